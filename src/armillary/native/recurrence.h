/* States that a token changes as a whole, and what makes their gates. The tokens of a call are taken one after
 * another, so that those of one sequence find what the ones before them left. */
#ifndef ARMILLARY_RECURRENCE_H
#define ARMILLARY_RECURRENCE_H

#include "products.h"
#include "rowwise.h"

#define PER_LOG2 1.44269504f
#define CHANNELS 32 /* channels at a time */

enum fading { STILL, BY_HEAD, BY_KEY };
enum cell { RNN_TANH, RNN_RELU, LSTM, GRU };
enum map { FADE, ELU_ONE };

INLINE float softplus_of(float x) { return (x > 0.0f ? x : 0.0f) + log1p_unit(exp_down(-fabsf(x))); }

INLINE float sigmoid_of(float x) {
    float e = exp_down(-fabsf(x));
    return (x >= 0.0f ? 1.0f : e) / (1.0f + e);
}

/* -- matrices: S <- fade S + share k v, y = q S for one token of one head; if delta, what S holds for k is taken
 * from v first. `n` vectors of columns at a time, so that y stays in registers while S is passed over. */

INLINE void matrix_stripe(const int n, const int fading, const int delta, float *state, int64_t stride, int64_t keys,
                          const float *q, const float *k, const float *v, const float *fades, float share, float *y) {
    wide sums[4], news[4];
    float fade = fading == BY_HEAD ? fades[0] : 1.0f;
    for (int s = 0; s < n; s++) sums[s] = (wide){0}, news[s] = *(const wide *)(v + s * WIDE);
    if (delta) {
        wide held[4];
        for (int s = 0; s < n; s++) held[s] = (wide){0};
        for (int64_t i = 0; i < keys; i++) {
            wide key = wide_of(k[i]);
            for (int s = 0; s < n; s++) held[s] = fuse(key, *(const wide *)(state + i * stride + s * WIDE), held[s]);
        }
        for (int s = 0; s < n; s++) news[s] -= held[s] * fade;
    }
    for (int s = 0; s < n; s++) news[s] *= share;
    for (int64_t i = 0; i < keys; i++) {
        wide key = wide_of(k[i]), ask = wide_of(q[i]), keep = wide_of(fading == BY_KEY ? fades[i] : fade);
        float *line = state + i * stride;
        for (int s = 0; s < n; s++) {
            wide old = *(const wide *)(line + s * WIDE);
            wide each = fading == STILL ? fuse(key, news[s], old) : fuse(old, keep, key * news[s]);
            *(wide *)(line + s * WIDE) = each;
            sums[s] = fuse(ask, each, sums[s]);
        }
    }
    for (int s = 0; s < n; s++) *(wide *)(y + s * WIDE) = sums[s];
}

static float matrix_column(int fading, int delta, float *state, int64_t stride, int64_t keys,
                           const float *q, const float *k, float v, const float *fades, float share) {
    float fade = fading == BY_HEAD ? fades[0] : 1.0f, held = 0.0f, sum = 0.0f;
    if (delta)
        for (int64_t i = 0; i < keys; i++) held += k[i] * state[i * stride];
    float new = (v - held * fade) * share;
    for (int64_t i = 0; i < keys; i++) {
        float *each = state + i * stride;
        *each = (fading == BY_KEY ? fades[i] : fade) * *each + k[i] * new;
        sum += q[i] * *each;
    }
    return sum;
}

INLINE void matrix_head(const int fading, const int delta, float *state, int64_t stride, int64_t keys, int64_t values,
                        const float *q, const float *k, const float *v, const float *fades, float share, float *y) {
    int64_t c = 0;
#define STRIPES(N)                       \
    for (; c + (N) * WIDE <= values; c += (N) * WIDE) \
        matrix_stripe(N, fading, delta, state + c, stride, keys, q, k, v + c, fades, share, y + c);
    STRIPES(4)
    STRIPES(2)
    STRIPES(1)
#undef STRIPES
    for (; c < values; c++)
        y[c] = matrix_column(fading, delta, state + c, stride, keys, q, k, v[c], fades, share);
}

/* State [slots, heads, keys, values] of heads `mine`, with one column more if it also sums keys.
 * n: heads, groups of heads that share q and k, keys, values, how it fades, 1: delta or 2: divide by q times the
 * sum of the keys; in: q, more: k, weight: v, rest: state; bias: fades, pairs of a fade and a share [rows, heads, 2]
 * or, by key, [rows, heads, keys]; f: what is added to that divisor */
static void matrix(const op_t *op, const call_t *call, int64_t rows, range_t mine) {
    int64_t heads = op->n[0], each = heads / op->n[1], keys = op->n[2], values = op->n[3], fading = op->n[4];
    int64_t stride = values + (op->n[5] == 2);
    for (int64_t h = mine.first; h < mine.stop; h++)
        for (int64_t r = 0; r < rows; r++) {
            int64_t at = (r * op->n[1] + h / each) * keys, head = r * heads + h;
            const float *q = (const float *)op->in + at, *k = (const float *)op->more + at;
            const float *v = (const float *)op->weight + head * values, *fades = op->bias;
            float *y = (float *)op->out + head * values;
            float *state = (float *)op->rest + (call->slots[r] * heads + h) * keys * stride;
            const float *own = fading == STILL ? NULL : fades + head * (fading == BY_KEY ? keys : 2);
            float share = fading == BY_HEAD ? own[1] : 1.0f;
            if (fading == BY_KEY) matrix_head(BY_KEY, 0, state, stride, keys, values, q, k, v, own, share, y);
            else if (fading == STILL) matrix_head(STILL, 0, state, stride, keys, values, q, k, v, own, share, y);
            else if (op->n[5] == 1) matrix_head(BY_HEAD, 1, state, stride, keys, values, q, k, v, own, share, y);
            else matrix_head(BY_HEAD, 0, state, stride, keys, values, q, k, v, own, share, y);
            if (op->n[5] == 2) {
                float sum = matrix_column((int)fading, 0, state + values, stride, keys, q, k, 1.0f, own, share);
                for (int64_t c = 0; c < values; c++) y[c] /= sum + op->f[0];
            }
        }
}

/* The same with fades that stay. n: heads, keys, values; bias: fades; f: factor on k */
static void retain(const op_t *op, const call_t *call, int64_t rows, range_t mine) {
    int64_t heads = op->n[0], keys = op->n[1], values = op->n[2];
    for (int64_t h = mine.first; h < mine.stop; h++)
        for (int64_t r = 0; r < rows; r++) {
            const float *q = (const float *)op->in + (r * heads + h) * keys;
            const float *k = (const float *)op->more + (r * heads + h) * keys;
            const float *v = (const float *)op->weight + (r * heads + h) * values;
            float *state = (float *)op->rest + (call->slots[r] * heads + h) * keys * values;
            matrix_head(BY_HEAD, 0, state, values, keys, values, q, k, v, (const float *)op->bias + h, op->f[0],
                        (float *)op->out + (r * heads + h) * values);
        }
}

/* -- gates */

/* Pairs of a fade and a share for heads `mine`, [rows, heads, 2]: steps softplus(s + b) within f, fades
 * exp(-rate step). in: s, or null: nothing fades; more: shares before their sigmoid, or null: the steps;
 * bias: b, weight: rates; n: heads */
static void gates(const op_t *op, int64_t rows, range_t mine) {
    const float *s = op->in, *shares = op->more, *bias = op->bias, *rates = op->weight;
    float *out = op->out;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t h = mine.first; h < mine.stop; h++) {
            int64_t at = r * op->n[0] + h;
            float step = 0.0f;
            if (s) {
                step = softplus_of(s[at] + bias[h]);
                step = step < op->f[0] ? op->f[0] : step;
                step = step > op->f[1] ? op->f[1] : step;
            }
            out[2 * at] = s ? exp2_down(-rates[h] * step * PER_LOG2) : 1.0f;
            out[2 * at + 1] = shares ? sigmoid_of(shares[at]) : step;
        }
}

/* x in place: sigmoid(x)^f or elu(x) + 1. */
static void map(float *x, int64_t n, int kind, float factor) {
    if (kind == FADE)
        for (int64_t i = 0; i < n; i++) {
            float down = x[i] < 0.0f ? x[i] : 0.0f;
            x[i] = exp2_down((down - log1p_unit(exp_down(-fabsf(x[i])))) * factor * PER_LOG2);
        }
    else
        for (int64_t i = 0; i < n; i++) /* NaN stays */
            x[i] = (x[i] < 0.0f ? 0.0f : x[i]) + exp_down(x[i] < 0.0f ? x[i] : 0.0f);
}

/* y * weight, or y + x * weight, a weight for each column. n: width */
static void scaled(const op_t *op, const float *x, float *y, int64_t rows, int64_t from, int64_t to) {
    const float *weight = op->weight;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = from, at = r * op->n[0]; i < to; i++)
            y[at + i] = x ? y[at + i] + x[at + i] * weight[i] : y[at + i] * weight[i];
}

/* -- features of queries and keys, by heads */

enum features { RELU_FEATURES, EXP_FEATURES, UNIT_FEATURES };

/* In place, a line of logarithms: exponentials relative to its largest or, of keys, to the largest so far in steps
 * of 4, to which `fade` brings the sums up to here. */
static void exponentials(float *line, int64_t n, float *so_far, float *fade) {
    float peak = most_of(line, n, -INFINITY), top = ceilf(peak * 0.25f) * 4.0f;
    if (so_far) {
        top = top > -1e30f ? top : -1e30f;
        top = *so_far > top ? *so_far : top;
        fade[0] = exp_down(*so_far - top), fade[1] = 1.0f;
        *so_far = peak = top;
    }
    for (int64_t i = 0; i < n; i++) line[i] = exp_down(line[i] - peak);
}

/* x [rows, heads, width] -> out [rows, heads, features], heads `mine`. By random directions: relu(d x) + f1;
 * exp(d x - |x|^2 / 2), if paired also of -d; or x to length 1 and a 1. n: heads, width, directions, features,
 * kind, paired; weight: directions; f: factor on x, what is added; of keys, rest: their largest so far [slots,
 * heads], more: pairs of a fade and a share [rows, heads, 2]; scratch: width and directions of all heads */
static void features(const op_t *op, const call_t *call, const float *x, float *out, int64_t rows, range_t mine,
                     float *scratch) {
    int64_t heads = op->n[0], width = op->n[1], directions = op->n[2], size = op->n[3], count = mine.stop - mine.first;
    float *scaled_ = scratch, *found = scratch + heads * width;
    for (int64_t r = 0; r < rows; r++) {
        const float *from = x + (r * heads + mine.first) * width;
        for (int64_t i = 0; i < count * width; i++) scaled_[i] = from[i] * op->f[0];
        if (op->n[4] != UNIT_FEATURES) {
            op_t one = *op;
            one.n[0] = width, one.n[1] = directions, one.bias = NULL, one.f[0] = 1.0f;
            f32_product(&one, scaled_, found, count, (range_t){0, directions});
        }
        for (int64_t h = 0; h < count; h++) {
            const float *each = scaled_ + h * width, *by = found + h * directions;
            int64_t head = r * heads + mine.first + h;
            float *line = out + head * size, squares = sum_line(each, width, 1, 0.0f);
            if (op->n[4] == UNIT_FEATURES) {
                float length = 1.0f / sqrtf(squares + op->f[1]);
                for (int64_t i = 0; i < width; i++) line[i] = each[i] * length;
                line[width] = 1.0f;
            } else if (op->n[4] == RELU_FEATURES) {
                for (int64_t i = 0; i < directions; i++) /* NaN stays */
                    line[i] = (by[i] < 0.0f ? 0.0f : by[i]) + op->f[1];
            } else {
                for (int64_t i = 0; i < directions; i++) line[i] = by[i] - 0.5f * squares;
                if (op->n[5])
                    for (int64_t i = 0; i < directions; i++) line[directions + i] = -by[i] - 0.5f * squares;
                float *so_far = op->rest ? (float *)op->rest + call->slots[r] * heads + mine.first + h : NULL;
                exponentials(line, size, so_far, (float *)op->more + 2 * head);
            }
        }
    }
}

/* -- short convolutions: channels `from` to before `to` of x [rows, channels], in place. n: channels, units, taps,
 * first channel in the tail, channels of the tail, whether silu follows; kind: of the tail [slots, taps - 1, .] in
 * rest; weight: [taps, channels], the last a token's own; bias */
static void convolve(const op_t *op, const call_t *call, float *x, int64_t rows, int64_t from, int64_t to) {
    int64_t channels = op->n[0], before = op->n[2] - 1, all = op->n[4];
    const float *weight = op->weight, *bias = op->bias;
    int kind = op->kind;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = from; c < to; c += CHANNELS) {
            int64_t count = to - c < CHANNELS ? to - c : CHANNELS, at = call->slots[r] * before * all + op->n[3] + c;
            float sums[CHANNELS], *line = x + r * channels + c;
            const float *own = weight + before * channels + c;
            for (int64_t i = 0; i < count; i++) sums[i] = own[i] * line[i] + (bias ? bias[c + i] : 0.0f);
            for (int64_t j = 0; j < before; j++) {
                const float *w = weight + j * channels + c;
                if (kind != F32) {
                    uint16_t *held = (uint16_t *)op->rest + at + j * all;
                    for (int64_t i = 0; i < count; i++) sums[i] += w[i] * from_half(held[i], kind);
                    if (j + 1 < before) memcpy(held, held + all, sizeof(uint16_t) * (size_t)count);
                    else
                        for (int64_t i = 0; i < count; i++) held[i] = to_half(line[i], kind);
                } else {
                    float *held = (float *)op->rest + at + j * all;
                    for (int64_t i = 0; i < count; i++) sums[i] += w[i] * held[i];
                    memcpy(held, j + 1 < before ? held + all : line, sizeof(float) * (size_t)count);
                }
            }
            if (op->n[5]) activate(sums, NULL, count, SILU);
            memcpy(line, sums, sizeof(float) * (size_t)count);
        }
}

/* -- the diagonal selective scan: h <- exp(step a) h + step u b, y = c h + d u for every channel */

INLINE void select_block(const int64_t count, float *h, const float *rates, int64_t channels, int64_t states,
                         const float *u, const float *steps, const float *b, const float *c, const float *skip,
                         const float *shift, float *y) {
    float step[CHANNELS], in[CHANNELS], out[CHANNELS];
    for (int64_t i = 0; i < count; i++) {
        step[i] = softplus_of(steps[i] + shift[i]);
        in[i] = step[i] * u[i];
        out[i] = skip[i] * u[i];
    }
    for (int64_t n = 0; n < states; n++) {
        float *line = h + n * channels, take = b[n], give = c[n];
        const float *rate = rates + n * channels;
        for (int64_t i = 0; i < count; i++) {
            float each = exp2_down(step[i] * rate[i]) * line[i] + in[i] * take;
            line[i] = each;
            out[i] += give * each;
        }
    }
    memcpy(y, out, sizeof(float) * (size_t)count);
}

/* n: channels, units, states, width of what b and c stand in, and where b does; in: u, more: steps before bias and
 * softplus, bias: [rows, width] with b and, behind it, c; weight: lines of channels: the states' rates a (at most
 * 0, in units of log 2), d and the steps' bias; rest: state [slots, states, channels] */
static void select_(const op_t *op, const call_t *call, const float *u, float *y, int64_t rows, int64_t from,
                    int64_t to) {
    int64_t channels = op->n[0], states = op->n[2];
    const float *rates = op->weight, *skip = rates + states * channels, *shift = skip + channels;
    for (int64_t c = from; c < to; c += CHANNELS)
        for (int64_t r = 0; r < rows; r++) {
            int64_t at = r * channels + c;
            float *h = (float *)op->rest + call->slots[r] * states * channels + c;
            const float *steps = (const float *)op->more + at;
            const float *b = (const float *)op->bias + r * op->n[3] + op->n[4];
#define SELECT(N) \
    select_block(N, h, rates + c, channels, states, u + at, steps, b, b + states, skip + c, shift + c, y + at)
            if (to - c >= CHANNELS) SELECT(CHANNELS);
            else SELECT(to - c);
#undef SELECT
        }
}

/* -- recurrent cells */

INLINE void cell_row(const int kind, int64_t n, int64_t from, int64_t to, const float *restrict a,
                     const float *restrict b, const float *restrict bias, float *restrict h, float *restrict c,
                     float *restrict y) {
#define SUM(G) (a[(G) * n + i] + bias[(G) * n + i] + b[(G) * n + i])
    _Pragma("omp simd") for (int64_t i = from; i < to; i++) {
        float new;
        if (kind == LSTM) {
            float held = fused(sigmoid_of(SUM(1)), c[i], sigmoid_of(SUM(0)) * tanh_of(SUM(2)));
            c[i] = held;
            new = sigmoid_of(SUM(3)) * tanh_of(held);
        } else if (kind == GRU) {
            new = tanh_of(a[2 * n + i] + bias[2 * n + i] + sigmoid_of(SUM(0)) * b[2 * n + i]);
            new += sigmoid_of(SUM(1)) * (h[i] - new);
        } else if (kind == RNN_TANH) {
            new = tanh_of(SUM(0));
        } else {
            new = SUM(0);
            new = new < 0.0f ? 0.0f : new;
        }
        h[i] = y[i] = new;
    }
#undef SUM
}

/* Features `from` to before `to` of h and, of an LSTM, c. n: features, units, cell; in: products of the inputs,
 * more: of h, bias: all of them [gates, features]; rest: h, weight: c [slots, features] */
static void cell(const op_t *op, const call_t *call, const float *found, float *y, int64_t rows, int64_t from,
                 int64_t to) {
    const int64_t n = op->n[0], gates_of[] = {1, 1, 4, 3}, width = gates_of[op->n[2]] * n;
    for (int64_t r = 0; r < rows; r++) {
        const float *a = found + r * width, *b = (const float *)op->more + r * width;
        float *h = (float *)op->rest + call->slots[r] * n, *c = (float *)op->weight + call->slots[r] * n;
#define CELL_ROW(KIND) cell_row(KIND, n, from, to, a, b, op->bias, h, c, y + r * n)
        if (op->n[2] == LSTM) CELL_ROW(LSTM);
        else if (op->n[2] == GRU) CELL_ROW(GRU);
        else if (op->n[2] == RNN_TANH) CELL_ROW(RNN_TANH);
        else CELL_ROW(RNN_RELU);
#undef CELL_ROW
    }
}

#endif
