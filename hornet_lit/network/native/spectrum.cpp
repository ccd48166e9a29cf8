// The global filter (HorNet §3.3): real 2-d DFT of each channel, a complex weight for each of its numbers, and back;
// and the way back through all that. The DFT is four products with its matrices, each from the left.
//
// Sixteen or eight channels are one vector, and a map's side a dozen pixels or two: what one vector of channels of one
// image needs lies in the first- or second-level cache from the first product to the last.
//
// B batch, C channels, H height, W width, F = W / 2 + 1 columns of a spectrum, G = 2F and L = 2H: real and imaginary
// parts as rows of their own, G by part and column, L by row and part.

#include "tiles.h"

#ifdef TILES

namespace {

template <class T>
struct Filter {
    const T *x, *dy;  // (B, H, W) pixels, `x_pitch` and `dy_pitch` elements apart
    int64_t B, H, W, C, x_pitch, dy_pitch;
    const float* weight;  // (C, H, F, 2)
    // (G, W), (L, L), (L, L), (W, G): there and back, and the turned ones for gradients.
    const float *along_w, *along_h, *back_h, *back_w, *turned_w, *turned_h, *turned_back_h, *turned_back_w;
    T *y, *dx;       // (B, H, W, C)
    float* dweight;  // (C, H, F, 2)
    int64_t columns() const { return W / 2 + 1; }
    int64_t numbers() const { return 2 * H * columns(); }
    bool past(int64_t pixels) const { return sizeof(T) == sizeof(float) && past_caches(y, pixels, C); }
    int64_t map() const { return H * (W + 2); }  // room for a map or for its spectrum, of vectors
};

// emit(n, column, sum) for each element of m (N, K) times x (K, columns).
template <class Emit>
inline void matrix(const float* m, int64_t N, int64_t K, const Vec* x, int64_t columns, Emit emit) {
    int64_t column = 0;
    const auto some = [&](auto size) __attribute__((always_inline)) {
        constexpr int V = decltype(size)::value;
        product<V>(m, N, x + column, columns, K, [&](int64_t n, int v, Vec sum) { emit(n, column + v, sum); });
        column += V;
    };
    while (columns - column >= kMaxV && columns - column != kMaxV + 1) some(std::integral_constant<int, kMaxV>{});
    while (columns - column >= 2) some(std::integral_constant<int, 2>{});
    while (column < columns) some(std::integral_constant<int, 1>{});
}

// A map (W, H) to its spectrum (L, F), by w (G, W) and h (L, L).
template <class T>
void there(const Filter<T>& a, const float* w, const float* h, const Vec* map, Vec* between, Vec* spectrum) {
    const int64_t G = 2 * a.columns(), F = a.columns();
    matrix(w, G, a.W, map, a.H, [&](int64_t g, int64_t row, Vec sum) { between[row * G + g] = sum; });
    matrix(h, 2 * a.H, 2 * a.H, between, F, [&](int64_t l, int64_t f, Vec sum) { spectrum[l * F + f] = sum; });
}

// A spectrum (L, F) to a map (W, H), emitted as (column, row), by h (L, L) and w (W, G).
template <class T, class Emit>
void back(const Filter<T>& a, const float* h, const float* w, const Vec* spectrum, Vec* between, Emit emit) {
    const int64_t F = a.columns();
    matrix(h, 2 * a.H, 2 * a.H, spectrum, F,
           [&](int64_t l, int64_t f, Vec sum) { between[((l & 1) * F + f) * a.H + l / 2] = sum; });
    matrix(w, a.W, 2 * F, between, a.H, emit);
}

template <class T>
void read(const Filter<T>& a, const T* x, int64_t pitch, int64_t b, int64_t c, Vec* map) {
    for (int64_t row = 0; row < a.H; ++row)
        for (int64_t column = 0; column < a.W; ++column) {
            const T* from = x + ((b * a.H + row) * a.W + column) * pitch + c;
            __builtin_prefetch(from + kLanes, 0, 2);  // for the next channels
            map[column * a.H + row] = load(from, a.C - c);
        }
}

// run(at, real, imag, by_real, by_imag) for each of the H × F numbers of a spectrum: its place, those of its two parts,
// and the weight it is multiplied with, of (H, F, 2, C) weights.
template <class T, class Run>
inline void for_numbers(const Filter<T>& a, const float* weights, int64_t c, Run run) {
    const int64_t F = a.columns();
    for (int64_t row = 0; row < a.H; ++row)
        for (int64_t f = 0; f < F; ++f) {
            const int64_t at = row * F + f, real = at + row * F;
            const float* weight = weights + at * 2 * a.C + c;
            run(at, real, real + F, load(weight, a.C - c), load(weight + a.C, a.C - c));
        }
}

// The weight as (H, F, 2, C).
template <class X>
float* turned(const Filter<X>& a, int64_t T) {
    float* to = reinterpret_cast<float*>(allocated(vectors(a.numbers() * a.C)));
    turn_matrix(a.weight, a.numbers(), a.C, a.numbers(), to, a.C, T);
    return to;
}

// A vector of channels of an image; `map` has room for three.
template <class X>
void filter_group(const Filter<X>& a, const float* weights, int64_t b, int64_t group, bool past, Vec* map) {
    Vec *between = map + a.map(), *spectrum = between + a.map();
    const int64_t c = group * kLanes;
    read(a, a.x, a.x_pitch, b, c, map);
    there(a, a.along_w, a.along_h, map, between, spectrum);
    for_numbers(a, weights, c, [&](int64_t, int64_t real, int64_t imag, Vec by_real, Vec by_imag) {
        const Vec was = spectrum[real];
        spectrum[real] = was * by_real - spectrum[imag] * by_imag;
        spectrum[imag] = spectrum[imag] * by_real + was * by_imag;
    });
    back(a, a.back_h, a.back_w, spectrum, between, [&](int64_t column, int64_t row, Vec sum) {
        auto* to = a.y + ((b * a.H + row) * a.W + column) * a.C + c;
        past ? store_past(sum, to) : store(sum, to, a.C - c);
    });
}

template <class X>
void filter(const Filter<X>& a, int64_t T) {
    const int64_t groups = vectors(a.C);
    const bool past = a.past(a.B * a.H * a.W);
    float* weights = turned(a, T);
#pragma omp parallel num_threads(T)
    {
        Vec* map = allocated(3 * a.map());
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < a.B; ++b)
            for (int64_t group = 0; group < groups; ++group) filter_group(a, weights, b, group, past, map);
        settle();
        std::free(map);
    }
    std::free(weights);
}

// The images of pixels [first, last), by the thread that calls.
template <class X>
void filter_part(const Filter<X>& a, int64_t first, int64_t last) {
    float* weights = turned(a, 1);
    Vec* map = allocated(3 * a.map());
    for (int64_t b = first / (a.H * a.W); b < last / (a.H * a.W); ++b)
        for (int64_t group = 0; group < vectors(a.C); ++group)
            filter_group(a, weights, b, group, a.past(last - first), map);
    settle();
    std::free(map);
    std::free(weights);
}

template <class X>
void filter_backward(const Filter<X>& a, int64_t T) {
    const int64_t groups = vectors(a.C);
    const bool past = sizeof(X) == sizeof(float) && past_caches(a.dx, a.B * a.H * a.W, a.C);
    float *weights = turned(a, T), *dweights = reinterpret_cast<float*>(allocated(vectors(a.numbers() * a.C)));
    if (a.B == 0) std::memset(dweights, 0, a.numbers() * a.C * sizeof(float));
#pragma omp parallel num_threads(T)
    {
        Vec *map = allocated(4 * a.map()), *between = map + a.map(), *spectrum = between + a.map();
        Vec* d = spectrum + a.map();
#pragma omp for schedule(static)
        for (int64_t group = 0; group < groups; ++group)
            for (int64_t b = 0; b < a.B; ++b) {
                const int64_t c = group * kLanes;
                read(a, a.x, a.x_pitch, b, c, map);
                there(a, a.along_w, a.along_h, map, between, spectrum);
                read(a, a.dy, a.dy_pitch, b, c, map);
                there(a, a.turned_back_w, a.turned_back_h, map, between, d);
                for_numbers(a, weights, c, [&](int64_t at, int64_t r, int64_t i, Vec by_real, Vec by_imag) {
                    float* sums = dweights + at * 2 * a.C + c;
                    const Vec by_r = d[r] * spectrum[r] + d[i] * spectrum[i];
                    const Vec by_i = d[i] * spectrum[r] - d[r] * spectrum[i];
                    store(b ? load(sums, a.C - c) + by_r : by_r, sums, a.C - c);
                    store(b ? load(sums + a.C, a.C - c) + by_i : by_i, sums + a.C, a.C - c);
                    const Vec was = d[r];
                    d[r] = was * by_real + d[i] * by_imag;
                    d[i] = d[i] * by_real - was * by_imag;
                });
                back(a, a.turned_h, a.turned_w, d, between, [&](int64_t column, int64_t row, Vec sum) {
                    auto* to = a.dx + ((b * a.H + row) * a.W + column) * a.C + c;
                    past ? store_past(sum, to) : store(sum, to, a.C - c);
                });
            }
        settle();
        std::free(map);
    }
    turn_matrix(dweights, a.C, a.numbers(), a.C, a.dweight, a.numbers(), T);
    std::free(weights);
    std::free(dweights);
}

}  // namespace

extern "C" {
void filter_f32(const Filter<float>* a, int64_t T) { filter(*a, T); }
void filter_bf16(const Filter<uint16_t>* a, int64_t T) { filter(*a, T); }
void filter_f32_part(const void* a, int64_t first, int64_t last) {
    filter_part(*static_cast<const Filter<float>*>(a), first, last);
}
void filter_bf16_part(const void* a, int64_t first, int64_t last) {
    filter_part(*static_cast<const Filter<uint16_t>*>(a), first, last);
}
void filter_backward_f32(const Filter<float>* a, int64_t T) { filter_backward(*a, T); }
void filter_backward_bf16(const Filter<uint16_t>* a, int64_t T) { filter_backward(*a, T); }
}

#endif
