// All of HorNet that stays within a pixel, forward and backward, in three kernels: LayerNorm and a linear layer;
// gnConv's gated interactions with its output projection; LayerNorm, MLP and residual (HorNet equations 3.1 to 3.4).
//
// Maps are (pixels, channels) rows in memory. A thread takes V × 16 pixels at a time, turns them into a tile (channels
// down, pixels across, one vector for 16 pixels) and takes it through the whole kernel while it stays in the
// second-level cache. So a weight is a number times whole vectors, read in its natural layout and never packed; norms
// need no sum across lanes; and between two products there is neither memory traffic nor a wait for other threads.
// A pixel's values do not depend on its neighbours or on the number of threads; gradients of weights do, in their last
// bits, since each thread adds up its own share.
//
// M pixels, C channels, K channels in, N channels out, T threads, V vectors of pixels, R rows of a product at a time.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#ifdef __AVX512F__

namespace {

constexpr int64_t kLanes = 16, kMaxV = 3, kR = 8, kGroup = 4;  // kR × kMaxV sums, kMaxV inputs and a weight: of 32 registers
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef float Unaligned __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float))));

inline Vec all(float value) { return value - Vec{}; }
inline int64_t vectors(int64_t n) { return (n + kLanes - 1) / kLanes; }

inline Vec load(const float* from, int64_t lanes) {
    if (lanes >= kLanes) return *reinterpret_cast<const Unaligned*>(from);
    Vec v = {};
    std::memcpy(&v, from, lanes * sizeof(float));
    return v;
}

inline void store(Vec v, float* to, int64_t lanes) {
    if (lanes >= kLanes) {
        *reinterpret_cast<Unaligned*>(to) = v;
    } else {
        std::memcpy(to, &v, lanes * sizeof(float));
    }
}

#define MIX __builtin_shufflevector
inline void transpose(Vec (&r)[kLanes]) {
    Vec t[kLanes];
    for (int i = 0; i < 16; i += 2) {
        t[i] = MIX(r[i], r[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
        t[i + 1] = MIX(r[i], r[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = MIX(t[i + j], t[i + 2 + j], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
            r[i + 2 * j + 1] = MIX(t[i + j], t[i + 2 + j], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
        }
    for (int c = 0; c < 4; ++c) {  // r[4g + c] holds, four lanes at a time, rows 4g … 4g + 3 of columns c, 4 + c, 8 + c, 12 + c
        Vec half[4];
        for (int j = 0; j < 2; ++j) {
            const Vec a = r[8 * j + c], b = r[8 * j + 4 + c];
            half[2 * j] = MIX(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
            half[2 * j + 1] = MIX(a, b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
        }
        for (int j = 0; j < 2; ++j) {
            t[8 * j + c] = MIX(half[j], half[2 + j], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
            t[8 * j + 4 + c] = MIX(half[j], half[2 + j], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
        }
    }
    for (int i = 0; i < 16; ++i) r[i] = t[i];
}
#undef MIX

// (rows, C) from memory into a tile; pixels beyond `rows` are 0.
template <int V>
void enter(const float* x, int64_t rows, int64_t C, Vec* tile) {
    for (int64_t v = 0; v < V; ++v)
        for (int64_t c = 0; c < C; c += kLanes) {
            Vec r[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) r[i] = v * kLanes + i < rows ? load(x + (v * kLanes + i) * C + c, C - c) : Vec{};
            transpose(r);
            for (int64_t i = 0; i < kLanes && c + i < C; ++i) tile[(c + i) * V + v] = r[i];
        }
}

// A tile's first `rows` pixels to memory, as rows of C channels that lie `stride` ≥ C apart.
template <int V>
void leave(const Vec* tile, int64_t rows, int64_t C, float* x, int64_t stride) {
    for (int64_t v = 0; v < V; ++v)
        for (int64_t c = 0; c < C; c += kLanes) {
            Vec r[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) r[i] = c + i < C ? tile[(c + i) * V + v] : Vec{};
            transpose(r);
            for (int64_t i = 0; i < kLanes && v * kLanes + i < rows; ++i)
                store(r[i], x + (v * kLanes + i) * stride + c, stride > C ? kLanes : C - c);
        }
}

// Vectors from row to row of turned tiles: an odd number, or all rows would share a few sets of the first-level cache.
inline int64_t pitch(int64_t C) { return vectors(C) | 1; }

// A tile as rows of whole vectors, for sums over pixels.
template <int V>
void turn(const Vec* tile, int64_t C, Vec* rows) {
    leave<V>(tile, V * kLanes, C, reinterpret_cast<float*>(rows), pitch(C) * kLanes);
}

// sums(i, j) += Σ_k w(i, k) · x(k, j) for R rows of w, ldw apart, and V vectors, ldx apart in k.
template <int R, int V>
inline __attribute__((always_inline)) void accumulate(Vec (&sums)[R][V], const float* w, int64_t ldw, const Vec* x,
                                                      int64_t ldx, int64_t K) {
    for (int64_t k = 0; k < K; ++k) {
        Vec in[V];
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) in[j] = x[k * ldx + j];
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
            const Vec weight = all(w[i * ldw + k]);
#pragma GCC unroll 4
            for (int j = 0; j < V; ++j) sums[i][j] += weight * in[j];
        }
    }
}

// W (N, K) times a tile of K channels: `emit(n, v, sum)` for each of the N × V vectors that come out.
template <int V, class Emit>
inline __attribute__((always_inline)) void product(const float* w, int64_t N, const Vec* x, int64_t K, Emit emit) {
    const auto strip = [&](auto rows, int64_t n) __attribute__((always_inline)) {
        constexpr int R = decltype(rows)::value;
        Vec sums[R][V] = {};
        accumulate(sums, w + n * K, K, x, V, K);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) emit(n + i, v, sums[i][v]);
    };
    int64_t n = 0;
    for (; n + kR <= N; n += kR) strip(std::integral_constant<int, kR>{}, n);
    for (; n + 2 <= N; n += 2) strip(std::integral_constant<int, 2>{}, n);
    for (; n < N; ++n) strip(std::integral_constant<int, 1>{}, n);
}

// The gradients that a backward kernel adds up over pixels: of weights, Σ over pixels of d(n, pixel) · x(pixel, k), each
// (N, vectors(K) · 16); behind them 16 lanes for each element of vectors. d and x are kept for a group of tiles, so that
// the sums, which fill the caches, are read and written less often.
struct Sums {
    int count = 0;
    int64_t N[17], K[17], size = 0;  // of floats
    void add(int64_t n, int64_t k) { N[count] = n, K[count++] = k, size += n * vectors(k) * kLanes; }
};

struct Kept {  // of one tile
    Vec *d[17], *rows[17];
    int64_t pixels;
};

template <int R, int V>
void add_outer(const Kept* tiles, int64_t count, int i, int64_t n, int64_t k, int64_t width, Vec* to) {
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) __builtin_prefetch(to + (n + r) * width + k + v, 1);
    Vec sums[R][V] = {};
    for (int64_t t = 0; t < count; ++t) {
        const int64_t pixels = tiles[t].pixels;
        const float* d = reinterpret_cast<const float*>(tiles[t].d[i]) + n * pixels;
        accumulate(sums, d, pixels, tiles[t].rows[i] + k, width | 1, pixels);
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) to[(n + r) * width + k + v] += sums[r][v];
}

template <int R>
void add_rows(const Kept* tiles, int64_t count, int i, int64_t n, int64_t width, Vec* to) {
    for (int64_t k = 0; k < width;) {
        const int64_t left = width - k;
        if (left == 1) {
            add_outer<R, 1>(tiles, count, i, n, k, width, to), k += 1;
        } else if (left == 2 || left == 4) {
            add_outer<R, 2>(tiles, count, i, n, k, width, to), k += 2;
        } else {
            add_outer<R, 3>(tiles, count, i, n, k, width, to), k += 3;
        }
    }
}

void add_weights(const Sums& sums, const Kept* tiles, int64_t count, float* to) {
    for (int i = 0; i < sums.count; ++i) {
        const int64_t N = sums.N[i], width = vectors(sums.K[i]);
        int64_t n = 0;
        for (; n + kR <= N; n += kR) add_rows<kR>(tiles, count, i, n, width, reinterpret_cast<Vec*>(to));
        for (; n < N; ++n) add_rows<1>(tiles, count, i, n, width, reinterpret_cast<Vec*>(to));
        to += N * width * kLanes;
    }
}

template <int Terms>
inline Vec odd(Vec x, const float (&c)[Terms], float limit) {
    Vec z = x < -limit ? all(-limit) : x;
    z = z > limit ? all(limit) : z;
    const Vec u = z * z * (2 / (limit * limit)) - 1;
    Vec sum = all(c[Terms - 1]);
#pragma GCC unroll 32
    for (int i = Terms - 2; i >= 0; --i) sum = sum * u + c[i];
    return z * sum + 0.5f;
}

// Φ(x), and the derivative of x·Φ(x), as 1/2 plus an odd polynomial: least maximum error over |x| ≤ limit, beyond which
// both are as good as constant. Off by at most 1.5e-7 and 4e-7 when evaluated in float (scipy's erf in double).
inline Vec normal_cdf(Vec x) {
    constexpr float c[] = {0.130928113f,    -0.0653280549f,  0.0484995915f,  -0.039206813f,   0.0321165952f,
                           -0.0257464572f,  0.0196451441f,   -0.0139633199f, 0.00965119602f,  -0.00671533878f,
                           0.00365892205f,  -0.00118640995f, 0.000874934006f, -0.00102836896f, 0.000392858682f};
    return odd(x, c, 5.4f);
}
inline Vec gelu_slope(Vec x) {
    constexpr float c[] = {0.126416642f,  -0.0642823051f, 0.0518079604f,  -0.050972425f,   0.0566848785f, -0.0648823016f,
                           0.0716295838f, -0.0737511776f, 0.0666107266f,  -0.0516532671f,  0.0426603217f, -0.0381617706f,
                           0.0204231409f, -0.00259530939f, 0.0041846045f, -0.00800063844f, 0.00316712128f};
    return odd(x, c, 5.6f);
}

// Each pixel of the tile less its mean, over its standard deviation; gives the inverse of the latter.
template <int V>
void standardise(Vec* x, int64_t C, float eps, Vec* inverse) {
    for (int64_t v = 0; v < V; ++v) {
        Vec mean = {}, square = {};
        for (int64_t c = 0; c < C; ++c) mean += x[c * V + v];
        mean *= 1.0f / C;
        for (int64_t c = 0; c < C; ++c) square += (x[c * V + v] - mean) * (x[c * V + v] - mean);
        for (int64_t l = 0; l < kLanes; ++l) inverse[v][l] = 1 / std::sqrt(square[l] / C + eps);
        for (int64_t c = 0; c < C; ++c) x[c * V + v] = (x[c * V + v] - mean) * inverse[v];
    }
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

// From the gradient of a LayerNorm's output to that of its input, in place; adds to the sums of its two vectors.
template <int V>
void norm_back(Vec* d, const Vec* x, const Vec* inverse, int64_t C, const Norm& norm, Vec* weight_sums, Vec* bias_sums) {
    for (int64_t v = 0; v < V; ++v) {
        Vec mean = {}, along = {};
        for (int64_t c = 0; c < C; ++c) {
            Vec& g = d[c * V + v];
            weight_sums[c] += g * x[c * V + v];
            bias_sums[c] += g;
            g *= norm.weight[c];
            mean += g;
            along += g * x[c * V + v];
        }
        mean *= 1.0f / C, along *= 1.0f / C;
        for (int64_t c = 0; c < C; ++c) d[c * V + v] = inverse[v] * (d[c * V + v] - mean - x[c * V + v] * along);
    }
}

template <int V>
void add_lanes(const Vec* d, int64_t N, Vec* lanes) {
    for (int64_t n = 0; n < N; ++n)
        for (int64_t v = 0; v < V; ++v) lanes[n] += d[n * V + v];
}

struct Tile {
    int64_t first, rows;  // of the pixels
};

template <class Run>
void with_size(int64_t V, Run run) {
    switch (V) {
        case 1: run(std::integral_constant<int, 1>{}); break;
        case 2: run(std::integral_constant<int, 2>{}); break;
        case 3: run(std::integral_constant<int, 3>{}); break;
    }
}

// The next tile of [from, end), vectors of pixels, and its V: as even as can be.
inline int64_t next_tile(int64_t from, int64_t end, int64_t M, Tile& tile) {
    const int64_t left = end - from, tiles = (left + kMaxV - 1) / kMaxV, V = (left + tiles - 1) / tiles;
    tile = {from * kLanes, (from + V) * kLanes < M ? V * kLanes : M - from * kLanes};
    return V;
}

inline Vec* allocated(int64_t vectors) { return static_cast<Vec*>(std::aligned_alloc(sizeof(Vec), vectors * sizeof(Vec))); }

// Shares M pixels among T threads, and each thread's among tiles. Work<V>: scratch(args), vectors of scratch for each of
// V; run(tile, scratch, args).
template <template <int> class Work, class Args>
void for_tiles(int64_t M, int64_t T, const Args& args) {
#pragma omp parallel for num_threads(T) schedule(static)
    for (int64_t t = 0; t < T; ++t) {
        Vec* scratch = allocated(Work<1>::scratch(args) * kMaxV);
        Tile tile;
        const int64_t end = vectors(M) * (t + 1) / T;
        for (int64_t from = vectors(M) * t / T, V; from < end; from += V) {
            V = next_tile(from, end, M, tile);
            with_size(V, [&](auto size) { Work<decltype(size)::value>::run(tile, scratch, args); });
        }
        std::free(scratch);
    }
}

// The same for backward kernels: run(tile, scratch, args, kept, lanes) fills what is kept for the weights' sums, and adds
// to the lanes of the vectors' sums.
template <template <int> class Work, class Args>
void for_tiles_back(int64_t M, int64_t T, const Args& args) {
    const Sums sums = Work<1>::sums(args);
    const int64_t share = sums.size + Work<1>::lanes(args) * kLanes;
    int64_t each = 0;
    for (int i = 0; i < sums.count; ++i) each += (sums.N[i] + pitch(sums.K[i]) * kLanes) * kMaxV;
#pragma omp parallel for num_threads(T) schedule(static)
    for (int64_t t = 0; t < T; ++t) {
        float* to = args.sums + t * share;
        std::memset(to, 0, share * sizeof(float));
        Vec *scratch = allocated(Work<1>::scratch(args) * kMaxV), *room = allocated(each * kGroup);
        Kept kept[kGroup];
        Vec* next = room;
        for (Kept& one : kept)
            for (int i = 0; i < sums.count; ++i) {
                one.d[i] = next, next += sums.N[i] * kMaxV;
                one.rows[i] = next, next += pitch(sums.K[i]) * kLanes * kMaxV;
            }
        Tile tile;
        const int64_t end = vectors(M) * (t + 1) / T;
        for (int64_t from = vectors(M) * t / T; from < end;) {
            int64_t count = 0;
            for (int64_t V; from < end && count < kGroup; from += V, ++count) {
                V = next_tile(from, end, M, tile);
                kept[count].pixels = V * kLanes;
                Vec* lanes = reinterpret_cast<Vec*>(to + sums.size);
                with_size(V, [&](auto size) { Work<decltype(size)::value>::run(tile, scratch, args, kept[count], lanes); });
            }
            add_weights(sums, kept, count, to);
        }
        std::free(scratch);
        std::free(room);
    }
}

struct Linear {  // out = W·norm(x) + b, its first P channels to p and the rest to q; d*: gradients, of which dx is written
    const float* x;
    int64_t K, N, P;
    Norm norm;
    const float *w, *b;
    float *p, *q;
    float *dx, *sums;
};

template <int V>
struct LinearForward {
    static int64_t scratch(const Linear& a) { return a.K + a.N; }
    static void run(const Tile& t, Vec* scratch, const Linear& a) {
        Vec *x = scratch, *out = x + a.K * V, inverse[V];
        enter<V>(a.x + t.first * a.K, t.rows, a.K, x);
        standardise<V>(x, a.K, a.norm.eps, inverse);
        affine<V>(x, a.K, a.norm, x);
        product<V>(a.w, a.N, x, a.K, [&](int64_t n, int j, Vec sum) { out[n * V + j] = sum + a.b[n]; });
        leave<V>(out, t.rows, a.P, a.p + t.first * a.P, a.P);
        leave<V>(out + a.P * V, t.rows, a.N - a.P, a.q + t.first * (a.N - a.P), a.N - a.P);
    }
};

template <int V>
struct LinearBackward {  // w is turned (K, N); p and q are read, as gradients; sums: w, then b, norm.weight, norm.bias
    static int64_t scratch(const Linear& a) { return 3 * a.K; }
    static Sums sums(const Linear& a) {
        Sums sums;
        return sums.add(a.N, a.K), sums;
    }
    static int64_t lanes(const Linear& a) { return a.N + 2 * a.K; }
    static void run(const Tile& t, Vec* scratch, const Linear& a, const Kept& kept, Vec* lanes) {
        Vec *x = scratch, *in = x + a.K * V, *dx = in + a.K * V, *d = kept.d[0], inverse[V];
        enter<V>(a.x + t.first * a.K, t.rows, a.K, x);
        enter<V>(a.p + t.first * a.P, t.rows, a.P, d);
        enter<V>(a.q + t.first * (a.N - a.P), t.rows, a.N - a.P, d + a.P * V);
        standardise<V>(x, a.K, a.norm.eps, inverse);
        affine<V>(x, a.K, a.norm, in);
        turn<V>(in, a.K, kept.rows[0]);
        add_lanes<V>(d, a.N, lanes);
        product<V>(a.w, a.K, d, a.N, [&](int64_t k, int v, Vec sum) { dx[k * V + v] = sum; });
        norm_back<V>(dx, x, inverse, a.K, a.norm, lanes + a.N, lanes + a.N + a.K);
        leave<V>(dx, t.rows, a.K, a.dx + t.first * a.K, a.K);
    }
};

struct Mlp {  // y = x + scale ⊙ (W₂·GELU(h) + b₂), h = W₁·norm(x) + b₁, kept in tiles if there is room; y - x without `residual`
    const float* x;
    int64_t C, N;
    Norm norm;
    const float *w1, *b1, *w2, *b2, *scale;
    float *h, *y;
    int64_t residual;
    const float* dy;
    float *dx, *sums;
};

template <int V>
struct MlpForward {
    static int64_t scratch(const Mlp& a) { return 2 * a.C + a.N; }
    static void run(const Tile& t, Vec* scratch, const Mlp& a) {
        Vec *x = scratch, *y = x + a.C * V, *hidden = y + a.C * V, inverse[V];
        Vec* kept = a.h ? reinterpret_cast<Vec*>(a.h + t.first * a.N) : nullptr;
        enter<V>(a.x + t.first * a.C, t.rows, a.C, y);
        std::memcpy(x, y, a.C * V * sizeof(Vec));
        standardise<V>(x, a.C, a.norm.eps, inverse);
        affine<V>(x, a.C, a.norm, x);
        product<V>(a.w1, a.N, x, a.C, [&](int64_t n, int j, Vec sum) {
            const Vec h = sum + a.b1[n];
            if (kept) kept[n * V + j] = h;
            hidden[n * V + j] = h * normal_cdf(h);
        });
        product<V>(a.w2, a.C, hidden, a.N, [&](int64_t c, int j, Vec sum) {
            const Vec branch = (sum + a.b2[c]) * a.scale[c];
            y[c * V + j] = a.residual ? y[c * V + j] + branch : branch;
        });
        leave<V>(y, t.rows, a.C, a.y + t.first * a.C, a.C);
    }
};

template <int V>
struct MlpBackward {  // w1 and w2 are turned (C, N) and (N, C). Sums: w1, w2 turned, then b1, b2, norm.weight, norm.bias; w2's and b2's for scale = 1
    static int64_t scratch(const Mlp& a) { return 4 * a.C; }
    static Sums sums(const Mlp& a) {
        Sums sums;
        return sums.add(a.N, a.C), sums.add(a.N, a.C), sums;
    }
    static int64_t lanes(const Mlp& a) { return a.N + 3 * a.C; }
    static void run(const Tile& t, Vec* scratch, const Mlp& a, const Kept& kept, Vec* lanes) {
        Vec *x = scratch, *in = x + a.C * V, *dy = in + a.C * V, *dx = dy + a.C * V, inverse[V];
        Vec *dh = kept.d[0], *hidden = kept.d[1];
        const Vec* h = reinterpret_cast<const Vec*>(a.h + t.first * a.N);
        enter<V>(a.dy + t.first * a.C, t.rows, a.C, dy);
        turn<V>(dy, a.C, kept.rows[1]);
        for (int64_t c = 0; c < a.C; ++c)
            for (int64_t v = 0; v < V; ++v) dx[c * V + v] = dy[c * V + v] * a.scale[c];
        product<V>(a.w2, a.N, dx, a.C, [&](int64_t n, int v, Vec sum) {
            hidden[n * V + v] = h[n * V + v] * normal_cdf(h[n * V + v]);
            dh[n * V + v] = sum * gelu_slope(h[n * V + v]);
        });
        enter<V>(a.x + t.first * a.C, t.rows, a.C, x);
        standardise<V>(x, a.C, a.norm.eps, inverse);
        affine<V>(x, a.C, a.norm, in);
        turn<V>(in, a.C, kept.rows[0]);
        add_lanes<V>(dh, a.N, lanes);
        add_lanes<V>(dy, a.C, lanes + a.N);
        product<V>(a.w1, a.C, dh, a.N, [&](int64_t c, int v, Vec sum) { dx[c * V + v] = sum; });
        norm_back<V>(dx, x, inverse, a.C, a.norm, lanes + a.N + a.C, lanes + a.N + 2 * a.C);
        if (a.residual)
            for (int64_t i = 0; i < a.C * V; ++i) dx[i] += dy[i];
        leave<V>(dx, t.rows, a.C, a.dx + t.first * a.C, a.C);
    }
};

constexpr int64_t kMaxOrder = 16;

struct Gates {  // z₀ = p ⊙ g₀, z_{k+1} = (W_k·z_k + b_k) ⊙ g_{k+1}; y = x + scale ⊙ (W·z + b), the last of w and b; y - x without x
    const float *p, *gates;
    int64_t C, order, first;  // first: width of p
    const float *w[kMaxOrder], *b[kMaxOrder], *turned[kMaxOrder];
    const float *scale, *x;
    float* y;
    const float* dy;
    float *dp, *dgates, *sums;
    int64_t filtered() const { return 2 * C - first; }
};

template <int V>
struct GatesForward {
    static int64_t scratch(const Gates& a) { return a.first + a.filtered() + a.C; }
    static void run(const Tile& t, Vec* scratch, const Gates& a) {
        Vec *p = scratch, *z = p + a.first * V, *y = z + a.filtered() * V;
        enter<V>(a.p + t.first * a.first, t.rows, a.first, p);
        enter<V>(a.gates + t.first * a.filtered(), t.rows, a.filtered(), z);
        for (int64_t i = 0; i < a.first * V; ++i) z[i] *= p[i];
        int64_t k = 0;
        for (int64_t width = a.first; k + 1 < a.order; ++k, width *= 2) {
            Vec* next = z + width * V;
            const float* b = a.b[k];
            product<V>(a.w[k], 2 * width, z, width, [&](int64_t n, int j, Vec sum) { next[n * V + j] *= sum + b[n]; });
            z = next;
        }
        const float* b = a.b[k];
        if (a.x) enter<V>(a.x + t.first * a.C, t.rows, a.C, y);
        product<V>(a.w[k], a.C, z, a.C, [&](int64_t c, int j, Vec sum) {
            const Vec branch = (sum + b[c]) * a.scale[c];
            y[c * V + j] = a.x ? y[c * V + j] + branch : branch;
        });
        leave<V>(y, t.rows, a.C, a.y + t.first * a.C, a.C);
    }
};

template <int V>
struct GatesBackward {  // interactions are computed again; sums: all w, the last turned, then all b; the last two for scale = 1
    static int64_t scratch(const Gates& a) { return a.first + 3 * a.filtered() + 3 * a.C; }
    static Sums sums(const Gates& a) {
        Sums sums;
        for (int64_t width = a.first; width < a.C; width *= 2) sums.add(2 * width, width);
        return sums.add(a.C, a.C), sums;
    }
    static int64_t lanes(const Gates& a) { return 3 * a.C - 2 * a.first; }
    static void run(const Tile& t, Vec* scratch, const Gates& a, const Kept& kept, Vec* lanes) {
        const int64_t Q = a.filtered(), last = a.order - 1;
        // Of z, of the gates g, and of the products u that they multiply, order k begins where its width - first is.
        Vec *p = scratch, *z = p + a.first * V, *g = z + Q * V, *u = g + Q * V, *dy = u + Q * V;
        Vec *dz = dy + a.C * V, *other = dz + a.C * V;
        enter<V>(a.p + t.first * a.first, t.rows, a.first, p);
        enter<V>(a.gates + t.first * Q, t.rows, Q, g);
        for (int64_t i = 0; i < a.first * V; ++i) z[i] = p[i] * g[i];
        int64_t width = a.first;
        for (int64_t k = 0; k < last; ++k, width *= 2) {
            const int64_t next = 2 * width - a.first;
            const float* b = a.b[k];
            const Vec* from = z + (width - a.first) * V;
            turn<V>(from, width, kept.rows[k]);
            product<V>(a.w[k], 2 * width, from, width, [&](int64_t n, int v, Vec sum) {
                const int64_t i = (next + n) * V + v;
                u[i] = sum + b[n], z[i] = u[i] * g[i];
            });
        }
        enter<V>(a.dy + t.first * a.C, t.rows, a.C, dy);
        turn<V>(dy, a.C, kept.rows[last]);
        std::memcpy(kept.d[last], z + (a.C - a.first) * V, a.C * V * sizeof(Vec));
        lanes += 2 * (a.C - a.first);
        add_lanes<V>(dy, a.C, lanes);
        for (int64_t c = 0; c < a.C; ++c)
            for (int64_t v = 0; v < V; ++v) other[c * V + v] = dy[c * V + v] * a.scale[c];
        product<V>(a.turned[last], a.C, other, a.C, [&](int64_t c, int v, Vec sum) { dz[c * V + v] = sum; });
        for (int64_t k = last - 1; k >= 0; --k) {
            width /= 2;
            const int64_t next = (2 * width - a.first) * V;
            Vec* du = kept.d[k];
            for (int64_t i = 0; i < 2 * width * V; ++i) {
                du[i] = dz[i] * g[next + i];
                g[next + i] = dz[i] * u[next + i];
            }
            lanes -= 2 * width;
            add_lanes<V>(du, 2 * width, lanes);
            product<V>(a.turned[k], width, du, 2 * width, [&](int64_t n, int v, Vec sum) { dz[n * V + v] = sum; });
        }
        for (int64_t i = 0; i < a.first * V; ++i) {
            const Vec gate = g[i];
            g[i] = dz[i] * p[i];
            dz[i] *= gate;
        }
        leave<V>(dz, t.rows, a.first, a.dp + t.first * a.first, a.first);
        leave<V>(g, t.rows, Q, a.dgates + t.first * Q, Q);
    }
};

}  // namespace

extern "C" {
void linear_forward(const Linear* a, int64_t M, int64_t T) { for_tiles<LinearForward>(M, T, *a); }
void linear_backward(const Linear* a, int64_t M, int64_t T) { for_tiles_back<LinearBackward>(M, T, *a); }
void mlp_forward(const Mlp* a, int64_t M, int64_t T) { for_tiles<MlpForward>(M, T, *a); }
void mlp_backward(const Mlp* a, int64_t M, int64_t T) { for_tiles_back<MlpBackward>(M, T, *a); }
void gates_forward(const Gates* a, int64_t M, int64_t T) { for_tiles<GatesForward>(M, T, *a); }
void gates_backward(const Gates* a, int64_t M, int64_t T) { for_tiles_back<GatesBackward>(M, T, *a); }
}

extern "C" int pixelwise_built() { return 1; }

#else

extern "C" int pixelwise_built() { return 0; }

#endif
