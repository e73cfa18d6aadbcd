/* Weights in 8 and 4 bits, row by row: what pack.py says, quickly. w [n, k] in float32, bf16 or fp16. */
#include "record.h"

static void widen(const void *w, int kind, int64_t at, int64_t count, float *line) {
#define WIDENED(KIND) for (int64_t i = 0; i < count; i++) line[i] = get_one(w, at + i, KIND)
    OF_KIND(kind, WIDENED)
#undef WIDENED
}

/* Not inlined, so that what is multiplied with it is not divided instead: that rounds otherwise. */
static __attribute__((noinline)) float inverse(float x) { return 1.0f / x; }

/* out [n, padded] */
void pack_int8_rows(const void *w, int32_t kind, int64_t n, int64_t k, int64_t padded, int8_t *out, float *scales) {
    _Pragma("omp parallel for schedule(static)") for (int64_t r = 0; r < n; r++) {
        float line[GROUP], largest = 0.0f;
        int8_t *to = out + r * padded;
        for (int64_t i = 0; i < k; i += GROUP) {
            int64_t count = k - i < GROUP ? k - i : GROUP;
            widen(w, kind, r * k + i, count, line);
            float here = largest_size(line, count);
            largest = here <= largest ? largest : here; /* NaN stays */
            if (largest != largest) break;
        }
        scales[r] = largest * (float)(1.0 / 127.0);
        float scale = scales[r] > 1e-30f ? scales[r] : 1e-30f, each = inverse(scale);
        for (int64_t i = 0; i < k; i += GROUP) {
            int64_t count = k - i < GROUP ? k - i : GROUP;
            widen(w, kind, r * k + i, count, line);
            for (int64_t j = 0; j < count; j++) {
                float x = __builtin_rintf(line[j] * each);
                x = x < 127.0f ? x : 127.0f;
                to[i + j] = (int8_t)(x > -127.0f ? x : -127.0f);
            }
        }
        memset(to + k, 0, (size_t)(padded - k));
    }
}

/* out [n, groups, 18] */
void pack_int4_rows(const void *w, int32_t kind, int64_t n, int64_t k, uint8_t *out) {
    int64_t groups = (k + GROUP - 1) / GROUP;
    _Pragma("omp parallel for schedule(static)") for (int64_t r = 0; r < n; r++)
        for (int64_t g = 0; g < groups; g++) {
            int64_t count = k - g * GROUP < GROUP ? k - g * GROUP : GROUP;
            float line[GROUP] = {0}, most = 0.0f, least = 0.0f;
            uint8_t *to = out + (r * groups + g) * (2 + GROUP / 2), number[GROUP];
            widen(w, kind, r * k + g * GROUP, count, line);
            for (int j = 0; j < GROUP; j++) { /* NaN stays */
                most = line[j] <= most ? most : line[j];
                least = line[j] >= least ? least : line[j];
                if (line[j] != line[j]) break;
            }
            float largest = most < -least ? least : most;
            uint16_t scale = to_bf16(largest * -0.125f);
            scale = scale & 0x7fff ? scale : 0; /* a zero has no sign */
            float divisor = from_bf16(scale), each = fabsf(divisor) > 1e-30f ? inverse(divisor) : 0.0f;
            for (int j = 0; j < GROUP; j++) {
                float x = __builtin_rintf(line[j] * each);
                x = x < 7.0f ? x : 7.0f;
                number[j] = (uint8_t)((x > -8.0f ? x : -8.0f) + 8.0f);
            }
            memcpy(to, &scale, 2);
            for (int j = 0; j < GROUP / 2; j++) to[2 + j] = (uint8_t)(number[j] | number[j + GROUP / 2] << 4);
        }
}
