/* Stick-breaking attention over the keys and values so far. */
#ifndef ARMILLARY_STICK_H
#define ARMILLARY_STICK_H

#include "recurrence.h"

INLINE float dot_key(const int kind, const void *key, int64_t at, const float *q, int64_t width) {
    wide sums = {0};
    int64_t c = 0;
    for (; c + WIDE <= width; c += WIDE) sums = fuse(get(key, at + c, kind), *(const wide *)(q + c), sums);
    float sum = sum_of(sums);
    for (; c < width; c++) sum += get_one(key, at + c, kind) * q[c];
    return sum;
}

INLINE void add_value(const int kind, const void *value, int64_t at, float weight, float *y, int64_t width) {
    int64_t c = 0;
    for (; c + WIDE <= width; c += WIDE)
        *(wide *)(y + c) = fuse(get(value, at + c, kind), wide_of(weight), *(const wide *)(y + c));
    for (; c < width; c++) y[c] += get_one(value, at + c, kind) * weight;
}

/* From the newest key on, each of score s takes the share sigmoid(s) of what is left: y = sum of shares v. */
INLINE void break_stick(const int kind, const op_t *op, const float *q, float *y, int64_t base, int64_t place) {
    int64_t width = op->n[2];
    float broken = 0.0f; /* minus the logarithm of what is left */
    memset(y, 0, sizeof(float) * (size_t)width);
    for (int64_t i = place; i >= 0; i--) {
        float score = dot_key(kind, op->more, base + i * width, q, width) * op->f[0];
        broken += softplus_of(score);
        add_value(kind, op->weight, base + i * width, exp_down(score - broken), y, width);
    }
}

/* n: heads, groups, width, room; more, weight: keys and values [slots, groups, room, width]; f: scale */
static void stick(const op_t *op, const call_t *call, const float *q, float *out, int64_t rows, int thread,
                  int threads) {
    int64_t heads = op->n[0], groups = op->n[1], width = op->n[2], room = op->n[3];
    range_t mine = share_of(rows * heads, thread, threads);
    for (int64_t task = mine.first; task < mine.stop; task++) {
        int64_t r = task / heads, h = task % heads;
        int64_t base = (call->slots[r] * groups + h / (heads / groups)) * room * width;
        const float *from = q + (r * heads + h) * width;
        float *to = out + (r * heads + h) * width;
#define BROKEN(KIND) break_stick(KIND, op, from, to, base, call->places[r])
        OF_KIND(op->kind, BROKEN);
#undef BROKEN
    }
}

#endif
