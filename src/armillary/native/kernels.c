/* Row kernels that tensors do slowly on a CPU. Plain C, auto-vectorised, no PyTorch headers.
 *
 * bf16 is passed as uint16_t. Functions over many rows split them over OpenMP threads and have a plain form in
 * rows.py or bands.py, against which they are tested; what is said to be for few rows takes the place of one
 * operation of PyTorch's, and is tested against that.
 */
#include "numbers.h"

#define ROW_KERNELS(NAME, T, LOAD, STORE)                                                              \
    /* scores [rows, cols] -> softmax(scores * scale) in place. Rows come in groups of `size`; row r of \
     * a group sees the columns from start + r - left to start + r + right, the others become 0. */    \
    void softmax_rows_##NAME(T *scores, int64_t rows, int64_t cols, int64_t size, int64_t start,       \
                             int64_t left, int64_t right, float scale) {                               \
        _Pragma("omp parallel") {                                                                      \
            float *line = malloc(sizeof(float) * (size_t)cols);                                        \
            _Pragma("omp for schedule(static)") for (int64_t r = 0; r < rows; r++) {                   \
                T *s = scores + r * cols;                                                              \
                int64_t at = start + r % size;                                                         \
                int64_t first = at - left > 0 ? at - left : 0;                                         \
                int64_t seen = at + right + 1 < cols ? at + right + 1 : cols;                          \
                float peak = -INFINITY, total = 0.0f;                                                  \
                for (int64_t c = first; c < seen; c++) {                                               \
                    float x = LOAD(s[c]) * scale;                                                      \
                    line[c] = x;                                                                       \
                    peak = x > peak ? x : peak;                                                        \
                }                                                                                      \
                for (int64_t c = first; c < seen; c++) {                                               \
                    float e = exp_down(line[c] - peak);                                                \
                    line[c] = e;                                                                       \
                    total += e;                                                                        \
                }                                                                                      \
                float share = 1.0f / total;                                                            \
                for (int64_t c = first; c < seen; c++) s[c] = STORE(line[c] * share);                  \
                memset(s, 0, sizeof(T) * (size_t)first);                                               \
                memset(s + seen, 0, sizeof(T) * (size_t)(cols - seen));                                \
            }                                                                                          \
            free(line);                                                                                \
        }                                                                                              \
    }                                                                                                  \
    /* slopes [rows, cols] (gradient of the weights) -> gradient of the scores, in place */            \
    void softmax_rows_backward_##NAME(const T *weights, T *slopes, int64_t rows, int64_t cols,         \
                                      int64_t size, int64_t start, int64_t left, int64_t right,        \
                                      float scale) {                                                   \
        _Pragma("omp parallel for schedule(static)") for (int64_t r = 0; r < rows; r++) {              \
            const T *w = weights + r * cols;                                                           \
            T *d = slopes + r * cols;                                                                  \
            int64_t at = start + r % size;                                                             \
            int64_t first = at - left > 0 ? at - left : 0;                                             \
            int64_t seen = at + right + 1 < cols ? at + right + 1 : cols;                              \
            float dot = 0.0f;                                                                          \
            for (int64_t c = first; c < seen; c++) dot += LOAD(w[c]) * LOAD(d[c]);                     \
            for (int64_t c = first; c < seen; c++) d[c] = STORE(LOAD(w[c]) * (LOAD(d[c]) - dot) * scale); \
            memset(d, 0, sizeof(T) * (size_t)first);                                                   \
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
    /* y [rows, n] = x [rows, k] W^T for few rows: W [n, k] is read once */                            \
    void few_rows_product_##NAME(const T *x, const T *w, T *y, int64_t rows, int64_t k, int64_t n) {   \
        float *wide = malloc(sizeof(float) * (size_t)(rows * k));                                      \
        for (int64_t i = 0; i < rows * k; i++) wide[i] = LOAD(x[i]);                                   \
        _Pragma("omp parallel for schedule(static)") for (int64_t i = 0; i < n; i++) {                 \
            const T *line = w + i * k;                                                                 \
            for (int64_t r = 0; r < rows; r++) {                                                       \
                const float *in = wide + r * k;                                                        \
                float sum = 0.0f;                                                                      \
                for (int64_t c = 0; c < k; c++) sum += LOAD(line[c]) * in[c];                          \
                y[r * n + i] = STORE(sum);                                                             \
            }                                                                                          \
        }                                                                                              \
        free(wide);                                                                                    \
    }                                                                                                  \
    /* Attention of few queries: q [batch, groups * share, queries, width] contiguous, k and v         \
     * [batch, groups, ., width] with the given strides of batch and group. Query t of row b sees the  \
     * first starts[b] + t + 1 keys, at most `keys`. out [batch, queries, groups * share, width]. */   \
    void few_rows_attend_##NAME(const T *q, const T *k, const T *v, T *out, const int64_t *starts,     \
                                int64_t batch, int64_t groups, int64_t share, int64_t queries,         \
                                int64_t keys, int64_t width, int64_t batch_stride,                     \
                                int64_t group_stride, float scale) {                                   \
        _Pragma("omp parallel") {                                                                      \
            float *weights = malloc(sizeof(float) * (size_t)keys);                                     \
            float *ask = malloc(sizeof(float) * (size_t)width * 2);                                    \
            float *sum = ask + width;                                                                  \
            _Pragma("omp for schedule(static)") for (int64_t task = 0; task < batch * groups; task++) {\
                int64_t b = task / groups, g = task % groups;                                          \
                const T *ks = k + b * batch_stride + g * group_stride;                                 \
                const T *vs = v + b * batch_stride + g * group_stride;                                 \
                for (int64_t one = 0; one < share * queries; one++) {                                  \
                    int64_t h = g * share + one / queries, t = one % queries;                          \
                    int64_t seen = starts[b] + t + 1 < keys ? starts[b] + t + 1 : keys;                \
                    const T *line = q + ((b * groups * share + h) * queries + t) * width;              \
                    float peak = -INFINITY, total = 0.0f;                                              \
                    for (int64_t c = 0; c < width; c++) ask[c] = LOAD(line[c]) * scale, sum[c] = 0.0f; \
                    for (int64_t s = 0; s < seen; s++) {                                               \
                        const T *key = ks + s * width;                                                 \
                        float dot = 0.0f;                                                              \
                        for (int64_t c = 0; c < width; c++) dot += LOAD(key[c]) * ask[c];              \
                        weights[s] = dot;                                                              \
                        peak = dot > peak ? dot : peak;                                                \
                    }                                                                                  \
                    for (int64_t s = 0; s < seen; s++) {                                               \
                        float e = exp_down(weights[s] - peak);                                         \
                        weights[s] = e;                                                                \
                        total += e;                                                                    \
                    }                                                                                  \
                    for (int64_t s = 0; s < seen; s++) {                                               \
                        const T *value = vs + s * width;                                               \
                        float e = weights[s];                                                          \
                        for (int64_t c = 0; c < width; c++) sum[c] += e * LOAD(value[c]);              \
                    }                                                                                  \
                    T *y = out + ((b * queries + t) * groups * share + h) * width;                     \
                    for (int64_t c = 0; c < width; c++) y[c] = STORE(sum[c] / total);                  \
                }                                                                                      \
            }                                                                                          \
            free(weights);                                                                             \
            free(ask);                                                                                 \
        }                                                                                              \
    }                                                                                                  \
    /* y [rows, cols] = x / rms(x) * w for few rows */                                                 \
    void few_rows_rmsnorm_##NAME(const T *x, const T *w, T *y, int64_t rows, int64_t cols,             \
                                 float epsilon, float offset) {                                        \
        for (int64_t r = 0; r < rows; r++) {                                                           \
            const T *in = x + r * cols;                                                                \
            float sum = 0.0f;                                                                          \
            for (int64_t c = 0; c < cols; c++) sum += LOAD(in[c]) * LOAD(in[c]);                       \
            float factor = 1.0f / sqrtf(sum / (float)cols + epsilon);                                  \
            for (int64_t c = 0; c < cols; c++)                                                         \
                y[r * cols + c] = STORE(LOAD(in[c]) * factor * (offset + LOAD(w[c])));                 \
        }                                                                                              \
    }

/* Bands: rows of a sequence sorted into groups, in blocks of `size`; row c of block i has its scores
 * against the `span` sorted tokens that end with its block. `places` [orders, stride] holds the tokens'
 * places in every order (in the order of the rows, span - size of them before the first block); a
 * pair is seen in the last order when the places there differ by 1 .. widths[last], and in no earlier one. */
static inline void band_row(float *line, const int32_t *places, const int32_t *widths, int64_t orders,
                            int64_t stride, int64_t base, int64_t self, int64_t low) {
    for (int64_t o = 0; o < orders; o++) {
        const int32_t *at = places + o * stride + base;
        uint32_t mine = (uint32_t)at[self], width = (uint32_t)widths[o];
        if (o + 1 == orders) {
            for (int64_t c = low; c < self; c++)
                line[c] = mine - (uint32_t)at[c] - 1u < width ? line[c] : -INFINITY;
        } else {
            for (int64_t c = low; c < self; c++)
                line[c] = mine - (uint32_t)at[c] - 1u < width ? -INFINITY : line[c];
        }
    }
}

#define BAND_KERNELS(NAME, T, LOAD, STORE)                                                             \
    /* scores [blocks, size, span] -> weights, in place; sums [blocks, size]: the logarithm of what    \
     * they were divided by, -inf where nothing is seen */                                             \
    void band_softmax_##NAME(T *scores, float *sums, const int32_t *places, const int32_t *widths,     \
                             int64_t orders, int64_t stride, int64_t first, int64_t blocks,            \
                             int64_t size, int64_t span, float scale) {                                \
        _Pragma("omp parallel") {                                                                      \
            float *line = malloc(sizeof(float) * (size_t)span);                                        \
            _Pragma("omp for schedule(static)") for (int64_t r = 0; r < blocks * size; r++) {          \
                T *s = scores + r * span;                                                              \
                int64_t self = span - size + r % size, base = (first + r / size) * size;               \
                int64_t low = self > widths[orders - 1] ? self - widths[orders - 1] : 0;               \
                float peak = -INFINITY, total = 0.0f;                                                  \
                for (int64_t c = low; c < self; c++) line[c] = LOAD(s[c]) * scale;                     \
                band_row(line, places, widths, orders, stride, base, self, low);                       \
                for (int64_t c = low; c < self; c++) peak = line[c] > peak ? line[c] : peak;           \
                sums[r] = -INFINITY;                                                                   \
                if (peak == -INFINITY) {                                                               \
                    memset(s, 0, sizeof(T) * (size_t)span);                                            \
                    continue;                                                                          \
                }                                                                                      \
                for (int64_t c = low; c < self; c++) {                                                 \
                    float e = exp_down(line[c] - peak);                                                \
                    line[c] = line[c] == -INFINITY ? 0.0f : e;                                         \
                    total += line[c];                                                                  \
                }                                                                                      \
                float share = 1.0f / total;                                                            \
                sums[r] = logf(total) + peak;                                                          \
                memset(s, 0, sizeof(T) * (size_t)low);                                                 \
                for (int64_t c = low; c < self; c++) s[c] = STORE(line[c] * share);                    \
                memset(s + self, 0, sizeof(T) * (size_t)(span - self));                                \
            }                                                                                          \
            free(line);                                                                                \
        }                                                                                              \
    }                                                                                                  \
    /* scores -> weights under the rows' common logarithms `sums` (of all orders together), and slopes \
     * (gradient of the weights) -> gradient of the scores, both in place; dots [blocks, size]: of     \
     * each row's output with its gradient */                                                          \
    void band_softmax_backward_##NAME(T *scores, T *slopes, const float *sums, const float *dots,      \
                                      const int32_t *places, const int32_t *widths, int64_t orders,    \
                                      int64_t stride, int64_t first, int64_t blocks, int64_t size,     \
                                      int64_t span, float scale) {                                     \
        _Pragma("omp parallel") {                                                                      \
            float *line = malloc(sizeof(float) * (size_t)span);                                        \
            _Pragma("omp for schedule(static)") for (int64_t r = 0; r < blocks * size; r++) {          \
                T *s = scores + r * span, *d = slopes + r * span;                                      \
                int64_t self = span - size + r % size, base = (first + r / size) * size;               \
                int64_t low = self > widths[orders - 1] ? self - widths[orders - 1] : 0;               \
                if (sums[r] == -INFINITY) low = self;                                                  \
                for (int64_t c = low; c < self; c++) line[c] = LOAD(s[c]) * scale - sums[r];           \
                band_row(line, places, widths, orders, stride, base, self, low);                       \
                for (int64_t c = low; c < self; c++) {                                                 \
                    float e = exp_down(line[c]);                                                       \
                    line[c] = line[c] == -INFINITY ? 0.0f : e;                                         \
                }                                                                                      \
                for (int64_t c = low; c < self; c++) {                                                 \
                    d[c] = STORE(line[c] * (LOAD(d[c]) - dots[r]) * scale);                            \
                    s[c] = STORE(line[c]);                                                             \
                }                                                                                      \
                memset(s, 0, sizeof(T) * (size_t)low);                                                 \
                memset(d, 0, sizeof(T) * (size_t)low);                                                 \
                memset(s + self, 0, sizeof(T) * (size_t)(span - self));                                \
                memset(d + self, 0, sizeof(T) * (size_t)(span - self));                                \
            }                                                                                          \
            free(line);                                                                                \
        }                                                                                              \
    }

#define SAME(x) (x)
ROW_KERNELS(bf16, uint16_t, from_bf16, to_bf16)
ROW_KERNELS(f32, float, SAME, SAME)
BAND_KERNELS(bf16, uint16_t, from_bf16, to_bf16)
BAND_KERNELS(f32, float, SAME, SAME)

/* Reads everything once and gives a sum: the bandwidth floor that decoding is measured against. */
float read_all(const float *x, int64_t count) {
    float total = 0.0f;
    _Pragma("omp parallel for schedule(static) reduction(+ : total)") for (int64_t i = 0; i < count; i++) total += x[i];
    return total;
}
