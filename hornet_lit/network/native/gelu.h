// GELU's Φ(x), and the derivative of x·Φ(x), by polynomials for pieces of |x|, looked up in registers: that takes fewer
// operations than one polynomial for all, of many terms.
#pragma once

#include <cmath>

#include "tiles.h"

#ifdef TILES

namespace {

constexpr int kPieces = kLanes;  // as one register holds

// A polynomial for each piece: its terms.
template <int Terms>
struct Pieces {
    float c[Terms][kPieces] = {};

    // f in units of which |t| ≤ 1/2 is around each piece's number, by what equals it at the zeros of Chebyshev's
    // polynomial; 1/2 in the last piece.
    template <class F>
    Pieces(F f) {
        c[0][kPieces - 1] = 0.5f;
        for (int k = 0; k < kPieces - 1; ++k) {
            double at[Terms], difference[Terms], sum[Terms] = {};
            for (int i = 0; i < Terms; ++i) at[i] = std::cos(M_PI * (i + 0.5) / Terms) / 2, difference[i] = f(k + at[i]);
            for (int n = 1; n < Terms; ++n)
                for (int i = Terms - 1; i >= n; --i)
                    difference[i] = (difference[i] - difference[i - 1]) / (at[i] - at[i - n]);
            for (int i = Terms - 1; i >= 0; --i) {  // Newton's form: sum · (t - at) + difference
                for (int n = Terms - 1; n > 0; --n) sum[n] = sum[n - 1] - at[i] * sum[n];
                sum[0] = difference[i] - at[i] * sum[0];
            }
            for (int n = 0; n < Terms; ++n) c[n][k] = sum[n];
        }
    }
};

// Both are 1/2 and an odd function, 1/2 of |x| ≥ limit. Of many vectors a few at a time, term by term: those of one wait
// for each other.
template <int Terms>
class Gelu {
    const float unit_;
    const Pieces<Terms> cdf_, slope_;

    static double cdf(double x) { return std::erf(x * M_SQRT1_2) / 2; }
    static double slope(double x) { return cdf(x) + x * std::exp(-x * x / 2) * M_SQRT1_2 * M_2_SQRTPI / 2; }

    template <int N>
    static constexpr int kTogether = N % 4 == 0 ? 4 : N % 3 == 0 ? 3 : N % 2 == 0 ? 2 : 1;

    template <int G>
    struct Places {
        Bits bits[G];  // the lowest are the piece's number
        Vec t[G];
        Places(const Vec* x, float unit) {
            constexpr float last = kPieces - 1, rounds = 3 << 22;  // so large that the sum has no fraction
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g) {
                const Vec u = minimum(all(last), (Vec)((Bits)x[g] & 0x7fffffffu) * unit), rounded = u + rounds;
                bits[g] = (Bits)rounded, t[g] = u - (rounded - rounds);
            }
        }
    };
    template <int G>
    static void evaluate(const Pieces<Terms>& pieces, const Vec* x, const Places<G>& at, Vec* y) {
        Vec sum[G];
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) sum[g] = looked_up(pieces.c[Terms - 1], at.bits[g]);
#pragma GCC unroll 8
        for (int n = Terms - 2; n >= 0; --n)
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g)
                sum[g] = multiplied_added(sum[g], at.t[g], looked_up(pieces.c[n], at.bits[g]));
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) y[g] = (Vec)((Bits)sum[g] ^ ((Bits)x[g] & 0x80000000u)) + 0.5f;
    }

  public:
    Gelu(double limit)
        : unit_((kPieces - 1.5) / limit),
          cdf_([&](double u) { return cdf(u / unit_); }),
          slope_([&](double u) { return slope(u / unit_); }) {}

    // N vectors x to x·Φ(x), in place.
    template <int N>
    void apply(Vec* x) const {
        constexpr int G = kTogether<N>;
        for (int i = 0; i < N; i += G, x += G) {
            Vec cdf[G];
            evaluate<G>(cdf_, x, Places<G>(x, unit_), cdf);
            for (int g = 0; g < G; ++g) x[g] *= cdf[g];
        }
    }

    // And to that function's derivative.
    template <int N>
    void apply(Vec* x, Vec* derivative) const {
        constexpr int G = kTogether<N>;
        for (int i = 0; i < N; i += G, x += G, derivative += G) {
            const Places<G> at(x, unit_);
            Vec cdf[G];
            evaluate<G>(slope_, x, at, derivative);
            evaluate<G>(cdf_, x, at, cdf);
            for (int g = 0; g < G; ++g) x[g] *= cdf[g];
        }
    }
};

// Off by no more than a float's last bits; for pairs by little beside the rounding to bfloat16 (2e-6, the slope 2e-5).
const Gelu<kPieces == 16 ? 6 : 8> kGelu(5.6);
const Gelu<kPieces == 16 ? 4 : 6> kRoughGelu(4.8);

template <class Dot>
constexpr const auto& gelu() {
    if constexpr (Dot::kRow == 2) {
        return kRoughGelu;
    } else {
        return kGelu;
    }
}

}  // namespace

#endif
