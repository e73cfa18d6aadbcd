/* A draft writes on: steps of a tape, each with the token that was chosen by the scores of the one before. */
#include "choice.h"
#include "record.h"

void tape_run(const op_t *ops, int64_t count, const call_t *call, int64_t threads);

/* call: tokens of one sequence, whose last one's scores are asked for, with room for one in each of its arrays, which
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
