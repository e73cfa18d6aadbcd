/* The diagonal selective scan (Gu & Dao 2023, Mamba), forward and backward. Plain C, no PyTorch headers.
 *
 *     delta = softplus(dt + bias),  h[n] = exp(delta a[n]) h[n] + delta u b[n],  y = sum over n of c[n] h[n] + d u
 *
 * for every channel; n runs over a few states (16, say), b and c are shared by all channels of a token. u and
 * dt are [rows, length, channels] in float32 or bf16 (as uint16_t), b and c [rows, length, states] likewise; a
 * [states, channels] (at most 0), d and bias [channels] and states [rows, states, channels] are float32. A token
 * whose document differs from the one before it starts from zeros.
 *
 * A task is one row and LANES channels: everything it needs besides its input lies in the first two caches, and
 * the innermost loop runs over channels, so that it vectorises without sums across lanes. The forward pass
 * keeps the state before every chunk of tokens only; the backward pass goes through the chunks from the last
 * to the first and makes the states of one again. No result depends on the number of threads.
 */
#include "lines.h"

static const float LOG2 = 0.693147181f, PER_LOG2 = 1.44269504f;

static inline float scalar(const void *from, int64_t at, int bf16) {
    return bf16 ? from_bf16(((const uint16_t *)from)[at]) : ((const float *)from)[at];
}

/* Lines of all states: [states, channels] in memory, [states][LANES] at hand. */
static inline void load_states(const float *from, int64_t channels, int64_t count, int64_t states, float *at) {
    for (int64_t n = 0; n < states; n++) load(from, n * channels, count, 0, at + n * LANES);
}

static inline void store_states(float *to, int64_t channels, int64_t count, int64_t states, const float *at) {
    for (int64_t n = 0; n < states; n++) store(to, n * channels, count, 0, at + n * LANES);
}

/* The rates a in units of log 2. */
static inline void load_rates(const float *from, int64_t channels, int64_t count, int64_t states, float *at) {
    load_states(from, channels, count, states, at);
    for (int64_t i = 0; i < states * LANES; i++) at[i] *= PER_LOG2;
}

/* softplus(x) in place; slope, if asked for, is its derivative. Far below 0 both are exactly 0: a token that is
 * not there has x = -inf and leaves the state as it is. */
static inline void softplus(float *x, float *slope) {
    EACH {
        float size = x[i] < 0.0f ? x[i] : -x[i];
        float e = size < -87.0f ? 0.0f : exp_down(size);
        if (slope) slope[i] = (x[i] < 0.0f ? e : 1.0f) / (1.0f + e);
        x[i] = (x[i] < 0.0f ? 0.0f : x[i]) + log1p_unit(e);
    }
}

static inline int begins(const int64_t *documents, int64_t token) {
    return documents && token > 0 && documents[token] != documents[token - 1];
}

/* y, the state `end` after the last token and, unless null, the states `kept` [rows, chunks, states, channels]
 * before each chunk, from the state `start` (null: zeros). documents: [rows, length] or null. */
void scan(const void *u, const void *dt, const float *a, const void *b, const void *c, const float *d,
          const float *bias, const float *start, const int64_t *documents, void *y, float *end, float *kept,
          int64_t rows, int64_t length, int64_t channels, int64_t states, int64_t chunk, int bf16) {
    int64_t blocks = (channels + LANES - 1) / LANES, chunks = (length + chunk - 1) / chunk;
    int64_t size = states * channels;
#pragma omp parallel
    {
        float *rates = lines(states * 2), *h = rates + states * LANES;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < rows * blocks; task++) {
            int64_t row = task / blocks, first = task % blocks * LANES;
            int64_t count = channels - first < LANES ? channels - first : LANES;
            const int64_t *ids = documents ? documents + row * length : NULL;
            float delta[LANES], in[LANES], out[LANES], skip[LANES], shift[LANES];
            load_rates(a + first, channels, count, states, rates);
            load(d, first, count, 0, skip);
            load(bias, first, count, 0, shift);
            if (start) load_states(start + row * size + first, channels, count, states, h);
            else memset(h, 0, sizeof(float) * (size_t)states * LANES);
            for (int64_t t = 0; t < length; t++) {
                int64_t at = (row * length + t) * channels + first, pair = (row * length + t) * states;
                if (kept && t % chunk == 0)
                    store_states(kept + (row * chunks + t / chunk) * size + first, channels, count, states, h);
                if (begins(ids, t)) memset(h, 0, sizeof(float) * (size_t)states * LANES);
                load(u, at, count, bf16, in);
                load(dt, at, count, bf16, delta);
                EACH delta[i] += shift[i];
                softplus(delta, NULL);
                EACH out[i] = skip[i] * in[i], in[i] *= delta[i];
                for (int64_t n = 0; n < states; n++) {
                    float into = scalar(b, pair + n, bf16), from = scalar(c, pair + n, bf16);
                    float *line = h + n * LANES, *rate = rates + n * LANES;
                    EACH {
                        line[i] = exp2_down(delta[i] * rate[i]) * line[i] + in[i] * into;
                        out[i] += from * line[i];
                    }
                }
                store(y, at, count, bf16, out);
            }
            store_states(end + row * size + first, channels, count, states, h);
        }
        free(rates);
    }
}

/* Gradients from those of y and of the last state. grad_u and grad_dt are like u; grad_a [rows, states,
 * channels], grad_d and grad_bias [rows, channels] and grad_start [rows, states, channels] are one part per
 * row; grad_b and grad_c [rows, groups, length, states] float32, zeros when given, are one part per group
 * of blocks. */
void scan_backward(const void *grad, const float *grad_end, const void *u, const void *dt, const float *a,
                   const void *b, const void *c, const float *d, const float *bias, const float *kept,
                   const int64_t *documents, void *grad_u, void *grad_dt, float *grad_a, float *grad_b,
                   float *grad_c, float *grad_d, float *grad_bias, float *grad_start, int64_t rows,
                   int64_t length, int64_t channels, int64_t states, int64_t chunk, int64_t groups, int bf16) {
    int64_t blocks = (channels + LANES - 1) / LANES, chunks = (length + chunk - 1) / chunk;
    int64_t size = states * channels, all = states * LANES;
#pragma omp parallel
    {
        float *rates = lines(states * (4 + 2 * chunk) + 4 * chunk);
        float *h = rates + all, *slope = h + all, *slope_a = slope + all;
        float *befores = slope_a + all, *factors = befores + all * chunk; /* of the tokens of one chunk */
        float *deltas = factors + all * chunk, *bends = deltas + chunk * LANES, *ins = bends + chunk * LANES;
        float *entereds = ins + chunk * LANES; /* delta u */
#pragma omp for schedule(static)
        for (int64_t task = 0; task < rows * groups; task++) {
            int64_t row = task / groups, group = task % groups;
            const int64_t *ids = documents ? documents + row * length : NULL;
            for (int64_t block = group; block < blocks; block += groups) {
                int64_t first = block * LANES;
                int64_t count = channels - first < LANES ? channels - first : LANES;
                float skip[LANES], shift[LANES], slope_d[LANES] = {0}, slope_bias[LANES] = {0};
                load_rates(a + first, channels, count, states, rates);
                load(d, first, count, 0, skip);
                load(bias, first, count, 0, shift);
                load_states(grad_end + row * size + first, channels, count, states, slope);
                memset(slope_a, 0, sizeof(float) * (size_t)all);
                for (int64_t part = chunks - 1; part >= 0; part--) {
                    int64_t begin = part * chunk, stop = begin + chunk < length ? begin + chunk : length;
                    load_states(kept + (row * chunks + part) * size + first, channels, count, states, h);
                    for (int64_t t = begin; t < stop; t++) {
                        int64_t k = t - begin, at = (row * length + t) * channels + first;
                        if (begins(ids, t)) memset(h, 0, sizeof(float) * (size_t)all);
                        float *in = ins + k * LANES, *delta = deltas + k * LANES, *entered = entereds + k * LANES;
                        load(u, at, count, bf16, in);
                        load(dt, at, count, bf16, delta);
                        EACH delta[i] += shift[i];
                        softplus(delta, bends + k * LANES);
                        EACH entered[i] = delta[i] * in[i];
                        for (int64_t n = 0; n < states; n++) {
                            float into = scalar(b, (row * length + t) * states + n, bf16);
                            float *line = h + n * LANES, *rate = rates + n * LANES;
                            float *old = befores + k * all + n * LANES, *factor = factors + k * all + n * LANES;
                            EACH {
                                old[i] = line[i];
                                factor[i] = exp2_down(delta[i] * rate[i]);
                                line[i] = factor[i] * line[i] + entered[i] * into;
                            }
                        }
                    }
                    for (int64_t t = stop - 1; t >= begin; t--) {
                        int64_t k = t - begin, at = (row * length + t) * channels + first;
                        const float *in = ins + k * LANES, *delta = deltas + k * LANES, *bend = bends + k * LANES;
                        const float *entered = entereds + k * LANES;
                        float out[LANES], of_entered[LANES] = {0}, of_delta[LANES] = {0}, line[LANES];
                        float *parts_b = grad_b + ((row * groups + group) * length + t) * states;
                        float *parts_c = grad_c + ((row * groups + group) * length + t) * states;
                        load(grad, at, count, bf16, out);
                        for (int64_t n = 0; n < states; n++) {
                            float into = scalar(b, (row * length + t) * states + n, bf16);
                            float from = scalar(c, (row * length + t) * states + n, bf16);
                            const float *rate = rates + n * LANES, *old = befores + k * all + n * LANES;
                            const float *factor = factors + k * all + n * LANES;
                            float *carried = slope + n * LANES, *sum_a = slope_a + n * LANES;
                            float sum_b = 0.0f, sum_c = 0.0f;
#pragma omp simd reduction(+ : sum_b, sum_c)
                            for (int64_t i = 0; i < LANES; i++) {
                                float of_h = carried[i] + out[i] * from; /* slope of the state after this token */
                                sum_c += out[i] * (factor[i] * old[i] + entered[i] * into);
                                sum_b += of_h * entered[i];
                                of_entered[i] += of_h * into;
                                carried[i] = of_h * factor[i];
                                float of_power = carried[i] * old[i]; /* slope of delta * a, but for log 2 */
                                of_delta[i] += of_power * rate[i];
                                sum_a[i] += of_power * delta[i];
                            }
                            parts_b[n] += sum_b;
                            parts_c[n] += sum_c;
                        }
                        if (begins(ids, t)) memset(slope, 0, sizeof(float) * (size_t)all);
                        EACH {
                            slope_d[i] += out[i] * in[i];
                            line[i] = out[i] * skip[i] + of_entered[i] * delta[i];
                            of_delta[i] = (LOG2 * of_delta[i] + of_entered[i] * in[i]) * bend[i];
                            slope_bias[i] += of_delta[i];
                        }
                        store(grad_u, at, count, bf16, line);
                        store(grad_dt, at, count, bf16, of_delta);
                    }
                }
                store_states(grad_a + row * size + first, channels, count, states, slope_a);
                store_states(grad_start + row * size + first, channels, count, states, slope);
                store(grad_d, row * channels + first, count, 0, slope_d);
                store(grad_bias, row * channels + first, count, 0, slope_bias);
            }
        }
        free(rates);
    }
}
