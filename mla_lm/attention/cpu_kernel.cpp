// Attention of one new token over a cache: softmax(q k^T) v, where every query row sees every key.
//
// Each key is read once for all the query heads that share it. MLA's absorbed decoding needs this, as all its heads
// share a single key. The keys are split into chunks among the threads. The chunks' results are merged by the largest
// score and the sum of each (flash decoding). cpu_kernel.py calls `attend`.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
constexpr int LANES = 16, MOST_ROWS = 6, KEYS = 4;  // MOST_ROWS x KEYS sums stay in registers: 24 of 32
#else
constexpr int LANES = 8, MOST_ROWS = 4, KEYS = 2;  // 8 of 16
#endif
constexpr int BLOCK = 32;   // keys that are scored at once: their bytes stay in the L1 cache
static_assert(BLOCK % LANES == 0 && BLOCK % 2 == 0);
constexpr int CHUNK = 256;  // keys in a chunk; as it does not depend on the number of threads, neither do results

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

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

// The partial result of a chunk of keys for some query rows.
struct Part {
    float* out;    // (rows, value_dim): sum of exp(score - most) v
    float* most;   // (rows): the largest score
    float* total;  // (rows): sum of exp(score - most)
};

template <int ROWS, int COUNT, typename T>
static inline void score(const T* q, const T* k, long stride, int dim, float (*scores)[BLOCK], int at) {
    Floats sums[ROWS][COUNT] = {};
    for (int d = 0; d < dim; d += LANES)
        for (int j = 0; j < COUNT; j++) {
            Floats key = load(k + j * stride + d);
            __builtin_prefetch(k + (j + BLOCK) * stride + d, 0, 2);  // the next block, into the L2 cache
            for (int r = 0; r < ROWS; r++) sums[r][j] += load(q + r * dim + d) * key;
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

#ifdef __AVX512BF16__
// The same with instructions that multiply two pairs of bf16 per lane and add both products to a float. They need the
// softmax weights rounded to bf16.
constexpr int PAIRS = 2 * LANES;

template <bool WHOLE>
static inline __m512bh load_pairs(const uint16_t* from) {  // if not whole: LANES values, then zeros
    if constexpr (WHOLE) return (__m512bh)_mm512_loadu_si512(from);
    return (__m512bh)_mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)from));
}

static inline void round_to_bf16(const float* from, uint16_t* to, int size) {
    for (int i = 0; i < size; i += LANES)
        _mm256_storeu_si256((__m256i*)(to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
}

template <bool WHOLE, int ROWS, int COUNT>
static inline void add_products(const uint16_t* q, const uint16_t* k, long stride, int dim, Floats (*sums)[COUNT]) {
    __m512bh keys[COUNT];
    for (int j = 0; j < COUNT; j++) {
        keys[j] = load_pairs<WHOLE>(k + j * stride);
        __builtin_prefetch(k + (j + BLOCK) * stride, 0, 2);
    }
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < COUNT; j++)
            sums[r][j] = (Floats)_mm512_dpbf16_ps((__m512)sums[r][j], load_pairs<WHOLE>(q + r * dim), keys[j]);
}

template <int ROWS, int COUNT>
static inline void score(const uint16_t* q, const uint16_t* k, long stride, int dim, float (*scores)[BLOCK], int at) {
    Floats sums[ROWS][COUNT] = {};
    int d = 0;
    for (; d + PAIRS <= dim; d += PAIRS) add_products<true, ROWS>(q + d, k + d, stride, dim, sums);
    if (d < dim) add_products<false, ROWS>(q + d, k + d, stride, dim, sums);
    for (int r = 0; r < ROWS; r++) store_sums<COUNT>(scores[r] + at, sums[r]);
}

// Takes the values of two keys at a time, interleaved so that each column's pair lies in one lane.
template <bool WHOLE, int ROWS, int COUNT>
static inline void add_values(const uint16_t (*weights)[BLOCK], const uint16_t* v, long stride, int keys, float* out,
                              int dim) {
    constexpr int WIDTH = WHOLE ? 2 * COUNT : 1;  // in units of LANES
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(LANES));
    Floats sums[ROWS][WIDTH];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < WIDTH; c++) sums[r][c] = load(out + r * dim + c * LANES);
    for (int j = 0; j < keys; j += 2) {
        const uint16_t *at = v + j * stride, *next = j + 1 < keys ? at + stride : at;  // past the end: weight e^-87
        __m512bh values[2 * COUNT];
        for (int c = 0; c < COUNT; c++) {
            const __m512i a = (__m512i)load_pairs<WHOLE>(at + c * PAIRS), b = (__m512i)load_pairs<WHOLE>(next + c * PAIRS);
            values[2 * c] = (__m512bh)_mm512_permutex2var_epi16(a, first, b);
            values[2 * c + 1] = (__m512bh)_mm512_permutex2var_epi16(a, second, b);
        }
        for (int r = 0; r < ROWS; r++) {
            int32_t pair;
            memcpy(&pair, weights[r] + j, sizeof pair);
            for (int c = 0; c < WIDTH; c++)
                sums[r][c] = (Floats)_mm512_dpbf16_ps((__m512)sums[r][c], (__m512bh)_mm512_set1_epi32(pair), values[c]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < WIDTH; c++) store(out + r * dim + c * LANES, sums[r][c]);
}

template <int ROWS>
static inline void add_all_values(const float (*weights)[BLOCK], const uint16_t* v, long stride, int keys, float* out,
                                  int dim) {
    constexpr int COUNT = ROWS > 3 ? 1 : 2;  // independent sums, as many as fit into the registers
    uint16_t rounded[ROWS][BLOCK];
    for (int r = 0; r < ROWS; r++) round_to_bf16(weights[r], rounded[r], BLOCK);
    int d = 0;
    for (; d + COUNT * PAIRS <= dim; d += COUNT * PAIRS)
        add_values<true, ROWS, COUNT>(rounded, v + d, stride, keys, out + d, dim);
    for (; d + PAIRS <= dim; d += PAIRS) add_values<true, ROWS, 1>(rounded, v + d, stride, keys, out + d, dim);
    if (d < dim) add_values<false, ROWS, 1>(rounded, v + d, stride, keys, out + d, dim);
}
#endif

template <int ROWS>
static void to_weights(float (*scores)[BLOCK], int keys, Part part, int value_dim) {
    for (int r = 0; r < ROWS; r++) {
        for (int j = keys; j < BLOCK; j++) scores[r][j] = -INFINITY;
        Floats largest = load(scores[r]), sums = {};
        for (int j = LANES; j < BLOCK; j += LANES) largest = LARGER(largest, load(scores[r] + j));
        const float most = LARGER(fold(largest, LARGER), part.most[r]);
        const float before = most == part.most[r] ? 1 : std::exp(part.most[r] - most);
        for (int j = 0; j < BLOCK; j += LANES) {
            Floats weights = exp(load(scores[r] + j) - most);
            store(scores[r] + j, weights);
            sums += weights;
        }
        part.most[r] = most;
        part.total[r] = part.total[r] * before + fold(sums, ADD);
        if (before != 1)
            for (int d = 0; d < value_dim; d++) part.out[r * value_dim + d] *= before;
    }
}

template <int ROWS, typename T>
static void attend_block(const T* q, const T* k, long k_stride, const T* v, long v_stride, int keys, int dim,
                         int value_dim, Part part) {
    float scores[ROWS][BLOCK];
    int j = 0;
    for (; j + KEYS <= keys; j += KEYS) score<ROWS, KEYS>(q, k + j * k_stride, k_stride, dim, scores, j);
    for (; j < keys; j++) score<ROWS, 1>(q, k + j * k_stride, k_stride, dim, scores, j);
    to_weights<ROWS>(scores, keys, part, value_dim);
    add_all_values<ROWS>(scores, v, v_stride, keys, part.out, value_dim);
}

template <typename T>
static void attend_rows(int rows, const T* q, const T* k, long k_stride, const T* v, long v_stride, int keys,
                        int dim, int value_dim, Part part) {
    static decltype(&attend_block<1, T>) const blocks[] = {
        attend_block<1, T>, attend_block<2, T>, attend_block<3, T>, attend_block<4, T>,
#ifdef __AVX512F__
        attend_block<5, T>, attend_block<6, T>,
#endif
    };
    blocks[rows - 1](q, k, k_stride, v, v_stride, keys, dim, value_dim, part);
}

struct Sizes {
    long batch, heads, rows, keys, dim, value_dim;
    long k_batch, k_head, k_key, v_batch, v_head, v_key;  // strides
};

template <typename T>
static void attend_chunk(const T* q, const T* k, const T* v, const Sizes& n, long keys, Part part) {
    for (long r = 0; r < n.rows; r++) part.most[r] = -INFINITY, part.total[r] = 0;
    memset(part.out, 0, n.rows * n.value_dim * sizeof(float));
    const long tiles = (n.rows + MOST_ROWS - 1) / MOST_ROWS, tile = (n.rows + tiles - 1) / tiles;  // nearly equal
    for (long begin = 0; begin < keys; begin += BLOCK) {
        const int count = keys - begin < BLOCK ? keys - begin : BLOCK;
        for (long r = 0; r < n.rows; r += tile) {
            const int rows = n.rows - r < tile ? n.rows - r : tile;
            Part some = {part.out + r * n.value_dim, part.most + r, part.total + r};
            attend_rows(rows, q + r * n.dim, k + begin * n.k_key, n.k_key, v + begin * n.v_key, n.v_key, count, n.dim,
                        n.value_dim, some);
        }
    }
}

static void put_together(const std::vector<Part>& parts, const Sizes& n, float* out) {
    for (long r = 0; r < n.rows; r++) {
        float most = -INFINITY, total = 0;
        for (const Part& part : parts) most = LARGER(most, part.most[r]);
        float* sums = out + r * n.value_dim;
        memset(sums, 0, n.value_dim * sizeof(float));
        for (const Part& part : parts) {
            const float share = std::exp(part.most[r] - most);
            total += share * part.total[r];
            for (long d = 0; d < n.value_dim; d++) sums[d] += share * part.out[r * n.value_dim + d];
        }
        for (long d = 0; d < n.value_dim; d++) sums[d] /= total;
    }
}

template <typename T>
static void attend(const T* q, const T* k, const T* v, const Sizes& n, float* out) {
    const long chunks = (n.keys + CHUNK - 1) / CHUNK, heads = n.batch * n.heads, width = n.rows * (n.value_dim + 2);
    std::unique_ptr<float[]> memory(new float[heads * chunks * width]);
    auto part = [&](long head, long chunk) {
        float* at = memory.get() + (head * chunks + chunk) * width;
        return Part{at, at + n.rows * n.value_dim, at + n.rows * (n.value_dim + 1)};
    };
#pragma omp parallel
    {
#pragma omp for collapse(2)
        for (long head = 0; head < heads; head++)
            for (long chunk = 0; chunk < chunks; chunk++) {
                const long b = head / n.heads, h = head % n.heads, begin = chunk * CHUNK;
                const long keys = n.keys - begin < CHUNK ? n.keys - begin : CHUNK;
                attend_chunk(q + head * n.rows * n.dim, k + b * n.k_batch + h * n.k_head + begin * n.k_key,
                             v + b * n.v_batch + h * n.v_head + begin * n.v_key, n, keys, part(head, chunk));
            }
#pragma omp for
        for (long head = 0; head < heads; head++) {
            std::vector<Part> parts;
            for (long chunk = 0; chunk < chunks; chunk++) parts.push_back(part(head, chunk));
            put_together(parts, n, out + head * n.rows * n.value_dim);
        }
    }
}

extern "C" void attend_fp32(const float* q, const float* k, const float* v, const Sizes* n, float* out) {
    attend(q, k, v, *n, out);
}

extern "C" void attend_bf16(const uint16_t* q, const uint16_t* k, const uint16_t* v, const Sizes* n, float* out) {
    attend(q, k, v, *n, out);
}
