/* Lines of LANES channels: what the kernels that run along a sequence work on at a time. */
#ifndef ARMILLARY_LINES_H
#define ARMILLARY_LINES_H

#include "numbers.h"

#define LANES 32
#define EACH _Pragma("omp simd") for (int64_t i = 0; i < LANES; i++)

/* One line of channels into float32, zeros behind the last channel. */
static inline void load(const void *from, int64_t at, int64_t count, int bf16, float *line) {
    if (count < LANES) memset(line, 0, sizeof(float) * LANES);
    if (bf16) {
        const uint16_t *x = (const uint16_t *)from + at;
        if (count == LANES)
            for (int64_t i = 0; i < LANES; i++) line[i] = from_bf16(x[i]);
        else
            for (int64_t i = 0; i < count; i++) line[i] = from_bf16(x[i]);
    } else if (count == LANES) {
        memcpy(line, (const float *)from + at, sizeof(float) * LANES);
    } else {
        memcpy(line, (const float *)from + at, sizeof(float) * (size_t)count);
    }
}

static inline void store(void *to, int64_t at, int64_t count, int bf16, const float *line) {
    if (bf16) {
        uint16_t *x = (uint16_t *)to + at;
        for (int64_t i = 0; i < count; i++) x[i] = to_bf16(line[i]);
    } else if (count == LANES) {
        memcpy((float *)to + at, line, sizeof(float) * LANES);
    } else {
        memcpy((float *)to + at, line, sizeof(float) * (size_t)count);
    }
}

/* Whole lines: room for `count` of them, to be freed. */
static inline float *lines(int64_t count) { return aligned_alloc(64, sizeof(float) * LANES * (size_t)count); }

#endif
