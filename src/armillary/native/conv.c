/* The short causal depthwise convolution, forward and backward. Plain C, no PyTorch headers.
 *
 *     y[t] = act(bias + sum over j < taps of w[j] x[t - j])
 *
 * for every channel, act the identity or x sigma(x). x is [rows, length, channels] in float32 or bf16 (as
 * uint16_t); w [taps, channels], tap j for the token j back, and bias [channels] are float32. `tail` [rows, taps
 * - 1, channels], like x, is what came before the first token (null: nothing). With documents [rows,
 * length] (or null) a token sees nothing from before the last change of the id, and no tail.
 *
 * A task is one row, LANES channels and, in the forward pass, some tokens; the innermost loop runs over channels.
 */
#include "numbers.h"

#define LANES 64  /* channels at a time */
#define TOKENS 256 /* of one task in the forward pass */

static inline void load(const void *from, int64_t at, int64_t count, int bf16, float *line) {
    if (count < LANES) memset(line, 0, sizeof(float) * LANES);
    if (bf16)
        for (int64_t i = 0; i < count; i++) line[i] = from_bf16(((const uint16_t *)from)[at + i]);
    else
        memcpy(line, (const float *)from + at, sizeof(float) * (size_t)count);
}

static inline void store(void *to, int64_t at, int64_t count, int bf16, const float *line) {
    if (bf16)
        for (int64_t i = 0; i < count; i++) ((uint16_t *)to)[at + i] = to_bf16(line[i]);
    else
        memcpy((float *)to + at, line, sizeof(float) * (size_t)count);
}

static inline float sigmoid(float x) {
    float e = exp_down(x < 0.0f ? x : -x);
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

/* How many tokens before `token` it sees, at most most. */
static inline int64_t reach(const int64_t *ids, int64_t token, int64_t most, int tailed) {
    if (!ids && tailed) return most;
    int64_t back = 0;
    while (back < most && back < token && (!ids || ids[token - back] == ids[token - back - 1])) back++;
    return back;
}

/* The input `back` tokens before token t of a row, which may lie in the tail. */
static inline void look(const void *x, const void *tail, int64_t row, int64_t t, int64_t back, int64_t length,
                        int64_t channels, int64_t taps, int64_t first, int64_t count, int bf16, float *line) {
    int64_t at = t - back;
    if (at >= 0) load(x, (row * length + at) * channels + first, count, bf16, line);
    else load(tail, (row * (taps - 1) + taps - 1 + at) * channels + first, count, bf16, line);
}

void short_conv(const void *x, const float *w, const float *bias, const void *tail, const int64_t *documents,
                void *y, int64_t rows, int64_t length, int64_t channels, int64_t taps, int silu, int bf16) {
    int64_t parts = (length + TOKENS - 1) / TOKENS, blocks = (channels + LANES - 1) / LANES;
#pragma omp parallel for schedule(static)
    for (int64_t task = 0; task < rows * parts * blocks; task++) {
        int64_t row = task / (parts * blocks), part = task / blocks % parts, first = task % blocks * LANES;
        int64_t count = channels - first < LANES ? channels - first : LANES;
        int64_t stop = (part + 1) * TOKENS < length ? (part + 1) * TOKENS : length;
        const int64_t *ids = documents ? documents + row * length : NULL;
        float sum[LANES], line[LANES], weight[LANES], shift[LANES];
        load(bias, first, count, 0, shift);
        for (int64_t t = part * TOKENS; t < stop; t++) {
            int64_t back = reach(ids, t, taps - 1, tail != NULL);
            memcpy(sum, shift, sizeof(sum));
            for (int64_t j = 0; j <= back; j++) {
                look(x, tail, row, t, j, length, channels, taps, first, count, bf16, line);
                load(w, j * channels + first, count, 0, weight);
                for (int64_t i = 0; i < LANES; i++) sum[i] += weight[i] * line[i];
            }
            if (silu)
                for (int64_t i = 0; i < LANES; i++) sum[i] *= sigmoid(sum[i]);
            store(y, (row * length + t) * channels + first, count, bf16, sum);
        }
    }
}

/* Gradients from that of y: grad_x like x, grad_tail (null: not asked for) like tail, and one part per row of
 * grad_w [rows, taps, channels] and grad_bias [rows, channels], float32. */
void short_conv_backward(const void *grad, const void *x, const float *w, const float *bias, const void *tail,
                         const int64_t *documents, void *grad_x, void *grad_tail, float *grad_w,
                         float *grad_bias, int64_t rows, int64_t length, int64_t channels, int64_t taps,
                         int silu, int bf16) {
    int64_t blocks = (channels + LANES - 1) / LANES;
#pragma omp parallel
    {
        float *weights = malloc(sizeof(float) * (size_t)taps * LANES * 3);
        float *slopes = weights + taps * LANES; /* of the inputs 0, 1, ... tokens back, not all terms there yet */
        float *sums = slopes + taps * LANES;    /* gradient of the weights */
        float *lines = malloc(sizeof(float) * (size_t)taps * LANES);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < rows * blocks; task++) {
            int64_t row = task / blocks, first = task % blocks * LANES;
            int64_t count = channels - first < LANES ? channels - first : LANES;
            const int64_t *ids = documents ? documents + row * length : NULL;
            float sum[LANES], slope[LANES], shift[LANES], total[LANES] = {0};
            load(bias, first, count, 0, shift);
            for (int64_t j = 0; j < taps; j++) load(w, j * channels + first, count, 0, weights + j * LANES);
            memset(slopes, 0, sizeof(float) * (size_t)taps * LANES * 2);
            for (int64_t t = 0; t < length + taps - 1; t++) {
                memmove(slopes + LANES, slopes, sizeof(float) * (size_t)(taps - 1) * LANES);
                memset(slopes, 0, sizeof(float) * LANES);
                if (t < length) {
                    int64_t back = reach(ids, t, taps - 1, tail != NULL);
                    load(grad, (row * length + t) * channels + first, count, bf16, slope);
                    memcpy(sum, shift, sizeof(sum));
                    for (int64_t j = 0; j <= back; j++) {
                        float *line = lines + j * LANES, *weight = weights + j * LANES;
                        look(x, tail, row, t, j, length, channels, taps, first, count, bf16, line);
                        for (int64_t i = 0; i < LANES; i++) sum[i] += weight[i] * line[i];
                    }
                    if (silu)
                        for (int64_t i = 0; i < LANES; i++) {
                            float s = sigmoid(sum[i]);
                            slope[i] *= s * (1.0f + sum[i] * (1.0f - s));
                        }
                    for (int64_t i = 0; i < LANES; i++) total[i] += slope[i];
                    for (int64_t j = 0; j <= back; j++) {
                        float *line = lines + j * LANES, *weight = weights + j * LANES;
                        float *of_input = slopes + j * LANES, *of_weight = sums + j * LANES;
                        for (int64_t i = 0; i < LANES; i++) {
                            of_input[i] += slope[i] * weight[i];
                            of_weight[i] += slope[i] * line[i];
                        }
                    }
                }
                int64_t done = t - (taps - 1);
                const float *last = slopes + (taps - 1) * LANES;
                if (done >= 0) store(grad_x, (row * length + done) * channels + first, count, bf16, last);
                else if (grad_tail)
                    store(grad_tail, (row * (taps - 1) + taps - 1 + done) * channels + first, count, bf16, last);
            }
            for (int64_t j = 0; j < taps; j++)
                store(grad_w, (row * taps + j) * channels + first, count, 0, sums + j * LANES);
            store(grad_bias, row * channels + first, count, 0, total);
        }
        free(weights);
        free(lines);
    }
}
