/* Products of a few rows with weights in float32, bf16, fp16, int8 and int4.
 *
 * Weights lie in blocks of 16 columns, the last one filled up with zeros, so that a vector holds as many
 * columns and a sum is never spread over lanes: float32 [blocks, k, 16]; bf16 in pairs [blocks, k/2, 16, 2],
 * k up to whole steps of 32; fp16 [blocks, k, 16], steps of 32; int8 in fours [blocks, k/4, 16, 4], steps of 64; int4 by steps of 64: 2 x 16 scales in
 * bf16, then four lines for each of its groups of 32, whose byte [column, j] of line i holds numbers
 * 4 i + j and, in its upper half, 16 + 4 i + j, each moved up by 8.
 */
#ifndef ARMILLARY_PRODUCTS_H
#define ARMILLARY_PRODUCTS_H

#include "tiles.h"

/* Of two numbers of each column the first or the second: pairs in bf16, two lines in fp16. */
INLINE lanes first_of(const int kind, const void *at) { return kind == BF16 ? firsts(at) : lanes_of_f16(at); }
INLINE lanes second_of(const int kind, const char *at) {
    return kind == BF16 ? seconds(at) : lanes_of_f16(at + STEP / 2);
}

INLINE void float_tile(const int kind, const int blocks, const int rows, const op_t *op, const float *x, float *y,
                       int64_t block, range_t columns) {
    const int half = kind != F32;
    int64_t k = op->n[0], count = half ? k / 2 : k;
    int64_t size = (half ? (k + STEP / 2 - 1) / (STEP / 2) * (STEP / 4) : k) * STEP;
    const char *w = (const char *)op->weight + block * size;
    lanes sums[4][8];
    for (int b = 0; b < blocks; b++)
        for (int r = 0; r < rows; r++) sums[b][r] = spread(0.0f);
    for (int64_t i = 0; i < count; i++) {
        lanes first[4], second[4];
        for (int b = 0; b < blocks; b++) {
            const char *at = w + b * size + i * STEP;
            SOON(at);
            first[b] = half ? first_of(kind, at) : lanes_at(at);
            if (half) second[b] = second_of(kind, at);
        }
        for (int r = 0; r < rows; r++) {
            lanes each = spread(x[r * k + (half ? 2 * i : i)]);
            for (int b = 0; b < blocks; b++) sums[b][r] = fuse_lanes(first[b], each, sums[b][r]);
            if (!half) continue;
            each = spread(x[r * k + 2 * i + 1]);
            for (int b = 0; b < blocks; b++) sums[b][r] = fuse_lanes(second[b], each, sums[b][r]);
        }
    }
    float whole[4 * 8][BLOCK];
    for (int b = 0; b < blocks; b++)
        for (int r = 0; r < rows; r++) {
            if (half && k % 2)
                sums[b][r] = fuse_lanes(first_of(kind, w + b * size + count * STEP), spread(x[r * k + k - 1]), sums[b][r]);
            put(sums[b][r], whole[b * rows + r]);
        }
    finish(op, whole[0], blocks, rows, NULL, y, block, columns);
}

INLINE int32_t word(const char *p) {
    int32_t x;
    memcpy(&x, p, 4);
    return x;
}

INLINE void int8_tile(const int blocks, const int rows, const op_t *op, const prepared_t *p, int64_t row, float *y,
                      int64_t block, range_t columns) {
    int64_t size = p->steps * TILE * STEP;
    const char *w = (const char *)op->weight + block * size;
    ints sums[4][8];
    for (int b = 0; b < blocks; b++)
        for (int r = 0; r < rows; r++) sums[b][r] = ints_of(0);
    for (int64_t s = 0; s < p->steps; s++) {
        const char *x = line_of(p, s, row);
        _Pragma("GCC unroll 2") for (int i = 0; i < TILE; i++) {
            bytes each[4];
            for (int b = 0; b < blocks; b++) {
                const char *at = w + b * size + (s * TILE + i) * STEP;
                SOON(at);
                each[b] = bytes_at(at);
            }
            for (int r = 0; r < rows; r++)
                for (int b = 0; b < blocks; b++) sums[b][r] = dot_int8(each[b], word(x + r * STEP + 4 * i), sums[b][r]);
        }
    }
    float whole[4 * 8][BLOCK];
    for (int b = 0; b < blocks; b++)
        for (int r = 0; r < rows; r++) put(of_int8(op, sums[b][r], block + b), whole[b * rows + r]);
    finish(op, whole[0], blocks, rows, p->scales + row, y, block, columns);
}

INLINE void int4_tile(const int rows, const op_t *op, const prepared_t *p, int64_t row, float *y, int64_t block,
                      range_t columns) {
    enum { LINES = GROUP / 8, SIZE = STEP + 2 * LINES * STEP };
    const char *w = (const char *)op->weight + block * p->steps * SIZE;
    lanes sums[8];
    for (int r = 0; r < rows; r++) sums[r] = spread(0.0f);
    for (int64_t s = 0; s < p->steps; s++, w += SIZE) {
        for (int i = 0; i < SIZE / STEP; i++) SOON(w + i * STEP);
        _Pragma("GCC unroll 1") for (int g = 0; g < 2; g++) {
            lanes scale = lanes_of_bf16(w + g * 2 * BLOCK);
            bytes low[LINES], high[LINES];
            for (int i = 0; i < LINES; i++) {
                bytes both = bytes_at(w + STEP + (g * LINES + i) * STEP);
                low[i] = low_halves(both), high[i] = high_halves(both);
            }
            const char *x = line_of(p, s, row) + g * GROUP;
            const int32_t *moved = p->sums + (2 * s + g) * p->rows + row;
            for (int r = 0; r < rows; r++) {
                ints total = ints_of(-8 * moved[r]), more = ints_of(0);
                for (int i = 0; i < LINES; i++) {
                    total = dot_int4(low[i], word(x + r * STEP + 4 * i), total);
                    more = dot_int4(high[i], word(x + r * STEP + GROUP / 2 + 4 * i), more);
                }
                sums[r] = fuse_lanes(lanes_of_ints(add_ints(total, more)), scale, sums[r]);
            }
        }
    }
    float whole[8][BLOCK];
    for (int r = 0; r < rows; r++) put(sums[r], whole[r]);
    finish(op, whole[0], 1, rows, p->scales + row, y, block, columns);
}

/* One row takes four blocks at a time. Of several, as many go together as there are registers for sums, and with them
 * as many blocks as then still fit: a line of weights is read once for all of them. More rows go in passes of about
 * the same size. */
#if defined(__AVX512F__)
enum { MOST = 8, FEW = 6, SIDE_OF_FEW = 4, SIDE_OF_MORE = 3 };
#define MORE_ROWS(CALL, B) SOME(CALL, B, 5) SOME(CALL, B, 6) SOME(CALL, B, 7) SOME(CALL, B, 8)
#elif defined(__AVX2__)
enum { MOST = 6, FEW = 2, SIDE_OF_FEW = 2, SIDE_OF_MORE = 1 };
#define MORE_ROWS(CALL, B) SOME(CALL, B, 5) SOME(CALL, B, 6)
#else
enum { MOST = 4, FEW = 1, SIDE_OF_FEW = 1, SIDE_OF_MORE = 1 };
#define MORE_ROWS(CALL, B)
#endif
#define SOME(CALL, B, R)                                                                  \
    case R:                                                                               \
        if (B == 1 || (B == SIDE_OF_FEW ? R <= FEW : R >= FEW)) CALL(B, R); \
        break;
#define ROWS(CALL, B)                                                                     \
    for (int64_t r = 0, some, left = passes; left > 0; left--, r += some)                 \
        switch (some = (rows - r + left - 1) / left) {                                    \
            SOME(CALL, B, 1) SOME(CALL, B, 2) SOME(CALL, B, 3) SOME(CALL, B, 4)           \
            MORE_ROWS(CALL, B)                                                            \
        }
#define BLOCKS(CALL)                                                                      \
    {                                                                                     \
        int64_t block = columns.first / BLOCK, stop = (columns.stop + BLOCK - 1) / BLOCK; \
        int64_t passes = (rows + MOST - 1) / MOST, few = rows <= passes * FEW;            \
        if (rows == 1)                                                                    \
            for (int64_t r = 0; block + 4 <= stop; block += 4) CALL(4, 1);                \
        else if (few)                                                                     \
            for (; block + SIDE_OF_FEW <= stop; block += SIDE_OF_FEW) ROWS(CALL, SIDE_OF_FEW) \
        else                                                                              \
            for (; block + SIDE_OF_MORE <= stop; block += SIDE_OF_MORE) ROWS(CALL, SIDE_OF_MORE) \
        for (; block < stop; block++) ROWS(CALL, 1)                                       \
    }

static void f32_product(const op_t *op, const float *x, float *y, int64_t rows, range_t columns) {
#define CALL(B, R) float_tile(F32, B, R, op, x + r * op->n[0], y + r * op->n[1], block, columns)
    BLOCKS(CALL)
#undef CALL
}

static void bf16_product(const op_t *op, const float *x, float *y, int64_t rows, range_t columns) {
#define CALL(B, R) float_tile(BF16, B, R, op, x + r * op->n[0], y + r * op->n[1], block, columns)
    BLOCKS(CALL)
#undef CALL
}

static void f16_product(const op_t *op, const float *x, float *y, int64_t rows, range_t columns) {
#define CALL(B, R) float_tile(F16, B, R, op, x + r * op->n[0], y + r * op->n[1], block, columns)
    BLOCKS(CALL)
#undef CALL
}

static void int8_product(const op_t *op, void *x, float *y, int64_t rows, range_t columns) {
    prepared_t p = prepared(x, INT8, op->n[0], rows);
#define CALL(B, R) int8_tile(B, R, op, &p, r, y + r * op->n[1], block, columns)
    BLOCKS(CALL)
#undef CALL
}

static void int4_product(const op_t *op, void *x, float *y, int64_t rows, range_t columns) {
    prepared_t p = prepared(x, INT4, op->n[0], rows);
#define CALL(B, R) int4_tile(R, op, &p, r, y + r * op->n[1], block, columns)
    int64_t passes = (rows + MOST - 1) / MOST;
    for (int64_t block = columns.first / BLOCK; block * BLOCK < columns.stop; block++) ROWS(CALL, 1)
#undef CALL
}

/* n: inputs, outputs, units, whether by tiles; more: of int8; f: factor, before the bias */
static void product(const op_t *op, void *x, float *y, int64_t rows, range_t columns, int *set) {
    if (columns.first >= columns.stop) return;
#if TILES
    if (op->n[3] && op->kind == BF16) {
        tiles_product(1, op, x, y, rows, columns, set);
        return;
    }
    if (op->n[3] && op->kind == INT8 && rows > 1) {
        tiles_product(0, op, x, y, rows, columns, set);
        return;
    }
#endif
    (void)set;
    if (op->kind == F32) f32_product(op, x, y, rows, columns);
    else if (op->kind == BF16) bf16_product(op, x, y, rows, columns);
    else if (op->kind == F16) f16_product(op, x, y, rows, columns);
    else if (op->kind == INT8) int8_product(op, x, y, rows, columns);
    else int4_product(op, x, y, rows, columns);
}

#endif
