// Backward kernels over tiles: gradients of weights and vectors, added up over pixels by each thread on its own.
//
// M pixels, C channels, K channels in, N channels out, T threads, V vectors of pixels, R rows of a product at a time.
#pragma once

#include "tiles.h"

#ifdef TILES

namespace {

constexpr int64_t kGroup = 5;

// Vectors from row to row of turned tiles: an odd number, or all rows would share a few sets of the first-level cache.
inline int64_t pitch(int64_t C) { return vectors(C) | 1; }

// A tile as rows of whole vectors, for sums over pixels: a row for each pixel, or for each pair of them.
template <class Dot, int V>
void turn(const Vec* tile, int64_t C, Vec* rows) {
    for (int64_t v = 0; v < V; v += Dot::kDepth)
        for (int64_t c = 0; c < C; c += kLanes) {
            const bool two = Dot::kDepth > 1 && v + 1 < V;
            Vec r[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) {
                const Vec* from = tile + (c + i) * V + v;
                r[i] = c + i < C ? Dot::joined(from[0], two ? from[1] : Vec{}) : Vec{};
            }
            transpose(r);
            for (int64_t i = 0; i < (two ? kLanes : kLanes / Dot::kDepth); ++i)
                rows[(v * kLanes / Dot::kDepth + i) * pitch(C) + c / kLanes] = r[i];
        }
}

// The gradients that a backward kernel adds up over pixels, each thread on its own: of weights, Σ over pixels of
// d(n, pixel) · x(pixel, k), each (N, vectors(K) · kLanes); behind them a vector for each element of vectors. d and x
// are kept for a group of tiles, so that the sums, which fill the caches, are read and written less often.
template <class Dot>
struct Sums {
    int count = 0;
    int64_t N[kMaxOrder], K[kMaxOrder], size = 0;  // K: of whole rows; size: of all, in floats
    float* weights[kMaxOrder];                     // where they go in the end, (N, K)
    void add(int64_t n, int64_t k, float* weight) {
        N[count] = n, K[count] = k, weights[count++] = weight, size += n * vectors(k) * kLanes;
    }
    int64_t elements = 0;  // of all vectors, and where they go
    float* vectors_to = nullptr;
    // If not null: the last weight is that of scale ⊙ (W·x + b) and summed up turned, (K, N) for W (N, K), as if scale
    // were 1; so is b, from element `bias` on. Scale's gradient, Σ d ⊙ (W·x + b), is W's rows times their sums, and b
    // times its.
    const typename Dot::Element* w = nullptr;
    const float *b, *scale;
    int64_t bias;
    float* dscale;
    int64_t share() const { return size + elements * kLanes; }
};

constexpr int64_t kWidth = kGroup * kMaxV;  // vectors from channel to channel of what is kept of a group of tiles

template <class Dot>
struct Kept {  // of a group, or from one of its tiles on
    typename Dot::Factor* d[kMaxOrder];  // channels kWidth vectors apart
    Vec* rows[kMaxOrder];
    int64_t pixels;
};

struct Place {
    Vec* at;
    int64_t pitch;
};

// Where to compute a tile that becomes a d: floats at once where they are kept.
template <class Dot, int V>
Place in_place(typename Dot::Factor* d, Vec* scratch) {
    if (Dot::kDepth > 1) return {scratch, V};
    return {reinterpret_cast<Vec*>(d), kWidth};
}

// A tile as the d of sums.
template <class Dot, int V>
void keep(const Vec* tile, int64_t N, typename Dot::Factor* d) {
    for (int64_t n = 0; n < N; ++n)
        for (int64_t v = 0; v < V; ++v) store(tile[n * V + v], d + (n * kWidth + v) * kLanes, kLanes);
}

template <class Dot, int R, int V>
void add_outer(const Kept<Dot>& kept, int i, int64_t n, int64_t k, int64_t width, bool first, Vec* to) {
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) __builtin_prefetch(to + (n + r) * width + k + v, 1);
    Vec sums[R][V];
    const int64_t pitch = kWidth * kLanes;
    accumulate<Dot>(sums, kept.d[i] + n * pitch, pitch, kept.rows[i] + k, width | 1, kept.pixels);
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) {
            Vec& sum = to[(n + r) * width + k + v];
            sum = first ? sums[r][v] : sum + sums[r][v];
        }
}

template <class Dot, int R>
void add_rows(const Kept<Dot>& kept, int i, int64_t n, int64_t width, bool first, Vec* to) {
    for (int64_t k = 0; k < width;) {
        const int64_t left = width - k;
        if (left >= kMaxV && left != kMaxV + 1) {
            add_outer<Dot, R, kMaxV>(kept, i, n, k, width, first, to), k += kMaxV;
        } else if (left > 1) {
            add_outer<Dot, R, 2>(kept, i, n, k, width, first, to), k += 2;
        } else {
            add_outer<Dot, R, 1>(kept, i, n, k, width, first, to), k += 1;
        }
    }
}

template <class Dot>
void add_weights(const Sums<Dot>& sums, const Kept<Dot>& kept, bool first, float* to) {
    for (int i = 0; i < sums.count; ++i) {
        const int64_t N = sums.N[i], width = vectors(sums.K[i]);
        in_strips(N, [&](auto rows, int64_t n) {
            add_rows<Dot, decltype(rows)::value>(kept, i, n, width, first, reinterpret_cast<Vec*>(to));
        });
        to += N * width * kLanes;
    }
}

template <int V>
void add_lanes(const Vec* d, int64_t N, Vec* lanes, int64_t pitch = V) {
    for (int64_t n = 0; n < N; ++n)
        for (int64_t v = 0; v < V; ++v) lanes[n] += d[n * pitch + v];
}

// w (N, K) to (K, N), as products take it, the rows of both whole.
template <class Dot, class Factor = typename Dot::Factor>
Factor* turned_weight(const typename Dot::Element* w, int64_t N, int64_t K, int64_t threads) {
    Factor* to = reinterpret_cast<Factor*>(allocated(vectors(K * whole<Dot>(N))));
    turn_matrix(w, whole<Dot>(K), N, K, to, whole<Dot>(N), threads);
    return to;
}

inline Vec summed(const float* from, int64_t share, int64_t T) {
    Vec sum = {};
    for (int64_t t = 0; t < T; ++t) sum += load(from + t * share, kLanes);
    return sum;
}

inline float across(Vec v) {
    float sum = 0;
    for (int64_t l = 0; l < kLanes; ++l) sum += v[l];
    return sum;
}

// All threads' sums to where they go.
template <class Dot>
void finish(const Sums<Dot>& s, const float* from, int64_t T) {
    const int64_t share = s.share(), last = s.count - 1;
#pragma omp parallel num_threads(T)
    {
        const float* at = from;
        for (int i = 0; i < s.count; ++i) {
            const int64_t N = s.N[i], K = s.K[i], width = vectors(K) * kLanes;
            if (i < last || !s.w) {
#pragma omp for schedule(static) nowait
                for (int64_t n = 0; n < N; ++n)
                    for (int64_t k = 0; k < K; k += kLanes)
                        store(summed(at + n * width + k, share, T), s.weights[i] + n * K + k, K - k);
            }
            at += N * width;
        }
#pragma omp for schedule(static)
        for (int64_t e = 0; e < s.elements; ++e) s.vectors_to[e] = across(summed(at + e * kLanes, share, T));
        if (s.w) {
            const int64_t N = s.N[last], K = s.K[last], width = vectors(K) * kLanes;  // of W: its columns, its rows
            const int64_t row = whole<Dot>(N);
            at -= N * width;
#pragma omp for schedule(static)
            for (int64_t k = 0; k < K; k += kLanes) {
                Vec along[kLanes] = {};
                for (int64_t n = 0; n < N; n += kLanes) {
                    Vec r[kLanes];
                    for (int64_t i = 0; i < kLanes; ++i)
                        r[i] = n + i < N ? summed(at + (n + i) * width + k, share, T) : Vec{};
                    transpose(r);
                    for (int64_t i = 0; i < kLanes && k + i < K; ++i) {
                        along[i] += r[i] * load(s.w + (k + i) * row + n, N - n);
                        store(r[i] * s.scale[k + i], s.weights[last] + (k + i) * row + n, row - n);
                    }
                }
                for (int64_t i = 0; i < kLanes && k + i < K; ++i) {
                    float& bias = s.vectors_to[s.bias + k + i];
                    s.dscale[k + i] = across(along[i]) + bias * s.b[k + i];
                    bias *= s.scale[k + i];
                }
            }
        }
    }
}

// `for_tiles` for backward kernels: run(V, tile, scratch, kept, lanes) fills what is kept for the weights' sums, and
// adds to the lanes of the vectors'. The pixels are shared as among T threads, but only `workers` have sums of their
// own.
template <class Dot, class Run>
void for_tiles_back(int64_t M, int64_t T, int64_t workers, int64_t scratch, const Sums<Dot>& sums, Run run) {
    const int64_t share = sums.share();
    int64_t each = 0;
    for (int i = 0; i < sums.count; ++i) each += (sums.N[i] + pitch(sums.K[i]) * kLanes) * kWidth;
    float* all_sums = reinterpret_cast<float*>(allocated(workers * vectors(share)));
#pragma omp parallel for num_threads(workers) schedule(static)
    for (int64_t worker = 0; worker < workers; ++worker) {
        float* own = all_sums + worker * share;
        std::memset(own + sums.size, 0, (share - sums.size) * sizeof(float));
        Vec *room = allocated(scratch * kMaxV + each), *next = room + scratch * kMaxV;
        Kept<Dot> kept;
        for (int i = 0; i < sums.count; ++i) {
            kept.d[i] = reinterpret_cast<typename Dot::Factor*>(next), next += sums.N[i] * kWidth;
            kept.rows[i] = next, next += pitch(sums.K[i]) * kLanes * kWidth;
        }
        bool first = true;
        for (int64_t t = T * worker / workers; t < T * (worker + 1) / workers; ++t) {
            const int64_t end = vectors(M) * (t + 1) / T;
            for (int64_t from = vectors(M) * t / T; from < end;) {
                const int64_t groups = (end - from + kWidth - 1) / kWidth, width = (end - from + groups - 1) / groups;
                Kept<Dot> at = kept;
                Tile tile;
                int64_t count = 0;
                for (int64_t V; count < width && count + (V = next_tile(from, end, M, tile)) <= kWidth;) {
                    Vec* lanes = reinterpret_cast<Vec*>(own + sums.size);
                    with_size(V, [&](auto size) { run(size, tile, room, at, lanes); });
                    from += V, count += V;
                    for (int i = 0; i < sums.count; ++i)
                        at.d[i] += V * kLanes, at.rows[i] += V * kLanes / Dot::kDepth * pitch(sums.K[i]);
                }
                kept.pixels = count * kLanes;
                add_weights(sums, kept, first, own);
                first = false;
            }
        }
        if (first) std::memset(own, 0, sums.size * sizeof(float));
        settle();
        std::free(room);
    }
    finish(sums, all_sums, workers);
    std::free(all_sums);
}

}  // namespace

#endif
