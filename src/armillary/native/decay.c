/* What the chunks of matrix states with decay do besides products. Plain C, no PyTorch headers.
 *
 *     pairs[i][j] = exp(total[i] - total[j]) for j <= i, 0 for j > i
 *
 * for every line of `chunk` sums of log decays, which never rise. They are doubles, because differences of
 * large sums are taken; what is below single precision is 0.
 *
 *     sums[row] = sum over c of a[row][c] b[row][c]
 */
#include "numbers.h"

void fade(const double *total, float *pairs, int64_t lines, int64_t chunk) {
#pragma omp parallel for schedule(static)
    for (int64_t line = 0; line < lines; line++) {
        const double *sum = total + line * chunk;
        float *into = pairs + line * chunk * chunk;
        for (int64_t i = 0; i < chunk; i++, into += chunk) {
#pragma omp simd
            for (int64_t j = 0; j <= i; j++) {
                float between = (float)(sum[i] - sum[j]);
                float e = exp_down(between);
                into[j] = between < -87.0f ? 0.0f : e;
            }
            memset(into + i + 1, 0, sizeof(float) * (size_t)(chunk - i - 1));
        }
    }
}

void dots(const float *a, const float *b, float *sums, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const float *x = a + row * width, *y = b + row * width;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < width; c++) sum += x[c] * y[c];
        sums[row] = sum;
    }
}
