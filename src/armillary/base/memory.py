"""What a process that runs for weeks sets once, so that the memory it takes and the pauses it makes stay small.

A server computes on many threads: the engine's, and those that prepare texts and compute embeddings. By default what
each of them has once used stays with it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time
from typing import Any

_ARENA_MAX = -8  # glibc's M_ARENA_MAX
_WHOLE = "glibc.malloc.arena_max=1:glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
_NAMES = {"MALLOC_ARENA_MAX", "GLIBC_TUNABLES"}  # by which the environment says of it
EVERY = 60.0  # seconds


def share() -> None:
    """Memory that a thread is done with is there for all. Call it before PyTorch is loaded; what the environment
    says of it already holds."""
    # MKL keeps the buffers of its products, some 10 MB, for every thread that ever made one
    os.environ.setdefault("MKL_DISABLE_FAST_MM", "1")
    # glibc gives each thread a heap of its own, whose free parts no other thread takes
    option = _of_glibc("mallopt")
    if option is not None and not _NAMES & set(os.environ):
        option(_ARENA_MAX, 1)


def begin_whole() -> None:
    """Where the heap would be torn, begin this process anew with one that is not: for a command's first lines. What
    the environment says of it already holds.

    PyTorch's blocks are aligned. Before version 2.38, what glibc leaves before and behind such a block goes into
    stores of small pieces, to the next small thing that is asked for, and that may stay; then the block's place is too
    small for the next one, and the heap grows to several times what is in it. Without those stores (of each thread,
    and of all) the pieces are joined again. Only a process that begins can be told so.
    """
    words = sys.argv[1:]
    own = sys.orig_argv[len(sys.orig_argv) - len(words) :] == words  # not called within another program
    if own and _tears() and not _NAMES & set(os.environ):
        os.environ["GLIBC_TUNABLES"] = _WHOLE
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _tears() -> bool:
    if sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return False
    numbers = (os.confstr("CS_GNU_LIBC_VERSION") or "").removeprefix("glibc ").split(".")
    return all(map(str.isdigit, numbers)) and tuple(map(int, numbers)) < (2, 38)


def settle() -> None:
    """What is loaded by now stays: Python need not look for cycles in it again and again, which takes 0.2 to 0.4 s
    with PyTorch's objects, in which no token comes and no request is heard."""
    gc.collect()
    gc.freeze()


def give_back(every: float = EVERY) -> None:
    """From now on, give the system back what is free in the heap, again and again: between things that stay, glibc
    would hold it for ever, and more of it from hour to hour. With half a gigabyte that takes 10 ms, and 40 where there
    is much to give, in which threads that ask for memory wait."""
    trim = _of_glibc("malloc_trim")
    if trim is None:
        return

    def work() -> None:
        while True:
            time.sleep(every)
            trim(0)

    threading.Thread(target=work, name="armillary-memory", daemon=True).start()


def _of_glibc(name: str) -> Any:
    """A function of the C library, None where it is another one."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
