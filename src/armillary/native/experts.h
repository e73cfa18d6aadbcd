/* Mixtures of experts: which of them a row goes through, and their products, of which only those that some row
 * picked are read. */
#ifndef ARMILLARY_EXPERTS_H
#define ARMILLARY_EXPERTS_H

#include "products.h"
#include "recurrence.h"

typedef struct {
    void *weight, *more;
    float *bias;
} expert_t;

/* The `top` largest of each row's scores [rows, experts] and their gates: picks [rows, 2 top]. Of equal ones the
 * first. n: experts, top, 1: by sigmoids, 1: gates sum to 1; bias: added where experts are picked, or null;
 * f: factor on the gates; scratch: three numbers an expert */
static void route(const op_t *op, const float *scores, float *picks, int64_t rows, float *scratch) {
    int64_t experts = op->n[0], top = op->n[1];
    const float *added = op->bias;
    float *every = scratch, *by = scratch + experts, *open = by + experts;
    for (int64_t r = 0; r < rows; r++) {
        const float *each = scores + r * experts;
        float *pick = picks + r * 2 * top, *gate = pick + top, total = 0.0f;
        if (op->n[2]) {
            for (int64_t e = 0; e < experts; e++) every[e] = sigmoid_of(each[e]);
        } else {
            float peak = most_of(each, experts, -INFINITY);
            for (int64_t e = 0; e < experts; e++) total += every[e] = exp_down(each[e] - peak);
            for (int64_t e = 0; e < experts; e++) every[e] /= total;
        }
        /* a softmax keeps the order of scores, which do not round to ties where its shares would */
        for (int64_t e = 0; e < experts; e++)
            by[e] = op->n[2] || added ? every[e] + (added ? added[e] : 0.0f) : each[e];
        for (int64_t e = 0; e < experts; e++) open[e] = 1.0f;
        total = 0.0f;
        for (int64_t j = 0; j < top; j++) {
            int64_t best = -1;
            for (int64_t e = 0; e < experts; e++)
                if (open[e] != 0.0f && (best < 0 || by[e] > by[best])) best = e;
            open[best] = 0.0f;
            pick[j] = (float)best;
            total += gate[j] = every[best];
        }
        for (int64_t j = 0; j < top; j++) gate[j] = (op->n[3] ? gate[j] / total : gate[j]) * op->f[0];
    }
}

/* The picks of one expert, at most one a row: row times top, plus which of its picks. Returns how many. */
INLINE int64_t picked_by(const float *picks, int64_t rows, int64_t top, int64_t expert, int64_t *owners) {
    int64_t count = 0;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < top; j++)
            if ((int64_t)picks[r * 2 * top + j] == expert) owners[count++] = r * top + j;
    return count;
}

/* Some rows as an expert's products take them: owners[i] / divisor is where row i stands in x. Returns what is behind
 * them. */
INLINE float *gather_rows(int kind, const float *x, const int64_t *owners, int64_t divisor, int64_t count,
                          int64_t inputs, void *to) {
    if (kind == F32 || kind == BF16 || kind == F16) {
        for (int64_t i = 0; i < count; i++)
            memcpy((float *)to + i * inputs, x + owners[i] / divisor * inputs, sizeof(float) * (size_t)inputs);
        return (float *)to + count * inputs;
    }
    prepared_t p = prepared(to, kind, inputs, count);
    for (int64_t i = 0; i < count; i++) prepare(x + owners[i] / divisor * inputs, &p, kind, i, inputs);
    return (float *)((char *)to + prepared_size(kind, inputs, count));
}

INLINE void expert_product(const op_t *op, const expert_t *expert, int64_t inputs, int64_t outputs, void *x, float *y,
                           int64_t rows, range_t columns) {
    op_t one = *op;
    one.weight = expert->weight, one.more = expert->more, one.bias = expert->bias;
    one.n[0] = inputs, one.n[1] = outputs, one.f[0] = 1.0f;
    if (op->kind == F32) f32_product(&one, x, y, rows, columns);
    else if (op->kind == BF16) bf16_product(&one, x, y, rows, columns);
    else if (op->kind == F16) f16_product(&one, x, y, rows, columns);
    else if (op->kind == INT8) int8_product(&one, x, y, rows, columns);
    else int4_product(&one, x, y, rows, columns);
}

/* Columns of what all picks are inside their experts, [rows, top, hidden]: activation(gate) up, or activation(up).
 * n: inputs, hidden, units, experts, top, activation (below 0: none); in: x, more: picks of this thread, weight:
 * experts' up products and, unless bias is null, bias: their gates; scratch: 8 bytes a row, then x as products take it
 * and two results of all rows */
static void experts_in(const op_t *op, const float *x, const float *picks, float *out, int64_t rows, range_t columns,
                       float *scratch) {
    int64_t inputs = op->n[0], hidden = op->n[1], top = op->n[4], count = columns.stop - columns.first;
    int64_t *owners = (int64_t *)scratch;
    void *taken = owners + rows;
    for (int64_t e = 0; e < op->n[3]; e++) {
        int64_t found = picked_by(picks, rows, top, e, owners);
        if (found == 0) continue;
        float *up = gather_rows(op->kind, x, owners, top, found, inputs, taken), *gate = up + found * hidden;
        expert_product(op, (const expert_t *)op->weight + e, inputs, hidden, taken, up, found, columns);
        if (op->bias)
            expert_product(op, (const expert_t *)op->bias + e, inputs, hidden, taken, gate, found, columns);
        for (int64_t i = 0; i < found; i++) {
            float *line = (op->bias ? gate : up) + i * hidden + columns.first;
            if (op->n[5] >= 0) activate(line, op->bias ? up + i * hidden + columns.first : NULL, count, (int)op->n[5]);
            memcpy(out + owners[i] * hidden + columns.first, line, sizeof(float) * (size_t)count);
        }
    }
}

/* Columns of the sum of a row's experts times their gates, added in the order of the experts. n: hidden, outputs,
 * units, experts, top; in: [rows, top, hidden], more: picks of this thread, weight: experts' down products;
 * scratch: as above */
static void experts_out(const op_t *op, const float *x, const float *picks, float *out, int64_t rows,
                        range_t columns, float *scratch) {
    int64_t inputs = op->n[0], outputs = op->n[1], top = op->n[4];
    int64_t *owners = (int64_t *)scratch;
    void *taken = owners + rows;
    for (int64_t r = 0; r < rows; r++)
        memset(out + r * outputs + columns.first, 0, sizeof(float) * (size_t)(columns.stop - columns.first));
    for (int64_t e = 0; e < op->n[3]; e++) {
        int64_t found = picked_by(picks, rows, top, e, owners);
        if (found == 0) continue;
        float *each = gather_rows(op->kind, x, owners, 1, found, inputs, taken);
        expert_product(op, (const expert_t *)op->weight + e, inputs, outputs, taken, each, found, columns);
        for (int64_t i = 0; i < found; i++) {
            int64_t r = owners[i] / top;
            float gate = picks[r * 2 * top + top + owners[i] % top], *line = out + r * outputs;
            for (int64_t c = columns.first; c < columns.stop; c++) line[c] += gate * each[i * outputs + c];
        }
    }
}

/* x [rows, a, b, width] -> y [rows, b, a, width], heads `mine` of y. n: heads, a, width */
static void swap(const op_t *op, const float *x, float *y, int64_t rows, range_t mine) {
    int64_t heads = op->n[0], a = op->n[1], b = heads / a, width = op->n[2];
    for (int64_t r = 0; r < rows; r++)
        for (int64_t h = mine.first; h < mine.stop; h++)
            memcpy(y + (r * heads + h) * width, x + (r * heads + h % a * b + h / a) * width,
                   sizeof(float) * (size_t)width);
}

/* y + sigmoid(s) x for columns `from` to before `to`. n: width; in: x, more: s [rows] */
static void add_gated(const op_t *op, const float *x, float *y, int64_t rows, int64_t from, int64_t to) {
    for (int64_t r = 0; r < rows; r++) {
        float gate = sigmoid_of(((const float *)op->more)[r]);
        for (int64_t i = from, at = r * op->n[0]; i < to; i++) y[at + i] += gate * x[at + i];
    }
}

#endif
