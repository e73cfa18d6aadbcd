/* What a tape is made of: its records, the call that runs it, and how threads share an operation. */
#ifndef ARMILLARY_RECORD_H
#define ARMILLARY_RECORD_H

#include "mirror.h"
#include "wide.h"

/* What a code does is said where it is done: tape.c's `step` names the function. */
#define CODES(X)                                                                                                   \
    X(EMBED) X(NORM) X(ANGLES) X(QUANTISE) X(PRODUCT) X(HEAD_NORM) X(ROTATE) X(APPEND) X(ATTEND) X(ACTIVATE)       \
    X(ADD) X(COPY) X(CAP) X(RETAIN) X(CLIP) X(PICK) X(CONVOLVE) X(GATES) X(MAP) X(MATRIX) X(SELECT) X(CUT) X(TAKE) \
    X(CELL) X(SCALED) X(ROUTE) X(EXPERTS_IN) X(EXPERTS_OUT) X(ADD_GATED) X(FEATURES) X(STICK) X(APPEND_INT8)       \
    X(ATTEND_INT8) X(SWAP)
enum code { CODES(LISTED) };
enum { GROUP = 32 }; /* numbers of int4 that share a scale */

/* in, out: float buffers [rows, .] unless said otherwise, each moved on by its stride for every thread that has its
 * own; wait: a barrier comes first; picked: only the rows of which scores are asked for. */
typedef struct {
    int32_t code, kind, wait, picked;
    int64_t in_stride, out_stride;
    void *in, *out, *more, *weight, *bias, *rest;
    int64_t n[6];
    float f[4];
} op_t;

typedef struct {
    int64_t rows, picks, scratch;                      /* scratch: floats that a thread needs for itself, */
    float *room;                                       /* which it finds here */
    const int64_t *ids, *slots, *places, *picked;      /* of each row: token, row of the states, position */
} call_t;

typedef struct {
    int64_t first, stop;
} range_t;

INLINE range_t share_of(int64_t count, int thread, int threads) {
    range_t r = {count * thread / threads, count * (thread + 1) / threads};
    return r;
}

#endif
