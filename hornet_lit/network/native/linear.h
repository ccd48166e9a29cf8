// LayerNorm and a linear layer, of a pixel or of the pixels of a patch, forward and backward (see pixelwise.h).
//
// M pixels, C channels, K channels in, N channels out, S side of a patch, T threads, V vectors of pixels.
#pragma once

#include "sums.h"

#ifdef TILES

namespace {

constexpr int64_t kMaxSide = 4;

// out = W·norm(x) + b, its first P channels to p and the rest to q, or from there in the backward kernel. If there is a
// second norm the rest goes through it, and its halves to q and r; what it was before is kept in tiles, if not null.
//
// With S > 1, x is a map (height, width) and W·norm(x) takes the S × S pixels of a patch, each normed by itself, side by
// side: a convolution of stride S. All other pixels are patches then.
template <class X, class Element>
struct Linear {
    const X* x;
    int64_t K, S, height, width, N, P;
    Norm norm;
    const Element* w;
    const float* b;
    Element *p, *q, *r;
    Norm then;
    Element* kept;
    X* dx;
    float *dw, *dvectors;
    int64_t in() const { return S * S * K; }
    int64_t rest() const { return N - P; }
    int64_t again() const { return then.weight ? rest() : 0; }  // channels normed twice: maps may be null, if empty
    int64_t half() const { return again() / 2; }                // those of r
};

// Where the patches of a tile lie in the map.
template <class X, class Element>
class Patches {
    const Linear<X, Element>& a_;
    int64_t rows_, at_[kMaxV * kLanes];

    // run(row, k) for each pixel of a patch: a function that gives its place for a row of the tile, and its first channel.
    template <class Run>
    void for_pixels(Run run) const {
        for (int64_t s = 0; s < a_.S * a_.S; ++s) {
            const int64_t within = (s / a_.S * a_.width + s % a_.S) * a_.K;
            run([&](int64_t i) { return at_[i] + within; }, s * a_.K);
        }
    }

  public:
    Patches(const Linear<X, Element>& a, const Tile& t) : a_(a), rows_(t.rows) {
        const int64_t down = a.height / a.S, across = a.width / a.S;
        int64_t image = t.first / across / down, row = t.first / across % down, column = t.first % across;
        for (int64_t i = 0; i < t.rows; ++i) {
            at_[i] = ((image * a.height + row * a.S) * a.width + column * a.S) * a.K;
            if (++column == across) column = 0, ++row;
            if (row == down) row = 0, ++image;
        }
    }
    template <int V>
    void enter(Vec* tile) const {
        for_pixels([&](auto row, int64_t k) { enter_rows<V>(a_.x, row, rows_, a_.K, tile + k * V); });
    }
    template <int V>
    void leave(const Vec* tile) const {
        for_pixels([&](auto row, int64_t k) { leave_rows<V>(tile + k * V, a_.dx, row, rows_, a_.K, false); });
    }
};

// A tile of x, and each of its pixels standardised.
template <int V, class X, class Element>
void enter_standardised(const Linear<X, Element>& a, const Tile& t, int64_t M, Vec* x, Vec* inverse) {
    if (a.S == 1) {
        enter<V>(a.x, t, a.K, M, x);
    } else {
        Patches<X, Element>(a, t).template enter<V>(x);
    }
    for (int64_t s = 0; s < a.S * a.S; ++s) standardise<V>(x + s * a.K * V, a.K, a.norm.eps, inverse + s * V);
}

template <int V, class X, class Element>
void affine_pixels(const Linear<X, Element>& a, const Vec* x, Vec* y) {
    for (int64_t k = 0; k < a.in(); k += a.K) affine<V>(x + k * V, a.K, a.norm, y + k * V);
}

// Each forward kernel's work on one tile of M pixels, of which `written` at a time decide how they are stored.
template <class X, class Dot>
auto linear_run(const Linear<X, typename Dot::Element>& a, const Factors<Dot>& w, int64_t M, int64_t written) {
    return [=, &w](auto size, const Tile& t, Vec* scratch) {
        constexpr int V = decltype(size)::value;
        Vec *x = scratch, *out = x + a.in() * V, inverse[kMaxSide * kMaxSide * V];
        enter_standardised<V>(a, t, M, x, inverse);
        affine_pixels<V>(a, x, x);
        pack<Dot>(x, a.in(), V);
        product<V, Dot>(w[0], a.N, x, a.in(), [&](int64_t n, int v, Vec sum) { out[n * V + v] = sum + a.b[n]; });
        leave<V>(out, t, a.P, a.p, written);
        Vec* rest = out + a.P * V;
        if (a.kept)
            for (int64_t i = 0; i < a.rest() * V; ++i) store(rest[i], a.kept + t.first * a.rest() + i * kLanes, kLanes);
        if (a.again()) {
            standardise<V>(rest, a.rest(), a.then.eps, inverse);
            affine<V>(rest, a.rest(), a.then, rest);
        }
        const int64_t first = a.rest() - a.half();
        leave<V>(rest, t, first, a.q, written);
        leave<V>(rest + first * V, t, a.half(), a.r, written);
    };
}

// Vectors: b, norm.weight, norm.bias; then.weight, then.bias.
template <class X, class Dot>
void linear_backward(const Linear<X, typename Dot::Element>& a, int64_t M, int64_t T, int64_t workers) {
    const int64_t again = a.again(), first = a.rest() - a.half();
    Sums<Dot> sums;
    sums.add(a.N, whole<Dot>(a.in()), a.dw);
    sums.elements = a.N + 2 * a.K + 2 * again, sums.vectors_to = a.dvectors;
    auto* w = turned_weight<Dot>(a.w, a.N, a.in(), T);
    const auto run = [&](auto size, const Tile& t, Vec* scratch, const Kept<Dot>& kept, Vec* lanes) {
        constexpr int V = decltype(size)::value;
        Vec *x = scratch, *in = x + a.in() * V, *dx = in + a.in() * V, *rest = dx + a.in() * V;
        Vec inverse[kMaxSide * kMaxSide * V];
        const auto [d, D] = in_place<Dot, V>(kept.d[0], rest + again * V);
        enter<V>(a.p, t, a.P, M, d, D);
        enter<V>(a.q, t, first, M, d + a.P * D, D);
        if (again) {
            enter<V>(a.r, t, a.half(), M, d + (a.P + first) * D, D);
            for (int64_t i = 0; i < again * V; ++i) rest[i] = load(a.kept + t.first * again + i * kLanes, kLanes);
            standardise<V>(rest, again, a.then.eps, inverse);
            Vec* vectors = lanes + a.N + 2 * a.K;
            norm_back<V>(d + a.P * D, rest, inverse, again, a.then, vectors, vectors + again, D);
        }
        enter_standardised<V>(a, t, M, x, inverse);
        affine_pixels<V>(a, x, in);
        turn<Dot, V>(in, a.in(), kept.rows[0]);
        add_lanes<V>(d, a.N, lanes, D);
        if (Dot::kDepth > 1) keep<Dot, V>(d, a.N, kept.d[0]);
        pack<Dot>(d, a.N, V);
        product<V, Dot>(w, a.in(), d, D, a.N, [&](int64_t k, int v, Vec sum) { dx[k * V + v] = sum; });
        for (int64_t s = 0; s < a.S * a.S; ++s) {
            const int64_t k = s * a.K * V;
            norm_back<V>(dx + k, x + k, inverse + s * V, a.K, a.norm, lanes + a.N, lanes + a.N + a.K);
        }
        if (a.S == 1) {
            leave<V>(dx, t, a.K, a.dx, M);
        } else {
            Patches<X, typename Dot::Element>(a, t).template leave<V>(dx);
        }
    };
    for_tiles_back(M, T, workers, 3 * a.in() + a.N + again, sums, run);
    std::free(w);
}

}  // namespace

#endif
