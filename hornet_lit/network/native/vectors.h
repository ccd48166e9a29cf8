// Vectors of floats on any processor, and their ways from and to memory, as floats or bfloat16.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

#ifdef __AVX512F__
constexpr int64_t kLanes = 16;
#else
constexpr int64_t kLanes = 8;
#endif
constexpr uint64_t kCached = 1 << 20;  // bytes
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint16_t Half __attribute__((vector_size(kLanes * sizeof(uint16_t))));  // bfloat16: a float's upper half
typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(uint32_t))));

inline int64_t vectors(int64_t n) { return (n + kLanes - 1) / kLanes; }

inline Vec* allocated(int64_t vectors) {
    return static_cast<Vec*>(std::aligned_alloc(sizeof(Vec), vectors * sizeof(Vec)));
}

// To the nearest bfloat16, ties to even, in the lower half of each lane; what is not a number stays so.
inline Bits rounded(Vec v) {
    const Bits bits = (Bits)v;
    return (v == v ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000) >> 16;
}

inline Half narrowed(Vec v) {
#ifdef __AVX512BF16__
    return (Half)_mm512_cvtneps_pbh((__m512)v);
#else
    return __builtin_convertvector(rounded(v), Half);
#endif
}

// The first `count` elements from memory, all that fit in a vector if those are no more.
template <class V, class T>
inline V load_some(const T* from, int64_t count) {
    V v = {};
    if (count >= int64_t(sizeof v / sizeof(T))) {  // a constant size, which the compiler turns into one vector load
        std::memcpy(&v, from, sizeof v);
    } else {
        std::memcpy(&v, from, count * sizeof(T));
    }
    return v;
}

template <class V, class T>
inline void store_some(V v, T* to, int64_t count) {
    if (count >= int64_t(sizeof v / sizeof(T))) {
        std::memcpy(to, &v, sizeof v);
    } else {
        std::memcpy(to, &v, count * sizeof(T));
    }
}

inline Vec load(const float* from, int64_t lanes) { return load_some<Vec>(from, lanes); }
inline Vec load(const uint16_t* from, int64_t lanes) {
    return (Vec)(__builtin_convertvector(load_some<Half>(from, lanes), Bits) << 16);
}
inline void store(Vec v, float* to, int64_t lanes) { store_some(v, to, lanes); }
inline void store(Vec v, uint16_t* to, int64_t lanes) {
    store_some(narrowed(v), to, lanes);
}

// Whether the lines of a map of M pixels of C channels are written past the caches: one that they would not keep costs
// less so, since no line is read before it is overwritten. Only whole lines, whole vectors.
template <class T>
bool past_caches(const T* x, int64_t M, int64_t C) {
    const uint64_t row = C * sizeof(T), line = 64;
    return sizeof(Vec) == line && M * row > kCached && row % line == 0 && reinterpret_cast<uintptr_t>(x) % line == 0;
}

inline void store_past(Vec v, float* to) {
#ifdef __AVX512F__
    _mm512_stream_ps(to, (__m512)v);
#else
    store(v, to, kLanes);
#endif
}
inline void store_past(Vec v, uint16_t* to) {
#ifdef __AVX512F__
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)narrowed(v));
#else
    store(v, to, kLanes);
#endif
}

// After the last `store_past` of a thread, before others read.
inline void settle() {
#ifdef __AVX512F__
    _mm_sfence();
#endif
}

}  // namespace
