/* Products of a few rows with weights in float32, bf16, int8 and int4. */
#ifndef ARMILLARY_PRODUCTS_H
#define ARMILLARY_PRODUCTS_H

#include "record.h"

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

#endif
