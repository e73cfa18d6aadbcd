/* Vectors of eight numbers, and sums over them in one fixed order. */
#ifndef ARMILLARY_WIDE_H
#define ARMILLARY_WIDE_H

#include "numbers.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define WIDE 8
typedef float wide __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));
typedef uint16_t half_wide __attribute__((vector_size(2 * WIDE), aligned(2), may_alias));
typedef uint32_t wide_bits __attribute__((vector_size(4 * WIDE)));
#define INLINE static inline __attribute__((always_inline))

#if defined(__clang__) || __GNUC__ >= 12
#define SWAPPED(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define SWAPPED(x, ...) __builtin_shuffle(x, (wide_bits){__VA_ARGS__})
#endif
INLINE wide wide_of(float x) { return x - (wide){0}; }

/* a b + c, rounded once where the processor can: left to itself a compiler does so in some places only. */
INLINE wide fuse(wide a, wide b, wide c) {
#if defined(__AVX2__) && defined(__FMA__)
    return (wide)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

/* The sum of eight numbers, each number with the one four on, then two, then one. */
INLINE float sum_of(wide x) {
    x += SWAPPED(x, 4, 5, 6, 7, 0, 1, 2, 3);
    x += SWAPPED(x, 2, 3, 0, 1, 6, 7, 4, 5);
    x += SWAPPED(x, 1, 0, 3, 2, 5, 4, 7, 6);
    return x[0];
}

/* Of a line of numbers: the sum of (x - mean)^2 or of x - mean. */
INLINE float sum_line(const float *x, int64_t n, const int squares, float mean) {
    wide sums = {0};
    int64_t i = 0;
    for (; i + WIDE <= n; i += WIDE) {
        wide each = *(const wide *)(x + i) - mean;
        if (squares) each *= each;
        sums += each;
    }
    float sum = sum_of(sums);
    for (; i < n; i++) sum += squares ? (x[i] - mean) * (x[i] - mean) : x[i] - mean;
    return sum;
}

/* The largest of a line and `most`; NaN is passed over. */
INLINE float most_of(const float *x, int64_t n, float most) {
    wide held = wide_of(most);
    int64_t i = 0;
    for (; i + WIDE <= n; i += WIDE) {
        wide each = *(const wide *)(x + i);
        wide_bits more = (wide_bits)(each > held);
        held = (wide)(((wide_bits)each & more) | ((wide_bits)held & ~more));
    }
    for (int j = 0; j < WIDE; j++) most = held[j] > most ? held[j] : most;
    for (; i < n; i++) most = x[i] > most ? x[i] : most;
    return most;
}

/* CALL with what the numbers are kept in as a constant, so that each form is built for itself. */
#define OF_KIND(KIND, CALL)                \
    {                                      \
        if ((KIND) == BF16) CALL(BF16);    \
        else if ((KIND) == F16) CALL(F16); \
        else CALL(F32);                    \
    }

/* Numbers in float32, bf16 or fp16. */
INLINE wide get(const void *p, int64_t at, int kind) {
    if (kind == F32) return *(const wide *)((const float *)p + at);
    if (kind == F16) {
#if defined(__F16C__)
        return (wide)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)p + at)));
#else
        wide each;
        for (int i = 0; i < WIDE; i++) each[i] = from_f16(((const uint16_t *)p)[at + i]);
        return each;
#endif
    }
    wide_bits bits = __builtin_convertvector(*(const half_wide *)((const uint16_t *)p + at), wide_bits) << 16;
    return (wide)bits;
}

INLINE float get_one(const void *p, int64_t at, int kind) {
    return kind == F32 ? ((const float *)p)[at] : from_half(((const uint16_t *)p)[at], kind);
}

#endif
