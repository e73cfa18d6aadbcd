/* Sixteen columns of a product at a time, each in a lane of its own, on every kind of processor. A lane's
 * sum has one order, whatever stands beside it: with fused multiplication the forms agree bit for bit. */
#ifndef ARMILLARY_LANES_H
#define ARMILLARY_LANES_H

#include "wide.h"

enum { BLOCK = 16 };
enum { AHEAD = 1536 }; /* bytes by which memory is asked for what comes next */
#define SOON(P) __builtin_prefetch((const char *)(P) + AHEAD)

#if defined(__AVX512F__)
typedef __m512 lanes;
INLINE lanes spread(float x) { return _mm512_set1_ps(x); }
INLINE lanes lanes_at(const void *p) { return _mm512_loadu_ps(p); }
INLINE void put(lanes x, float *p) { _mm512_storeu_ps(p, x); }
INLINE lanes fuse_lanes(lanes a, lanes b, lanes c) { return _mm512_fmadd_ps(a, b, c); }
INLINE lanes add_lanes(lanes a, lanes b) { return _mm512_add_ps(a, b); }
INLINE lanes times_lanes(lanes a, lanes b) { return _mm512_mul_ps(a, b); }
/* Of pairs of bf16 in memory the first of each, and the second. */
INLINE lanes firsts(const void *p) { return (lanes)_mm512_slli_epi32(_mm512_loadu_si512(p), 16); }
INLINE lanes seconds(const void *p) {
    return (lanes)_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32((int)0xffff0000u));
}
INLINE lanes lanes_of_bf16(const void *p) {
    return (lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16);
}
INLINE lanes lanes_of_f16(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(p)); }
#else
typedef struct { wide half[2]; } lanes;
#define BOTH(...) ((lanes){{ __VA_ARGS__ }})
INLINE lanes spread(float x) { return BOTH(wide_of(x), wide_of(x)); }
INLINE lanes lanes_at(const void *p) { return BOTH(*(const wide *)p, *((const wide *)p + 1)); }
INLINE void put(lanes x, float *p) { *(wide *)p = x.half[0], *(wide *)(p + WIDE) = x.half[1]; }
INLINE lanes fuse_lanes(lanes a, lanes b, lanes c) {
    return BOTH(fuse(a.half[0], b.half[0], c.half[0]), fuse(a.half[1], b.half[1], c.half[1]));
}
INLINE lanes add_lanes(lanes a, lanes b) { return BOTH(a.half[0] + b.half[0], a.half[1] + b.half[1]); }
INLINE lanes times_lanes(lanes a, lanes b) { return BOTH(a.half[0] * b.half[0], a.half[1] * b.half[1]); }
typedef uint32_t wide_words __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));
INLINE lanes firsts(const void *p) {
    const wide_words *x = p;
    return BOTH((wide)(x[0] << 16), (wide)(x[1] << 16));
}
INLINE lanes seconds(const void *p) {
    const wide_words *x = p;
    return BOTH((wide)(x[0] & 0xffff0000u), (wide)(x[1] & 0xffff0000u));
}
INLINE lanes lanes_of_bf16(const void *p) { return BOTH(get(p, 0, BF16), get(p, WIDE, BF16)); }
INLINE lanes lanes_of_f16(const void *p) { return BOTH(get(p, 0, F16), get(p, WIDE, F16)); }
#endif

/* Whole numbers: `ints` one in each lane, `bytes` four in each. x are four numbers of a row, the same for all
 * lanes. What is multiplied with int8 stands moved up by OFFSET, where that is what the processor takes. */
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#define OFFSET 128
typedef __m512i ints, bytes;
INLINE ints ints_of(int32_t x) { return _mm512_set1_epi32(x); }
INLINE ints ints_at(const void *p) { return _mm512_loadu_si512(p); }
INLINE bytes bytes_at(const void *p) { return _mm512_loadu_si512(p); }
INLINE bytes low_halves(bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
INLINE bytes high_halves(bytes x) { return low_halves(_mm512_srli_epi16(x, 4)); }
INLINE ints dot_int8(bytes w, int32_t x, ints sums) { return _mm512_dpbusd_epi32(sums, _mm512_set1_epi32(x), w); }
INLINE ints dot_int4(bytes w, int32_t x, ints sums) { return _mm512_dpbusd_epi32(sums, w, _mm512_set1_epi32(x)); }
INLINE ints add_ints(ints a, ints b) { return _mm512_add_epi32(a, b); }
INLINE lanes lanes_of_ints(ints x) { return _mm512_cvtepi32_ps(x); }
#elif defined(__AVX2__)
typedef struct { __m256i half[2]; } ints;
typedef ints bytes;
#define TWO(...) ((ints){{ __VA_ARGS__ }})
INLINE ints ints_of(int32_t x) { return TWO(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
INLINE ints ints_at(const void *p) {
    return TWO(_mm256_loadu_si256(p), _mm256_loadu_si256((const __m256i *)p + 1));
}
INLINE bytes bytes_at(const void *p) { return ints_at(p); }
INLINE __m256i low_half(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
INLINE bytes low_halves(bytes x) { return TWO(low_half(x.half[0]), low_half(x.half[1])); }
INLINE bytes high_halves(bytes x) {
    return TWO(low_half(_mm256_srli_epi16(x.half[0], 4)), low_half(_mm256_srli_epi16(x.half[1], 4)));
}
INLINE ints add_ints(ints a, ints b) {
    return TWO(_mm256_add_epi32(a.half[0], b.half[0]), _mm256_add_epi32(a.half[1], b.half[1]));
}
#if defined(__AVXVNNI__)
#define OFFSET 128
INLINE ints dot_int8(bytes w, int32_t x, ints sums) {
    __m256i each = _mm256_set1_epi32(x);
    return TWO(_mm256_dpbusd_avx_epi32(sums.half[0], each, w.half[0]),
               _mm256_dpbusd_avx_epi32(sums.half[1], each, w.half[1]));
}
INLINE ints dot_int4(bytes w, int32_t x, ints sums) {
    __m256i each = _mm256_set1_epi32(x);
    return TWO(_mm256_dpbusd_avx_epi32(sums.half[0], w.half[0], each),
               _mm256_dpbusd_avx_epi32(sums.half[1], w.half[1], each));
}
#else
#define OFFSET 0
/* Four products of bytes, a without sign; pairs of them stay below 2^15. */
INLINE __m256i dot_half(__m256i a, __m256i b) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1));
}
/* Products of |x| and w with the sign of x: neither goes to -128. */
INLINE ints dot_int8(bytes w, int32_t x, ints sums) {
    __m256i each = _mm256_set1_epi32(x), size = _mm256_abs_epi8(each);
    return add_ints(sums, TWO(dot_half(size, _mm256_sign_epi8(w.half[0], each)),
                              dot_half(size, _mm256_sign_epi8(w.half[1], each))));
}
INLINE ints dot_int4(bytes w, int32_t x, ints sums) {
    __m256i each = _mm256_set1_epi32(x);
    return add_ints(sums, TWO(dot_half(w.half[0], each), dot_half(w.half[1], each)));
}
#endif
INLINE lanes lanes_of_ints(ints x) {
    __m256 low = _mm256_cvtepi32_ps(x.half[0]), high = _mm256_cvtepi32_ps(x.half[1]);
#if defined(__AVX512F__)
    return (lanes)_mm512_insertf64x4(_mm512_castpd256_pd512((__m256d)low), (__m256d)high, 1);
#else
    return BOTH((wide)low, (wide)high);
#endif
}
#else
#define OFFSET 0
typedef struct { int32_t lane[BLOCK]; } ints;
typedef struct { int8_t lane[BLOCK][4]; } bytes;
#define LANES(RESULT, ...) RESULT made; for (int i = 0; i < BLOCK; i++) { __VA_ARGS__; } return made
#define QUADS(...) LANES(bytes, for (int j = 0; j < 4; j++) __VA_ARGS__)
INLINE ints ints_of(int32_t x) { LANES(ints, made.lane[i] = x); }
INLINE ints ints_at(const void *p) { LANES(ints, memcpy(made.lane + i, (const int32_t *)p + i, 4)); }
INLINE bytes bytes_at(const void *p) { LANES(bytes, memcpy(made.lane + i, (const char *)p + 4 * i, 4)); }
INLINE bytes low_halves(bytes x) { QUADS(made.lane[i][j] = x.lane[i][j] & 15); }
INLINE bytes high_halves(bytes x) { QUADS(made.lane[i][j] = (x.lane[i][j] >> 4) & 15); }
INLINE ints dot_int8(bytes w, int32_t x, ints sums) {
    int8_t each[4];
    memcpy(each, &x, 4);
    LANES(ints, made.lane[i] = sums.lane[i]; for (int j = 0; j < 4; j++) made.lane[i] += w.lane[i][j] * each[j]);
}
INLINE ints dot_int4(bytes w, int32_t x, ints sums) { return dot_int8(w, x, sums); }
INLINE ints add_ints(ints a, ints b) { LANES(ints, made.lane[i] = a.lane[i] + b.lane[i]); }
INLINE lanes lanes_of_ints(ints x) {
    float each[BLOCK];
    for (int i = 0; i < BLOCK; i++) each[i] = (float)x.lane[i];
    return lanes_at(each);
}
#endif

#endif
