// Tiles, and what the kernels of pixelwise.h do with them.
//
// Maps are (pixels, channels) rows in memory. A thread takes V vectors of pixels at a time (of 16 with AVX-512, of 8
// with AVX2), turns them into a tile (channels down, pixels across) and takes it through a whole kernel while it stays
// in the second-level cache. So a weight is a number times whole vectors, read in its natural layout and never packed;
// norms need no sum across lanes; and between two products there is neither memory traffic nor a wait for other
// threads. A pixel's values do not depend on its neighbours or on the number of threads; gradients of weights do, in
// their last bits, since each thread adds up its own share.
//
// M pixels, C channels, K channels in, N channels out, T threads, V vectors of pixels, R rows of a product at a time.
#pragma once

#include "registers.h"

#ifdef TILES

namespace {

constexpr int64_t kMaxOrder = 16;  // of gnConv

struct Tile {
    int64_t first, rows;  // of the pixels
};

// Asks for the next tile's pixels of a map while this one is computed: read row by row, the processor would not guess.
template <class T>
void prefetch_next(const T* x, const Tile& t, int64_t C, int64_t M) {
    const int64_t first = t.first + t.rows, last = first + kMaxV * kLanes < M ? first + kMaxV * kLanes : M;
    for (int64_t at = first * C; at < last * C; at += 64 / sizeof(T)) __builtin_prefetch(x + at, 0, 2);
}

// A tile's pixels from memory, each from where `row` says, of C channels, which in the tile lie `pitch` vectors apart;
// pixels beyond the tile's rows are 0.
template <int V, class Row>
inline void enter_rows(const float* x, Row row, int64_t rows, int64_t C, Vec* tile, int64_t pitch = V) {
    for (int64_t v = 0; v < V; ++v)
        for (int64_t c = 0; c < C; c += kLanes) {
            Vec r[kLanes];
            for (int64_t i = 0; i < kLanes; ++i)
                r[i] = v * kLanes + i < rows ? load(x + row(v * kLanes + i) + c, C - c) : Vec{};
            transpose(r);
            for (int64_t i = 0; i < kLanes && c + i < C; ++i) tile[(c + i) * pitch + v] = r[i];
        }
}

// Of bfloat16 a pair of channels at a time.
template <int V, class Row>
inline void enter_rows(const uint16_t* x, Row row, int64_t rows, int64_t C, Vec* tile, int64_t pitch = V) {
    for (int64_t v = 0; v < V; ++v)
        for (int64_t c = 0; c < C; c += 2 * kLanes) {
            Vec r[kLanes];
            for (int64_t i = 0; i < kLanes; ++i)
                r[i] = v * kLanes + i < rows ? load_some<Vec>(x + row(v * kLanes + i) + c, C - c) : Vec{};
            transpose(r);
            for (int64_t i = 0; i < kLanes && c + 2 * i < C; ++i) {
                tile[(c + 2 * i) * pitch + v] = (Vec)((Bits)r[i] << 16);
                if (c + 2 * i + 1 < C) tile[(c + 2 * i + 1) * pitch + v] = (Vec)((Bits)r[i] & 0xffff0000u);
            }
        }
}

// Of a map of M pixels.
template <int V, class T>
void enter(const T* map, const Tile& t, int64_t C, int64_t M, Vec* tile, int64_t pitch = V) {
    enter_rows<V>(map + t.first * C, [=](int64_t i) { return i * C; }, t.rows, C, tile, pitch);
    prefetch_next(map, t, C, M);
}

template <class T>
void store_line(Vec v, T* to, int64_t count, bool past) {
    past ? store_past(v, reinterpret_cast<float*>(to)) : store_some(v, to, count);
}

// A tile's first `rows` pixels to memory, each to where `row` says; in the tile channels are `pitch` vectors apart.
template <int V, class Row>
inline void leave_rows(const Vec* tile, float* x, Row row, int64_t rows, int64_t C, bool past, int64_t pitch = V) {
    for (int64_t v = 0; v < V; ++v)
        for (int64_t c = 0; c < C; c += kLanes) {
            Vec r[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) r[i] = c + i < C ? tile[(c + i) * pitch + v] : Vec{};
            transpose(r);
            for (int64_t i = 0; i < kLanes && v * kLanes + i < rows; ++i)
                store_line(r[i], x + row(v * kLanes + i) + c, C - c, past);
        }
}

template <int V, class Row>
inline void leave_rows(const Vec* tile, uint16_t* x, Row row, int64_t rows, int64_t C, bool past, int64_t pitch = V) {
    for (int64_t v = 0; v < V; ++v)
        for (int64_t c = 0; c < C; c += 2 * kLanes) {
            Vec r[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) {
                const int64_t k = c + 2 * i;
                const Vec second = k + 1 < C ? tile[(k + 1) * pitch + v] : Vec{};
                r[i] = k < C ? paired(tile[k * pitch + v], second) : Vec{};
            }
            transpose(r);
            for (int64_t i = 0; i < kLanes && v * kLanes + i < rows; ++i)
                store_line(r[i], x + row(v * kLanes + i) + c, C - c, past);
        }
}

// From the tile's first pixel on, as rows of a map of M pixels.
template <int V, class T>
void leave(const Vec* tile, const Tile& t, int64_t C, T* x, int64_t M, int64_t pitch = V) {
    const auto row = [=](int64_t i) { return i * C; };
    leave_rows<V>(tile, x + t.first * C, row, t.rows, C, past_caches(x, M, C), pitch);
}

// What a product multiplies. Weights lie in memory as rows of `Element`, whole numbers of kRow of them, and so do the maps
// between kernels; a product takes `Factor`s, kDepth to a lane: floats, or pairs of bfloat16, with sums in float. `joined`
// are the vectors of kDepth × kLanes elements in their order.
struct Single {
    typedef float Element, Factor;
    static constexpr int64_t kRow = 1, kDepth = 1;
    static Vec weight(const float* w) { return all(*w); }
    static void add(Vec& sum, Vec w, Vec x) { sum = multiplied_added(w, x, sum); }
    static Vec joined(Vec first, Vec) { return first; }
};

// bfloat16 in memory, where the processor multiplies floats alone: no sum is rounded more than with pairs, tiles less.
struct Widened : Single {
    typedef uint16_t Element;
    static constexpr int64_t kRow = 2;
};

#ifdef __AVX512BF16__
struct Pairs {
    typedef uint16_t Element, Factor;
    static constexpr int64_t kRow = 2, kDepth = 2;
    static Vec weight(const uint16_t* w) {
        uint32_t pair;
        std::memcpy(&pair, w, sizeof pair);
        return (Vec)(pair - Bits{});
    }
    static void add(Vec& sum, Vec w, Vec x) { sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x); }
    static Vec joined(Vec first, Vec second) { return (Vec)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first); }
};
typedef Pairs Bfloat16;
#else
typedef Widened Bfloat16;
#endif

// Elements of a weight's row: a product's K channels, and a 0 for whole pairs.
template <class Dot>
constexpr int64_t whole(int64_t K) { return (K + Dot::kRow - 1) / Dot::kRow * Dot::kRow; }

// The K channels of a tile that a product goes through: a 0 more, if they are packed in pairs.
template <class Dot>
constexpr int64_t filled(int64_t K) { return (K + Dot::kDepth - 1) / Dot::kDepth * Dot::kDepth; }

// A kernel's weights as products take them: as they lie in memory, or copied to floats.
template <class Dot>
class Factors {
    typedef typename Dot::Factor Factor;
    static constexpr bool kCopied = !std::is_same_v<Factor, typename Dot::Element>;
    const Factor* w_[kMaxOrder];
    int count_ = 0;

  public:
    void add(const typename Dot::Element* w, int64_t N, int64_t K, int64_t threads) {
        if constexpr (kCopied) {
            const int64_t size = N * whole<Dot>(K);
            float* to = reinterpret_cast<float*>(allocated(vectors(size)));
#pragma omp parallel for num_threads(threads) schedule(static)
            for (int64_t i = 0; i < size; i += kLanes) store(load(w + i, size - i), to + i, kLanes);
            w_[count_++] = to;
        } else {
            w_[count_++] = w;
        }
    }
    const Factor* operator[](int64_t i) const { return w_[i]; }
    Factors() = default;
    Factors(const Factors&) = delete;
    ~Factors() {
        if constexpr (kCopied)
            for (int i = 0; i < count_; ++i) std::free(const_cast<Factor*>(w_[i]));
    }
};

// A tile of K channels as a product takes it, in place.
template <class Dot>
void pack(Vec* tile, int64_t K, int64_t V) {
    if (Dot::kDepth == 1) return;
    for (int64_t k = 0; k < K; k += 2)
        for (int64_t v = 0; v < V; ++v)
            tile[k / 2 * V + v] = paired(tile[k * V + v], k + 1 < K ? tile[(k + 1) * V + v] : Vec{});
}

// to(i, j) = Σ_k w(i, k) · x(k, j) for R rows of w, ldw apart, and V vectors, ldx apart in k. Not inlined: the few
// vectors that pass through memory cost less than it takes to compile all uses.
template <class Dot, int R, int V>
__attribute__((noinline)) void accumulate(Vec (&to)[R][V], const typename Dot::Factor* w, int64_t ldw, const Vec* x,
                                          int64_t ldx, int64_t K) {
    Vec sums[R][V];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) sums[i][j] = Vec{};
    for (int64_t k = 0; k < K / Dot::kDepth; ++k) {
        Vec in[V];
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) in[j] = x[k * ldx + j];
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
            const Vec weight = Dot::weight(w + i * ldw + k * Dot::kDepth);
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) Dot::add(sums[i][j], weight, in[j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) to[i][j] = sums[i][j];
}

// Shares N rows among strips of kR, of kFewer and of one row, run(R, n): few of one, since its few sums wait for each
// other, and none where N is a multiple of kFewer.
template <class Run>
inline __attribute__((always_inline)) void in_strips(int64_t N, Run run) {
    int64_t full = N / kR, n = 0;
    if (full > 0 && (N - full * kR) % kFewer && (N - (full - 1) * kR) % kFewer == 0) --full;
    for (; n < full * kR; n += kR) run(std::integral_constant<int, kR>{}, n);
    for (; n + kFewer <= N; n += kFewer) run(std::integral_constant<int, kFewer>{}, n);
    for (; n < N; ++n) run(std::integral_constant<int, 1>{}, n);
}

// w (N, K), its rows whole, times V vectors, ldx apart in k: `emit(n, sums)` for rows from n on, of the N × V that come out.
template <int V, class Dot, class Emit>
inline __attribute__((always_inline)) void product_by_strips(const typename Dot::Factor* w, int64_t N, const Vec* x,
                                                             int64_t ldx, int64_t K, Emit emit) {
    in_strips(N, [&](auto rows, int64_t n) __attribute__((always_inline)) {
        Vec sums[decltype(rows)::value][V];
        accumulate<Dot>(sums, w + n * whole<Dot>(K), whole<Dot>(K), x, ldx, filled<Dot>(K));
        emit(n, sums);
    });
}

// The same with `emit(n, v, sum)` for each.
template <int V, class Dot = Single, class Emit>
inline __attribute__((always_inline)) void product(const typename Dot::Factor* w, int64_t N, const Vec* x, int64_t ldx,
                                                   int64_t K, Emit emit) {
    product_by_strips<V, Dot>(w, N, x, ldx, K, [&](int64_t n, auto& sums) __attribute__((always_inline)) {
        for (auto& row : sums) {
            for (int v = 0; v < V; ++v) emit(n, v, row[v]);
            ++n;
        }
    });
}

// The same of a tile of K channels.
template <int V, class Dot = Single, class Emit>
inline __attribute__((always_inline)) void product(const typename Dot::Factor* w, int64_t N, const Vec* x, int64_t K,
                                                   Emit emit) {
    product<V, Dot>(w, N, x, V, K, emit);
}

// Σ over channels of term(c, v) for each vector, in parts: sums of many channels would lose accuracy.
template <int V, class Term>
inline __attribute__((always_inline)) void over_channels(int64_t C, Vec* sums, Term term) {
    for (int v = 0; v < V; ++v) sums[v] = Vec{};
    for (int64_t c = 0; c < C; c += kLanes) {
        Vec part[V] = {};
        for (int64_t i = c; i < C && i < c + kLanes; ++i)
            for (int v = 0; v < V; ++v) part[v] += term(i, v);
        for (int v = 0; v < V; ++v) sums[v] += part[v];
    }
}

// Each pixel of the tile less its mean, over its standard deviation; gives the inverse of the latter.
template <int V>
void standardise(Vec* x, int64_t C, float eps, Vec* inverse) {
    Vec mean[V], rest[V], square[V];
    over_channels<V>(C, mean, [&](int64_t c, int v) { return x[c * V + v]; });
    for (int v = 0; v < V; ++v) mean[v] /= float(C);
    over_channels<V>(C, rest, [&](int64_t c, int v) { return x[c * V + v] -= mean[v]; });
    for (int v = 0; v < V; ++v) rest[v] /= float(C);  // what rounding has left, where the mean is far from 0
    over_channels<V>(C, square, [&](int64_t c, int v) {
        x[c * V + v] -= rest[v];
        return x[c * V + v] * x[c * V + v];
    });
    for (int v = 0; v < V; ++v) inverse[v] = 1 / square_root(square[v] / float(C) + eps);
    for (int64_t c = 0; c < C; ++c)
        for (int v = 0; v < V; ++v) x[c * V + v] *= inverse[v];
}

struct Norm {
    const float *weight, *bias;
    float eps;
};

template <int V>
void affine(const Vec* x, int64_t C, const Norm& norm, Vec* y) {
    for (int64_t c = 0; c < C; ++c)
        for (int64_t v = 0; v < V; ++v) y[c * V + v] = x[c * V + v] * norm.weight[c] + norm.bias[c];
}

template <int V>
void scaled(const Vec* x, int64_t C, const float* scale, Vec* y) {
    for (int64_t c = 0; c < C; ++c)
        for (int64_t v = 0; v < V; ++v) y[c * V + v] = x[c * V + v] * scale[c];
}

// From the gradient of a LayerNorm's output to that of its input, in place, channels `pitch` vectors apart; adds to the
// sums of its two vectors.
template <int V>
void norm_back(Vec* d, const Vec* x, const Vec* inverse, int64_t C, const Norm& norm, Vec* weight_sums,
               Vec* bias_sums, int64_t pitch = V) {
    Vec mean[V], along[V];
    over_channels<V>(C, mean, [&](int64_t c, int v) {
        Vec& g = d[c * pitch + v];
        weight_sums[c] += g * x[c * V + v];
        bias_sums[c] += g;
        return g *= norm.weight[c];
    });
    over_channels<V>(C, along, [&](int64_t c, int v) { return d[c * pitch + v] * x[c * V + v]; });
    for (int v = 0; v < V; ++v) mean[v] *= 1.0f / C, along[v] *= 1.0f / C;
    for (int64_t c = 0; c < C; ++c)
        for (int v = 0; v < V; ++v) {
            Vec& g = d[c * pitch + v];
            g = inverse[v] * (g - mean[v] - x[c * V + v] * along[v]);
        }
}

// A matrix (N, K) to (K, N), with rows `pitch` and `to_pitch` elements apart; the latter are filled up with 0.
template <class From, class To>
void turn_matrix(const From* from, int64_t pitch, int64_t N, int64_t K, To* to, int64_t to_pitch, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < N; n += kLanes)
        for (int64_t k = 0; k < K; k += kLanes) {
            Vec r[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) r[i] = n + i < N ? load(from + (n + i) * pitch + k, K - k) : Vec{};
            transpose(r);
            for (int64_t i = 0; i < kLanes && k + i < K; ++i) store(r[i], to + (k + i) * to_pitch + n, to_pitch - n);
        }
}

template <class Run>
void with_size(int64_t V, Run run) {
    if (V == kMaxV) {
        run(std::integral_constant<int, kMaxV>{});
    } else if (V == 2) {
        run(std::integral_constant<int, 2>{});
    } else {
        run(std::integral_constant<int, 1>{});
    }
}

// The next tile of [from, end), vectors of pixels, and its V: as even as can be.
inline int64_t next_tile(int64_t from, int64_t end, int64_t M, Tile& tile) {
    const int64_t left = end - from, tiles = (left + kMaxV - 1) / kMaxV, V = (left + tiles - 1) / tiles;
    tile = {from * kLanes, (from + V) * kLanes < M ? V * kLanes : M - from * kLanes};
    return V;
}

// Shares the pixels [first, last) among tiles: run(V, tile, scratch), V an integral_constant.
template <class Run>
void over_tiles(int64_t first, int64_t last, Vec* scratch, Run run) {
    const int64_t M = last - first, end = vectors(M);
    Tile tile;
    for (int64_t from = 0, V; from < end; from += V) {
        V = next_tile(from, end, M, tile);
        tile.first += first;
        with_size(V, [&](auto size) { run(size, tile, scratch); });
    }
    settle();
}

// Shares M pixels among T threads, and each thread's among tiles, with `scratch` vectors for each of V.
template <class Run>
void for_tiles(int64_t M, int64_t T, int64_t scratch, Run run) {
#pragma omp parallel for num_threads(T) schedule(static)
    for (int64_t t = 0; t < T; ++t) {
        Vec* room = allocated(scratch * kMaxV);
        const int64_t first = vectors(M) * t / T * kLanes, last = vectors(M) * (t + 1) / T * kLanes;
        over_tiles(first, last < M ? last : M, room, run);
        std::free(room);
    }
}

}  // namespace

#endif
