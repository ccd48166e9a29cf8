// All of HorNet that stays within a pixel, forward and backward, in three kernels: LayerNorm and a linear layer
// (linear.h); gnConv's gated interactions with its output projection; LayerNorm, MLP and residual (HorNet equations 3.1
// to 3.4).
//
// X is the element of the residual stream (x, y), Dot::Element that of weights and of what gnConv filters; vectors
// (biases, scales, norms) are always float. What d* point to is written.
//
// They are compiled apart for floats (pixelwise.cpp) and for bfloat16 (pixelwise_bf16.cpp), at the same time.
//
// Rows of weights are whole numbers of what a product multiplies (see `whole`); those of their gradients too.
//
// M pixels, C channels, K channels in, N channels out, T threads, V vectors of pixels.

#pragma once

#include "gelu.h"
#include "linear.h"

#ifdef TILES

namespace {

// y = x + scale ⊙ (W₂·GELU(h) + b₂), h = W₁·norm(x) + b₁, kept in tiles if not null; y - x if not residual.
template <class X, class Element>
struct Mlp {
    const X* x;
    int64_t C, N;
    Norm norm;
    const Element* w1;
    const float* b1;
    const Element* w2;
    const float *b2, *scale;
    Element* h;
    X* y;
    int64_t residual;
    const X* dy;
    X* dx;
    float *dw1, *dw2, *dvectors, *dscale;
};

template <class X, class Dot>
auto mlp_run(const Mlp<X, typename Dot::Element>& a, const Factors<Dot>& w, int64_t M, int64_t written) {
    const bool past = a.h && past_caches(a.h, written, a.N);
    return [=, &w](auto size, const Tile& t, Vec* scratch) {
        constexpr int V = decltype(size)::value;
        Vec *x = scratch, *y = x + a.C * V, *hidden = y + a.C * V, inverse[V];
        auto* kept = a.h ? a.h + t.first * a.N : nullptr;
        enter<V>(a.x, t, a.C, M, y);
        std::memcpy(x, y, a.C * V * sizeof(Vec));
        standardise<V>(x, a.C, a.norm.eps, inverse);
        affine<V>(x, a.C, a.norm, x);
        pack<Dot>(x, a.C, V);
        product_by_strips<V, Dot>(w[0], a.N, x, V, a.C, [&](int64_t n, auto& sums) __attribute__((always_inline)) {
            constexpr int R = sizeof sums / sizeof sums[0];
            Vec* h = hidden + n * V;
            for (int i = 0; i < R; ++i)
                for (int v = 0; v < V; ++v) h[i * V + v] = sums[i][v] + a.b1[n + i];
            if (kept)
                for (int i = 0; i < R * V; ++i) {
                    auto* to = kept + (n * V + i) * kLanes;
                    past ? store_past(h[i], to) : store(h[i], to, kLanes);
                }
            gelu<Dot>().template apply<R * V>(h);
        });
        pack<Dot>(hidden, a.N, V);
        product<V, Dot>(w[1], a.C, hidden, a.N, [&](int64_t c, int v, Vec sum) {
            const Vec branch = (sum + a.b2[c]) * a.scale[c];
            y[c * V + v] = a.residual ? y[c * V + v] + branch : branch;
        });
        leave<V>(y, t, a.C, a.y, written);
    };
}

// Vectors: b1, b2, norm.weight, norm.bias.
template <class X, class Dot>
void mlp_backward(const Mlp<X, typename Dot::Element>& a, int64_t M, int64_t T, int64_t workers) {
    Sums<Dot> sums;
    sums.add(a.N, whole<Dot>(a.C), a.dw1), sums.add(a.N, a.C, a.dw2);
    sums.elements = a.N + 3 * a.C, sums.vectors_to = a.dvectors;
    sums.w = a.w2, sums.b = a.b2, sums.scale = a.scale, sums.bias = a.N, sums.dscale = a.dscale;
    auto *w1 = turned_weight<Dot>(a.w1, a.N, a.C, T), *w2 = turned_weight<Dot>(a.w2, a.C, a.N, T);
    const auto run = [&](auto size, const Tile& t, Vec* scratch, const Kept<Dot>& kept, Vec* lanes) {
        constexpr int V = decltype(size)::value;
        Vec *x = scratch, *in = x + a.C * V, *dy = in + a.C * V, *dx = dy + a.C * V, *next = dx + a.C * V, inverse[V];
        const Place dh = in_place<Dot, V>(kept.d[0], next);
        const auto* kept_h = a.h + t.first * a.N;  // at any address: hooks may have moved what was kept
        enter<V>(a.dy, t, a.C, M, dy);
        turn<Dot, V>(dy, a.C, kept.rows[1]);
        scaled<V>(dy, a.C, a.scale, dx);
        pack<Dot>(dx, a.C, V);
        product_by_strips<V, Dot>(w2, a.N, dx, V, a.C, [&](int64_t n, auto& sums) __attribute__((always_inline)) {
            constexpr int R = sizeof sums / sizeof sums[0];
            Vec h[R * V], slope[R * V];
            for (int i = 0; i < R * V; ++i) h[i] = load(kept_h + (n * V + i) * kLanes, kLanes);
            gelu<Dot>().template apply<R * V>(h, slope);
            for (int i = 0; i < R; ++i)
                for (int v = 0; v < V; ++v) {
                    const Vec d = sums[i][v] * slope[i * V + v];
                    store(h[i * V + v], kept.d[1] + ((n + i) * kWidth + v) * kLanes, kLanes);
                    dh.at[(n + i) * dh.pitch + v] = d;
                    lanes[n + i] += d;
                }
        });
        enter<V>(a.x, t, a.C, M, x);
        standardise<V>(x, a.C, a.norm.eps, inverse);
        affine<V>(x, a.C, a.norm, in);
        turn<Dot, V>(in, a.C, kept.rows[0]);
        add_lanes<V>(dy, a.C, lanes + a.N);
        if (Dot::kDepth > 1) keep<Dot, V>(dh.at, a.N, kept.d[0]);
        pack<Dot>(dh.at, a.N, V);
        product<V, Dot>(w1, a.C, dh.at, dh.pitch, a.N, [&](int64_t c, int v, Vec sum) { dx[c * V + v] = sum; });
        norm_back<V>(dx, x, inverse, a.C, a.norm, lanes + a.N + a.C, lanes + a.N + 2 * a.C);
        if (a.residual)
            for (int64_t i = 0; i < a.C * V; ++i) dx[i] += dy[i];
        leave<V>(dx, t, a.C, a.dx, M);
    };
    for_tiles_back(M, T, workers, 4 * a.C + a.N, sums, run);
    std::free(w1);
    std::free(w2);
}

// z₀ = p ⊙ g₀, z_{k+1} = (W_k·z_k + b_k) ⊙ g_{k+1}; y = x + scale ⊙ (W·z + b), the last w and b; y - x if no x.
// If there is a norm, all g lie as they alternate in `gates` and `others`, and go through it first.
template <class X, class Element>
struct Gates {
    const Element *p, *gates, *others;
    Norm norm;
    int64_t C, order, first;  // first: width of p
    const Element* w[kMaxOrder];
    const float *b[kMaxOrder], *scale;
    const X* x;
    X* y;
    const X* dy;
    Element *dp, *dgates, *dothers;
    float *dw[kMaxOrder], *dvectors, *dscale;
    int64_t filtered() const { return 2 * C - first; }
    int64_t normed() const { return norm.weight ? filtered() : 0; }  // channels: maps may be null, if empty
    int64_t maps() const { return normed() ? 2 : 1; }
};

// All g of a tile's pixels: as they are read, and times the norm's vectors in `g`, if there is a norm.
template <int V, class X, class Element>
void enter_gates(const Gates<X, Element>& a, const Tile& t, int64_t M, Vec* x, Vec* inverse, Vec* g) {
    const int64_t Q = a.filtered(), each = Q / a.maps();
    enter<V>(a.gates, t, each, M, x, a.maps() * V);
    if (!a.normed()) return;
    enter<V>(a.others, t, each, M, x + V, 2 * V);
    standardise<V>(x, Q, a.norm.eps, inverse);
    affine<V>(x, Q, a.norm, g);
}

template <class X, class Dot>
auto gates_run(const Gates<X, typename Dot::Element>& a, const Factors<Dot>& w, int64_t M, int64_t written) {
    return [=, &w](auto size, const Tile& t, Vec* scratch) {
        constexpr int V = decltype(size)::value;
        Vec *p = scratch, *z = p + a.first * V, *y = z + a.filtered() * V, inverse[V];
        enter<V>(a.p, t, a.first, M, p);
        enter_gates<V>(a, t, M, z, inverse, z);
        for (int64_t i = 0; i < a.first * V; ++i) z[i] *= p[i];
        pack<Dot>(z, a.first, V);
        int64_t k = 0;
        for (int64_t width = a.first; k + 1 < a.order; ++k, width *= 2) {
            Vec* next = z + width * V;
            const float* b = a.b[k];
            const auto gate = [&](int64_t n, int v, Vec sum) { next[n * V + v] *= sum + b[n]; };
            product<V, Dot>(w[k], 2 * width, z, width, gate);
            pack<Dot>(next, 2 * width, V);
            z = next;
        }
        const float* b = a.b[k];
        if (a.x) enter<V>(a.x, t, a.C, M, y);
        product<V, Dot>(w[k], a.C, z, a.C, [&](int64_t c, int v, Vec sum) {
            const Vec branch = (sum + b[c]) * a.scale[c];
            y[c * V + v] = a.x ? y[c * V + v] + branch : branch;
        });
        leave<V>(y, t, a.C, a.y, written);
    };
}

// Interactions are computed again. Vectors: all b; norm.weight, norm.bias.
template <class X, class Dot>
void gates_backward(const Gates<X, typename Dot::Element>& a, int64_t M, int64_t T, int64_t workers) {
    const int64_t Q = a.filtered(), last = a.order - 1;
    Sums<Dot> sums;
    Factors<Dot> w;
    typename Dot::Factor* turned[kMaxOrder];
    for (int64_t k = 0, width = a.first; k < a.order; ++k, width *= 2) {
        const int64_t out = k < last ? 2 * width : a.C, in = k < last ? width : a.C;
        sums.add(out, k < last ? whole<Dot>(in) : in, a.dw[k]);
        turned[k] = turned_weight<Dot>(a.w[k], out, in, T);
        if (k < last) w.add(a.w[k], out, in, T);
    }
    const int64_t biases = 3 * a.C - 2 * a.first, normed = a.normed();
    sums.elements = biases + 2 * normed, sums.vectors_to = a.dvectors;
    sums.w = a.w[last], sums.b = a.b[last], sums.scale = a.scale;
    sums.bias = 2 * (a.C - a.first), sums.dscale = a.dscale;
    const auto run = [&](auto size, const Tile& t, Vec* scratch, const Kept<Dot>& kept, Vec* lanes) {
        constexpr int V = decltype(size)::value;
        // Of z, of the gates g, and of the products u that they multiply, order k begins where its width - first is.
        Vec *p = scratch, *z = p + a.first * V, *g = z + Q * V, *u = g + Q * V, *dy = u + Q * V;
        Vec *dz = dy + a.C * V, *other = dz + a.C * V, *x = normed ? other + a.C * V : g, inverse[V];
        enter<V>(a.p, t, a.first, M, p);
        enter_gates<V>(a, t, M, x, inverse, g);
        for (int64_t i = 0; i < a.first * V; ++i) z[i] = p[i] * g[i];
        int64_t width = a.first;
        for (int64_t k = 0; k < last; ++k, width *= 2) {
            const int64_t next = 2 * width - a.first;
            const float* b = a.b[k];
            Vec* from = z + (width - a.first) * V;
            turn<Dot, V>(from, width, kept.rows[k]);
            pack<Dot>(from, width, V);
            product<V, Dot>(w[k], 2 * width, from, width, [&](int64_t n, int v, Vec sum) {
                const int64_t i = (next + n) * V + v;
                u[i] = sum + b[n], z[i] = u[i] * g[i];
            });
        }
        enter<V>(a.dy, t, a.C, M, dy);
        turn<Dot, V>(dy, a.C, kept.rows[last]);
        keep<Dot, V>(z + (a.C - a.first) * V, a.C, kept.d[last]);
        Vec* norm_lanes = lanes + biases;
        lanes += 2 * (a.C - a.first);
        add_lanes<V>(dy, a.C, lanes);
        scaled<V>(dy, a.C, a.scale, other);
        pack<Dot>(other, a.C, V);
        product<V, Dot>(turned[last], a.C, other, a.C, [&](int64_t c, int v, Vec sum) { dz[c * V + v] = sum; });
        for (int64_t k = last - 1; k >= 0; --k) {
            width /= 2;
            const int64_t next = (2 * width - a.first) * V;
            const auto [du, D] = in_place<Dot, V>(kept.d[k], other);
            for (int64_t n = 0; n < 2 * width; ++n)
                for (int64_t v = 0; v < V; ++v) {
                    const int64_t i = n * V + v;
                    du[n * D + v] = dz[i] * g[next + i];
                    g[next + i] = dz[i] * u[next + i];
                }
            lanes -= 2 * width;
            add_lanes<V>(du, 2 * width, lanes, D);
            if (Dot::kDepth > 1) keep<Dot, V>(du, 2 * width, kept.d[k]);
            pack<Dot>(du, 2 * width, V);
            const auto to_dz = [&](int64_t n, int v, Vec sum) { dz[n * V + v] = sum; };
            product<V, Dot>(turned[k], width, du, D, 2 * width, to_dz);
        }
        for (int64_t i = 0; i < a.first * V; ++i) {
            const Vec gate = g[i];
            g[i] = dz[i] * p[i];
            dz[i] *= gate;
        }
        leave<V>(dz, t, a.first, a.dp, M);
        if (normed) {
            norm_back<V>(g, x, inverse, Q, a.norm, norm_lanes, norm_lanes + Q);
            leave<V>(g + V, t, Q / 2, a.dothers, M, 2 * V);
        }
        leave<V>(g, t, Q / a.maps(), a.dgates, M, a.maps() * V);
    };
    for_tiles_back(M, T, workers, a.first + 3 * Q + 3 * a.C + normed, sums, run);
    for (int64_t k = 0; k < a.order; ++k) std::free(turned[k]);
}

// Vectors for each of V of a tile.
template <class X, class Element>
int64_t scratch(const Linear<X, Element>& a) { return a.in() + a.N; }
template <class X, class Element>
int64_t scratch(const Mlp<X, Element>& a) { return 2 * a.C + a.N; }
template <class X, class Element>
int64_t scratch(const Gates<X, Element>& a) { return a.first + a.filtered() + a.C; }

// Adds what the products of a forward kernel take, by T threads.
template <class Dot, class X, class Element>
void add_factors(const Linear<X, Element>& a, int64_t T, Factors<Dot>& w) { w.add(a.w, a.N, a.in(), T); }
template <class Dot, class X, class Element>
void add_factors(const Mlp<X, Element>& a, int64_t T, Factors<Dot>& w) {
    w.add(a.w1, a.N, a.C, T), w.add(a.w2, a.C, a.N, T);
}
template <class Dot, class X, class Element>
void add_factors(const Gates<X, Element>& a, int64_t T, Factors<Dot>& w) {
    const int64_t last = a.order - 1;
    for (int64_t k = 0; k < last; ++k) w.add(a.w[k], a.first << (k + 1), a.first << k, T);
    w.add(a.w[last], a.C, a.C, T);
}

}  // namespace

// All M pixels by T threads, and those of [first, last) by the one that calls.
#define FORWARD_KERNEL(name, Kind, type, X, Dot)                                                         \
    void name##_forward_##type(const void* p, int64_t M, int64_t T) {                                    \
        const auto& a = *static_cast<const Kind<X, Dot::Element>*>(p);                                   \
        Factors<Dot> w;                                                                                  \
        add_factors(a, T, w);                                                                            \
        for_tiles(M, T, scratch(a), name##_run<X, Dot>(a, w, M, M));                                     \
    }                                                                                                    \
    void name##_forward_##type##_part(const void* p, int64_t first, int64_t last) {                      \
        const auto& a = *static_cast<const Kind<X, Dot::Element>*>(p);                                   \
        Factors<Dot> w;                                                                                  \
        add_factors(a, 1, w);                                                                            \
        Vec* room = allocated(scratch(a) * kMaxV);                                                       \
        over_tiles(first, last, room, name##_run<X, Dot>(a, w, last, last - first));                     \
        std::free(room);                                                                                 \
    }

#define FORWARD(type, X, Dot)                                                                            \
    FORWARD_KERNEL(linear, Linear, type, X, Dot)                                                         \
    FORWARD_KERNEL(mlp, Mlp, type, X, Dot)                                                               \
    FORWARD_KERNEL(gates, Gates, type, X, Dot)

#define BACKWARD(type, X, Dot)                                                                           \
    void linear_backward_##type(const void* a, int64_t M, int64_t T, int64_t workers) {                  \
        linear_backward<X, Dot>(*static_cast<const Linear<X, Dot::Element>*>(a), M, T, workers);         \
    }                                                                                                    \
    void mlp_backward_##type(const void* a, int64_t M, int64_t T, int64_t workers) {                     \
        mlp_backward<X, Dot>(*static_cast<const Mlp<X, Dot::Element>*>(a), M, T, workers);               \
    }                                                                                                    \
    void gates_backward_##type(const void* a, int64_t M, int64_t T, int64_t workers) {                   \
        gates_backward<X, Dot>(*static_cast<const Gates<X, Dot::Element>*>(a), M, T, workers);           \
    }

#endif
