/* Keys and values: appended to a state, and attended to. */
#ifndef ARMILLARY_ATTENTION_H
#define ARMILLARY_ATTENTION_H

#include "rowwise.h"

#include "attention_tiles.h"

/* n: units, width of one, room; out: [slots, units, room, width] */
static void append(const op_t *op, const call_t *call, const float *x, int64_t rows, range_t mine) {
    int64_t units = op->n[0], width = op->n[1], room = op->n[2];
    for (int64_t r = 0; r < rows; r++)
        for (int64_t u = mine.first; u < mine.stop; u++) {
            int64_t at = ((call->slots[r] * units + u) * room + call->places[r] % room) * width;
            const float *from = op->kind == INT64 ? NULL : x + (r * units + u) * width;
            if (op->kind == INT64) ((int64_t *)op->out)[at] = call->places[r];
            else if (op->kind == F32) memcpy((float *)op->out + at, from, sizeof(float) * (size_t)width);
            else
                for (int64_t i = 0; i < width; i++) ((uint16_t *)op->out)[at + i] = to_half(from[i], op->kind);
        }
}

/* Queries of one slot go through its keys together, KEYS keys at a time, so that keys and values are read once for
 * all of them: rows of neighbouring places, times heads of one group. Blocks begin at multiples of KEYS, whoever
 * asks, and every query keeps a running maximum of its own and takes the keys of its own range only. So its sums have
 * one order, alone or not. */
enum { KEYS = 64, ASKED = 32 };

/* What a block of queries holds; lines of `padded` numbers, zeros behind the width. */
typedef struct {
    float *ask, *out, *weights, *keys, *values; /* [ASKED, padded] twice, [ASKED, KEYS], [KEYS / BROAD, padded, BROAD],
                                                 * [KEYS, padded] */
    int64_t key_at[KEYS], value_at[KEYS];       /* where each key and value of the block begins */
    float most[ASKED], sum[ASKED], fade[ASKED]; /* of a query: maximum and sum so far, what is left of the past */
    int64_t from[ASKED], to[ASKED];             /* its keys in the block */
} asked_t;

INLINE int64_t padded_to(int64_t width) { return (width + BROAD - 1) / BROAD * BROAD; }

/* Scores of a tile of queries against BROAD / queries keys. */
INLINE void score_tile(const int kind, const int queries, const void *keys, const int64_t *at, const float *ask,
                       int64_t padded, float *to) {
    const int each = BROAD / queries;
    broad sums[BROAD];
    UNROLLED for (int i = 0; i < BROAD; i++) sums[i] = (broad){0};
    for (int64_t c = 0; c < padded; c += BROAD) {
        broad key[BROAD];
        UNROLLED for (int k = 0; k < each; k++) key[k] = broad_get(keys, at[k] + c, kind);
        UNROLLED for (int q = 0; q < queries; q++) {
            broad one = *(const broad *)(ask + q * padded + c);
            UNROLLED for (int k = 0; k < each; k++) {
                const int place = q * each + k, where = place / 4 + BROAD / 4 * (place % 4);
                sums[where] = broad_fuse(key[k], one, sums[where]);
            }
        }
    }
    broad found = sums_of(sums);
    UNROLLED for (int q = 0; q < queries; q++) memcpy(to + q * KEYS, (float *)&found + q * each, sizeof(float) * each);
}

/* What is used several times stays in a register: a compiler would rather read it from memory each time. */
#if defined(__AVX512F__)
#define HELD(x) __asm__("" : "+v"(x))
#elif defined(__AVX2__)
#define HELD(x) __asm__("" : "+x"(x))
#else
#define HELD(x) (void)0
#endif

/* The same scores, bit for bit, of keys that are turned round, lines [lines, padded, BROAD] of them with a lane for
 * each key. What were lanes there are sums of their own here, and are added in the order of `sums_of`. */
INLINE void score_turned(const int queries, const int lines, const float *keys, const float *ask, int64_t padded,
                         float *to) {
    const int quads = BROAD / 4;
    broad whole[4][4][2];
    _Pragma("GCC unroll 1") for (int quad = 0; quad < quads; quad++) {
        broad sums[4][4][2];
        UNROLLED for (int i = 0; i < 4; i++) {
            for (int q = 0; q < queries; q++)
                for (int l = 0; l < lines; l++) sums[i][q][l] = (broad){0};
            for (int64_t c = quad + i * quads; c < padded; c += BROAD) {
                broad key[2];
                for (int l = 0; l < lines; l++) {
                    key[l] = *(const broad *)(keys + (l * padded + c) * BROAD);
                    HELD(key[l]);
                }
                for (int q = 0; q < queries; q++) {
                    broad one = broad_of(ask[q * padded + c]);
                    if (lines > 1) HELD(one);
                    for (int l = 0; l < lines; l++) sums[i][q][l] = broad_fuse(key[l], one, sums[i][q][l]);
                }
            }
        }
        for (int q = 0; q < queries; q++)
            for (int l = 0; l < lines; l++)
                whole[quad][q][l] = (sums[0][q][l] + sums[2][q][l]) + (sums[1][q][l] + sums[3][q][l]);
    }
    for (int q = 0; q < queries; q++)
        for (int l = 0; l < lines; l++)
            *(broad *)(to + q * KEYS + l * BROAD) =
                BROAD == 16 ? (whole[0][q][l] + whole[2][q][l]) + (whole[1][q][l] + whole[3][q][l])
                            : whole[0][q][l] + whole[1][q][l];
}

/* Adds the weighted values of keys `from` to before `to` to what is left of the past, for a tile of queries. */
INLINE void gather_tile(const int kind, const int queries, const void *values, const int64_t *at, int64_t from,
                        int64_t to, const float *weights, const float *fade, float *out, int64_t padded) {
    int64_t c = 0;
#define STRIPES(N)                                                                                      \
    for (; c + (N) * BROAD <= padded; c += (N) * BROAD) {                                               \
        broad sums[4][N];                                                                               \
        for (int q = 0; q < queries; q++)                                                               \
            for (int s = 0; s < (N); s++)                                                               \
                sums[q][s] = *(const broad *)(out + q * padded + c + s * BROAD) * fade[q];              \
        for (int64_t i = from; i < to; i++) {                                                           \
            broad each[N];                                                                              \
            for (int s = 0; s < (N); s++) each[s] = broad_get(values, at[i] + c + s * BROAD, kind);     \
            for (int q = 0; q < queries; q++)                                                           \
                for (int s = 0; s < (N); s++)                                                           \
                    sums[q][s] = broad_fuse(each[s], broad_of(weights[q * KEYS + i]), sums[q][s]);     \
        }                                                                                               \
        for (int q = 0; q < queries; q++)                                                               \
            for (int s = 0; s < (N); s++) *(broad *)(out + q * padded + c + s * BROAD) = sums[q][s];    \
    }
#if BROAD == 16
    STRIPES(4)
#endif
    STRIPES(2)
    STRIPES(1)
#undef STRIPES
}

#define TILED(LEFT, CALL)      \
    if ((LEFT) >= 4) CALL(4)   \
    else if ((LEFT) >= 2) CALL(2) \
    else CALL(1)

INLINE void score_block(const int kind, asked_t *a, const void *keys, int64_t queries, int64_t padded, int64_t from,
                        int64_t to) {
    for (int64_t q = 0; q < queries;) {
#define SCORE(N)                                                                                                \
    {                                                                                                           \
        for (int64_t i = from; i < to; i += BROAD / N)                                                          \
            score_tile(kind, N, keys, a->key_at + i, a->ask + q * padded, padded, a->weights + q * KEYS + i);  \
        q += N;                                                                                                 \
    }
        TILED(queries - q, SCORE)
#undef SCORE
    }
}

static void score_block_turned(asked_t *a, int64_t queries, int64_t padded, int64_t from, int64_t to) {
    for (int64_t i = from, lines; i < to; i += lines * BROAD) {
        const float *keys = a->keys + i * padded;
        lines = to - i < 2 * BROAD ? 1 : 2;
        for (int64_t q = 0; q < queries;) {
#define SCORE(N)                                                                                           \
    {                                                                                                      \
        const float *ask = a->ask + q * padded;                                                            \
        float *line = a->weights + q * KEYS + i;                                                           \
        if (lines == 2) score_turned(N, 2, keys, ask, padded, line);                                       \
        else score_turned(N, 1, keys, ask, padded, line);                                                  \
        q += N;                                                                                            \
    }
            TILED(queries - q, SCORE)
#undef SCORE
        }
    }
}

INLINE void gather_block(const int kind, asked_t *a, const void *values, int64_t queries, int64_t padded) {
    for (int64_t q = 0; q < queries;) {
        int64_t from = a->from[q], to = a->to[q], alike = 1;
        while (q + alike < queries && a->from[q + alike] == from && a->to[q + alike] == to) alike++;
        if (from >= to) {
            q += alike;
            continue;
        }
#define GATHER(N)                                                                                               \
    {                                                                                                           \
        gather_tile(kind, N, values, a->value_at, from, to, a->weights + q * KEYS, a->fade + q,                \
                    a->out + q * padded, padded);                                                               \
        q += N;                                                                                                 \
    }
        TILED(alike, GATHER)
#undef GATHER
    }
}

/* Of the scores of a query in a block: which become weights, their largest and their sum. all: the whole block. */
INLINE void weigh_line(const int all, asked_t *a, int64_t q, float *line) {
    int64_t from = a->from[q], to = a->to[q];
    broad each[KEYS / BROAD], most = broad_of(a->most[q]), sum[KEYS / BROAD];
    broad_ints own[KEYS / BROAD], at;
    for (int i = 0; i < BROAD; i++) at[i] = i;
    UNROLLED for (int i = 0; i < KEYS / BROAD; i++) {
        own[i] = (at + i * BROAD >= (int32_t)from) & (at + i * BROAD < (int32_t)to);
        each[i] = *(const broad *)(line + i * BROAD);
        if (!all) each[i] = chosen(own[i], each[i], broad_of(-INFINITY));
        most = larger(each[i], most);
    }
    float peak = largest_of(most);
    UNROLLED for (int i = 0; i < KEYS / BROAD; i++) {
        sum[i] = broad_exp(each[i] - peak);
        if (!all) sum[i] = chosen(own[i], sum[i], (broad){0});
        *(broad *)(line + i * BROAD) = sum[i];
    }
    UNROLLED for (int i = KEYS / BROAD / 2; i > 0; i /= 2)
        UNROLLED for (int j = 0; j < i; j++) sum[j] += sum[j + i];
    a->fade[q] = exp_down(a->most[q] - peak);
    a->sum[q] = a->sum[q] * a->fade[q] + whole_of(sum[0]);
    a->most[q] = peak;
}

/* The scores of one query become weights; key: the block's first; the query stands at `place`. */
static void weigh(asked_t *a, int64_t q, int64_t key, int64_t place, float slope, float cap) {
    float *line = a->weights + q * KEYS;
    if (a->from[q] >= a->to[q]) return;
    /* The whole line, keys of others included: what a number comes to does not depend on where a loop begins. */
    if (cap > 0.0f)
        for (int64_t i = 0; i < KEYS; i++) line[i] = cap * tanh_of(line[i] / cap);
    if (slope != 0.0f)
        for (int64_t i = 0; i < KEYS; i++) line[i] -= slope * (float)(place - key - i);
    if (a->from[q] == 0 && a->to[q] == KEYS) weigh_line(1, a, q, line);
    else weigh_line(0, a, q, line);
}

/* What the next block reads is on its way while this one is computed. */
INLINE void ask_for(const void *from, int64_t at, int64_t count, int kind) {
    int64_t size = kind == F32 ? 4 : 2;
    for (int64_t i = 0; i < count * size; i += 64) __builtin_prefetch((const char *)from + at * size + i);
}

/* Of one block's values, float32 lines. */
static void widened(const void *from, const int64_t *at, int64_t first, int64_t stop, int kind, int64_t width,
                   int64_t padded, float *to) {
    for (int64_t i = first; i < stop; i++) {
        int64_t c = 0;
        ask_for(from, at[i] + KEYS * width, width, kind);
#define WIDENED(KIND) \
    for (; c + BROAD <= width; c += BROAD) *(broad *)(to + i * padded + c) = broad_get(from, at[i] + c, KIND)
        OF_KIND(kind, WIDENED);
#undef WIDENED
        for (; c < width; c++) to[i * padded + c] = get_one(from, at[i] + c, kind);
        for (; c < padded; c++) to[i * padded + c] = 0.0f;
    }
}

/* Of one block's keys, float32 with a lane for each. */
static void turned(const void *from, const int64_t *at, int64_t first, int64_t stop, int kind, int64_t width,
                   int64_t padded, float *to) {
    for (int64_t i = first; i < stop; i += BROAD) {
        float *lanes_of_keys = to + i * padded;
        int64_t c = 0;
        ask_for(from, at[i] + KEYS * width, BROAD * width, kind);
        broad x[BROAD];
        for (; kind == BF16 && c + 2 * BROAD <= width; c += 2 * BROAD) { /* two numbers in each lane's place */
            UNROLLED for (int k = 0; k < BROAD; k++) x[k] = *(const broad *)((const uint16_t *)from + at[i + k] + c);
            turn_about(x);
            UNROLLED for (int j = 0; j < BROAD; j++) {
                float *pair = lanes_of_keys + (c + 2 * j) * BROAD;
                *(broad *)pair = (broad)((broad_bits)x[j] << 16);
                *(broad *)(pair + BROAD) = (broad)((broad_bits)x[j] & 0xffff0000u);
            }
        }
        for (; c < padded; c += BROAD) {
            if (c + BROAD <= width) {
#define LINES(KIND) UNROLLED for (int k = 0; k < BROAD; k++) x[k] = broad_get(from, at[i + k] + c, KIND)
                OF_KIND(kind, LINES);
#undef LINES
            } else
                for (int k = 0; k < BROAD; k++)
                    for (int j = 0; j < BROAD; j++)
                        x[k][j] = c + j < width ? get_one(from, at[i + k] + c + j, kind) : 0.0f;
            turn_about(x);
            UNROLLED for (int j = 0; j < BROAD; j++) *(broad *)(lanes_of_keys + (c + j) * BROAD) = x[j];
        }
    }
}

INLINE float *taken(float **scratch, int64_t count) {
    float *at = *scratch;
    *scratch += count;
    return at;
}

/* Rows `row` to before `row + rows`, heads `head` to before `head + heads`, of one slot and one group. */
static void attend_together(const op_t *op, const call_t *call, const float *q, float *out, int64_t row, int64_t rows,
                            int64_t head, int64_t heads, float *scratch) {
    int64_t width = op->n[2], room = op->n[3], back = op->n[4], padded = padded_to(width), queries = rows * heads;
    int64_t base = (call->slots[row] * op->n[1] + head / (op->n[0] / op->n[1])) * room * width;
    int64_t place = call->places[row], earliest = place > back ? place - back : 0, end = place + rows;
    const float *sinks = op->bias, *slopes = op->rest;
    int kind = op->kind, apart = width != padded || queries > 4;
    asked_t a;
    a.ask = taken(&scratch, ASKED * padded), a.out = taken(&scratch, ASKED * padded);
    a.keys = taken(&scratch, KEYS * padded), a.values = taken(&scratch, KEYS * padded);
    a.weights = taken(&scratch, ASKED * KEYS);
    for (int64_t i = 0; i < queries; i++) {
        int64_t h = head + i % heads;
        const float *from = q + ((row + i / heads) * op->n[0] + h) * width;
        for (int64_t c = 0; c < padded; c++) a.ask[i * padded + c] = c < width ? from[c] * op->f[0] : 0.0f;
        for (int64_t c = 0; c < padded; c++) a.out[i * padded + c] = 0.0f;
        a.most[i] = sinks ? sinks[h] : -INFINITY, a.sum[i] = sinks ? 1.0f : 0.0f;
    }
    for (int64_t key = earliest / KEYS * KEYS; key < end; key += KEYS) {
        /* what any query needs, up to whole vectors: a slot has a whole room, and what is beyond is not used */
        int64_t from = earliest > key ? (earliest - key) / BROAD * BROAD : 0;
        int64_t to = end - key < KEYS ? padded_to(end - key) : KEYS, slot = (key + from) % room;
        for (int64_t i = from; i < to; i++) {
            a.key_at[i] = a.value_at[i] = base + slot * width;
            slot = slot + 1 == room ? 0 : slot + 1;
        }
        if (apart) {
            turned(op->more, a.key_at, from, to, kind, width, padded, a.keys);
            widened(op->weight, a.value_at, from, to, kind, width, padded, a.values);
            for (int64_t i = from; i < to; i++) a.value_at[i] = i * padded;
            score_block_turned(&a, queries, padded, from, to);
        } else {
#define SCORED(KIND) score_block(KIND, &a, op->more, queries, padded, from, to)
            OF_KIND(kind, SCORED);
#undef SCORED
        }
        for (int64_t i = 0; i < queries; i++) {
            int64_t own = place + i / heads, first = own > back ? own - back - key : -key;
            a.from[i] = first > 0 ? first : 0, a.to[i] = own + 1 - key < KEYS ? own + 1 - key : KEYS;
            weigh(&a, i, key, own, slopes ? slopes[head + i % heads] : 0.0f, op->f[1]);
        }
        if (apart) gather_block(F32, &a, a.values, queries, padded);
        else {
#define GATHERED(KIND) gather_block(KIND, &a, op->weight, queries, padded)
            OF_KIND(kind, GATHERED);
#undef GATHERED
        }
    }
    for (int64_t i = 0; i < queries; i++) {
        float *to = out + ((row + i / heads) * op->n[0] + head + i % heads) * width, whole = 1.0f / a.sum[i];
        for (int64_t c = 0; c < width; c++) to[c] = a.out[i * padded + c] * whole;
    }
}

/* Floats that a thread needs for itself, whichever way it goes. */
int64_t tape_attend_floats(int64_t width) {
    int64_t most = 2 * (ASKED + KEYS) * padded_to(width) + ASKED * KEYS;
#if defined(LOOK_TILES)
    int64_t tiles = LOOK_FLOATS(ASKED, width);
    most = tiles > most ? tiles : most;
#endif
    return most;
}

/* n: heads, groups, width, room, tokens back; more, weight: keys and values [slots, groups, room, width];
 * bias: sinks; rest: slopes; f: scale, cap. Threads share the work by what it costs: queries times their keys. */
static void attend(const op_t *op, const call_t *call, const float *q, float *out, int64_t rows, float *scratch,
                   int thread, int threads) {
    int64_t groups = op->n[1], each = op->n[0] / groups, back = op->n[4];
    int64_t parts = (threads + rows * groups - 1) / (rows * groups); /* of a group's heads */
    if (parts > each) parts = each;
    int64_t heads = (each + parts - 1) / parts;
    if (heads > ASKED) heads = ASKED;
    int64_t most = ASKED / heads;
    if (groups % threads && most > (rows + threads - 1) / threads) most = (rows + threads - 1) / threads;
#if defined(LOOK_TILES)
    int tiles = op->kind == BF16 && op->n[2] % CHUNK == 0 && tiles_allowed();
    setup_t tiles_before;
    if (tiles) whole_tiles(&tiles_before);
#endif
    double all = 0.0, before = 0.0;
    for (int64_t r = 0; r < rows; r++) all += (double)(call->places[r] < back ? call->places[r] : back) + KEYS;
    all *= (double)(groups * each);
    for (int64_t g = 0; g < groups; g++)
        for (int64_t r = 0, count; r < rows; r += count) {
            count = 1;
            while (r + count < rows && count < most && call->slots[r + count] == call->slots[r] &&
                   call->places[r + count] == call->places[r] + count)
                count++;
            double keys = (double)(call->places[r] < back ? call->places[r] : back) + KEYS;
            for (int64_t h = 0, some; h < each; h += some) {
                some = each - h < heads ? each - h : heads;
                double cost = (double)(count * some) * keys;
                if ((int)((before + 0.5 * cost) * threads / all) == thread) {
#if defined(LOOK_TILES)
                    if (tiles) attend_tiles(op, call, q, out, r, count, g * each + h, some, scratch);
                    else
#endif
                        attend_together(op, call, q, out, r, count, g * each + h, some, scratch);
                }
                before += cost;
            }
        }
#if defined(LOOK_TILES)
    if (tiles) tiles_back(&tiles_before);
#endif
}

#endif
