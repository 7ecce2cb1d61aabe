// Products of a few query rows with keys, and of softmax weights with values, in fp32, bf16 and int8.
//
// `Query<T>` is the type of queries over a cache of T. `score` gives the products of ROWS queries with COUNT keys,
// `add_all_values` adds the values of up to BLOCK keys, times their weights, to the rows of `out`.

#pragma once

#include <type_traits>

#include "cpu_vectors.h"

#ifdef __AVX512F__
constexpr int MOST_ROWS = 6, KEYS = 4;  // MOST_ROWS x KEYS sums stay in registers: 24 of 32
#else
constexpr int MOST_ROWS = 4, KEYS = 2;  // 8 of 16
#endif
constexpr int BLOCK = 32;  // keys that are scored at once: their bytes stay in the L1 cache
static_assert(BLOCK % LANES == 0 && BLOCK % 2 == 0);

#ifdef __AVX512VNNI__
template <typename T>
using Query = std::conditional_t<std::is_same_v<T, int8_t>, int16_t, T>;
#else
template <typename T>
using Query = std::conditional_t<std::is_same_v<T, int8_t>, float, T>;
#endif

// Products of floats, to which keys and values of any type are converted.

template <int ROWS, int COUNT, typename Q, typename T>
static inline void score(const Q* q, long q_stride, const T* k, long stride, int dim, float (*scores)[BLOCK], int at) {
    Floats sums[ROWS][COUNT] = {};
    for (int d = 0; d < dim; d += LANES)
        for (int j = 0; j < COUNT; j++) {
            Floats key = load(k + j * stride + d);
            __builtin_prefetch(k + (j + BLOCK) * stride + d, 0, 2);  // the next block, into the L2 cache
            for (int r = 0; r < ROWS; r++) sums[r][j] += load(q + r * q_stride + d) * key;
        }
    for (int r = 0; r < ROWS; r++) store_sums<COUNT>(scores[r] + at, sums[r]);
}

template <int ROWS, int COUNT, typename T>
static inline void add_values(const float (*weights)[BLOCK], const T* v, long stride, int keys, float* out, int dim) {
    Floats sums[ROWS][COUNT];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COUNT; c++) sums[r][c] = load(out + r * dim + c * LANES);
    for (int j = 0; j < keys; j++)
        for (int c = 0; c < COUNT; c++) {
            Floats value = load(v + j * stride + c * LANES);
            for (int r = 0; r < ROWS; r++) sums[r][c] += weights[r][j] * value;
        }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COUNT; c++) store(out + r * dim + c * LANES, sums[r][c]);
}

template <int ROWS, typename T>
static inline void add_all_values(const float (*weights)[BLOCK], const T* v, long stride, int keys, float* out,
                                  int dim) {
    int d = 0;
    for (; d + KEYS * LANES <= dim; d += KEYS * LANES)
        add_values<ROWS, KEYS>(weights, v + d, stride, keys, out + d, dim);
    for (; d < dim; d += LANES) add_values<ROWS, 1>(weights, v + d, stride, keys, out + d, dim);
}

static inline float prepare(const float* from, float* to, int size) {  // as below, where int8 becomes floats
    memcpy(to, from, size * sizeof(float));
    return 1;
}

#ifdef __AVX512VNNI__
// The same with instructions that multiply two pairs of 16-bit numbers per lane and add both products to it: pairs of
// bf16 to a float, and pairs of int16, which int8 becomes, to an int32. They need queries and weights of these types.

constexpr int PAIRS = 2 * LANES;

#ifdef __AVX512BF16__
static inline Floats add_products(Floats sums, __m512i a, __m512i b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
}
#endif

static inline Ints add_products(Ints sums, __m512i a, __m512i b) {
    return (Ints)_mm512_dpwssd_epi32((__m512i)sums, a, b);
}

template <bool WHOLE, typename T>
static inline __m512i load_pairs(const T* from) {  // if not whole: LANES values, then zeros
    if constexpr (sizeof(T) == 1) {
        if constexpr (WHOLE) return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from));
        return _mm512_zextsi256_si512(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from)));
    }
    if constexpr (WHOLE) return _mm512_loadu_si512(from);
    return _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)from));
}

// Rounds floats to multiples of a step, which it returns; the largest magnitude becomes LARGEST steps, so that the sum
// of 1024 products with int8 fits into an int32.
constexpr int LARGEST = INT32_MAX / (1024 * INT8_MAX);

static inline float prepare(const float* from, int16_t* to, int size) {
    Floats largest = {};
    for (int i = 0; i < size; i += LANES) largest = LARGER(largest, LARGER(load(from + i), -load(from + i)));
    const float step = LARGER(fold(largest, LARGER), 1e-30f) / LARGEST;
    for (int i = 0; i < size; i += LANES) {
        const __m512i rounded = _mm512_cvtps_epi32((__m512)(load(from + i) * (1 / step)));
        _mm256_storeu_si256((__m256i*)(to + i), _mm512_cvtepi32_epi16(rounded));
    }
    return step;
}

template <bool WHOLE, int ROWS, int COUNT, typename Sums, typename Q, typename T>
static inline void add_products(const Q* q, long q_stride, const T* k, long stride, Sums (*sums)[COUNT]) {
    __m512i keys[COUNT];
    for (int j = 0; j < COUNT; j++) {
        keys[j] = load_pairs<WHOLE>(k + j * stride);
        __builtin_prefetch(k + (j + BLOCK) * stride, 0, 2);
    }
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < COUNT; j++)
            sums[r][j] = add_products(sums[r][j], load_pairs<WHOLE>(q + r * q_stride), keys[j]);
}

template <typename Sums, int ROWS, int COUNT, typename Q, typename T>
static inline void score_pairs(const Q* q, long q_stride, const T* k, long stride, int dim, float (*scores)[BLOCK],
                               int at) {
    Sums sums[ROWS][COUNT] = {};
    int d = 0;
    for (; d + PAIRS <= dim; d += PAIRS) add_products<true, ROWS>(q + d, q_stride, k + d, stride, sums);
    if (d < dim) add_products<false, ROWS>(q + d, q_stride, k + d, stride, sums);
    for (int r = 0; r < ROWS; r++) store_sums<COUNT>(scores[r] + at, sums[r]);
}

// Takes the values of two keys at a time, interleaved so that each column's pair lies in one lane.
template <typename Sums, bool WHOLE, int ROWS, int COUNT, typename T>
static inline void add_value_pairs(const uint16_t (*weights)[BLOCK], const float* steps, const T* v, long stride,
                                   int keys, float* out, int dim) {
    constexpr int WIDTH = WHOLE ? 2 * COUNT : 1;  // in units of LANES
    constexpr bool INTS = std::is_same_v<Sums, Ints>;
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(LANES));
    Sums sums[ROWS][WIDTH] = {};
    if constexpr (!INTS)
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < WIDTH; c++) sums[r][c] = load(out + r * dim + c * LANES);
    for (int j = 0; j < keys; j += 2) {
        const T *at = v + j * stride, *next = j + 1 < keys ? at + stride : at;  // past the end: a weight of almost 0
        __m512i values[2 * COUNT];
        for (int c = 0; c < COUNT; c++) {
            const __m512i a = load_pairs<WHOLE>(at + c * PAIRS), b = load_pairs<WHOLE>(next + c * PAIRS);
            values[2 * c] = _mm512_permutex2var_epi16(a, first, b);
            values[2 * c + 1] = _mm512_permutex2var_epi16(a, second, b);
        }
        for (int r = 0; r < ROWS; r++) {
            int32_t pair;
            memcpy(&pair, weights[r] + j, sizeof pair);
            for (int c = 0; c < WIDTH; c++) sums[r][c] = add_products(sums[r][c], _mm512_set1_epi32(pair), values[c]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < WIDTH; c++) {
            float* to = out + r * dim + c * LANES;
            if constexpr (INTS) store(to, load(to) + to_floats(sums[r][c]) * steps[r]);
            if constexpr (!INTS) store(to, sums[r][c]);
        }
}

template <typename Sums, int ROWS, typename T>
static inline void add_all_value_pairs(const uint16_t (*weights)[BLOCK], const float* steps, const T* v, long stride,
                                       int keys, float* out, int dim) {
    constexpr int COUNT = ROWS > 3 ? 1 : 2;  // independent sums, as many as fit into the registers
    int d = 0;
    for (; d + COUNT * PAIRS <= dim; d += COUNT * PAIRS)
        add_value_pairs<Sums, true, ROWS, COUNT>(weights, steps, v + d, stride, keys, out + d, dim);
    for (; d + PAIRS <= dim; d += PAIRS)
        add_value_pairs<Sums, true, ROWS, 1>(weights, steps, v + d, stride, keys, out + d, dim);
    if (d < dim) add_value_pairs<Sums, false, ROWS, 1>(weights, steps, v + d, stride, keys, out + d, dim);
}

#ifdef __AVX512BF16__
template <int ROWS, int COUNT>
static inline void score(const uint16_t* q, long q_stride, const uint16_t* k, long stride, int dim,
                         float (*scores)[BLOCK], int at) {
    score_pairs<Floats, ROWS, COUNT>(q, q_stride, k, stride, dim, scores, at);
}

template <int ROWS>
static inline void add_all_values(const float (*weights)[BLOCK], const uint16_t* v, long stride, int keys, float* out,
                                  int dim) {
    uint16_t rounded[ROWS][BLOCK];
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < BLOCK; j += LANES)
            _mm256_storeu_si256((__m256i*)(rounded[r] + j), (__m256i)_mm512_cvtneps_pbh((__m512)load(weights[r] + j)));
    add_all_value_pairs<Floats, ROWS>(rounded, nullptr, v, stride, keys, out, dim);
}
#endif

template <int ROWS, int COUNT>
static inline void score(const int16_t* q, long q_stride, const int8_t* k, long stride, int dim,
                         float (*scores)[BLOCK], int at) {
    score_pairs<Ints, ROWS, COUNT>(q, q_stride, k, stride, dim, scores, at);
}

template <int ROWS>
static inline void add_all_values(const float (*weights)[BLOCK], const int8_t* v, long stride, int keys, float* out,
                                  int dim) {
    int16_t rounded[ROWS][BLOCK];
    float steps[ROWS];
    for (int r = 0; r < ROWS; r++) steps[r] = prepare(weights[r], rounded[r], BLOCK);
    add_all_value_pairs<Ints, ROWS>((const uint16_t(*)[BLOCK])rounded, steps, v, stride, keys, out, dim);
}
#endif
