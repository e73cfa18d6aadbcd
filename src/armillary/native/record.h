/* What a tape is made of: its records, the call that runs it, and how threads share an operation. */
#ifndef ARMILLARY_RECORD_H
#define ARMILLARY_RECORD_H

#include "wide.h"

enum code { EMBED, NORM, ANGLES, QUANTISE, PRODUCT, HEAD_NORM, ROTATE, APPEND, ATTEND, ACTIVATE, ADD, COPY, CAP, RETAIN, CLIP, PICK,
            CONVOLVE, GATES, MAP, MATRIX, SELECT, CUT, TAKE, CELL, SCALED,
            ROUTE, EXPERTS_IN, EXPERTS_OUT, ADD_GATED, FEATURES, STICK, APPEND_INT8, ATTEND_INT8, SWAP };
enum { GROUP = 32 }; /* numbers of int4 that share a scale */

/* What a code does is said where it is done: tape.c's `step` names the function. in, out: float buffers [rows, .] unless said otherwise, each moved on by its stride for every thread
 * that has its own; wait: a barrier comes first; picked: only the rows of which scores are asked for. */
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
