/* A decoding step as a tape: an array of small records, run by one call inside one parallel region.
 *
 * Every record is an operation over buffers that stay where they are. Threads split its columns, heads
 * or rows in one fixed way, so that most operations that follow one another need no barrier; where one
 * does, the tape says so. Activations are float32. What a row gives does not depend on the other rows,
 * bit for bit: each sum has one order, however rows and columns are grouped into tiles.
 */
/* Sums here keep the order in which they are written: `wide` says where they may be wide. */
#if defined(__clang__)
#pragma clang fp reassociate(off)
#else
#pragma GCC optimize("no-associative-math")
#endif
#include <omp.h>

#include "attention.h"
#include "attention_int8.h"
#include "experts.h"
#include "products.h"
#include "recurrence.h"
#include "rowwise.h"
#include "stick.h"

static void step(const op_t *op, const call_t *call, int thread, int threads, float *scratch, int *tiles) {
    int64_t rows = op->picked ? call->picks : call->rows;
    float *in = op->in ? (float *)((char *)op->in + op->in_stride * thread) : NULL;
    float *out = op->out ? (float *)((char *)op->out + op->out_stride * thread) : NULL;
    const int64_t *n = op->n;
    if (rows == 0) return;
    switch (op->code) {
    case EMBED: { /* n: width, units, whether by position, whether added; weight: table; f: factor */
        range_t mine = share_of(n[1], thread, threads);
        int64_t from = mine.first * (n[0] / n[1]), to = mine.stop * (n[0] / n[1]);
        for (int64_t r = 0; r < rows; r++) {
            int64_t at = (n[2] ? call->places : call->ids)[r] * n[0];
            for (int64_t i = from; i < to; i++) {
                float value = get_one(op->weight, at + i, op->kind) * op->f[0];
                out[r * n[0] + i] = n[3] ? out[r * n[0] + i] + value : value;
            }
        }
        break;
    }
    case NORM: { /* n: width, whether centred; own buffers: every thread all rows, else its share of them */
        range_t mine = op->out_stride ? (range_t){0, rows} : share_of(rows, thread, threads);
        for (int64_t r = mine.first; r < mine.stop; r++)
            norm_row(in + r * n[0], out + r * n[0], op->weight, op->bias, n[0], (int)n[1], op->f[0], op->f[1]);
        break;
    }
    case PICK: /* n: width */
        for (int64_t r = 0; r < rows; r++)
            memcpy(out + r * n[0], in + call->picked[r] * n[0], sizeof(float) * (size_t)n[0]);
        break;
    case ANGLES: { /* n: pairs; weight: speeds; out: cosines and sines; f: factor */
        range_t mine = share_of(rows, thread, threads);
        for (int64_t r = mine.first; r < mine.stop; r++)
            for (int64_t i = 0; i < n[0]; i++) {
                float angle = (float)call->places[r] * ((const float *)op->weight)[i];
                out[r * 2 * n[0] + i] = cosf(angle) * op->f[0];
                out[r * 2 * n[0] + n[0] + i] = sinf(angle) * op->f[0];
            }
        break;
    }
    case QUANTISE: { /* n: width; out: as products with weights of the kind take rows */
        prepared_t p = prepared(out, op->kind, n[0], rows);
        for (int64_t r = 0; r < rows; r++) prepare(in + r * n[0], &p, op->kind, r, n[0]);
        break;
    }
    case PRODUCT: {
        range_t mine = share_of(n[2], thread, threads);
        product(op, in, out, rows, (range_t){mine.first * (n[1] / n[2]), mine.stop * (n[1] / n[2])}, tiles);
        break;
    }
    case HEAD_NORM: { /* n: units, width of one, whether centred */
        range_t mine = share_of(n[0], thread, threads);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t u = mine.first; u < mine.stop; u++) {
                float *at = out + (r * n[0] + u) * n[1];
                norm_row(at, at, op->weight, op->bias, n[1], (int)n[2], op->f[0], op->f[1]);
            }
        break;
    }
    case ROTATE: { /* n: units, width of one, pairs, whether interleaved; in: angles */
        range_t mine = share_of(n[0], thread, threads);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t u = mine.first; u < mine.stop; u++)
                turn(out + (r * n[0] + u) * n[1], in + r * 2 * n[2], in + r * 2 * n[2] + n[2], n[2], (int)n[3]);
        break;
    }
    case APPEND:
        append(op, call, in, rows, share_of(n[0], thread, threads));
        break;
    case ATTEND:
        attend(op, call, in, out, rows, scratch, thread, threads);
        break;
    case RETAIN:
        retain(op, call, rows, share_of(n[0], thread, threads));
        break;
    case MATRIX:
        matrix(op, call, rows, share_of(n[0], thread, threads));
        break;
    case GATES:
        gates(op, rows, share_of(n[0], thread, threads));
        break;
    case SWAP:
        swap(op, in, out, rows, share_of(n[0], thread, threads));
        break;
    case ROUTE:
        route(op, in, out, rows, scratch);
        break;
    case EXPERTS_IN:
    case EXPERTS_OUT: { /* n: inputs, outputs, units; rest: from one thread's picks to the next one's */
        range_t mine = share_of(n[2], thread, threads);
        range_t columns = {mine.first * (n[1] / n[2]), mine.stop * (n[1] / n[2])};
        const float *picks = (const float *)((char *)op->more + (intptr_t)op->rest * thread);
        if (op->code == EXPERTS_IN) experts_in(op, in, picks, out, rows, columns, scratch);
        else experts_out(op, in, picks, out, rows, columns, scratch);
        break;
    }
    case FEATURES:
        features(op, call, in, out, rows, share_of(n[0], thread, threads), scratch);
        break;
    case APPEND_INT8:
        append_int8(op, call, in, rows, share_of(n[0], thread, threads));
        break;
    case ATTEND_INT8:
        attend_int8(op, call, in, out, rows, scratch, thread, threads);
        break;
    case STICK:
        stick(op, call, in, out, rows, thread, threads);
        break;
    case CUT: /* n: width, first column of it, how many */
        for (int64_t r = 0; r < rows; r++)
            memcpy(out + r * n[2], in + r * n[0] + n[1], sizeof(float) * (size_t)n[2]);
        break;
    case TAKE: /* n: width; rest: [slots, width] */
        for (int64_t r = 0; r < rows; r++)
            memcpy(out + r * n[0], (float *)op->rest + call->slots[r] * n[0], sizeof(float) * (size_t)n[0]);
        break;
    case CONVOLVE:
    case MAP:
    case SELECT:
    case CELL:
    case SCALED:
    case ADD_GATED: { /* n: width, units */
        range_t mine = share_of(n[1], thread, threads);
        int64_t from = mine.first * (n[0] / n[1]), to = mine.stop * (n[0] / n[1]);
        if (op->code == CONVOLVE) convolve(op, call, out, rows, from, to);
        else if (op->code == SELECT) select_(op, call, in, out, rows, from, to);
        else if (op->code == CELL) cell(op, call, in, out, rows, from, to);
        else if (op->code == ADD_GATED) add_gated(op, in, out, rows, from, to);
        else if (op->code == SCALED) scaled(op, in, out, rows, from, to);
        else
            for (int64_t r = 0; r < rows; r++) map(out + r * n[0] + from, to - from, op->kind, op->f[0]);
        break;
    }
    default: { /* element by element; n: width, units */
        range_t mine = share_of(n[1], thread, threads);
        int64_t from = mine.first * (n[0] / n[1]), count = mine.stop * (n[0] / n[1]) - from;
        for (int64_t r = 0; r < rows; r++) {
            float *y = out + r * n[0] + from;
            const float *x = in ? in + r * n[0] + from : NULL;
            float factor = op->f[0];
            if (op->code == ACTIVATE) activate(y, x, count, op->kind);
            else if (op->code == ADD)
                for (int64_t i = 0; i < count; i++) y[i] += factor * x[i];
            else if (op->code == COPY)
                for (int64_t i = 0; i < count; i++) y[i] = factor * x[i];
            else if (op->code == CLIP)
                for (int64_t i = 0; i < count; i++) {
                    float cut = y[i] > factor ? factor : y[i];
                    y[i] = cut < -factor ? -factor : cut;
                }
            else
                for (int64_t i = 0; i < count; i++) y[i] = factor * tanh_of(y[i] / factor);
        }
    }
    }
}

/* Run `count` records; with one thread, or where `threads` are not to be had, as many as there are. */
void tape_run(const op_t *ops, int64_t count, const call_t *call, int64_t threads) {
    _Pragma("omp parallel num_threads((int)threads)") {
        int thread = omp_get_thread_num(), all = omp_get_num_threads();
        float *scratch = call->room + thread * call->scratch;
        int tiles = 0; /* how the thread's are set up */
        for (int64_t i = 0; i < count; i++) {
            if (ops[i].wait) {
                _Pragma("omp barrier")
            }
            step(ops + i, call, thread, all, scratch, &tiles);
        }
        free_tiles(&tiles);
    }
}

/* Since OpenMP 5.0; the library may be older than the compiler. */
#if defined(__ELF__) && (__GNUC__ >= 9 || defined(__clang__))
#define PAUSES
__attribute__((weak)) int omp_pause_resource_all(omp_pause_resource_t kind);
#endif

/* The calling thread lets go of the threads that work for it, until it needs any again; 0: it has. */
int32_t tape_alone(void) {
#if defined(PAUSES)
    if (omp_pause_resource_all) return omp_pause_resource_all(omp_pause_soft);
#endif
    return -1;
}

/* As `tape_run`, but what threads do between two barriers is done by one after another, by the last one first if
 * `back`: what a thread takes from another one without waiting for it is not there yet, or is gone. For tests. */
void tape_run_in_turn(const op_t *ops, int64_t count, const call_t *call, int64_t threads, int64_t back) {
    int tiles = 0;
    for (int64_t first = 0, stop; first < count; first = stop) {
        for (stop = first + 1; stop < count && !ops[stop].wait; stop++);
        for (int64_t turn = 0; turn < threads; turn++)
            for (int64_t i = first; i < stop; i++)
                step(ops + i, call, (int)(back ? threads - 1 - turn : turn), (int)threads, call->room, &tiles);
    }
    free_tiles(&tiles);
}

static const mirror_t mirror[] = {
    CODES(NUMBER) KINDS(NUMBER)
    NUMBER(RELU) NUMBER(GELU) NUMBER(GELU_TANH) NUMBER(SILU)
    NUMBER(STILL) NUMBER(BY_HEAD) NUMBER(BY_KEY)
    NUMBER(RNN_TANH) NUMBER(RNN_RELU) NUMBER(LSTM) NUMBER(GRU)
    NUMBER(FADE) NUMBER(ELU_ONE)
    NUMBER(RELU_FEATURES) NUMBER(EXP_FEATURES) NUMBER(UNIT_FEATURES)
    NUMBER(GROUP) NUMBER(BLOCK) NUMBER(TILE) NUMBER(STEP)
#define OP(NAME) MEMBER(op_t, NAME)
    SIZE(op_t) OP(code) OP(kind) OP(wait) OP(picked) OP(in_stride) OP(out_stride)
    OP(in) OP(out) OP(more) OP(weight) OP(bias) OP(rest) OP(n) OP(f)
#define CALL(NAME) MEMBER(call_t, NAME)
    SIZE(call_t) CALL(rows) CALL(picks) CALL(scratch) CALL(room) CALL(ids) CALL(slots) CALL(places) CALL(picked)
};

const mirror_t *tape_mirror(int64_t *count) {
    *count = sizeof mirror / sizeof *mirror;
    return mirror;
}
