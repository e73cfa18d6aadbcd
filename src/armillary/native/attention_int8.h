/* Keys and values in 8 bits with a bf16 scale for each token and head: appended to a state, and attended to. */
#ifndef ARMILLARY_ATTENTION_INT8_H
#define ARMILLARY_ATTENTION_INT8_H

#include <float.h>

#include "recurrence.h"

/* n: units, width of one, room; out: numbers [slots, units, room, width], more: scales [slots, units, room] */
static void append_int8(const op_t *op, const call_t *call, const float *x, int64_t rows, range_t mine) {
    int64_t units = op->n[0], width = op->n[1], room = op->n[2];
    for (int64_t r = 0; r < rows; r++)
        for (int64_t u = mine.first; u < mine.stop; u++) {
            int64_t at = (call->slots[r] * units + u) * room + call->places[r];
            const float *from = x + (r * units + u) * width;
            int8_t *to = (int8_t *)op->out + at * width;
            float most = largest_size(from, width);
            int fine = most < INFINITY; /* not NaN either: the scale says so of the whole line */
            uint16_t stored = to_bf16(fine ? most / 127.0f : NAN);
            float scale = from_bf16(stored) > FLT_MIN ? from_bf16(stored) : FLT_MIN;
            ((uint16_t *)op->more)[at] = stored;
            if (!fine) memset(to, 0, (size_t)width);
            for (int64_t i = 0; fine && i < width; i++) {
                float each = __builtin_rintf(from[i] / scale);
                each = each > 127.0f ? 127.0f : each;
                to[i] = (int8_t)(int32_t)(each < -127.0f ? -127.0f : each);
            }
        }
}

INLINE wide get_int8(const int8_t *p) {
#if defined(__AVX2__)
    return (wide)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    wide x;
    for (int i = 0; i < WIDE; i++) x[i] = (float)p[i];
    return x;
#endif
}

/* `heads` heads of one group: weights [heads, count] by values, a stripe of columns at a time. */
INLINE void gather_int8(const int heads, const int n, const int8_t *values, int64_t width, int64_t count,
                        const float *weights, float *out) {
    wide sums[4][4];
    for (int h = 0; h < heads; h++)
        for (int s = 0; s < n; s++) sums[h][s] = (wide){0};
    for (int64_t i = 0; i < count; i++)
        for (int s = 0; s < n; s++) {
            wide each = get_int8(values + i * width + s * WIDE);
            for (int h = 0; h < heads; h++) sums[h][s] = fuse(each, wide_of(weights[h * count + i]), sums[h][s]);
        }
    for (int h = 0; h < heads; h++)
        for (int s = 0; s < n; s++) *(wide *)(out + h * width + s * WIDE) = sums[h][s];
}

INLINE void attend_int8_heads(const int heads, const op_t *op, const float *q, float *out, int64_t base, int64_t head,
                              int64_t place, float *weights) {
    int64_t width = op->n[2], count = place + 1;
    void *const *more = op->rest; /* scales of keys and of values, sinks, slopes */
    const uint16_t *key_scales = (const uint16_t *)more[0] + base, *value_scales = (const uint16_t *)more[1] + base;
    const float *sinks = more[2], *slopes = more[3];
    const int8_t *keys = (const int8_t *)op->more + base * width, *values = (const int8_t *)op->weight + base * width;
    float cap = op->f[1];
    for (int64_t i = 0; i < count; i++) {
        wide sums[4];
        for (int h = 0; h < heads; h++) sums[h] = (wide){0};
        int64_t c = 0;
        for (; c + WIDE <= width; c += WIDE) {
            wide each = get_int8(keys + i * width + c);
            for (int h = 0; h < heads; h++) sums[h] = fuse(each, *(const wide *)(q + h * width + c), sums[h]);
        }
        float scale = from_bf16(key_scales[i]) * op->f[0];
        for (int h = 0; h < heads; h++) {
            float sum = sum_of(sums[h]);
            for (int64_t j = c; j < width; j++) sum += (float)keys[i * width + j] * q[h * width + j];
            weights[h * count + i] = sum * scale;
        }
    }
    for (int h = 0; h < heads; h++) {
        float *line = weights + h * count;
        if (cap > 0.0f)
            for (int64_t i = 0; i < count; i++) line[i] = cap * tanh_of(line[i] / cap);
        if (slopes)
            for (int64_t i = 0; i < count; i++) line[i] -= slopes[head + h] * (float)(count - 1 - i);
        float peak = most_of(line, count, sinks ? sinks[head + h] : -INFINITY);
        for (int64_t i = 0; i < count; i++) line[i] = exp_down(line[i] - peak);
        float sum = sum_line(line, count, 0, 0.0f);
        if (sinks) sum += exp_down(sinks[head + h] - peak);
        for (int64_t i = 0; i < count; i++) line[i] *= from_bf16(value_scales[i]) / sum;
    }
    int64_t c = 0;
    for (; c + 4 * WIDE <= width; c += 4 * WIDE) gather_int8(heads, 4, values + c, width, count, weights, out + c);
    for (; c + WIDE <= width; c += WIDE) gather_int8(heads, 1, values + c, width, count, weights, out + c);
    for (; c < width; c++)
        for (int h = 0; h < heads; h++) {
            float sum = 0.0f;
            for (int64_t i = 0; i < count; i++) sum += (float)values[i * width + c] * weights[h * count + i];
            out[h * width + c] = sum;
        }
}

/* n: heads, groups, width, room; more, weight: keys and values [slots, groups, room, width]; rest: where the scales of
 * both [slots, groups, room], sinks and slopes lie; f: scale, cap; scratch: four numbers a place */
static void attend_int8(const op_t *op, const call_t *call, const float *q, float *out, int64_t rows, float *scratch,
                        int thread, int threads) {
    int64_t heads = op->n[0], groups = op->n[1], width = op->n[2], room = op->n[3], each = heads / groups;
    int64_t tiles = (each + 3) / 4;
    range_t mine = share_of(rows * groups * tiles, thread, threads);
    for (int64_t task = mine.first; task < mine.stop; task++) {
        int64_t r = task / (groups * tiles), g = task / tiles % groups, first = task % tiles * 4;
        int64_t base = (call->slots[r] * groups + g) * room, place = call->places[r];
        int64_t h = g * each + first, stop = g * each + (first + 4 < each ? first + 4 : each);
#define HEADS(N)                                                                                                \
    for (; h + (N) <= stop; h += (N))                                                                           \
        attend_int8_heads(N, op, q + (r * heads + h) * width, out + (r * heads + h) * width, base, h, place, scratch);
        HEADS(4)
        HEADS(2)
        HEADS(1)
#undef HEADS
    }
}

#endif
