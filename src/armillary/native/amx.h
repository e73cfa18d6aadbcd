/* The processor's tiles (AMX): whether this process may use them, and how a thread's are set up. */
#ifndef ARMILLARY_AMX_H
#define ARMILLARY_AMX_H

#include "wide.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
#define AMX 1
#include <sys/syscall.h>
#include <unistd.h>

/* A system may refuse. */
static int tiles_allowed(void) {
    static int allowed = -1;
    if (allowed < 0) allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return allowed;
}

/* Of each of eight tiles: bytes of a line, and lines. */
typedef struct {
    uint8_t palette, start, none[14];
    uint16_t bytes[16];
    uint8_t lines[16];
} setup_t;

/* The compiler's own tile operations do not tell it that they read and write memory. */
#define IN_MEMORY __asm__ volatile("" ::: "memory")

INLINE void set_up(const setup_t *how) {
    __asm__ volatile("" ::"r"(how) : "memory"); /* the compiler takes only its first bytes for read */
    _tile_loadconfig(how);
}
#else
#define AMX 0
#endif

#endif
