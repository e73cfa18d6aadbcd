/* Sequences write on: steps of a tape, each with the tokens that were chosen by the scores of the one before. */
#include "choice.h"
#include "record.h"

#include <time.h>

void tape_run(const op_t *ops, int64_t count, const call_t *call, int64_t threads);

/* A draft. call: tokens of one sequence, whose last one's scores are asked for, with room for one in each of its arrays, which
 * are written; scores [width]; draws: uniform in [0, 1), one for each of `most` tokens; sure, least: of the next token's
 * probability and of the power of the product of all, below which it stops. Returns how many tokens were chosen, with
 * their probabilities; all of them but the last of `most` have been read. -1: there is no memory. */
int64_t tape_write(const op_t *ops, int64_t count, call_t *call, int64_t threads, const float *scores, int64_t width,
                   row_t *row, const double *draws, int64_t most, double sure, double least, double power,
                   int64_t *written, double *probabilities) {
    int64_t made = 0, *ids = (int64_t *)call->ids, *places = (int64_t *)call->places;
    const int64_t first = 0;
    double chance = 1.0;
    for (;;) {
        found_t found;
        tape_run(ops, count, call, threads);
        if (choose_rows(&row, &first, draws + made, &found, 1, (const char *)scores, 0, width, 0, 1)) return -1;
        double probability = exp(found.logprob);
        chance *= probability;
        if (found.problem != FINE || probability < sure || pow(chance, power) < least) break;
        probabilities[made] = probability;
        written[made++] = (int64_t)found.token;
        if (made == most) break;
        places[0] = places[call->rows - 1] + 1;
        ids[0] = written[made - 1];
        ((int64_t *)call->picked)[0] = 0;
        call->rows = 1;
    }
    return made;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int ends(const row_t *row, int64_t token) {
    for (int64_t i = 0; i < row->ends; i++)
        if (row->end_ids[i] == token) return 1;
    return 0;
}

/* Answers. call: a token of each of `call->rows` sequences, in arrays that are written; scores [rows, width]; draws and
 * found [most, rows]: those of a step side by side. The last step is the one in which a sequence ends or has a problem,
 * or after which `seconds` have passed or `halt` is set; choosing: threads that choose. Returns how many steps were
 * made; the tokens chosen in the last one have not been read. -1: there is no memory. */
int64_t tape_write_together(const op_t *ops, int64_t count, call_t *call, int64_t threads, const float *scores,
                            int64_t width, row_t *const *rows, const int64_t *places, const double *draws,
                            found_t *found, int64_t most, double seconds, const volatile int64_t *halt,
                            int64_t choosing) {
    const double begun = now();
    int64_t *ids = (int64_t *)call->ids, *at = (int64_t *)call->places, made = 0;
    for (int over = 0; !over && made < most; made++) {
        const found_t *new = found;
        tape_run(ops, count, call, threads);
        if (choose_rows(rows, places, draws, found, call->rows, (const char *)scores, sizeof(float) * width, width, 0,
                        (int32_t)choosing))
            return -1;
        for (int64_t r = 0; r < call->rows; r++) {
            ids[r] = (int64_t)new[r].token;
            at[r]++;
            over |= new[r].problem != FINE || ends(rows[r], ids[r]);
        }
        over |= *halt || now() - begun >= seconds;
        draws += call->rows;
        found += call->rows;
    }
    return made;
}
