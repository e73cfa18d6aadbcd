/* States that a token changes as a whole. */
#ifndef ARMILLARY_RECURRENCE_H
#define ARMILLARY_RECURRENCE_H

#include "record.h"

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

#endif
