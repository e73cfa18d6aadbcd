/* A decoding step as a tape: an array of small records, run by one call inside one parallel region.
 *
 * Every record is an operation over buffers that stay where they are. Threads split its columns, heads
 * or rows in one fixed way, so that most operations that follow one another need no barrier; where one
 * does, the tape says so. Activations are float32. What a row gives does not depend on the other rows,
 * bit for bit: each sum has one order, however rows and columns are grouped into tiles.
 */
/* Sums here keep the order in which they are written: `wide` says where they may be wide. */
#if defined(__clang__)
#pragma clang fp reassociate(off)
#else
#pragma GCC optimize("no-associative-math")
#endif
#include <omp.h>

#include "numbers.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define WIDE 8
typedef float wide __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));
typedef uint16_t half_wide __attribute__((vector_size(2 * WIDE), aligned(2), may_alias));
typedef uint32_t wide_bits __attribute__((vector_size(4 * WIDE)));
#define INLINE static inline __attribute__((always_inline))

enum code { EMBED, NORM, ANGLES, QUANTISE, PRODUCT, HEAD_NORM, ROTATE, APPEND, ATTEND, ACTIVATE, ADD, COPY, CAP, RETAIN, CLIP, PICK };
enum kind { F32, BF16, INT8, INT4, INT64 };
enum { GROUP = 32, HEADER = 32 };

/* in, out: float buffers [rows, .] unless said otherwise, each moved on by its stride for every thread
 * that has its own; wait: a barrier comes first; picked: only the rows of which scores are asked for. */
typedef struct {
    int32_t code, kind, wait, picked;
    int64_t in_stride, out_stride;
    void *in, *out, *more, *weight, *bias, *rest;
    int64_t n[6];
    float f[4];
} op_t;

typedef struct {
    int64_t rows, picks, scratch;                      /* scratch: floats that a thread needs for itself */
    const int64_t *ids, *slots, *places, *picked;      /* of each row: token, row of the states, position */
} call_t;

typedef struct {
    int64_t first, stop;
} range_t;

INLINE range_t share_of(int64_t count, int thread, int threads) {
    range_t r = {count * thread / threads, count * (thread + 1) / threads};
    return r;
}

#if defined(__clang__) || __GNUC__ >= 12
#define SWAPPED(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define SWAPPED(x, ...) __builtin_shuffle(x, (wide_bits){__VA_ARGS__})
#endif
INLINE wide wide_of(float x) { return x - (wide){0}; }

/* a b + c, rounded once where the processor can: left to itself a compiler does so in some places only. */
INLINE wide fuse(wide a, wide b, wide c) {
#if defined(__AVX2__) && defined(__FMA__)
    return (wide)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

INLINE float sum_of(wide x) {
    x += SWAPPED(x, 4, 5, 6, 7, 0, 1, 2, 3);
    x += SWAPPED(x, 2, 3, 0, 1, 6, 7, 4, 5);
    x += SWAPPED(x, 1, 0, 3, 2, 5, 4, 7, 6);
    return x[0];
}

/* Of a line of numbers: the sum of (x - mean)^2 or of x, and the largest. */
INLINE float sum_line(const float *x, int64_t n, const int squares, float mean) {
    wide sums = {0};
    int64_t i = 0;
    for (; i + WIDE <= n; i += WIDE) {
        wide each = *(const wide *)(x + i) - mean;
        if (squares) each *= each;
        sums += each;
    }
    float sum = sum_of(sums);
    for (; i < n; i++) sum += squares ? (x[i] - mean) * (x[i] - mean) : x[i] - mean;
    return sum;
}

INLINE float most_of(const float *x, int64_t n, float most) {
    wide held = wide_of(most);
    int64_t i = 0;
    for (; i + WIDE <= n; i += WIDE) {
        wide each = *(const wide *)(x + i);
        wide_bits more = (wide_bits)(each > held);
        held = (wide)(((wide_bits)each & more) | ((wide_bits)held & ~more));
    }
    for (int j = 0; j < WIDE; j++) most = held[j] > most ? held[j] : most;
    for (; i < n; i++) most = x[i] > most ? x[i] : most;
    return most;
}

INLINE wide get(const void *p, int64_t at, int bf16) {
    if (!bf16) return *(const wide *)((const float *)p + at);
    wide_bits bits = __builtin_convertvector(*(const half_wide *)((const uint16_t *)p + at), wide_bits) << 16;
    return (wide)bits;
}

INLINE float get_one(const void *p, int64_t at, int bf16) {
    return bf16 ? from_bf16(((const uint16_t *)p)[at]) : ((const float *)p)[at];
}

/* -- products */

/* y[r, c] = w[c] . x[r] (+ bias) for a tile of columns and rows, each sum in an accumulator of its own. */
INLINE void float_tile(const int bf16, const int columns, const int rows, const void *w, const float *x, float *y,
                       const float *bias, float factor, int64_t k, int64_t n, int64_t column) {
    wide sums[4][4];
    for (int c = 0; c < columns; c++)
        for (int r = 0; r < rows; r++) sums[c][r] = (wide){0};
    int64_t i = 0;
    for (; i + WIDE <= k; i += WIDE) {
        wide ws[4];
        for (int c = 0; c < columns; c++) ws[c] = get(w, (column + c) * k + i, bf16);
        for (int r = 0; r < rows; r++) {
            wide each = *(const wide *)(x + r * k + i);
            for (int c = 0; c < columns; c++) sums[c][r] = fuse(ws[c], each, sums[c][r]);
        }
    }
    for (int c = 0; c < columns; c++)
        for (int r = 0; r < rows; r++) {
            float sum = sum_of(sums[c][r]);
            for (int64_t j = i; j < k; j++) sum += get_one(w, (column + c) * k + j, bf16) * x[r * k + j];
            y[r * n + column + c] = bias ? sum * factor + bias[column + c] : sum * factor;
        }
}

/* A line of int8 x: its float scale, then its numbers, zeros up to a multiple of GROUP. */
INLINE int64_t line_of(int64_t k) { return HEADER + (k + GROUP - 1) / GROUP * GROUP; }

#if defined(__AVX2__)
typedef __m256i sums_t;
INLINE sums_t no_sums(void) { return _mm256_setzero_si256(); }
/* Products of |x| and w with the sign of x: pairs stay below 2^15 because neither goes to -128. */
INLINE sums_t dot_group(__m256i w, const int8_t *x) {
    __m256i each = _mm256_loadu_si256((const __m256i *)x);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(each), _mm256_sign_epi8(w, each));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
INLINE sums_t add_sums(sums_t a, sums_t b) { return _mm256_add_epi32(a, b); }
INLINE wide float_sums(sums_t a) { return (wide)_mm256_cvtepi32_ps(a); }
INLINE int32_t total(sums_t a) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
typedef __m256i group_t;
INLINE group_t group_int8(const int8_t *w) { return _mm256_loadu_si256((const __m256i *)w); }
INLINE group_t group_int4(const uint8_t *w) {
    __m128i both = _mm_loadu_si128((const __m128i *)w);
    __m256i apart = _mm256_inserti128_si256(_mm256_castsi128_si256(both), _mm_srli_epi16(both, 4), 1);
    return _mm256_sub_epi8(_mm256_and_si256(apart, _mm256_set1_epi8(15)), _mm256_set1_epi8(8));
}
#else
typedef struct { int32_t lane[WIDE]; } sums_t;
INLINE sums_t no_sums(void) { sums_t s = {{0}}; return s; }
typedef struct { int8_t w[GROUP]; } group_t;
INLINE sums_t dot_group(group_t w, const int8_t *x) {
    sums_t s = {{0}};
    for (int i = 0; i < GROUP; i++) s.lane[i / 4] += (int32_t)w.w[i] * x[i];
    return s;
}
INLINE sums_t add_sums(sums_t a, sums_t b) {
    for (int i = 0; i < WIDE; i++) a.lane[i] += b.lane[i];
    return a;
}
INLINE wide float_sums(sums_t a) {
    wide x;
    for (int i = 0; i < WIDE; i++) x[i] = (float)a.lane[i];
    return x;
}
INLINE int32_t total(sums_t a) {
    int32_t sum = 0;
    for (int i = 0; i < WIDE; i++) sum += a.lane[i];
    return sum;
}
INLINE group_t group_int8(const int8_t *w) {
    group_t g;
    memcpy(g.w, w, GROUP);
    return g;
}
INLINE group_t group_int4(const uint8_t *w) {
    group_t g;
    for (int i = 0; i < GROUP / 2; i++) g.w[i] = (int8_t)((w[i] & 15) - 8), g.w[i + GROUP / 2] = (int8_t)((w[i] >> 4) - 8);
    return g;
}
#endif

/* int8 weights: rows of numbers up to a multiple of GROUP, one scale a row. */
INLINE void int8_tile(const int columns, const int rows, const int8_t *w, const float *scales, const int8_t *x,
                      float *y, const float *bias, float factor, int64_t k, int64_t n, int64_t column) {
    int64_t line = line_of(k), width = line - HEADER;
    sums_t sums[4][4];
    for (int c = 0; c < columns; c++)
        for (int r = 0; r < rows; r++) sums[c][r] = no_sums();
    for (int64_t i = 0; i < width; i += GROUP)
        for (int c = 0; c < columns; c++) {
            group_t each = group_int8(w + (column + c) * width + i);
            for (int r = 0; r < rows; r++)
                sums[c][r] = add_sums(sums[c][r], dot_group(each, x + r * line + HEADER + i));
        }
    for (int c = 0; c < columns; c++)
        for (int r = 0; r < rows; r++) {
            float scale = *(const float *)(x + r * line);
            float sum = (float)total(sums[c][r]) * (scale * scales[column + c]);
            y[r * n + column + c] = bias ? sum * factor + bias[column + c] : sum * factor;
        }
}

/* int4 weights: groups of 32, a bf16 scale and 16 bytes that hold number i and number i + 16. */
INLINE void int4_tile(const int columns, const int rows, const uint8_t *w, const int8_t *x, float *y,
                      const float *bias, float factor, int64_t k, int64_t n, int64_t column) {
    int64_t line = line_of(k), groups = (line - HEADER) / GROUP, size = 2 + GROUP / 2;
    wide sums[4][4];
    for (int c = 0; c < columns; c++)
        for (int r = 0; r < rows; r++) sums[c][r] = (wide){0};
    for (int64_t g = 0; g < groups; g++)
        for (int c = 0; c < columns; c++) {
            const uint8_t *at = w + ((column + c) * groups + g) * size;
            uint16_t stored;
            memcpy(&stored, at, 2);
            float scale = from_bf16(stored);
            group_t each = group_int4(at + 2);
            for (int r = 0; r < rows; r++)
                sums[c][r] = fuse(float_sums(dot_group(each, x + r * line + HEADER + g * GROUP)), wide_of(scale), sums[c][r]);
        }
    for (int c = 0; c < columns; c++)
        for (int r = 0; r < rows; r++) {
            float sum = sum_of(sums[c][r]) * *(const float *)(x + r * line);
            y[r * n + column + c] = bias ? sum * factor + bias[column + c] : sum * factor;
        }
}

#define TILES(NAME, CALL)                                                                               \
    static void NAME##_product(const op_t *op, const void *x, float *y, int64_t rows, range_t columns) { \
        int64_t k = op->n[0], n = op->n[1];                                                              \
        int64_t c = columns.first;                                                                       \
        for (; c + 4 <= columns.stop; c += 4) {                                                          \
            int64_t r = 0;                                                                               \
            for (; r + 4 <= rows; r += 4) { CALL(2, 4, c); CALL(2, 4, c + 2); }                          \
            for (; r + 2 <= rows; r += 2) CALL(4, 2, c);                                                 \
            for (; r < rows; r++) CALL(4, 1, c);                                                         \
        }                                                                                                \
        for (; c < columns.stop; c++) {                                                                  \
            int64_t r = 0;                                                                               \
            for (; r + 4 <= rows; r += 4) CALL(1, 4, c);                                                 \
            for (; r < rows; r++) CALL(1, 1, c);                                                         \
        }                                                                                                \
    }
#define F32_CALL(C, R, AT) float_tile(0, C, R, op->weight, (const float *)x + r * k, y + r * n, op->bias, op->f[0], k, n, AT)
#define BF16_CALL(C, R, AT) float_tile(1, C, R, op->weight, (const float *)x + r * k, y + r * n, op->bias, op->f[0], k, n, AT)
#define INT8_CALL(C, R, AT) \
    int8_tile(C, R, op->weight, op->more, (const int8_t *)x + r * line_of(k), y + r * n, op->bias, op->f[0], k, n, AT)
#define INT4_CALL(C, R, AT) int4_tile(C, R, op->weight, (const int8_t *)x + r * line_of(k), y + r * n, op->bias, op->f[0], k, n, AT)
TILES(f32, F32_CALL)
TILES(bf16, BF16_CALL)
TILES(int8, INT8_CALL)
TILES(int4, INT4_CALL)

/* Numbers of one row as int8 with one scale; rows that hold NaN or infinity get a scale of NaN. */
static void quantise(const float *x, int8_t *line, int64_t k) {
    uint32_t most = 0; /* sizes compare as the integers that they are stored as; NaN lies above infinity */
    for (int64_t i = 0; i < k; i++) {
        uint32_t size;
        memcpy(&size, x + i, 4);
        size &= 0x7fffffffu;
        most = size > most ? size : most;
    }
    float largest;
    memcpy(&largest, &most, 4);
    int8_t *to = line + HEADER;
    int fine = most < 0x7f800000u;
    float each = fine && largest > 1e-30f ? 127.0f / largest : 0.0f;
    *(float *)line = fine ? largest / 127.0f : NAN;
    for (int64_t i = 0; fine && i < k; i++) to[i] = (int8_t)(int32_t)__builtin_rintf(x[i] * each);
    for (int64_t i = fine ? k : 0; i < line_of(k) - HEADER; i++) to[i] = 0;
}

/* -- around the products */

/* centred: LayerNorm; f: epsilon, what is added to the gain */
static void norm_row(const float *x, float *y, const float *gain, const float *bias, int64_t n, int centred,
                     float epsilon, float offset) {
    float mean = centred ? sum_line(x, n, 0, 0.0f) / (float)n : 0.0f, square = sum_line(x, n, 1, mean);
    float factor = 1.0f / sqrtf(square / (float)n + epsilon);
    for (int64_t i = 0; i < n; i++) {
        float value = (x[i] - mean) * factor;
        if (gain) value *= gain[i] + offset;
        y[i] = bias ? value + bias[i] : value;
    }
}

enum { RELU, GELU, GELU_TANH, SILU };

INLINE float tanh_of(float x) {
    float e = exp_down(-2.0f * fabsf(x));
    return copysignf((1.0f - e) / (1.0f + e), x);
}

static void activate(float *x, const float *times, int64_t n, int kind) {
    if (kind == SILU)
        for (int64_t i = 0; i < n; i++) {
            float e = exp_down(-fabsf(x[i]));
            x[i] *= (x[i] >= 0.0f ? 1.0f : e) / (1.0f + e);
        }
    else if (kind == GELU_TANH)
        for (int64_t i = 0; i < n; i++)
            x[i] *= 0.5f * (1.0f + tanh_of(0.7978845608f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
    else if (kind == GELU)
        for (int64_t i = 0; i < n; i++) x[i] *= 0.5f * (1.0f + erff(x[i] * 0.70710678f));
    else
        for (int64_t i = 0; i < n; i++) x[i] = x[i] < 0.0f ? 0.0f : x[i];
    if (times)
        for (int64_t i = 0; i < n; i++) x[i] *= times[i];
}

static void turn(float *x, const float *cosine, const float *sine, int64_t half, int interleaved) {
    for (int64_t i = 0; i < half; i++) {
        float *a = x + (interleaved ? 2 * i : i), *b = interleaved ? a + 1 : a + half;
        float left = *a, right = *b;
        *a = left * cosine[i] - right * sine[i];
        *b = right * cosine[i] + left * sine[i];
    }
}

/* -- states */

/* Scores of one key against a tile of queries. */
INLINE void score(const int bf16, const int heads, const void *key, int64_t at, const float *ask, int64_t width,
                  float *to, int64_t step) {
    wide sums[4];
    for (int h = 0; h < heads; h++) sums[h] = (wide){0};
    int64_t c = 0;
    for (; c + WIDE <= width; c += WIDE) {
        wide each = get(key, at + c, bf16);
        for (int h = 0; h < heads; h++) sums[h] = fuse(each, *(const wide *)(ask + h * width + c), sums[h]);
    }
    for (int h = 0; h < heads; h++) {
        float sum = sum_of(sums[h]);
        for (int64_t j = c; j < width; j++) sum += get_one(key, at + j, bf16) * ask[h * width + j];
        to[h * step] = sum;
    }
}

/* Weights [heads, count] by values, a stripe of columns at a time; the token `first + i` lies in slot
 * (first + i) % room. */
INLINE void gather(const int bf16, const int heads, const void *values, int64_t base, int64_t first, int64_t count,
                   int64_t room, int64_t width, const float *weights, float *out) {
    int64_t c = 0;
#define STRIPES(N)                                                                                      \
    for (; c + (N) * WIDE <= width; c += (N) * WIDE) {                                                  \
        wide sums[4][N];                                                                                \
        for (int h = 0; h < heads; h++)                                                                 \
            for (int s = 0; s < (N); s++) sums[h][s] = (wide){0};                                       \
        int64_t slot = first % room;                                                                    \
        for (int64_t i = 0; i < count; i++) {                                                           \
            for (int s = 0; s < (N); s++) {                                                             \
                wide each = get(values, base + slot * width + c + s * WIDE, bf16);                      \
                for (int h = 0; h < heads; h++)                                                         \
                    sums[h][s] = fuse(each, wide_of(weights[h * count + i]), sums[h][s]);               \
            }                                                                                           \
            slot = slot + 1 == room ? 0 : slot + 1;                                                     \
        }                                                                                               \
        for (int h = 0; h < heads; h++)                                                                 \
            for (int s = 0; s < (N); s++) *(wide *)(out + h * width + c + s * WIDE) = sums[h][s];       \
    }
    STRIPES(2)
    STRIPES(1)
#undef STRIPES
    for (; c < width; c++)
        for (int h = 0; h < heads; h++) {
            float sum = 0.0f;
            for (int64_t i = 0; i < count; i++)
                sum += get_one(values, base + (first + i) % room * width + c, bf16) * weights[h * count + i];
            out[h * width + c] = sum;
        }
}

INLINE void attend_heads(const int bf16, const int tile, const op_t *op, const float *q, float *out, int64_t base,
                         int64_t head, int64_t place, float *scratch) {
    int64_t width = op->n[2], room = op->n[3], back = op->n[4];
    int64_t first = place - back > 0 ? place - back : 0, count = place + 1 - first;
    float *ask = scratch, *weights = scratch + 4 * width;
    const float *sinks = op->bias, *slopes = op->rest;
    float scale = op->f[0], cap = op->f[1];
    for (int64_t i = 0; i < tile * width; i++) ask[i] = q[i] * scale;
    int64_t slot = first % room;
    for (int64_t i = 0; i < count; i++) {
        score(bf16, tile, op->more, base + slot * width, ask, width, weights + i, count);
        slot = slot + 1 == room ? 0 : slot + 1;
    }
    for (int h = 0; h < tile; h++) {
        float *line = weights + h * count;
        if (cap > 0.0f)
            for (int64_t i = 0; i < count; i++) line[i] = cap * tanh_of(line[i] / cap);
        if (slopes)
            for (int64_t i = 0; i < count; i++) line[i] -= slopes[head + h] * (float)(count - 1 - i);
        float peak = most_of(line, count, sinks ? sinks[head + h] : -INFINITY);
        for (int64_t i = 0; i < count; i++) line[i] = exp_down(line[i] - peak);
        float sum = sum_line(line, count, 0, 0.0f);
        if (sinks) sum += exp_down(sinks[head + h] - peak);
        for (int64_t i = 0; i < count; i++) line[i] /= sum;
    }
    gather(bf16, tile, op->weight, base, first, count, room, width, weights, out);
}

/* n: heads, groups, width, room, tokens back; more, weight: keys and values [slots, groups, room, width];
 * bias: sinks; rest: slopes; f: scale, cap */
static void attend(const op_t *op, const call_t *call, const float *q, float *out, int64_t rows, float *scratch,
                   int thread, int threads) {
    int64_t heads = op->n[0], groups = op->n[1], width = op->n[2], room = op->n[3], each = heads / groups;
    int64_t blocks = (threads + rows * groups - 1) / (rows * groups);
    if (blocks > each) blocks = each;
    range_t mine = share_of(rows * groups * blocks, thread, threads);
    for (int64_t task = mine.first; task < mine.stop; task++) {
        int64_t r = task / (groups * blocks), g = task / blocks % groups, b = task % blocks;
        int64_t base = (call->slots[r] * groups + g) * room * width;
        range_t part = share_of(each, (int)b, (int)blocks);
        for (int64_t h = g * each + part.first, stop = g * each + part.stop; h < stop;) {
            int64_t at = (r * heads + h) * width, place = call->places[r];
#define HEADS(N)                                                                                        \
    {                                                                                                   \
        if (op->kind == BF16) attend_heads(1, N, op, q + at, out + at, base, h, place, scratch);        \
        else attend_heads(0, N, op, q + at, out + at, base, h, place, scratch);                         \
        h += N;                                                                                         \
    }
            if (h + 4 <= stop) HEADS(4)
            else if (h + 2 <= stop) HEADS(2)
            else HEADS(1)
#undef HEADS
        }
    }
}

/* State [slots, heads, keys, values] of heads `mine`: S <- decay S + k v, y = q S, row after row.
 * n: heads, keys, values; in: q, more: k, weight: v, bias: decays, rest: state; f: factor on k */
static void retain(const op_t *op, const call_t *call, int64_t rows, range_t mine) {
    int64_t heads = op->n[0], keys = op->n[1], values = op->n[2];
    for (int64_t h = mine.first; h < mine.stop; h++) {
        float decay = ((const float *)op->bias)[h];
        for (int64_t r = 0; r < rows; r++) {
            const float *q = (const float *)op->in + (r * heads + h) * keys;
            const float *k = (const float *)op->more + (r * heads + h) * keys;
            const float *v = (const float *)op->weight + (r * heads + h) * values;
            float *y = (float *)op->out + (r * heads + h) * values;
            float *state = (float *)op->rest + (call->slots[r] * heads + h) * keys * values;
            memset(y, 0, sizeof(float) * (size_t)values);
            for (int64_t i = 0; i < keys; i++) {
                float *line = state + i * values, key = k[i] * op->f[0], query = q[i];
                for (int64_t j = 0; j < values; j++) {
                    line[j] = decay * line[j] + key * v[j];
                    y[j] += query * line[j];
                }
            }
        }
    }
}

/* n: units, width of one, room; out: [slots, units, room, width] */
static void append(const op_t *op, const call_t *call, const float *x, int64_t rows, range_t mine) {
    int64_t units = op->n[0], width = op->n[1], room = op->n[2];
    for (int64_t r = 0; r < rows; r++)
        for (int64_t u = mine.first; u < mine.stop; u++) {
            int64_t at = ((call->slots[r] * units + u) * room + call->places[r] % room) * width;
            const float *from = op->kind == INT64 ? NULL : x + (r * units + u) * width;
            if (op->kind == INT64) ((int64_t *)op->out)[at] = call->places[r];
            else if (op->kind == F32) memcpy((float *)op->out + at, from, sizeof(float) * (size_t)width);
            else
                for (int64_t i = 0; i < width; i++) ((uint16_t *)op->out)[at + i] = to_bf16(from[i]);
        }
}

static void step(const op_t *op, const call_t *call, int thread, int threads, float *scratch) {
    int64_t rows = op->picked ? call->picks : call->rows;
    float *in = op->in ? (float *)((char *)op->in + op->in_stride * thread) : NULL;
    float *out = op->out ? (float *)((char *)op->out + op->out_stride * thread) : NULL;
    const int64_t *n = op->n;
    if (rows == 0) return;
    switch (op->code) {
    case EMBED: { /* n: width, units, whether by position, whether added; weight: table; f: factor */
        range_t mine = share_of(n[1], thread, threads);
        int64_t from = mine.first * (n[0] / n[1]), to = mine.stop * (n[0] / n[1]);
        for (int64_t r = 0; r < rows; r++) {
            int64_t at = (n[2] ? call->places : call->ids)[r] * n[0];
            for (int64_t i = from; i < to; i++) {
                float value = get_one(op->weight, at + i, op->kind == BF16) * op->f[0];
                out[r * n[0] + i] = n[3] ? out[r * n[0] + i] + value : value;
            }
        }
        break;
    }
    case NORM: { /* n: width, whether centred; own buffers: every thread all rows, else its share of them */
        range_t mine = op->out_stride ? (range_t){0, rows} : share_of(rows, thread, threads);
        for (int64_t r = mine.first; r < mine.stop; r++)
            norm_row(in + r * n[0], out + r * n[0], op->weight, op->bias, n[0], (int)n[1], op->f[0], op->f[1]);
        break;
    }
    case PICK: /* n: width */
        for (int64_t r = 0; r < rows; r++)
            memcpy(out + r * n[0], in + call->picked[r] * n[0], sizeof(float) * (size_t)n[0]);
        break;
    case ANGLES: { /* n: pairs; weight: speeds; out: cosines and sines; f: factor */
        range_t mine = share_of(rows, thread, threads);
        for (int64_t r = mine.first; r < mine.stop; r++)
            for (int64_t i = 0; i < n[0]; i++) {
                float angle = (float)call->places[r] * ((const float *)op->weight)[i];
                out[r * 2 * n[0] + i] = cosf(angle) * op->f[0];
                out[r * 2 * n[0] + n[0] + i] = sinf(angle) * op->f[0];
            }
        break;
    }
    case QUANTISE: /* n: width */
        for (int64_t r = 0; r < rows; r++) quantise(in + r * n[0], (int8_t *)out + r * line_of(n[0]), n[0]);
        break;
    case PRODUCT: { /* n: inputs, outputs, units; more: scales of int8; f: factor, before the bias */
        range_t mine = share_of(n[2], thread, threads);
        range_t columns = {mine.first * (n[1] / n[2]), mine.stop * (n[1] / n[2])};
        if (op->kind == F32) f32_product(op, in, out, rows, columns);
        else if (op->kind == BF16) bf16_product(op, in, out, rows, columns);
        else if (op->kind == INT8) int8_product(op, in, out, rows, columns);
        else int4_product(op, in, out, rows, columns);
        break;
    }
    case HEAD_NORM: { /* n: units, width of one, whether centred */
        range_t mine = share_of(n[0], thread, threads);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t u = mine.first; u < mine.stop; u++) {
                float *at = out + (r * n[0] + u) * n[1];
                norm_row(at, at, op->weight, op->bias, n[1], (int)n[2], op->f[0], op->f[1]);
            }
        break;
    }
    case ROTATE: { /* n: units, width of one, pairs, whether interleaved; in: angles */
        range_t mine = share_of(n[0], thread, threads);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t u = mine.first; u < mine.stop; u++)
                turn(out + (r * n[0] + u) * n[1], in + r * 2 * n[2], in + r * 2 * n[2] + n[2], n[2], (int)n[3]);
        break;
    }
    case APPEND:
        append(op, call, in, rows, share_of(n[0], thread, threads));
        break;
    case ATTEND:
        attend(op, call, in, out, rows, scratch, thread, threads);
        break;
    case RETAIN:
        retain(op, call, rows, share_of(n[0], thread, threads));
        break;
    default: { /* element by element; n: width, units */
        range_t mine = share_of(n[1], thread, threads);
        int64_t from = mine.first * (n[0] / n[1]), count = mine.stop * (n[0] / n[1]) - from;
        for (int64_t r = 0; r < rows; r++) {
            float *y = out + r * n[0] + from;
            const float *x = in ? in + r * n[0] + from : NULL;
            float factor = op->f[0];
            if (op->code == ACTIVATE) activate(y, x, count, op->kind);
            else if (op->code == ADD)
                for (int64_t i = 0; i < count; i++) y[i] += factor * x[i];
            else if (op->code == COPY)
                for (int64_t i = 0; i < count; i++) y[i] = factor * x[i];
            else if (op->code == CLIP)
                for (int64_t i = 0; i < count; i++) {
                    float cut = y[i] > factor ? factor : y[i];
                    y[i] = cut < -factor ? -factor : cut;
                }
            else
                for (int64_t i = 0; i < count; i++) y[i] = factor * tanh_of(y[i] / factor);
        }
    }
    }
}

/* Run `count` records; with one thread, or where `threads` are not to be had, as many as there are. */
void tape_run(const op_t *ops, int64_t count, const call_t *call, int64_t threads) {
    _Pragma("omp parallel num_threads((int)threads)") {
        int thread = omp_get_thread_num(), all = omp_get_num_threads();
        float *scratch = malloc(sizeof(float) * (size_t)call->scratch);
        for (int64_t i = 0; i < count; i++) {
            if (ops[i].wait) {
                _Pragma("omp barrier")
            }
            step(ops + i, call, thread, all, scratch);
        }
        free(scratch);
    }
}
