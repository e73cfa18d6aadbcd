/* What Python has a second time (native/tape.py, native/choice.py): lists by which it sees, when the library is loaded,
 * that both are alike. */
#ifndef ARMILLARY_MIRROR_H
#define ARMILLARY_MIRROR_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    const char *name; /* of a number, a type or, behind a dot, a member of it */
    int64_t value;    /* its value, size or offset */
} mirror_t;

#define LISTED(NAME) NAME,
#define NUMBER(NAME) {#NAME, NAME},
#define SIZE(TYPE) {#TYPE, sizeof(TYPE)},
#define MEMBER(TYPE, NAME) {#TYPE "." #NAME, offsetof(TYPE, NAME)},

#endif
