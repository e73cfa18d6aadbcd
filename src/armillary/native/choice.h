/* The choice of the next token of each row: what is asked for, and what comes of it. */
#ifndef ARMILLARY_CHOICE_H
#define ARMILLARY_CHOICE_H

#include <stdint.h>

enum { TOP = 20 }; /* alternatives, at the most */
enum { FINE, NOT_FINITE, NOTHING_LEFT };
enum { LEAVE, FORBID, FORBID_UNLESS_ALL, ADD_TO };

/* Row of native/choice.py. scores: what is drawn from in place of the row's logits, or NULL; temperature 0: the
 * likeliest; top_k 0, top_p 1, least -inf: no filter. least: log(min_p); bits: one for each of the first `tokens`
 * tokens, set where it is allowed (those behind are not), or NULL. Changes to the scores come in this order: what is not
 * allowed, bias, repetition of what was seen, presence and frequency of what was generated, ends. */
typedef struct {
    const float *scores;
    const uint32_t *bits;
    double top_p;
    float temperature, least, repetition, presence, frequency, end_amount;
    int32_t end_rule, tops;
    int64_t tokens, top_k, biased, seen, counted, ends;
    const int64_t *biased_ids, *seen_ids, *counted_ids, *end_ids;
    const float *biases, *counts;
    int32_t top_ids[TOP];
    float top_logprobs[TOP];
} row_t;

/* Of one row: small whole numbers are exact. */
typedef struct {
    double problem, token, logprob;
} found_t;

/* A token for each of the rows: row i is that at places[i] of scores of `width` each, float32 or bf16, `step` bytes
 * apart. Returns 0, or 1 when there is no memory. */
int32_t choose_rows(row_t *const *rows, const int64_t *places, const double *draws, found_t *found, int64_t count,
                    const char *logits, int64_t step, int64_t width, int32_t bf16, int32_t threads);

#endif
