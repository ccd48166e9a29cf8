// Depth-wise K×K convolution (stride 1, padding K/2) on channels-last maps, and its weight's and bias's gradients.
//
// Sixteen channels are one vector, or eight without AVX-512. For each image and channel vector a band of rows is packed
// into zero-padded, contiguous float buffers that stay in the second-level cache. The convolution then makes up to
// eight output columns at a time in registers out of K + 7 loaded inputs of each row; of the gradients every kernel row
// keeps its K sums there while four output columns at a time slide over K + 3 inputs: so multiply-adds and not loads are
// the limit.
// Plain C++ with the vector extension that gcc and clang share: no torch headers, so it compiles in seconds.
#include <type_traits>

#include "vectors.h"

namespace {

constexpr int64_t kColumns = 4, kBand = 16;
constexpr int64_t kGroup = 4;    // vectors of channels packed together: a cache line at a time would miss the TLB
inline int64_t padded(int64_t columns) { return (columns + kColumns - 1) / kColumns * kColumns; }
// Of a map (B, H, W, C): w (C, K, K), bias (C) or null.
template <class T>
struct Convolution {
    const T *x, *w, *bias;
    T* y;
    int64_t B, H, W, C, K;
    int64_t groups() const { return (vectors(C) + kGroup - 1) / kGroup; }
    int64_t bands() const { return (H + kBand - 1) / kBand; }
    // Columns at a time, and of all: the sides of ImageNet's maps are multiples of 7, CIFAR's of 8, and its last is 4.
    int64_t outputs() const { return W <= 4 ? 4 : (W + 7) / 8 * 8 < (W + 6) / 7 * 7 ? 8 : 7; }
    int64_t columns() const { return (W + outputs() - 1) / outputs() * outputs(); }
    int64_t width() const { return columns() + K - 1; }  // of what is packed
    int64_t height() const { return (H < kBand ? H : kBand) + K - 1; }
    bool past(int64_t pixels) const { return sizeof(T) == sizeof(float) && past_caches(y, pixels, C); }
};

// One vector of channels of a band of rows from `top` on: x is packed, w (K, K); y is the band's first pixel.
template <int K, int Outputs, class T>
void convolve(const Convolution<T>& a, const Vec* x, const Vec* w, Vec bias, T* y, int64_t top, int64_t rows,
              int64_t lanes, bool past) {
    const int64_t width = a.width();
    for (int64_t h = 0; h < rows; ++h) {
        // Beyond the map all is 0.
        const int64_t above = K / 2 - (top + h), below = top + h + K / 2 + 1 - a.H;
        const int64_t first = above > 0 ? above : 0, last = below > 0 ? K - below : K;
        for (int64_t column = 0; column < a.W; column += Outputs) {
            Vec sum[Outputs];
            for (int u = 0; u < Outputs; ++u) sum[u] = bias;
            for (int64_t i = first; i < last; ++i) {
                Vec in[K + Outputs - 1];
#pragma GCC unroll 32
                for (int j = 0; j < K + Outputs - 1; ++j) in[j] = x[(h + i) * width + column + j];
#pragma GCC unroll 16
                for (int j = 0; j < K; ++j) {
                    const Vec weight = w[i * K + j];
#pragma GCC unroll 8
                    for (int u = 0; u < Outputs; ++u) sum[u] += weight * in[u + j];
                }
            }
            const int64_t outputs = a.W - column < Outputs ? a.W - column : Outputs;
            for (int64_t u = 0; u < outputs; ++u) {
                T* to = y + (h * a.W + column + u) * a.C;
                past ? store_past(sum[u], to) : store(sum[u], to, lanes);
            }
        }
    }
}

// One group of channels of a band of an image; w (K, K, C); what is packed has zeros at its sides. Not inlined: the
// compiler may fuse multiplications and additions otherwise in each place, and last bits would depend on the caller.
template <int K, class T>
__attribute__((noinline)) void convolve_group(const Convolution<T>& a, const T* w, int64_t b, int64_t band, int64_t group, bool past,
                    Vec* packed) {
    constexpr int64_t P = K / 2;
    const int64_t H = a.H, W = a.W, C = a.C, width = a.width(), height = a.height();
    const int64_t top = band * kBand, rows = H - top < kBand ? H - top : kBand;
    const int64_t first = group * kGroup * kLanes, count = vectors(C - first);
    const int64_t members = count < kGroup ? count : kGroup;
    // Of the rows of which `convolve` makes these, those that the map has.
    const int64_t begin = top < P ? 0 : top - P, end = top + rows + P < H ? top + rows + P : H;
    for (int64_t h = begin; h < end; ++h) {
        const int64_t r = h - top + P;
        for (int64_t column = 0; column < W; ++column)
            for (int64_t m = 0; m < members; ++m) {
                const int64_t c = first + m * kLanes;
                Vec& to = packed[(m * height + r) * width + column + P];
                __builtin_prefetch(a.x + ((b * H + h) * W + column + 8) * C + c);
                to = load(a.x + ((b * H + h) * W + column) * C + c, C - c);
            }
    }
    for (int64_t m = 0; m < members; ++m) {
        const int64_t c = first + m * kLanes;
        Vec weights[K * K];
        for (int64_t k = 0; k < K * K; ++k) weights[k] = load(w + k * C + c, C - c);
        const Vec start = a.bias ? load(a.bias + c, C - c) : Vec{};
        T* to = a.y + ((b * H + top) * W) * C + c;
        const auto run = a.outputs() == 8 ? convolve<K, 8, T> : a.outputs() == 7 ? convolve<K, 7, T> : convolve<K, 4, T>;
        run(a, packed + m * height * width, weights, start, to, top, rows, C - c, past);
    }
}

// w (C, N) to (N, C), of vectors [first, last) of channels.
template <class T>
void turn(const T* w, T* to, int64_t C, int64_t N, int64_t first, int64_t last) {
    for (int64_t v = first; v < last; ++v)
        for (int64_t n = 0; n < N; ++n)
            for (int64_t c = v * kLanes; c < C && c < (v + 1) * kLanes; ++c) to[n * C + c] = w[c * N + n];
}

template <class T>
T* room_for(const Convolution<T>& a) {
    return reinterpret_cast<T*>(allocated(vectors(a.K * a.K * a.C)));
}

template <class T>
Vec* packing(const Convolution<T>& a) {
    const int64_t size = kGroup * a.height() * a.width();
    Vec* packed = allocated(size);
    std::memset(packed, 0, size * sizeof(Vec));
    return packed;
}

// Each thread takes groups of channels of bands of images.
template <int K, class T>
void convolve_all(const Convolution<T>& a, int64_t threads) {
    const bool past = a.past(a.B * a.H * a.W);
    T* turned = room_for(a);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t v = 0; v < vectors(a.C); ++v) turn(a.w, turned, a.C, K * K, v, v + 1);
        Vec* packed = packing(a);
#pragma omp for collapse(3) schedule(static)
        for (int64_t b = 0; b < a.B; ++b)
            for (int64_t band = 0; band < a.bands(); ++band)
                for (int64_t group = 0; group < a.groups(); ++group)
                    convolve_group<K>(a, turned, b, band, group, past, packed);
        settle();
        std::free(packed);
    }
    std::free(turned);
}

// The images of pixels [first, last), by the thread that calls.
template <int K, class T>
void convolve_some(const Convolution<T>& a, int64_t first, int64_t last) {
    const bool past = a.past(last - first);
    T* turned = room_for(a);
    turn(a.w, turned, a.C, K * K, 0, vectors(a.C));
    Vec* packed = packing(a);
    for (int64_t b = first / (a.H * a.W); b < last / (a.H * a.W); ++b)
        for (int64_t band = 0; band < a.bands(); ++band)
            for (int64_t group = 0; group < a.groups(); ++group)
                convolve_group<K>(a, turned, b, band, group, past, packed);
    settle();
    std::free(packed);
    std::free(turned);
}

// Gives 1 for a K that is not built in.
template <class Run>
int with_size(int64_t K, Run run) {
    switch (K) {
        case 3: run(std::integral_constant<int, 3>{}); return 0;
        case 5: run(std::integral_constant<int, 5>{}); return 0;
        case 7: run(std::integral_constant<int, 7>{}); return 0;
        case 9: run(std::integral_constant<int, 9>{}); return 0;
        case 11: run(std::integral_constant<int, 11>{}); return 0;
    }
    return 1;
}

template <int K>
void add_row(const Vec* x, const Vec* dy, Vec* sums, int64_t columns) {
    Vec sum[K];
    for (int j = 0; j < K; ++j) sum[j] = sums[j];
    for (int64_t w = 0; w < columns; w += kColumns) {
        Vec in[K + kColumns - 1];
#pragma GCC unroll 16
        for (int j = 0; j < K + kColumns - 1; ++j) in[j] = x[w + j];
#pragma GCC unroll 4
        for (int u = 0; u < kColumns; ++u) {
            const Vec d = dy[w + u];
#pragma GCC unroll 16
            for (int j = 0; j < K; ++j) sum[j] += d * in[u + j];
        }
    }
    for (int j = 0; j < K; ++j) sums[j] = sum[j];
}

// Of channels [c, c + lanes) over images [0, B): the bands are this thread's.
template <int K, typename T>
void weight_grad(const T* x, const T* dy, float* dw, float* db, int64_t B, int64_t H, int64_t W, int64_t C, int64_t c,
                 Vec* x_band, Vec* dy_band) {
    constexpr int64_t P = K / 2;
    const int64_t columns = padded(W), width = columns + 2 * P;
    const int64_t lanes = C - c < kLanes ? C - c : kLanes;
    Vec sums[K * K] = {}, bias = {};
    for (int64_t b = 0; b < B; ++b) {
        for (int64_t top = 0; top < H; top += kBand) {
            const int64_t rows = H - top < kBand ? H - top : kBand;
            const int64_t first = top - P < 0 ? 0 : top - P;
            const int64_t last = top + rows + P > H ? H : top + rows + P;
            for (int64_t h = first; h < last; ++h)
                for (int64_t w = 0; w < W; ++w)
                    x_band[(h - first) * width + w + P] = load(x + ((b * H + h) * W + w) * C + c, lanes);
            for (int64_t h = 0; h < rows; ++h)
                for (int64_t w = 0; w < W; ++w) {
                    const Vec d = load(dy + ((b * H + top + h) * W + w) * C + c, lanes);
                    dy_band[h * columns + w] = d;
                    bias += d;
                }
            for (int64_t h = 0; h < rows; ++h)
                for (int64_t i = 0; i < K; ++i) {
                    const int64_t source = top + h + i - P;
                    if (source < 0 || source >= H) continue;
                    add_row<K>(x_band + (source - first) * width, dy_band + h * columns, sums + i * K, columns);
                }
        }
    }
    for (int64_t l = 0; l < lanes; ++l) {
        for (int64_t k = 0; k < K * K; ++k) dw[(c + l) * K * K + k] = sums[k][l];
        db[c + l] = bias[l];
    }
}

// Each thread takes vectors of channels of shares of the batch. The threads are those of the OpenMP library that torch
// has loaded: others would compete with its own, which spin between its loops.
template <int K, typename T>
void weight_grads(const T* x, const T* dy, float* dw, float* db, int64_t B, int64_t H, int64_t W, int64_t C, int64_t S,
                  int64_t threads) {
    const int64_t columns = padded(W), x_size = (kBand + K - 1) * (columns + K - 1), dy_size = kBand * columns;
#pragma omp parallel num_threads(threads)
    {
        Vec *x_band = allocated(x_size), *dy_band = allocated(dy_size);
        std::memset(x_band, 0, x_size * sizeof(Vec));
        std::memset(dy_band, 0, dy_size * sizeof(Vec));
#pragma omp for collapse(2) schedule(dynamic, 1)
        for (int64_t s = 0; s < S; ++s)
            for (int64_t v = 0; v < vectors(C); ++v) {
                const int64_t start = B * s / S, image = H * W * C, weights = C * K * K;
                weight_grad<K>(x + start * image, dy + start * image, dw + s * weights, db + s * C,
                               B * (s + 1) / S - start, H, W, C, v * kLanes, x_band, dy_band);
            }
        std::free(x_band);
        std::free(dy_band);
    }
}

}  // namespace

extern "C" int64_t lanes() { return kLanes; }

// All of a map by so many threads; and the images of pixels [first, last), by the thread that calls.
#define CONVOLUTION(type, T)                                                                            \
    extern "C" int depthwise_conv_##type(const Convolution<T>* a, int64_t threads) {                    \
        return with_size(a->K, [&](auto K) { convolve_all<decltype(K)::value>(*a, threads); });         \
    }                                                                                                   \
    extern "C" void depthwise_conv_##type##_part(const void* p, int64_t first, int64_t last) {          \
        const auto& a = *static_cast<const Convolution<T>*>(p);                                         \
        with_size(a.K, [&](auto K) { convolve_some<decltype(K)::value>(a, first, last); });             \
    }

CONVOLUTION(f32, float)
CONVOLUTION(bf16, uint16_t)

// x, dy: (B, H, W, C) contiguous; dw: (S, C, K, K); db: (S, C), one sum for each of the S shares of the batch.
#define WEIGHT_GRAD(type, T)                                                                                       \
    extern "C" int depthwise_weight_grad_##type(const T* x, const T* dy, float* dw, float* db, int64_t B, int64_t H, \
                                                int64_t W, int64_t C, int64_t K, int64_t S, int64_t threads) {     \
        return with_size(K, [&](auto size) {                                                                       \
            weight_grads<decltype(size)::value>(x, dy, dw, db, B, H, W, C, S, threads);                            \
        });                                                                                                        \
    }

WEIGHT_GRAD(f32, float)
WEIGHT_GRAD(bf16, uint16_t)
