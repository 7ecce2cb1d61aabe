// Vectors of floats as wide as the CPU has them, for cpu_kernel.cpp.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

static inline Floats load(const float* from) {
    Floats x;
    memcpy(&x, from, sizeof x);
    return x;
}

static inline Floats load(const uint16_t* from) {  // bf16: the upper half of a float
    Halves x;
    memcpy(&x, from, sizeof x);
    return (Floats)(__builtin_convertvector(x, Ints) << 16);
}

static inline Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }

static inline Floats load(const int8_t* from) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // else GCC would convert one byte after the other
    return to_floats((Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
    Bytes x;
    memcpy(&x, from, sizeof x);
    return to_floats(__builtin_convertvector(x, Ints));
#endif
}

static inline void store(float* to, Floats x) { memcpy(to, &x, sizeof x); }

typedef float Half __attribute__((vector_size(2 * LANES)));
typedef float Quarter __attribute__((vector_size(LANES)));

template <typename Op>
static inline float fold(Floats x, Op op) {  // reduces all lanes to one value
    Half a[2];
    memcpy(a, &x, sizeof x);
    a[0] = op(a[0], a[1]);
    Quarter b[2];
    memcpy(b, a, sizeof b);
    b[0] = op(b[0], b[1]);
    float y = b[0][0];
    for (int i = 1; i < LANES / 4; i++) y = op(y, b[0][i]);
    return y;
}

constexpr auto ADD = [](auto a, auto b) { return a + b; };
constexpr auto LARGER = [](auto a, auto b) { return a > b ? a : b; };

// Stores the sum of each of COUNT registers, side by side.
template <int COUNT>
static inline void store_sums(float* to, const Floats* x) {
#ifdef __AVX512F__
    if constexpr (COUNT == 4) {  // all at once: each shuffle serves two of them
        auto together = [](__m512 a, __m512 b) { return _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b); };
        const __m512d ab = _mm512_castps_pd(together((__m512)x[0], (__m512)x[1]));
        const __m512d cd = _mm512_castps_pd(together((__m512)x[2], (__m512)x[3]));
        const __m512 abcd = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)) + _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
        const __m512 half = abcd + _mm512_shuffle_f32x4(abcd, abcd, 0x0e);
        _mm_storeu_ps(to, _mm512_castps512_ps128(half + _mm512_shuffle_f32x4(half, half, 0x01)));
        return;
    }
#endif
    for (int i = 0; i < COUNT; i++) to[i] = fold(x[i], ADD);
}

#ifdef __AVX512F__
template <int COUNT>
static inline void store_sums(float* to, const Ints* x) {
    if constexpr (COUNT == 4) {
        auto together = [](__m512i a, __m512i b) {
            return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        };
        const __m512i ab = together((__m512i)x[0], (__m512i)x[1]), cd = together((__m512i)x[2], (__m512i)x[3]);
        const __m512i abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
        const __m512i half = _mm512_add_epi32(abcd, _mm512_shuffle_i32x4(abcd, abcd, 0x0e));
        const __m512i all = _mm512_add_epi32(half, _mm512_shuffle_i32x4(half, half, 0x01));
        _mm_storeu_ps(to, _mm_cvtepi32_ps(_mm512_castsi512_si128(all)));
        return;
    }
    for (int i = 0; i < COUNT; i++) to[i] = _mm512_reduce_add_epi32((__m512i)x[i]);
}
#endif

static inline Floats exp(Floats x) {  // for x <= 0, by the polynomial of Cephes' expf
    x = x < -87.0f ? Floats{} - 87.0f : x;
    Ints power = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
    Floats whole = __builtin_convertvector(power, Floats);
    Floats rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Floats y = Floats{} + 1.9875691500e-4f;
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        y = y * rest + c;
    return (y * rest * rest + rest + 1.0f) * (Floats)((power + 127) << 23);
}

