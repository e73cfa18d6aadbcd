/* Rows as products with int8, int4 and, in tiles, bf16 take them, and what becomes of the sums. */
#ifndef ARMILLARY_PREPARED_H
#define ARMILLARY_PREPARED_H

#include "lanes.h"
#include "record.h"

/* Steps of 64 bytes: 64 numbers of a row in int8, or 32 in bf16. One step of all rows follows another, so that
 * the rows of a step are a tile. In bf16 a number is the sum of two, which stand in two lines of the
 * tile: 16 bits of it, all but about 2^-17 of its size. */
enum { STEP = 64, TILE = 16 };

typedef struct {
    char *numbers;                     /* [steps, lines, STEP bytes] */
    int32_t *sums;                     /* [groups, rows] of the numbers of a group (int4) */
    float *scales;                     /* [rows] (int8, int4) */
    int64_t steps, lines, rows, width; /* width: numbers of a step */
} prepared_t;

/* Where the parts of `rows` rows of k numbers lie. Lines beyond two tiles are filled up to whole tiles. */
INLINE prepared_t prepared(void *at, int kind, int64_t k, int64_t rows) {
    prepared_t p = {.numbers = at, .rows = rows, .width = kind == BF16 ? STEP / 2 : STEP};
    int64_t lines = kind == BF16 ? 2 * rows : rows;
    p.lines = lines > 2 * TILE ? (lines + TILE - 1) / TILE * TILE : lines;
    p.steps = (k + p.width - 1) / p.width;
    p.sums = (int32_t *)(p.numbers + p.steps * p.lines * STEP);
    p.scales = (float *)(p.sums + (kind == INT4 ? p.steps * (STEP / GROUP) * rows : 0));
    return p;
}

INLINE int64_t prepared_size(int kind, int64_t k, int64_t rows) {
    char nothing;
    prepared_t p = prepared(&nothing, kind, k, rows);
    return (char *)(p.scales + (kind == BF16 ? 0 : rows)) - &nothing;
}

INLINE char *line_of(const prepared_t *p, int64_t step, int64_t line) {
    return p->numbers + (step * p->lines + line) * STEP;
}

/* Row r in int8 with one scale; rows that hold NaN or infinity get a scale of NaN. */
static void quantise(const float *x, const prepared_t *p, int64_t r, int64_t k, const int offset, const int sums) {
    float largest = largest_size(x, k);
    int fine = largest < INFINITY;
    float each = fine && largest > 1e-30f ? 127.0f / largest : 0.0f;
    p->scales[r] = fine ? largest / 127.0f : NAN;
    for (int64_t s = 0; s < p->steps; s++) {
        int8_t *to = (int8_t *)line_of(p, s, r);
        int64_t count = k - s * STEP < STEP ? k - s * STEP : STEP;
        float line[STEP] = {0};
        if (fine) memcpy(line, x + s * STEP, sizeof(float) * (size_t)count);
        int8_t number[STEP];
        for (int i = 0; i < STEP; i++) number[i] = (int8_t)(int32_t)__builtin_rintf(line[i] * each);
        for (int i = 0; i < STEP; i++) to[i] = (int8_t)(number[i] ^ offset);
        for (int g = 0; sums && g < STEP / GROUP; g++) {
            int32_t sum = 0;
            for (int i = 0; i < GROUP; i++) sum += number[g * GROUP + i];
            p->sums[(s * (STEP / GROUP) + g) * p->rows + r] = sum;
        }
    }
}

/* Row r as sums of two bf16 numbers each; infinity and NaN stay alone. */
static void split(const float *x, const prepared_t *p, int64_t r, int64_t k) {
    for (int64_t s = 0; s < p->steps; s++) {
        uint16_t *high = (uint16_t *)line_of(p, s, 2 * r), *low = high + STEP / 2;
        int64_t count = k - s * (STEP / 2) < STEP / 2 ? k - s * (STEP / 2) : STEP / 2;
        float line[STEP / 2];
        if (count < STEP / 2) memset(line, 0, sizeof line);
        memcpy(line, x + s * (STEP / 2), sizeof(float) * (size_t)count);
#if defined(__AVX512BF16__) && defined(__AVX512DQ__)
        /* numbers too small to be normal become 0 here, as they do in tiles */
        _Pragma("GCC unroll 2") for (int i = 0; i < STEP / 2; i += 16) {
            __m512 each = _mm512_loadu_ps(line + i);
            __m256i top = (__m256i)_mm512_cvtneps_pbh(each);
            __m512 wide = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(top), 16);
            __mmask16 fine = (__mmask16)~_mm512_fpclass_ps_mask(wide, 0x99); /* NaN and infinity */
            _mm256_storeu_si256((__m256i *)(high + i), top);
            _mm256_storeu_si256((__m256i *)(low + i), (__m256i)_mm512_maskz_cvtneps_pbh(fine, _mm512_sub_ps(each, wide)));
        }
#else
        for (int i = 0; i < STEP / 2; i++) {
            high[i] = to_bf16(line[i]);
            float rest = line[i] - from_bf16(high[i]);
            low[i] = (high[i] & 0x7f80u) == 0x7f80u ? 0 : to_bf16(rest);
        }
#endif
    }
}

/* Row r as products with weights of the kind take it. */
INLINE void prepare(const float *x, const prepared_t *p, int kind, int64_t r, int64_t k) {
    if (kind == BF16) split(x, p, r, k);
    else if (kind == INT8) quantise(x, p, r, k, OFFSET, 0);
    else quantise(x, p, r, k, 0, 1);
}

/* sums [blocks, rows, BLOCK] of the columns of `block` and the next ones, as far as they are in `columns`, times
 * the rows' scales, if any, and the factor and with the bias, to the rows of y. */
static __attribute__((noinline)) void finish(const op_t *op, const float *sums, int blocks, int64_t rows,
                                             const float *scales, float *y, int64_t block, range_t columns) {
    const float *bias = op->bias;
    for (int b = 0; b < blocks; b++) {
        int64_t at = (block + b) * BLOCK, first = columns.first > at ? columns.first - at : 0;
        int64_t stop = columns.stop < at + BLOCK ? columns.stop - at : BLOCK;
        for (int64_t r = 0; r < rows; r++, sums += BLOCK) {
            float *to = y + r * op->n[1] + at, scale = scales ? scales[r] * op->f[0] : op->f[0];
            for (int64_t i = first; i < stop; i++) to[i] = bias ? sums[i] * scale + bias[at + i] : sums[i] * scale;
        }
    }
}

/* Sums in int8 of one block, times the columns' scales. more: the scales, up to whole blocks, and, as many,
 * -OFFSET times the sum of each column's weights */
INLINE lanes of_int8(const op_t *op, ints sums, int64_t block) {
    const float *scales = op->more, *moved = scales + (op->n[1] + BLOCK - 1) / BLOCK * BLOCK;
    if (OFFSET) sums = add_ints(sums, ints_at(moved + block * BLOCK));
    return times_lanes(lanes_of_ints(sums), lanes_at(scales + block * BLOCK));
}

#endif
