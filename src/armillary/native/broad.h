/* Vectors as broad as the processor's: sixteen numbers with AVX-512, else eight. */
#ifndef ARMILLARY_BROAD_H
#define ARMILLARY_BROAD_H

#include "wide.h"

#if defined(__AVX512F__)
#define BROAD 16
#else
#define BROAD 8
#endif
typedef float broad __attribute__((vector_size(4 * BROAD), aligned(4), may_alias));
typedef uint16_t half_broad __attribute__((vector_size(2 * BROAD), aligned(2), may_alias));
typedef uint32_t broad_bits __attribute__((vector_size(4 * BROAD)));
typedef int32_t broad_ints __attribute__((vector_size(4 * BROAD)));

#if defined(__clang__) || __GNUC__ >= 12
#define MIXED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIXED(a, b, ...) __builtin_shuffle(a, b, (broad_bits){__VA_ARGS__})
#endif
#define UNROLLED _Pragma("GCC unroll 16")

INLINE broad broad_of(float x) { return x - (broad){0}; }

INLINE broad broad_fuse(broad a, broad b, broad c) {
#if defined(__AVX512F__)
    return (broad)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (broad)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

INLINE broad broad_get(const void *p, int64_t at, const int kind) {
    if (kind == F32) return *(const broad *)((const float *)p + at);
#if BROAD == 16
    if (kind == F16) return (broad)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)((const uint16_t *)p + at)));
#else
    if (kind == F16) return get(p, at, kind);
#endif
    return (broad)(__builtin_convertvector(*(const half_broad *)((const uint16_t *)p + at), broad_bits) << 16);
}

INLINE broad chosen(broad_ints which, broad yes, broad no) {
    return (broad)(((broad_bits)yes & (broad_bits)which) | ((broad_bits)no & ~(broad_bits)which));
}

/* The sums of as many vectors as one has numbers, all in the same order: halves, then halves of halves. The sum
 * of x[i + BROAD / 4 * j] comes to stand at 4 i + j. */
INLINE broad sums_of(broad *x) {
#if BROAD == 16
    UNROLLED for (int i = 0; i < 8; i++)
        x[i] = MIXED(x[2 * i], x[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               MIXED(x[2 * i], x[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    UNROLLED for (int i = 0; i < 4; i++)
        x[i] = MIXED(x[2 * i], x[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               MIXED(x[2 * i], x[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    UNROLLED for (int i = 0; i < 2; i++)
        x[i] = MIXED(x[2 * i], x[2 * i + 1], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               MIXED(x[2 * i], x[2 * i + 1], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return MIXED(x[0], x[1], 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
           MIXED(x[0], x[1], 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
#else
    UNROLLED for (int i = 0; i < 4; i++)
        x[i] = MIXED(x[2 * i], x[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11) +
               MIXED(x[2 * i], x[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15);
    UNROLLED for (int i = 0; i < 2; i++)
        x[i] = MIXED(x[2 * i], x[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               MIXED(x[2 * i], x[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return MIXED(x[0], x[1], 0, 2, 8, 10, 4, 6, 12, 14) + MIXED(x[0], x[1], 1, 3, 9, 11, 5, 7, 13, 15);
#endif
}

/* As many vectors as one has numbers, turned round: x[j] gets number j of each. */
INLINE void turn_about(broad *x) {
    broad y[BROAD];
#if BROAD == 16
#define QUARTERS(a, b, c, d) \
    a, b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, c + 12, d + 12
#else
#define QUARTERS(a, b, c, d) a, b, c, d, a + 4, b + 4, c + 4, d + 4
#endif
    UNROLLED for (int i = 0; i < BROAD; i += 4) {
        broad a = MIXED(x[i], x[i + 1], QUARTERS(0, BROAD, 1, BROAD + 1));
        broad b = MIXED(x[i], x[i + 1], QUARTERS(2, BROAD + 2, 3, BROAD + 3));
        broad c = MIXED(x[i + 2], x[i + 3], QUARTERS(0, BROAD, 1, BROAD + 1));
        broad d = MIXED(x[i + 2], x[i + 3], QUARTERS(2, BROAD + 2, 3, BROAD + 3));
        y[i] = MIXED(a, c, QUARTERS(0, 1, BROAD, BROAD + 1));
        y[i + 1] = MIXED(a, c, QUARTERS(2, 3, BROAD + 2, BROAD + 3));
        y[i + 2] = MIXED(b, d, QUARTERS(0, 1, BROAD, BROAD + 1));
        y[i + 3] = MIXED(b, d, QUARTERS(2, 3, BROAD + 2, BROAD + 3));
    }
#undef QUARTERS
    /* y[4 i + j] holds numbers j, j + 4, ... of lines 4 i to 4 i + 3 */
    UNROLLED for (int j = 0; j < 4; j++) {
#if BROAD == 16
#define EVEN(x, y) MIXED(x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
#define ODD(x, y) MIXED(x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
        broad a = EVEN(y[j], y[4 + j]), b = EVEN(y[8 + j], y[12 + j]);
        broad c = ODD(y[j], y[4 + j]), d = ODD(y[8 + j], y[12 + j]);
        x[j] = EVEN(a, b), x[j + 8] = ODD(a, b), x[j + 4] = EVEN(c, d), x[j + 12] = ODD(c, d);
#undef EVEN
#undef ODD
#else
        x[j] = MIXED(y[j], y[4 + j], 0, 1, 2, 3, 8, 9, 10, 11);
        x[j + 4] = MIXED(y[j], y[4 + j], 4, 5, 6, 7, 12, 13, 14, 15);
#endif
    }
}

/* Of the numbers of a vector, each with the one half of them on, then a quarter, and so on: */
#if BROAD == 16
#define FOLDED(x, WITH)                                                                  \
    x = WITH(x, MIXED(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));      \
    x = WITH(x, MIXED(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));      \
    x = WITH(x, MIXED(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));      \
    x = WITH(x, MIXED(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#else
#define FOLDED(x, WITH)                                  \
    x = WITH(x, MIXED(x, x, 4, 5, 6, 7, 0, 1, 2, 3));    \
    x = WITH(x, MIXED(x, x, 2, 3, 0, 1, 6, 7, 4, 5));    \
    x = WITH(x, MIXED(x, x, 1, 0, 3, 2, 5, 4, 7, 6));
#endif

INLINE broad both_of(broad x, broad y) { return x + y; }

/* The larger one, or the second where the first is no number. */
INLINE broad larger(broad x, broad y) {
#if defined(__AVX512F__)
    return (broad)_mm512_max_ps((__m512)x, (__m512)y);
#elif defined(__AVX2__)
    return (broad)_mm256_max_ps((__m256)x, (__m256)y);
#else
    return chosen(x > y, x, y);
#endif
}

/* Their sum. */
INLINE float whole_of(broad x) {
    FOLDED(x, both_of)
    return x[0];
}

/* Their largest, of those of which none is NaN. */
INLINE float largest_of(broad x) {
    FOLDED(x, larger)
    return x[0];
}

/* exp_down of each number. */
INLINE broad broad_exp(broad x) {
    x = larger(broad_of(-87.0f), x);
    broad n = x * 1.44269504f;
#if defined(__AVX512F__)
    n = (broad)_mm512_roundscale_ps((__m512)n, 8);
#elif defined(__AVX2__)
    n = (broad)_mm256_round_ps((__m256)n, 8);
#else
    for (int i = 0; i < BROAD; i++) n[i] = __builtin_rintf(n[i]);
#endif
    broad r = broad_fuse(n, broad_of(2.12194440e-4f), broad_fuse(n, broad_of(-0.693359375f), x));
    broad p = broad_of(1.9875691500e-4f);
    p = broad_fuse(p, r, broad_of(1.3981999507e-3f));
    p = broad_fuse(p, r, broad_of(8.3334519073e-3f));
    p = broad_fuse(p, r, broad_of(4.1665795894e-2f));
    p = broad_fuse(p, r, broad_of(1.6666665459e-1f));
    p = broad_fuse(p, r, broad_of(5.0000001201e-1f));
    p = broad_fuse(p * r, r, r) + 1.0f;
    broad_ints power = (__builtin_convertvector(n, broad_ints) + 127) << 23;
    return p * (broad)power;
}

#endif
