/* Keys and values: appended to a state, and attended to. */
#ifndef ARMILLARY_ATTENTION_H
#define ARMILLARY_ATTENTION_H

#include "record.h"
#include "rowwise.h"

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

#endif
