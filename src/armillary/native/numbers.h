/* What the kernels share: numbers in 16 bits, and functions written out so that the compiler vectorises them. */
#ifndef ARMILLARY_NUMBERS_H
#define ARMILLARY_NUMBERS_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "mirror.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

/* How numbers are kept. */
#define KINDS(X) X(F32) X(BF16) X(INT8) X(INT4) X(INT64) X(F16)
enum kind { KINDS(LISTED) };

/* Sums may be taken in another order, but not across this: what cancels has to cancel first. */
#if defined(__has_builtin)
#if __has_builtin(__builtin_assoc_barrier)
#define AS_WRITTEN(x) __builtin_assoc_barrier(x)
#elif __has_builtin(__arithmetic_fence)
#define AS_WRITTEN(x) __arithmetic_fence(x)
#endif
#endif
#if !defined(AS_WRITTEN)
#define AS_WRITTEN(x) (x)
#endif

/* a b + c, rounded once where the processor can, in vectors and at their ends alike: of two products the compiler may
 * round now the one and now the other. */
static inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return AS_WRITTEN(a * b + c);
#endif
}

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

static inline float from_f16(uint16_t x) {
#if defined(__F16C__)
    return _cvtsh_ss(x);
#else
    union { uint32_t u; float f; } v, shift = {(127 + 127 - 15) << 23};
    v.u = (uint32_t)(x & 0x7fff) << 13;
    v.f *= shift.f; /* exact, of subnormal numbers, too */
    if ((x & 0x7c00) == 0x7c00) v.u |= 0x7f800000u;
    v.u |= (uint32_t)(x & 0x8000) << 16;
    return v.f;
#endif
}

/* Round to nearest, ties to even; what is too large becomes infinity, NaN stays NaN. */
static inline uint16_t to_f16(float x) {
#if defined(__F16C__)
    return (uint16_t)_cvtss_sh(x, 0);
#else
    union { float f; uint32_t u; } v;
    v.f = x;
    uint32_t sign = v.u >> 16 & 0x8000u;
    v.u &= 0x7fffffffu;
    if (v.u > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (v.u >> 13 & 0x1ffu));
    if (v.u >= 0x47800000u) return (uint16_t)(sign | 0x7c00u);
    if (v.u < 0x38800000u) { /* below 2^-14: as many 2^-24 as fit, rounded where 1/2 has its last place */
        v.f += 0.5f;
        return (uint16_t)(sign | (v.u - 0x3f000000u));
    }
    return (uint16_t)(sign | ((v.u - 0x38000000u + 0xfffu + (v.u >> 13 & 1u)) >> 13));
#endif
}

static inline float from_half(uint16_t x, int kind) { return kind == BF16 ? from_bf16(x) : from_f16(x); }
static inline uint16_t to_half(float x, int kind) { return kind == BF16 ? to_bf16(x) : to_f16(x); }

/* The largest |x| of a line, NaN if any is: sizes compare as the integers that they are stored as, NaN above
 * infinity. */
static inline float largest_size(const float *x, int64_t n) {
    uint32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t size;
        memcpy(&size, x + i, 4);
        size &= 0x7fffffffu;
        most = size > most ? size : most;
    }
    float largest;
    memcpy(&largest, &most, 4);
    return largest;
}

/* e^x for x <= 0, about 1e-7 relative: 2^n times a polynomial on [-ln2/2, ln2/2]. Written out so that
 * the compiler vectorises it. */
static inline float exp_down(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = __builtin_rintf(x * 1.44269504f);
    float r = fused(n, 2.12194440e-4f, fused(n, -0.693359375f, x));
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

/* 2^x for x <= 0, about 1e-7 relative and exact at 0: 2^n (1 + r q(r)), r on [-1/2, 1/2], n the nearest whole
 * number. q was fitted to (2^r - 1) / r, so that the error shrinks with r: products of many factors near 1
 * (slow decays) stay as good as single precision allows. */
static inline float exp2_down(float x) {
    x = x < -126.0f ? -126.0f : x;
    float n = __builtin_rintf(x);
    float r = x - n;
    float q = 1.54614475e-4f;
    q = q * r + 1.33908674e-3f;
    q = q * r + 9.61805667e-3f;
    q = q * r + 5.55035710e-2f;
    q = q * r + 2.40226509e-1f;
    q = q * r + 6.93147188e-1f;
    union { uint32_t u; float f; } two;
    two.u = (uint32_t)((int32_t)n + 127) << 23;
    return (q * r + 1.0f) * two.f;
}

/* log(1 + e) for 0 <= e <= 1, about 1e-7 relative: twice the inverse hyperbolic tangent of e / (2 + e). */
static inline float log1p_unit(float e) {
    float s = e / (2.0f + e), w = s * s;
    float q = 1.40873290e-1f;
    q = q * w + 1.39807090e-1f;
    q = q * w + 2.00124270e-1f;
    q = q * w + 3.33331580e-1f;
    return 2.0f * s * (q * w + 1.0f);
}

#endif
