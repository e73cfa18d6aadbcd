/* Products by the processor's tiles (AMX), for bf16 with as many rows as there are, for int8 with more than one.
 *
 * A tile of weights is 16 columns of one step as they lie in memory, and meets the lines of that step of up to
 * 32 rows. A line's sums do not depend on the other lines; whole numbers are exact in any order. One row is
 * no exception: with bf16 it takes tiles as many rows do, and is as quick as memory is.
 */
#ifndef ARMILLARY_TILES_H
#define ARMILLARY_TILES_H

#include "amx.h"
#include "prepared.h"

#if AMX && defined(__AMX_INT8__) && defined(__AVX512VNNI__)
#define TILES 1

/* Whether products go through tiles. */
int tape_tiles(void) { return tiles_allowed(); }

/* Tiles 0-3: sums of two times two tiles, 4 and 5: lines, 6 and 7: weights. `set` is what the thread has. */
static void set_tiles(int64_t lines, int *set) {
    int first = lines < TILE ? (int)lines : TILE;
    int second = lines <= TILE || lines >= 2 * TILE ? TILE : (int)lines - TILE;
    if (*set == first * 32 + second) return;
    setup_t t = {.palette = 1};
    for (int i = 0; i < 8; i++) t.bytes[i] = STEP;
    t.lines[0] = t.lines[1] = t.lines[4] = (uint8_t)first;
    t.lines[2] = t.lines[3] = t.lines[5] = (uint8_t)second;
    t.lines[6] = t.lines[7] = TILE;
    set_up(&t);
    *set = first * 32 + second;
}

INLINE void free_tiles(int *set) {
    if (*set) _tile_release();
    *set = 0;
}

#define MULTIPLY(TO, X, W)                       \
    {                                            \
        if (bf16) _tile_dpbf16ps(TO, X, W);      \
        else _tile_dpbusd(TO, X, W);             \
    }
/* Sums of one or two tiles of lines and one or two blocks of columns into `to` [32 lines, 32 columns]. */
INLINE void tile_sums(const int bf16, const int two_lines, const int two_blocks, const prepared_t *p, int64_t line,
                      const char *w, int64_t size, int32_t *to) {
    _tile_zero(0);
    if (two_blocks) _tile_zero(1);
    if (two_lines) _tile_zero(2);
    if (two_lines && two_blocks) _tile_zero(3);
    for (int64_t s = 0; s < p->steps; s++) {
        const char *x = line_of(p, s, line), *here = w + s * TILE * STEP;
        _tile_loadd(4, x, STEP);
        if (two_lines) _tile_loadd(5, x + TILE * STEP, STEP);
        _tile_loadd(6, here, STEP);
        for (int i = 0; i < TILE; i++) SOON(here + i * STEP);
        MULTIPLY(0, 4, 6)
        if (two_lines) MULTIPLY(2, 5, 6)
        if (two_blocks) {
            _tile_loadd(7, here + size, STEP);
            for (int i = 0; i < TILE; i++) SOON(here + size + i * STEP);
            MULTIPLY(1, 4, 7)
            if (two_lines) MULTIPLY(3, 5, 7)
        }
    }
    _tile_stored(0, to, 2 * STEP);
    if (two_blocks) _tile_stored(1, to + BLOCK, 2 * STEP);
    if (two_lines) _tile_stored(2, to + TILE * 2 * BLOCK, 2 * STEP);
    if (two_lines && two_blocks) _tile_stored(3, to + TILE * 2 * BLOCK + BLOCK, 2 * STEP);
}
#undef MULTIPLY

INLINE void tiles_product(const int bf16, const op_t *op, void *x, float *y, int64_t rows, range_t columns, int *set) {
    int64_t n = op->n[1], each = bf16 ? 2 : 1;
    prepared_t p = prepared(x, bf16 ? BF16 : INT8, op->n[0], rows);
    int64_t size = p.steps * TILE * STEP, stop = (columns.stop + BLOCK - 1) / BLOCK;
    int32_t sums[2 * TILE][2 * BLOCK] __attribute__((aligned(64)));
    float whole[2 * 2 * TILE][BLOCK] __attribute__((aligned(64)));
    set_tiles(p.lines, set);
    IN_MEMORY; /* what tiles read is written by now */
    for (int64_t block = columns.first / BLOCK; block < stop; block += 2) {
        const char *w = (const char *)op->weight + block * size;
        int two_blocks = block + 1 < stop;
        for (int64_t line = 0; line < p.lines; line += 2 * TILE) {
            int two_lines = line + TILE < p.lines;
            if (two_lines && two_blocks) tile_sums(bf16, 1, 1, &p, line, w, size, sums[0]);
            else if (two_lines) tile_sums(bf16, 1, 0, &p, line, w, size, sums[0]);
            else if (two_blocks) tile_sums(bf16, 0, 1, &p, line, w, size, sums[0]);
            else tile_sums(bf16, 0, 0, &p, line, w, size, sums[0]);
            int64_t from = line / each, count = rows - from < 2 * TILE / each ? rows - from : 2 * TILE / each;
            for (int b = 0; b <= two_blocks; b++)
                for (int64_t r = 0; r < count; r++) {
                    const int32_t *at = sums[r * each] + b * BLOCK;
                    put(bf16 ? add_lanes(lanes_at(at), lanes_at(at + 2 * BLOCK)) : of_int8(op, ints_at(at), block + b),
                        whole[b * count + r]);
                }
            finish(op, whole[0], 1 + two_blocks, count, bf16 ? NULL : p.scales + from, y + from * n, block, columns);
        }
    }
}
#else
#define TILES 0
int tape_tiles(void) { return 0; }
INLINE void free_tiles(int *set) { (void)set; }
#endif

#endif
