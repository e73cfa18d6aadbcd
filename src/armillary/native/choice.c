/* The choice of each row's next token from its scores: what is added and taken off, temperature, filters, the draw.
 *
 * The same as the plain form beside it (engine/choosing.py) but for the rounding of sums and exponentials: a token is
 * another one only where a draw, or a filter's bound, lies within about 1e-6 of the border between two. What a row
 * gives does not depend on the other rows, nor on threads. Sums are of double precision.
 */
#include "choice.h"
#include "mirror.h"
#include "wide.h"

enum { BLOCK = 1024, HIGH = 2048, LOW = 1024, NEAR = 16 };
/* e^(z - peak) of each score, 0 below e^-87, and the sum of every block; returns the whole sum. NaN gives NaN. */
static double weigh(const float *z, int64_t n, float peak, float *e, double *sums) {
    double whole = 0.0;
    for (int64_t at = 0; at < n; at += BLOCK) {
        int64_t stop = at + BLOCK < n ? at + BLOCK : n;
        double sum = 0.0;
        for (int64_t i = at; i < stop; i++) {
            float x = z[i] - peak, y = exp_down(x);
            y = x < -87.0f ? 0.0f : y;
            e[i] = y;
            sum += (double)y;
        }
        sums[at / BLOCK] = sum;
        whole += sum;
    }
    return whole;
}

static double summed(const float *e, int64_t n, double *sums) {
    double whole = 0.0;
    for (int64_t at = 0; at < n; at += BLOCK) {
        int64_t stop = at + BLOCK < n ? at + BLOCK : n;
        double sum = 0.0;
        for (int64_t i = at; i < stop; i++) sum += (double)e[i];
        sums[at / BLOCK] = sum;
        whole += sum;
    }
    return whole;
}

/* The first place of a number that is there. */
static int64_t place_of(const float *x, int64_t n, float value) {
    for (int64_t at = 0; at < n; at += 64) {
        int64_t stop = at + 64 < n ? at + 64 : n;
        int32_t found = 0;
        for (int64_t i = at; i < stop; i++) found |= x[i] == value;
        for (int64_t i = at; found && i < stop; i++)
            if (x[i] == value) return i;
    }
    return 0;
}

/* Bits that are in the order of the numbers. */
INLINE uint32_t ordered(float x) {
    union { float f; uint32_t u; } v = {x};
    return v.u & 0x80000000u ? ~v.u : v.u | 0x80000000u;
}

/* The k-th largest, by its bits from the top: as long for any numbers. */
static float kth_of(const float *x, int64_t n, int64_t k) {
    uint32_t prefix = 0, mask = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        int64_t counts[256] = {0};
        for (int64_t i = 0; i < n; i++) {
            uint32_t key = ordered(x[i]);
            if ((key & mask) == prefix) counts[(key >> shift) & 255u]++;
        }
        uint32_t byte = 255;
        while (k > counts[byte]) k -= counts[byte--];
        prefix |= byte << shift;
        mask |= 255u << shift;
    }
    union { uint32_t u; float f; } v = {prefix & 0x80000000u ? prefix & 0x7fffffffu : ~prefix};
    return v.f;
}

/* The k-th largest of a long line. The k-th largest of the maxima of small groups, whose members lie apart, is a bound
 * from below, which leaves little more than k to look at. room: n numbers. */
static float kth_largest(const float *x, int64_t n, int64_t k, float *room) {
    int64_t size = (int64_t)sqrt(4.0 * (double)n / (double)k), groups, count = 0;
    size = size > 64 ? 64 : size;
    groups = n / size;
    if (size < 4 || k > groups / 2) return kth_of(x, n, k);
    memcpy(room, x, sizeof(float) * (size_t)groups);
    for (int64_t i = 1; i < size; i++)
        for (int64_t g = 0; g < groups; g++) {
            float one = x[i * groups + g];
            room[g] = one > room[g] ? one : room[g];
        }
    float floor = kth_of(room, groups, k), *kept = room + groups;
    int64_t most = n - groups - size;
    for (int64_t g = 0; g < groups; g++)
        for (int64_t i = 0; room[g] >= floor && i < size; i++)
            if (x[i * groups + g] >= floor) {
                if (count == most) return kth_of(x, n, k);
                kept[count++] = x[i * groups + g];
            }
    for (int64_t i = size * groups; i < n; i++)
        if (x[i] >= floor) {
            if (count == most) return kth_of(x, n, k);
            kept[count++] = x[i];
        }
    return kth_of(kept, count, k);
}

/* Of bins of weights, the largest first: the one in which the sum passes the goal; `above`: what lies before it. */
static int64_t passing(const double *bins, int64_t count, double goal, double *above) {
    int64_t last = count;
    double before = *above, sum = *above;
    for (int64_t b = count - 1; b >= 0; b--) {
        if (bins[b] == 0.0) continue;
        last = b, before = sum;
        sum += bins[b];
        if (sum >= goal) break;
    }
    *above = before;
    return last;
}

/* Weights behind those that make up a share of their sum become 0: in the order of their sizes, of equal ones the
 * first go in. Those so small that all of them together lie behind need no look. Of the others, bits are gone through
 * from the top, 11 and then twice 10. room: n numbers. */
static void nucleus(float *e, int64_t n, double whole, double share, float *room) {
    double bins[HIGH] = {0}, above = 0.0, goal = share * whole;
    float small = (float)((1.0 - share) * whole / (2.0 * (double)n));
    int64_t count = 0, left = 0, equal = 0;
    union { float f; uint32_t u; } v;
    for (int64_t i = 0; i < n; i++) {
        room[count] = e[i];
        count += e[i] >= small;
    }
    for (int64_t i = 0; i < count; i++) {
        v.f = room[i];
        bins[v.u >> 20] += (double)v.f;
    }
    uint32_t high = (uint32_t)passing(bins, HIGH, goal, &above), prefix = high;
    for (int64_t i = 0; i < count; i++) {
        v.f = room[left] = room[i];
        left += v.u >> 20 == high;
    }
    for (int shift = 10; shift >= 0; shift -= 10) {
        memset(bins, 0, sizeof(double) * LOW);
        for (int64_t i = 0; i < left; i++) {
            v.f = room[i];
            if ((v.u & 0xfffffu) >> (shift + 10) == (shift ? 0 : prefix & (LOW - 1)))
                bins[(v.u >> shift) & (LOW - 1)] += (double)v.f;
        }
        prefix = prefix << 10 | (uint32_t)passing(bins, LOW, goal, &above);
    }
    v.u = prefix;
    float cut = v.f;
    for (int64_t i = 0; i < n; i++) {
        equal += e[i] == cut;
        e[i] = e[i] < cut ? 0.0f : e[i];
    }
    for (int64_t i = 0; equal > 1 && i < n; i++)
        if (e[i] == cut) {
            if (above >= goal) e[i] = 0.0f;
            above += (double)cut;
        }
}

/* The token at which the sum of weights passes draw * whole; at the very top the last that has any weight. */
static int64_t drawn(const float *e, int64_t n, const double *sums, double whole, double draw) {
    double goal = draw * whole, sum = 0.0;
    int64_t block = 0, last = 0;
    while ((block + 1) * BLOCK < n && sum + sums[block] <= goal) sum += sums[block++];
    for (int64_t i = block * BLOCK; i < n; i++) {
        sum += (double)e[i];
        if (sum > goal) return i;
    }
    for (int64_t i = 0; i < n; i++) last = e[i] > 0.0f ? i : last;
    return last;
}

/* The likeliest tokens, the first first; of equal ones that with the smaller number. */
static void likeliest(const float *x, int64_t n, row_t *row, double base, float *room) {
    int64_t wanted = row->tops < n ? row->tops : n, count = 0;
    float floor = kth_largest(x, n, wanted, room), least = INFINITY;
    for (int64_t at = 0; at < n; at += NEAR) {
        int64_t stop = at + NEAR < n ? at + NEAR : n;
        int32_t any = 0;
        for (int64_t i = at; i < stop; i++) any |= x[i] >= floor;
        for (int64_t i = at; any && i < stop; i++) {
            if (x[i] < floor || (count == wanted && x[i] <= least)) continue;
            int64_t place = count < wanted ? count++ : wanted - 1;
            for (; place > 0 && row->top_logprobs[place - 1] < x[i]; place--) {
                row->top_logprobs[place] = row->top_logprobs[place - 1];
                row->top_ids[place] = row->top_ids[place - 1];
            }
            row->top_logprobs[place] = x[i];
            row->top_ids[place] = (int32_t)i;
            least = row->top_logprobs[count - 1];
        }
    }
    for (int64_t i = 0; i < count; i++) row->top_logprobs[i] = (float)((double)row->top_logprobs[i] - base);
}

static void shape(const row_t *row, float *y, int64_t n) {
    int64_t known = row->tokens < n ? row->tokens : n;
    for (int64_t at = 0; row->bits && at < n; at += 32) {
        uint32_t word = at < known ? row->bits[at / 32] : 0;
        int64_t left = n - at < 32 ? n - at : 32, bits = known - at < left ? known - at : left;
        for (int64_t i = 0; i < left; i++) y[at + i] = i < bits && word >> i & 1 ? y[at + i] : -INFINITY;
    }
    for (int64_t i = 0; i < row->biased; i++) y[row->biased_ids[i]] += row->biases[i];
    for (int64_t i = 0; i < row->seen; i++) {
        float *one = y + row->seen_ids[i];
        *one = *one > 0.0f ? *one / row->repetition : *one * row->repetition;
    }
    for (int64_t i = 0; i < row->counted; i++)
        y[row->counted_ids[i]] -= row->presence + row->frequency * row->counts[i];
    int forbid = row->end_rule == FORBID;
    if (row->end_rule == FORBID_UNLESS_ALL) /* a constraint that allows nothing but the end stands above a bound */
        for (int64_t i = 0; i < n && !forbid; i++) {
            int end = y[i] == -INFINITY;
            for (int64_t j = 0; j < row->ends && !end; j++) end = row->end_ids[j] == i;
            forbid = !end;
        }
    for (int64_t i = 0; i < row->ends; i++) {
        float *one = y + row->end_ids[i];
        if (forbid) *one = -INFINITY;
        else if (row->end_rule == ADD_TO) *one += row->end_amount;
    }
}

/* draw: uniform in [0, 1); room: 3 n numbers, and n more for bf16; sums: one for each block. */
static found_t choose_one(row_t *row, const void *logits, double draw, int64_t n, int bf16, float *room,
                          double *sums) {
    const float *x = logits, *y = row->scores;
    found_t found = {NOT_FINITE, 0.0, 0.0};
    int64_t token;
    float *e = room, *z = room + n, *more = room + 2 * n;
    int changed = row->bits || row->biased || row->seen || row->counted || (row->ends && row->end_rule != LEAVE);
    if (bf16) { /* a line of its own: it is still wanted when the others are written */
        const uint16_t *half = logits;
        float *wide = room + 3 * n;
        for (int64_t i = 0; i < n; i++) wide[i] = from_bf16(half[i]);
        x = wide;
    }
    float peak = most_of(x, n, -INFINITY);
    double whole = weigh(x, n, peak, e, sums);
    if (!(peak > -INFINITY && peak < INFINITY && whole == whole)) return found;
    double base = (double)peak + log(whole);
    if (row->tops) likeliest(x, n, row, base, more);
    found.problem = NOTHING_LEFT;
    if (changed) {
        memcpy(z, y ? y : x, sizeof(float) * (size_t)n);
        shape(row, z, n);
        y = z;
    } else if (!y)
        y = x;
    float t = row->temperature, top = y == x ? peak : most_of(y, n, -INFINITY);
    int32_t unknown = 0;
    if (y != x)
        for (int64_t i = 0; i < n; i++) unknown |= y[i] != y[i];
    if (unknown || !(top > -INFINITY && top < INFINITY)) return found;
    if (t == 0.0f)
        token = place_of(y, n, top);
    else {
        if (t != 1.0f || row->least > -INFINITY) {
            for (int64_t i = 0; i < n; i++) z[i] = (y[i] - top) / t; /* however small t is, the largest stays 0 */
            y = z, top = 0.0f;
        }
        if (y != x) whole = weigh(y, n, top, e, sums);
        int filters = 0;
        if (row->top_k && row->top_k < n) {
            float floor = kth_largest(y, n, row->top_k, more);
            for (int64_t i = 0; i < n; i++) e[i] = y[i] < floor ? 0.0f : e[i];
            filters = 1;
        }
        if (row->top_p < 1.0) {
            if (filters) whole = summed(e, n, sums);
            nucleus(e, n, whole, row->top_p, more);
            filters = 1;
        }
        if (row->least > -INFINITY) {
            for (int64_t i = 0; i < n; i++) e[i] = y[i] < row->least ? 0.0f : e[i];
            filters = 1;
        }
        if (filters) whole = summed(e, n, sums);
        token = drawn(e, n, sums, whole, draw);
    }
    return (found_t){FINE, (double)token, (double)x[token] - base};
}

int32_t choose_rows(row_t *const *rows, const int64_t *places, const double *draws, found_t *found, int64_t count,
                    const char *logits, int64_t step, int64_t width, int32_t bf16, int32_t threads) {
    int64_t blocks = (width + BLOCK - 1) / BLOCK, line = sizeof(float) * (size_t)(width * (bf16 ? 4 : 3));
    int32_t failed = 0;
    _Pragma("omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)") {
        float *room = malloc((size_t)line);
        double *sums = malloc(sizeof(double) * (size_t)blocks);
        failed = !room || !sums;
        _Pragma("omp for schedule(static)") for (int64_t r = 0; r < count; r++)
            if (room && sums)
                found[r] = choose_one(rows[r], logits + places[r] * step, draws[r], width, bf16, room, sums);
        free(room);
        free(sums);
    }
    return failed;
}

static const mirror_t mirror[] = {
    NUMBER(TOP) NUMBER(FINE) NUMBER(NOT_FINITE) NUMBER(NOTHING_LEFT)
    NUMBER(LEAVE) NUMBER(FORBID) NUMBER(FORBID_UNLESS_ALL) NUMBER(ADD_TO)
#define ROW(NAME) MEMBER(row_t, NAME)
    SIZE(row_t) ROW(scores) ROW(bits) ROW(top_p) ROW(temperature) ROW(least) ROW(repetition) ROW(presence)
    ROW(frequency) ROW(end_amount) ROW(end_rule) ROW(tops) ROW(tokens) ROW(top_k) ROW(biased) ROW(seen) ROW(counted)
    ROW(ends) ROW(biased_ids) ROW(seen_ids) ROW(counted_ids) ROW(end_ids) ROW(biases) ROW(counts) ROW(top_ids)
    ROW(top_logprobs)
    SIZE(found_t) MEMBER(found_t, problem) MEMBER(found_t, token) MEMBER(found_t, logprob)
};

const mirror_t *choice_mirror(int64_t *count) {
    *count = sizeof mirror / sizeof *mirror;
    return mirror;
}
