/* Row kernels that tensors do slowly on a CPU. Plain C, auto-vectorised, no PyTorch headers.
 *
 * bf16 is passed as uint16_t. Every function splits its rows over OpenMP threads. Each has a plain
 * PyTorch form beside its operator (see operators.py), against which it is tested.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static inline float from_bf16(uint16_t x) {
    union { uint32_t u; float f; } v;
    v.u = (uint32_t)x << 16;
    return v.f;
}

/* Round to nearest, ties to even. NaN stays NaN: its payload is kept from rounding up to infinity. */
static inline uint16_t to_bf16(float x) {
    union { float f; uint32_t u; } v;
    v.f = x;
    uint32_t rounded = (v.u + 0x7fffu + ((v.u >> 16) & 1u)) >> 16;
    uint32_t nan = (v.u >> 16) | 0x40u;
    return (uint16_t)((v.u & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

/* e^x for x <= 0, about 1e-7 relative: 2^n times a polynomial on [-ln2/2, ln2/2]. Written out so that
 * the compiler vectorises it. */
static inline float exp_down(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = __builtin_rintf(x * 1.44269504f);
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { uint32_t u; float f; } two;
    two.u = (uint32_t)((int32_t)n + 127) << 23;
    return p * two.f;
}

#define ROW_KERNELS(NAME, T, LOAD, STORE)                                                              \
    /* scores [rows, cols] -> softmax(scores * scale) in place. Rows come in groups of `size`; with    \
     * causal, row r of a group sees the first start + r + 1 columns, the others become 0. */          \
    void softmax_rows_##NAME(T *scores, int64_t rows, int64_t cols, int64_t size, int64_t start,       \
                             int causal, float scale) {                                                \
        _Pragma("omp parallel") {                                                                      \
            float *line = malloc(sizeof(float) * (size_t)cols);                                        \
            _Pragma("omp for schedule(static)") for (int64_t r = 0; r < rows; r++) {                   \
                T *s = scores + r * cols;                                                              \
                int64_t seen = causal ? start + r % size + 1 : cols;                                   \
                float peak = -INFINITY, total = 0.0f;                                                  \
                for (int64_t c = 0; c < seen; c++) {                                                   \
                    float x = LOAD(s[c]) * scale;                                                      \
                    line[c] = x;                                                                       \
                    peak = x > peak ? x : peak;                                                        \
                }                                                                                      \
                for (int64_t c = 0; c < seen; c++) {                                                   \
                    float e = exp_down(line[c] - peak);                                                \
                    line[c] = e;                                                                       \
                    total += e;                                                                        \
                }                                                                                      \
                float share = 1.0f / total;                                                            \
                for (int64_t c = 0; c < seen; c++) s[c] = STORE(line[c] * share);                      \
                memset(s + seen, 0, sizeof(T) * (size_t)(cols - seen));                                \
            }                                                                                          \
            free(line);                                                                                \
        }                                                                                              \
    }                                                                                                  \
    /* slopes [rows, cols] (gradient of the weights) -> gradient of the scores, in place */            \
    void softmax_rows_backward_##NAME(const T *weights, T *slopes, int64_t rows, int64_t cols,         \
                                      int64_t size, int64_t start, int causal, float scale) {          \
        _Pragma("omp parallel for schedule(static)") for (int64_t r = 0; r < rows; r++) {              \
            const T *w = weights + r * cols;                                                           \
            T *d = slopes + r * cols;                                                                  \
            int64_t seen = causal ? start + r % size + 1 : cols;                                       \
            float dot = 0.0f;                                                                          \
            for (int64_t c = 0; c < seen; c++) dot += LOAD(w[c]) * LOAD(d[c]);                         \
            for (int64_t c = 0; c < seen; c++) d[c] = STORE(LOAD(w[c]) * (LOAD(d[c]) - dot) * scale);  \
            memset(d + seen, 0, sizeof(T) * (size_t)(cols - seen));                                    \
        }                                                                                              \
    }                                                                                                  \
    /* logits [rows, cols] -> gradient of weight * cross-entropy, in place; losses [rows] in nats */   \
    void cross_entropy_rows_##NAME(T *logits, const int64_t *targets, const float *shares,             \
                                   float *losses, int64_t rows, int64_t cols) {                        \
        _Pragma("omp parallel") {                                                                      \
            float *line = malloc(sizeof(float) * (size_t)cols);                                        \
            _Pragma("omp for schedule(static)") for (int64_t r = 0; r < rows; r++) {                   \
                T *s = logits + r * cols;                                                              \
                float peak = -INFINITY, total = 0.0f, goal = LOAD(s[targets[r]]);                      \
                for (int64_t c = 0; c < cols; c++) {                                                   \
                    float x = LOAD(s[c]);                                                              \
                    line[c] = x;                                                                       \
                    peak = x > peak ? x : peak;                                                        \
                }                                                                                      \
                for (int64_t c = 0; c < cols; c++) {                                                   \
                    float e = exp_down(line[c] - peak);                                                \
                    line[c] = e;                                                                       \
                    total += e;                                                                        \
                }                                                                                      \
                losses[r] = logf(total) + peak - goal;                                                 \
                float share = shares[r] / total;                                                       \
                line[targets[r]] -= total;                                                             \
                for (int64_t c = 0; c < cols; c++) s[c] = STORE(line[c] * share);                      \
            }                                                                                          \
            free(line);                                                                                \
        }                                                                                              \
    }                                                                                                  \
    /* y [rows, n] = x [rows, k] W^T for few rows: W [n, k] is read once. x and y are float32. */      \
    void few_rows_product_##NAME(const float *x, const T *w, float *y, int64_t rows, int64_t k,        \
                                 int64_t n) {                                                          \
        _Pragma("omp parallel for schedule(static)") for (int64_t i = 0; i < n; i++) {                 \
            const T *line = w + i * k;                                                                 \
            if (rows == 1) {                                                                           \
                float sum = 0.0f;                                                                      \
                for (int64_t c = 0; c < k; c++) sum += LOAD(line[c]) * x[c];                           \
                y[i] = sum;                                                                            \
            } else {                                                                                   \
                for (int64_t r = 0; r < rows; r++) {                                                   \
                    const float *in = x + r * k;                                                       \
                    float sum = 0.0f;                                                                  \
                    for (int64_t c = 0; c < k; c++) sum += LOAD(line[c]) * in[c];                      \
                    y[r * n + i] = sum;                                                                \
                }                                                                                      \
            }                                                                                          \
        }                                                                                              \
    }

#define SAME(x) (x)
ROW_KERNELS(bf16, uint16_t, from_bf16, to_bf16)
ROW_KERNELS(f32, float, SAME, SAME)

/* Reads everything once and gives a sum: the bandwidth floor that decoding is measured against. */
float read_all(const float *x, int64_t count) {
    float total = 0.0f;
    _Pragma("omp parallel for schedule(static) reduction(+ : total)") for (int64_t i = 0; i < count; i++) total += x[i];
    return total;
}
