// Attention of one new token to a cache: softmax(q k^T) v, where every query row sees every key.
//
// Each key is read once for all the query heads that share it, which is what MLA's absorbed decoding needs: a single
// key for all heads. Keys are cut into chunks for the threads to take, and what the chunks give is put together by the
// largest score and the sum of each (flash decoding). decode.py has the other side of `attend`.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#ifdef __AVX512F__
constexpr int LANES = 16, MOST_ROWS = 6, KEYS = 4;  // rows x keys sums live in registers: 24 of 32
#else
constexpr int LANES = 8, MOST_ROWS = 4, KEYS = 2;  // 8 of 16
#endif
constexpr int BLOCK = 32;   // keys whose scores are held at once: their bytes stay in the first cache
constexpr int CHUNK = 256;  // keys that one thread takes; not a matter of threads, so that results are not either

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

static inline float sum(Floats x) {
    Half a[2];
    memcpy(a, &x, sizeof x);
    a[0] += a[1];
    Quarter b[2];
    memcpy(b, a, sizeof b);
    b[0] += b[1];
    float s = 0;
    for (int i = 0; i < LANES / 4; i++) s += b[0][i];
    return s;
}

static inline Floats exp(Floats x) {  // of x <= 0, by the polynomial of Cephes' expf
    x = x < -87.0f ? Floats{} - 87.0f : x;
    Ints power = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
    Floats whole = __builtin_convertvector(power, Floats);
    Floats rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Floats y = Floats{} + 1.9875691500e-4f;
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        y = y * rest + c;
    return (y * rest * rest + rest + 1.0f) * (Floats)((power + 127) << 23);
}

// What a chunk of keys gives for some query rows.
struct Part {
    float* out;    // (rows, value_dim): sum of exp(score - most) v
    float* most;   // (rows): the largest score
    float* total;  // (rows): sum of exp(score - most)
};

template <int ROWS, int COUNT, typename T>
static inline void score(const float* q, const T* k, long stride, int dim, float (*scores)[BLOCK], int at) {
    Floats sums[ROWS][COUNT] = {};
    for (int d = 0; d < dim; d += LANES)
        for (int j = 0; j < COUNT; j++) {
            Floats key = load(k + j * stride + d);
            __builtin_prefetch(k + (j + BLOCK) * stride + d, 0, 2);  // of the next block, to the second cache
            for (int r = 0; r < ROWS; r++) sums[r][j] += load(q + r * dim + d) * key;
        }
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < COUNT; j++) scores[r][at + j] = sum(sums[r][j]);
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

template <int ROWS>
static void to_weights(float (*scores)[BLOCK], int keys, Part part, int value_dim) {
    for (int r = 0; r < ROWS; r++) {
        float most = part.most[r];
        for (int j = 0; j < keys; j++) most = scores[r][j] > most ? scores[r][j] : most;
        for (int j = keys; j < BLOCK; j++) scores[r][j] = -INFINITY;
        float before = std::exp(part.most[r] - most);
        Floats sums = {};
        for (int j = 0; j < BLOCK; j += LANES) {
            Floats weights = exp(load(scores[r] + j) - most);
            store(scores[r] + j, weights);
            sums += weights;
        }
        part.most[r] = most;
        part.total[r] = part.total[r] * before + sum(sums);
        if (before != 1)
            for (int d = 0; d < value_dim; d++) part.out[r * value_dim + d] *= before;
    }
}

template <int ROWS, typename T>
static void attend_block(const float* q, const T* k, long k_stride, const T* v, long v_stride, int keys, int dim,
                         int value_dim, Part part) {
    float scores[ROWS][BLOCK];
    int j = 0, d = 0;
    for (; j + KEYS <= keys; j += KEYS) score<ROWS, KEYS>(q, k + j * k_stride, k_stride, dim, scores, j);
    for (; j < keys; j++) score<ROWS, 1>(q, k + j * k_stride, k_stride, dim, scores, j);
    to_weights<ROWS>(scores, keys, part, value_dim);
    for (; d + KEYS * LANES <= value_dim; d += KEYS * LANES)
        add_values<ROWS, KEYS>(scores, v + d, v_stride, keys, part.out + d, value_dim);
    for (; d < value_dim; d += LANES) add_values<ROWS, 1>(scores, v + d, v_stride, keys, part.out + d, value_dim);
}

template <typename T>
static void attend_rows(int rows, const float* q, const T* k, long k_stride, const T* v, long v_stride, int keys,
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
static void attend_chunk(const float* q, const T* k, const T* v, const Sizes& n, long keys, Part part) {
    for (long r = 0; r < n.rows; r++) part.most[r] = -INFINITY, part.total[r] = 0;
    memset(part.out, 0, n.rows * n.value_dim * sizeof(float));
    const long tiles = (n.rows + MOST_ROWS - 1) / MOST_ROWS, tile = (n.rows + tiles - 1) / tiles;  // as equal as can be
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
        for (const Part& part : parts) most = part.most[r] > most ? part.most[r] : most;
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
static void attend(const float* q, const T* k, const T* v, const Sizes& n, float* out) {
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

extern "C" void attend_bf16(const float* q, const uint16_t* k, const uint16_t* v, const Sizes* n, float* out) {
    attend(q, k, v, *n, out);
}
