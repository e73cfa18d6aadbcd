/* The short causal depthwise convolution, forward and backward. Plain C, no PyTorch headers.
 *
 *     y[t] = act(bias + sum over j < taps of w[j] x[t - j])
 *
 * for every channel, act the identity or x sigma(x). x is [rows, length, channels] in float32 or bf16 (as
 * uint16_t); w [taps, channels], tap j for the token j back, and bias [channels] are float32. `tail` [rows, taps
 * - 1, channels], like x, is what came before the first token (null: nothing). With documents [rows,
 * length] (or null) a token sees nothing from before the last change of the id, and no tail.
 *
 * The innermost loops run over LANES channels. No result depends on the number of threads.
 */
#include "lines.h"

#define STRIPE (8 * LANES) /* channels of a task in the backward pass */

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
#pragma omp parallel for schedule(static)
    for (int64_t token = 0; token < rows * length; token++) {
        int64_t row = token / length, t = token % length;
        int64_t back = reach(documents ? documents + row * length : NULL, t, taps - 1, tail != NULL);
        for (int64_t first = 0; first < channels; first += LANES) {
            int64_t count = channels - first < LANES ? channels - first : LANES;
            float sum[LANES], line[LANES], weight[LANES];
            load(bias, first, count, 0, sum);
            for (int64_t j = 0; j <= back; j++) {
                look(x, tail, row, t, j, length, channels, taps, first, count, bf16, line);
                load(w, j * channels + first, count, 0, weight);
                EACH sum[i] += weight[i] * line[i];
            }
            if (silu) EACH sum[i] *= sigmoid(sum[i]);
            store(y, token * channels + first, count, bf16, sum);
        }
    }
}

/* Gradients from that of y: grad_x like x, grad_tail (null: not asked for) like tail, and one part per row of
 * grad_w [rows, taps, channels] and grad_bias [rows, channels], float32. A task is one row and STRIPE channels,
 * token after token: what an input t has an effect on ends at t + taps - 1, and then its gradient is written. */
void short_conv_backward(const void *grad, const void *x, const float *w, const float *bias, const void *tail,
                         const int64_t *documents, void *grad_x, void *grad_tail, float *grad_w,
                         float *grad_bias, int64_t rows, int64_t length, int64_t channels, int64_t taps,
                         int silu, int bf16) {
    int64_t stripes = (channels + STRIPE - 1) / STRIPE, step = taps * LANES;
#pragma omp parallel
    {
        int64_t size = taps * STRIPE;
        float *slopes = lines(taps * (2 * STRIPE / LANES + 1) + STRIPE / LANES); /* of the inputs t, t - 1, ... so far */
        float *sums = slopes + size, *totals = sums + size; /* gradients of the weights and of the bias */
        float *inputs = totals + STRIPE;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < rows * stripes; task++) {
            int64_t row = task / stripes, begin = task % stripes * STRIPE;
            int64_t end = begin + STRIPE < channels ? begin + STRIPE : channels;
            const int64_t *ids = documents ? documents + row * length : NULL;
            memset(slopes, 0, sizeof(float) * (size_t)(2 * size + STRIPE));
            for (int64_t t = 0; t < length + taps - 1; t++) {
                int64_t back = t < length ? reach(ids, t, taps - 1, tail != NULL) : -1, done = t - (taps - 1);
                for (int64_t first = begin; first < end; first += LANES) {
                    int64_t count = channels - first < LANES ? channels - first : LANES;
                    float *of_input = slopes + (first - begin) * taps, *of_weight = sums + (first - begin) * taps;
                    float *total = totals + first - begin, sum[LANES], slope[LANES], weight[LANES];
                    memmove(of_input + LANES, of_input, sizeof(float) * (size_t)(step - LANES));
                    memset(of_input, 0, sizeof(float) * LANES);
                    if (back >= 0) {
                        load(grad, (row * length + t) * channels + first, count, bf16, slope);
                        load(bias, first, count, 0, sum);
                    }
                    for (int64_t j = 0; j <= back; j++) {
                        float *line = inputs + j * LANES;
                        look(x, tail, row, t, j, length, channels, taps, first, count, bf16, line);
                        load(w, j * channels + first, count, 0, weight);
                        EACH sum[i] += weight[i] * line[i];
                    }
                    if (back >= 0 && silu)
                        EACH {
                            float s = sigmoid(sum[i]);
                            slope[i] *= s * (1.0f + sum[i] * (1.0f - s));
                        }
                    if (back >= 0) EACH total[i] += slope[i];
                    for (int64_t j = 0; j <= back; j++) {
                        const float *line = inputs + j * LANES;
                        load(w, j * channels + first, count, 0, weight);
                        EACH of_input[j * LANES + i] += slope[i] * weight[i];
                        EACH of_weight[j * LANES + i] += slope[i] * line[i];
                    }
                    const float *last = of_input + step - LANES;
                    if (done >= 0) store(grad_x, (row * length + done) * channels + first, count, bf16, last);
                    else if (grad_tail)
                        store(grad_tail, (row * (taps - 1) + taps - 1 + done) * channels + first, count, bf16, last);
                }
            }
            for (int64_t first = begin; first < end; first += LANES) {
                int64_t count = channels - first < LANES ? channels - first : LANES;
                for (int64_t j = 0; j < taps; j++)
                    store(grad_w, (row * taps + j) * channels + first, count, 0,
                          sums + (first - begin) * taps + j * LANES);
                store(grad_bias, row * channels + first, count, 0, totals + first - begin);
            }
        }
        free(slopes);
    }
}
