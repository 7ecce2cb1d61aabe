// Attention of one new token over a cache: softmax(q k^T) v, where every query row sees every key.
//
// Each key is read once for all the query heads that share it. MLA's absorbed decoding needs this, as all its heads
// share a single key. The keys are split into chunks among the threads. The chunks' results are merged by the largest
// score and the sum of each (flash decoding). An int8 cache is read as stored: keys are integers times a scale of each
// token and part, and so are values. cpu_kernel.py calls `attend`.

#include <cmath>
#include <memory>
#include <vector>

#include "cpu_products.h"

constexpr int CHUNK = 256;  // keys in a chunk; as it does not depend on the number of threads, neither do results
constexpr int PARTS = 2;    // most parts of a key

struct Sizes {
    long batch, heads, rows, keys, dim, value_dim;
    long first_part;                              // columns of an int8 key that share the first scale
    long k_batch, k_head, k_key;                  // strides
    long v_batch, v_head, v_key;
    long k_scales_batch, k_scales_head, k_scales_key;
    long v_scales_batch, v_scales_head, v_scales_key;
};

// Queries as the products take them; those of an int8 cache times a step of each row and part.
template <typename T>
struct Queries {
    const Query<T>* q;   // (rows, dim)
    const float* steps;  // (rows, PARTS)

    Queries from(long row, const Sizes& n) const { return {q + row * n.dim, steps + row * PARTS}; }
};

// The cache from some key on; the scales are those of int8, in bf16.
template <typename T>
struct Cache {
    const T *k, *v;
    const uint16_t *k_scales, *v_scales;

    Cache from(long key, const Sizes& n) const {
        return {k + key * n.k_key, v + key * n.v_key, k_scales + key * n.k_scales_key, v_scales + key * n.v_scales_key};
    }
};

// The partial result of a chunk of keys for some query rows.
struct Part {
    float* out;    // (rows, value_dim): sum of exp(score - most) v
    float* most;   // (rows): the largest score
    float* total;  // (rows): sum of exp(score - most)
};

static inline void load_scales(const uint16_t* from, long stride, int keys, float* to) {
    uint32_t bits[BLOCK] = {};
    for (int j = 0; j < keys; j++) bits[j] = (uint32_t)from[j * stride] << 16;
    memcpy(to, bits, sizeof bits);
}

template <int ROWS, typename Q, typename T>
static inline void score_all(const Q* q, long q_stride, const T* k, long stride, int keys, int dim,
                             float (*scores)[BLOCK]) {
    int j = 0;
    for (; j + KEYS <= keys; j += KEYS) score<ROWS, KEYS>(q, q_stride, k + j * stride, stride, dim, scores, j);
    for (; j < keys; j++) score<ROWS, 1>(q, q_stride, k + j * stride, stride, dim, scores, j);
}

// Adds the products with a part of int8 keys, the columns from `begin` to `end`, to the scores.
template <int ROWS>
static inline void add_scores(int part, long begin, long end, Queries<int8_t> queries, Cache<int8_t> cache,
                              const Sizes& n, int keys, float (*scores)[BLOCK]) {
    float products[ROWS][BLOCK] = {}, scales[BLOCK];
    score_all<ROWS>(queries.q + begin, n.dim, cache.k + begin, n.k_key, keys, end - begin, products);
    load_scales(cache.k_scales + part, n.k_scales_key, keys, scales);
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < BLOCK; j++) scores[r][j] += products[r][j] * (queries.steps[r * PARTS + part] * scales[j]);
}

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
static void attend_block(Queries<T> queries, Cache<T> cache, const Sizes& n, int keys, Part part) {
    constexpr bool INT8 = std::is_same_v<T, int8_t>;
    float scores[ROWS][BLOCK];
    if constexpr (INT8) {
        memset(scores, 0, sizeof scores);
        add_scores<ROWS>(0, 0, n.first_part, queries, cache, n, keys, scores);
        if (n.first_part < n.dim) add_scores<ROWS>(1, n.first_part, n.dim, queries, cache, n, keys, scores);
    } else {
        score_all<ROWS>(queries.q, n.dim, cache.k, n.k_key, keys, n.dim, scores);
    }
    to_weights<ROWS>(scores, keys, part, n.value_dim);
    if constexpr (INT8) {
        float scales[BLOCK];
        load_scales(cache.v_scales, n.v_scales_key, keys, scales);
        for (int r = 0; r < ROWS; r++)
            for (int j = 0; j < BLOCK; j++) scores[r][j] *= scales[j];
    }
    add_all_values<ROWS>(scores, cache.v, n.v_key, keys, part.out, n.value_dim);
}

template <typename T>
static void attend_rows(int rows, Queries<T> queries, Cache<T> cache, const Sizes& n, int keys, Part part) {
    static decltype(&attend_block<1, T>) const blocks[] = {
        attend_block<1, T>, attend_block<2, T>, attend_block<3, T>, attend_block<4, T>,
#ifdef __AVX512F__
        attend_block<5, T>, attend_block<6, T>,
#endif
    };
    blocks[rows - 1](queries, cache, n, keys, part);
}

template <typename T>
static void attend_chunk(Queries<T> queries, Cache<T> cache, const Sizes& n, long keys, Part part) {
    for (long r = 0; r < n.rows; r++) part.most[r] = -INFINITY, part.total[r] = 0;
    memset(part.out, 0, n.rows * n.value_dim * sizeof(float));
    const long tiles = (n.rows + MOST_ROWS - 1) / MOST_ROWS, tile = (n.rows + tiles - 1) / tiles;  // nearly equal
    for (long begin = 0; begin < keys; begin += BLOCK) {
        const int count = keys - begin < BLOCK ? keys - begin : BLOCK;
        for (long r = 0; r < n.rows; r += tile) {
            const int rows = n.rows - r < tile ? n.rows - r : tile;
            Part some = {part.out + r * n.value_dim, part.most + r, part.total + r};
            attend_rows(rows, queries.from(r, n), cache.from(begin, n), n, count, some);
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
static void attend(Queries<T> queries, Cache<T> cache, const Sizes& n, float* out) {
    const long chunks = (n.keys + CHUNK - 1) / CHUNK, heads = n.batch * n.heads;
    const long vectors = (n.rows * (n.value_dim + 2) + LANES - 1) / LANES;  // of a chunk; Floats for their alignment
    std::unique_ptr<Floats[]> memory(new Floats[heads * chunks * vectors]);
    auto part = [&](long head, long chunk) {
        float* at = (float*)(memory.get() + (head * chunks + chunk) * vectors);
        return Part{at, at + n.rows * n.value_dim, at + n.rows * (n.value_dim + 1)};
    };
#pragma omp parallel
    {
#pragma omp for collapse(2)
        for (long head = 0; head < heads; head++)
            for (long chunk = 0; chunk < chunks; chunk++) {
                const long b = head / n.heads, h = head % n.heads, begin = chunk * CHUNK;
                const long keys = n.keys - begin < CHUNK ? n.keys - begin : CHUNK;
                const Cache<T> own = {cache.k + b * n.k_batch + h * n.k_head, cache.v + b * n.v_batch + h * n.v_head,
                                      cache.k_scales + b * n.k_scales_batch + h * n.k_scales_head,
                                      cache.v_scales + b * n.v_scales_batch + h * n.v_scales_head};
                attend_chunk(queries.from(head * n.rows, n), own.from(begin, n), n, keys, part(head, chunk));
            }
#pragma omp for
        for (long head = 0; head < heads; head++) {
            std::vector<Part> parts;
            for (long chunk = 0; chunk < chunks; chunk++) parts.push_back(part(head, chunk));
            put_together(parts, n, out + head * n.rows * n.value_dim);
        }
    }
}

extern "C" void attend_fp32(const float* q, const Cache<float>* cache, const Sizes* n, float* out) {
    attend<float>({q, nullptr}, *cache, *n, out);
}

extern "C" void attend_bf16(const uint16_t* q, const Cache<uint16_t>* cache, const Sizes* n, float* out) {
    attend<uint16_t>({q, nullptr}, *cache, *n, out);
}

extern "C" void attend_int8(const float* q, const Cache<int8_t>* cache, const Sizes* n, float* out) {
    const long rows = n->batch * n->heads * n->rows;
    std::vector<Query<int8_t>> rounded(rows * n->dim);
    std::vector<float> steps(rows * PARTS);
    for (long r = 0; r < rows; r++) {
        const long at = r * n->dim, next = at + n->first_part;
        steps[r * PARTS] = prepare(q + at, rounded.data() + at, n->first_part);
        if (n->first_part < n->dim)
            steps[r * PARTS + 1] = prepare(q + next, rounded.data() + next, n->dim - n->first_part);
    }
    attend<int8_t>({rounded.data(), steps.data()}, *cache, *n, out);
}
