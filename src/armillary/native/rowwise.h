/* What rows go through between products: norms, activations, rotations. */
#ifndef ARMILLARY_ROWWISE_H
#define ARMILLARY_ROWWISE_H

#include "record.h"

/* centred: LayerNorm; f: epsilon, what is added to the gain */
static void norm_row(const float *x, float *y, const float *gain, const float *bias, int64_t n, int centred,
                     float epsilon, float offset) {
    float mean = centred ? sum_line(x, n, 0, 0.0f) / (float)n : 0.0f, square = sum_line(x, n, 1, mean);
    float factor = 1.0f / sqrtf(square / (float)n + epsilon);
    for (int64_t i = 0; i < n; i++) {
        float value = (x[i] - mean) * factor;
        if (gain) value *= gain[i] + offset;
        y[i] = bias ? value + bias[i] : value;
    }
}

enum { RELU, GELU, GELU_TANH, SILU };

INLINE float tanh_of(float x) {
    float e = exp_down(-2.0f * fabsf(x));
    return copysignf((1.0f - e) / (1.0f + e), x);
}

static void activate(float *x, const float *times, int64_t n, int kind) {
    if (kind == SILU)
        for (int64_t i = 0; i < n; i++) {
            float e = exp_down(-fabsf(x[i]));
            x[i] *= (x[i] >= 0.0f ? 1.0f : e) / (1.0f + e);
        }
    else if (kind == GELU_TANH)
        for (int64_t i = 0; i < n; i++)
            x[i] *= 0.5f * (1.0f + tanh_of(0.7978845608f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
    else if (kind == GELU)
        for (int64_t i = 0; i < n; i++) x[i] *= 0.5f * (1.0f + erff(x[i] * 0.70710678f));
    else
        for (int64_t i = 0; i < n; i++) x[i] = x[i] < 0.0f ? 0.0f : x[i];
    if (times)
        for (int64_t i = 0; i < n; i++) x[i] *= times[i];
}

static void turn(float *x, const float *cosine, const float *sine, int64_t half, int interleaved) {
    for (int64_t i = 0; i < half; i++) {
        float *a = x + (interleaved ? 2 * i : i), *b = interleaved ? a + 1 : a + half;
        float left = *a, right = *b;
        *a = left * cosine[i] - right * sine[i];
        *b = right * cosine[i] + left * sine[i];
    }
}

#endif
