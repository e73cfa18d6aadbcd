/* Attention over keys and values in bf16 by the processor's tiles (AMX). As in attention.h a query's sums have one
 * order: it has a lane of its own, whoever is in the others, and its weights of keys that are not its own are 0.
 * Queries are taken as the sum of two bf16, weights are rounded to bf16. */
#ifndef ARMILLARY_ATTENTION_TILES_H
#define ARMILLARY_ATTENTION_TILES_H

#include "amx.h"
#include "broad.h"
#include "record.h"

#if AMX && defined(__AVX512BF16__) && defined(__AVX512BW__)
#define LOOK_TILES 1

enum { SIDE = 16, LOOKED = 4 * SIDE, CHUNK = 2 * SIDE }; /* of a tile; keys of a block; bf16 in a line of a tile */

/* All of a thread's tiles are whole; what they were before is kept. */
static void whole_tiles(setup_t *before) {
    setup_t t = {.palette = 1};
    for (int i = 0; i < 8; i++) t.bytes[i] = 4 * SIDE, t.lines[i] = SIDE;
    _tile_storeconfig(before);
    set_up(&t);
}

static void tiles_back(const setup_t *before) {
    if (before->palette) set_up(before);
    else _tile_release();
}

/* Sixteen lines of sixteen words, turned round: to[j] gets word j of each. */
static void turn_round(__m512i *x, uint32_t *to, int64_t stride) {
    __m512i y[SIDE];
    UNROLLED for (int i = 0; i < SIDE; i += 4) {
        __m512i a = _mm512_unpacklo_epi32(x[i], x[i + 1]), b = _mm512_unpackhi_epi32(x[i], x[i + 1]);
        __m512i c = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]), d = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
        y[i] = _mm512_unpacklo_epi64(a, c), y[i + 1] = _mm512_unpackhi_epi64(a, c);
        y[i + 2] = _mm512_unpacklo_epi64(b, d), y[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    /* y[4 i + j] holds words j, j + 4, j + 8, j + 12 of lines 4 i to 4 i + 3 */
    UNROLLED for (int j = 0; j < 4; j++) {
        __m512i a = _mm512_shuffle_i32x4(y[j], y[4 + j], 0x44), b = _mm512_shuffle_i32x4(y[8 + j], y[12 + j], 0x44);
        __m512i c = _mm512_shuffle_i32x4(y[j], y[4 + j], 0xee), d = _mm512_shuffle_i32x4(y[8 + j], y[12 + j], 0xee);
        _mm512_storeu_si512(to + j * stride, _mm512_shuffle_i32x4(a, b, 0x88));
        _mm512_storeu_si512(to + (j + 4) * stride, _mm512_shuffle_i32x4(a, b, 0xdd));
        _mm512_storeu_si512(to + (j + 8) * stride, _mm512_shuffle_i32x4(c, d, 0x88));
        _mm512_storeu_si512(to + (j + 12) * stride, _mm512_shuffle_i32x4(c, d, 0xdd));
    }
}

/* Scores [keys, queries] of up to four tiles of keys, `first` to before `stop`. */
INLINE void score_tiles(const uint16_t *keys, int64_t first, int64_t stop, const uint32_t *ask, int64_t width,
                        float *scores) {
    IN_MEMORY;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int64_t c = 0; c < width; c += CHUNK, ask += 2 * SIDE * SIDE) {
        _tile_loadd(5, ask, 4 * SIDE); _tile_loadd(6, ask + SIDE * SIDE, 4 * SIDE);
#define TIMES(TILE)                                                            \
    if (first <= TILE && TILE < stop) {                                        \
        _tile_loadd(4, keys + TILE * SIDE * width + c, 2 * width);             \
        _tile_dpbf16ps(TILE, 4, 5); _tile_dpbf16ps(TILE, 4, 6);                \
    }
        TIMES(0) TIMES(1) TIMES(2) TIMES(3)
#undef TIMES
    }
    _tile_stored(0, scores, 4 * SIDE); _tile_stored(1, scores + SIDE * SIDE, 4 * SIDE);
    _tile_stored(2, scores + 2 * SIDE * SIDE, 4 * SIDE); _tile_stored(3, scores + 3 * SIDE * SIDE, 4 * SIDE);
    IN_MEMORY;
}

/* Adds weights [queries, keys] times values [pairs of keys, width] to out [queries, width]. */
INLINE void gather_tiles(const uint32_t *weights, const uint32_t *values, int64_t width, float *out) {
    IN_MEMORY;
    _tile_loadd(4, weights, 2 * LOOKED); _tile_loadd(5, weights + SIDE, 2 * LOOKED);
    for (int64_t c = 0; c < width; c += CHUNK) {
        _tile_loadd(0, out + c, 4 * width); _tile_loadd(1, out + c + SIDE, 4 * width);
        _tile_loadd(6, values + c, 4 * width); _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, values + c + SIDE, 4 * width); _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(6, values + SIDE * width + c, 4 * width); _tile_dpbf16ps(0, 5, 6);
        _tile_loadd(7, values + SIDE * width + c + SIDE, 4 * width); _tile_dpbf16ps(1, 5, 7);
        _tile_stored(0, out + c, 4 * width); _tile_stored(1, out + c + SIDE, 4 * width);
    }
    IN_MEMORY;
}

/* Values of a block [keys, width] as pairs of keys [keys / 2, width, 2]; zeros where nobody looks. Unless all look at
 * all keys, also in place of infinities and NaN, which weights of 0 would not hide; returns whether there are any. */
INLINE int pair_values(const int all, const uint16_t *values, int64_t from, int64_t to, int64_t width,
                       uint32_t *pairs) {
    uint16_t order[2][32];
    for (int i = 0; i < 32; i++) order[0][i] = (uint16_t)(i / 2 + i % 2 * 32), order[1][i] = order[0][i] + 16;
    __m512i low = _mm512_loadu_si512(order[0]), high = _mm512_loadu_si512(order[1]), top = _mm512_set1_epi16(0x7f80);
    __mmask32 odd = 0;
    for (int64_t i = 0; i < LOOKED; i += 2)
        for (int64_t c = 0; c < width; c += CHUNK) {
            __m512i a = from <= i && i < to ? _mm512_loadu_si512(values + i * width + c) : _mm512_setzero_si512();
            __m512i b = from <= i + 1 && i + 1 < to ? _mm512_loadu_si512(values + (i + 1) * width + c)
                                                    : _mm512_setzero_si512();
            if (!all) {
                __mmask32 odd_a = _mm512_cmpeq_epi16_mask(_mm512_and_si512(a, top), top);
                __mmask32 odd_b = _mm512_cmpeq_epi16_mask(_mm512_and_si512(b, top), top);
                a = _mm512_maskz_mov_epi16(~odd_a, a), b = _mm512_maskz_mov_epi16(~odd_b, b);
                odd |= odd_a | odd_b;
            }
            _mm512_storeu_si512(pairs + i / 2 * width + c, _mm512_permutex2var_epi16(a, low, b));
            _mm512_storeu_si512(pairs + i / 2 * width + c + SIDE, _mm512_permutex2var_epi16(a, high, b));
        }
    return odd != 0;
}

/* What pair_values left out, to the sums of those who look at it. weights: [queries, keys]. */
static void add_odd(const uint16_t *values, int64_t width, const uint16_t *weights, broad_ints first, broad_ints last,
                    float *sums) {
    for (int64_t j = 0; j < SIDE; j++)
        for (int64_t i = first[j]; i <= last[j] && i < LOOKED; i++)
            for (int64_t c = 0; c < width; c++)
                if ((values[i * width + c] & 0x7f80u) == 0x7f80u)
                    sums[j * width + c] += from_bf16(weights[j * LOOKED + i]) * from_bf16(values[i * width + c]);
}

typedef struct {
    broad most, sum, slopes; /* a lane for each query */
    broad_ints place;
} lane_t;

/* Scores [keys, queries] of the block that begins at `key` become weights [queries, keys] in bf16; returns what is
 * left of what was gathered so far. all: every lane looks at every key; else at those from `first` to `last`. */
INLINE broad weigh_lanes(const int all, lane_t *l, float *scores, int64_t key, broad_ints first, broad_ints last,
                         float cap, int sloping, uint32_t *weights, const uint16_t *next_keys,
                         const uint16_t *next_values, int64_t ahead) {
    broad most[4] = {l->most, l->most, l->most, l->most};
#define OWN(I) ((first <= (int32_t)(I)) & ((int32_t)(I) <= last))
    for (int64_t i = 0; i < LOOKED; i += 4)
        UNROLLED for (int j = 0; j < 4; j++) {
            broad x = *(broad *)(scores + (i + j) * SIDE);
            if (cap > 0.0f) {
                for (int k = 0; k < SIDE; k++) x[k] = cap * tanh_of(x[k] / cap);
            }
            if (sloping) x -= l->slopes * __builtin_convertvector(l->place - (int32_t)(key + i + j), broad);
            if (!all) x = chosen(OWN(i + j), x, broad_of(-INFINITY));
            if (!all || cap > 0.0f || sloping) *(broad *)(scores + (i + j) * SIDE) = x;
            most[j] = (broad)_mm512_max_ps((__m512)x, (__m512)most[j]); /* the second where the first is no number */
        }
    UNROLLED for (int j = 2; j > 0; j /= 2)
        UNROLLED for (int k = 0; k < j; k++) most[k] = (broad)_mm512_max_ps((__m512)most[k], (__m512)most[k + j]);
    uint16_t order[32];
    for (int i = 0; i < 32; i++) order[i] = (uint16_t)(i / 2 + i % 2 * 16);
    __m512i mixed = _mm512_loadu_si512(order), pairs[LOOKED / 2];
    broad fade = broad_exp(l->most - most[0]), sums[4] = {{0}};
    if (!all) fade = chosen((last < first) | (first >= LOOKED), broad_of(1.0f), fade); /* who looks at none */
    for (int64_t i = 0; i < LOOKED; i += 4) {
        for (int64_t k = 0; k < ahead; k += CHUNK) { /* the next block is on its way while this one is computed */
            _mm_prefetch(next_keys + i / 4 * ahead + k, _MM_HINT_T1);
            _mm_prefetch(next_values + i / 4 * ahead + k, _MM_HINT_T1);
        }
        UNROLLED for (int j = 0; j < 4; j += 2) {
            broad one = broad_exp(*(broad *)(scores + (i + j) * SIDE) - most[0]);
            broad other = broad_exp(*(broad *)(scores + (i + j + 1) * SIDE) - most[0]);
            if (!all) one = chosen(OWN(i + j), one, (broad){0}), other = chosen(OWN(i + j + 1), other, (broad){0});
            __m512i both = _mm512_permutexvar_epi16(mixed, (__m512i)_mm512_cvtne2ps_pbh((__m512)other, (__m512)one));
            sums[j] += (broad)((broad_bits)both << 16); /* as they are multiplied */
            sums[j + 1] += (broad)((broad_bits)both & 0xffff0000u);
            pairs[(i + j) / 2] = both;
        }
    }
#undef OWN
    turn_round(pairs, weights, LOOKED / 2);
    turn_round(pairs + SIDE, weights + SIDE, LOOKED / 2);
    l->sum = l->sum * fade + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
    l->most = most[0];
    return fade;
}

/* Floats in `scratch` below: sums and what is asked of every query; scores, weights; pairs of values, and what lies
 * round the end of the room; and up to a line of the cache. */
#define LOOK_FLOATS(QUERIES, WIDTH) \
    (2 * (QUERIES) * (WIDTH) + LOOKED * SIDE + LOOKED * SIDE / 2 + (LOOKED / 2 + LOOKED) * (WIDTH) + 16)

/* As attend_together; width: a multiple of CHUNK. */
static void attend_tiles(const op_t *op, const call_t *call, const float *q, float *out, int64_t row, int64_t rows,
                         int64_t head, int64_t heads, float *scratch) {
    int64_t width = op->n[2], room = op->n[3], back = op->n[4], queries = rows * heads;
    int64_t base = (call->slots[row] * op->n[1] + head / (op->n[0] / op->n[1])) * room * width;
    int64_t place = call->places[row], earliest = place > back ? place - back : 0, end = place + rows;
    int64_t tiles = (queries + SIDE - 1) / SIDE;
    const float *sinks = op->bias, *slopes = op->rest;
    scratch = (float *)(((uintptr_t)scratch + 63) / 64 * 64);
    float *sums = scratch, *scores = sums + tiles * SIDE * width;
    uint32_t *ask = (uint32_t *)(scores + LOOKED * SIDE), *weights = ask + tiles * SIDE * width;
    uint32_t *pairs = weights + SIDE * LOOKED / 2;
    uint16_t *aside = (uint16_t *)(pairs + LOOKED / 2 * width);
    memset(sums, 0, sizeof(float) * (size_t)(tiles * SIDE * width));
    memset(ask, 0, sizeof(float) * (size_t)(tiles * SIDE * width));
    lane_t lanes[2];
    for (int64_t t = 0; t < tiles; t++)
        for (int64_t j = 0; j < SIDE; j++) {
            int64_t i = t * SIDE + j, h = head + i % heads;
            int used = i < queries;
            lanes[t].most[j] = used && sinks ? sinks[h] : -INFINITY, lanes[t].sum[j] = used && sinks ? 1.0f : 0.0f;
            lanes[t].slopes[j] = used && slopes ? slopes[h] : 0.0f;
            lanes[t].place[j] = used ? (int32_t)(place + i / heads) : -1;
            if (!used) continue;
            const float *from = q + ((row + i / heads) * op->n[0] + h) * width;
            uint16_t *to = (uint16_t *)(ask + t * SIDE * width);
            for (int64_t c = 0; c < width; c++) {
                float x = from[c] * op->f[0];
                uint16_t whole = to_bf16(x);
                uint16_t *at = to + (c / CHUNK * 2 * SIDE * SIDE + c % CHUNK / 2 * SIDE + j) * 2 + c % 2;
                at[0] = whole, at[2 * SIDE * SIDE] = to_bf16(x - from_bf16(whole));
            }
        }
    int32_t reach = back < INT32_MAX / 2 ? (int32_t)back : INT32_MAX / 2;
    for (int64_t key = earliest / LOOKED * LOOKED; key < end; key += LOOKED) {
        int64_t from = earliest > key ? earliest - key : 0, to = end - key < LOOKED ? end - key : LOOKED;
        int64_t first = from / SIDE, stop = (to + SIDE - 1) / SIDE, slot = (key + first * SIDE) % room;
        int all = place >= key + LOOKED - 1 && end - 1 - back <= key;
        const uint16_t *keys, *values;
        if (slot + (stop - first) * SIDE <= room) {
            keys = (const uint16_t *)op->more + base + (slot - first * SIDE) * width;
            values = (const uint16_t *)op->weight + base + (slot - first * SIDE) * width;
        } else { /* round the end of the room */
            uint16_t *k = aside, *v = aside + LOOKED * width;
            for (int64_t i = first * SIDE; i < stop * SIDE; i++) {
                int64_t at = base + (key + i) % room * width;
                memcpy(k + i * width, (const uint16_t *)op->more + at, sizeof(uint16_t) * (size_t)width);
                memcpy(v + i * width, (const uint16_t *)op->weight + at, sizeof(uint16_t) * (size_t)width);
            }
            keys = k, values = v;
        }
        int odd = all ? pair_values(1, values, from, to, width, pairs) : pair_values(0, values, from, to, width, pairs);
        int64_t ahead = end - key > LOOKED ? LOOKED / 16 * width : 0; /* of the next block in each of 16 turns */
        for (int64_t t = 0; t < tiles; t++) {
            lane_t *l = lanes + t;
            float *sum = sums + t * SIDE * width;
            broad_ints last = l->place - (int32_t)key, begin = last - reach;
            begin = (broad_ints)chosen(begin < 0, (broad){0}, (broad)begin);
            score_tiles(keys, first, stop, ask + t * SIDE * width, width, scores);
            broad fade = all ? weigh_lanes(1, l, scores, key, begin, last, op->f[1], slopes != NULL, weights,
                                           keys + LOOKED * width, values + LOOKED * width, ahead)
                             : weigh_lanes(0, l, scores, key, begin, last, op->f[1], slopes != NULL, weights,
                                           keys + LOOKED * width, values + LOOKED * width, ahead);
            ahead = 0;
            int faded = _mm512_cmp_ps_mask((__m512)fade, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ) != 0;
            for (int64_t j = 0; faded && j < SIDE; j++)
                for (int64_t c = 0; c < width; c += SIDE) *(broad *)(sum + j * width + c) *= fade[j];
            gather_tiles(weights, pairs, width, sum);
            if (odd) add_odd(values, width, (const uint16_t *)weights, begin, last, sum);
        }
    }
    for (int64_t i = 0; i < queries; i++) {
        float *to = out + ((row + i / heads) * op->n[0] + head + i % heads) * width;
        float whole = 1.0f / lanes[i / SIDE].sum[i % SIDE];
        for (int64_t c = 0; c < width; c++) to[c] = sums[i * width + c] * whole;
    }
}
#endif

#endif
