// Vectors in registers, with AVX-512 or AVX2: what tiles are computed and turned with.
#pragma once

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))  // else there are no kernels
#define TILES

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

// A multiplication and an addition are one operation only where it says so below: left to the compiler, a pixel's last
// bits depend on how many pixels lie beside it. (Before vectors.h, or gcc would not inline what that defines.)
#ifdef __clang__
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "vectors.h"

namespace {

#ifdef __AVX512F__
constexpr int64_t kR = 8, kMaxV = 3;  // kR × kMaxV sums fill three quarters of the registers
#else
constexpr int64_t kR = 6, kMaxV = 2;
#endif
constexpr int64_t kFewer = 4;  // rows, whose sums with kMaxV vectors are just enough that none waits for another

inline Vec all(float value) { return value - Vec{}; }
#ifdef __AVX512F__
inline Vec multiplied_added(Vec a, Vec b, Vec c) { return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline Vec square_root(Vec v) { return (Vec)_mm512_sqrt_ps((__m512)v); }
inline Vec minimum(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }  // b if one is not a number
#else
inline Vec multiplied_added(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline Vec square_root(Vec v) { return (Vec)_mm256_sqrt_ps((__m256)v); }
inline Vec minimum(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
#endif

// The entries of a table at places that end in these bits.
inline Vec looked_up(const float (&table)[kLanes], Bits places) {
#ifdef __AVX512F__
    return (Vec)_mm512_permutexvar_ps((__m512i)places, _mm512_loadu_ps(table));
#else
    return (Vec)_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)places);
#endif
}

// Both as bfloat16 in each lane, the first in its lower half.
inline Vec paired(Vec first, Vec second) {
#ifdef __AVX512BF16__
    alignas(64) static constexpr uint16_t places[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    return (Vec)_mm512_permutexvar_epi16(_mm512_load_si512(places), (__m512i)both);
#else
    return (Vec)(rounded(first) | rounded(second) << 16);
#endif
}

#ifdef __clang__
#define MIX __builtin_shufflevector
#else  // gcc knows that only from 12 on
typedef int32_t Places __attribute__((vector_size(kLanes * sizeof(int32_t))));
#define MIX(a, b, ...) __builtin_shuffle(a, b, Places{__VA_ARGS__})
#endif
#ifdef __AVX512F__
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
    // Now r[4g + c] holds, four lanes at a time, rows 4g … 4g + 3 of columns c, 4 + c, 8 + c, 12 + c.
    for (int c = 0; c < 4; ++c) {
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
#else
inline void transpose(Vec (&r)[kLanes]) {
    Vec t[kLanes];
    for (int i = 0; i < 8; i += 2) {
        t[i] = MIX(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        t[i + 1] = MIX(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = MIX(t[i + j], t[i + 2 + j], 0, 1, 8, 9, 4, 5, 12, 13);
            r[i + 2 * j + 1] = MIX(t[i + j], t[i + 2 + j], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    // Now r[4g + c] holds, four lanes at a time, rows 4g … 4g + 3 of columns c and 4 + c.
    for (int c = 0; c < 4; ++c) {
        t[c] = MIX(r[c], r[4 + c], 0, 1, 2, 3, 8, 9, 10, 11);
        t[4 + c] = MIX(r[c], r[4 + c], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
}
#endif
#undef MIX

}  // namespace

#endif
