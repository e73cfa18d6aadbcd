"""What a process that runs for weeks sets once, so that the memory it takes and the pauses it makes stay small.

A server computes on many threads: the engine's, and those that prepare texts and compute embeddings. By default what
each of them has once used stays with it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys

_ARENA_MAX = -8  # glibc's M_ARENA_MAX


def share() -> None:
    """Memory that a thread is done with is there for all. Call it before PyTorch is loaded; what the environment
    says of it already holds."""
    # MKL keeps the buffers of its products, some 10 MB, for every thread that ever made one
    os.environ.setdefault("MKL_DISABLE_FAST_MM", "1")
    # glibc gives each thread a heap of its own, whose free parts no other thread takes
    if sys.platform == "linux" and not {"MALLOC_ARENA_MAX", "GLIBC_TUNABLES"} & set(os.environ):
        option = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have neither
        if option is not None:
            option(_ARENA_MAX, 1)


def settle() -> None:
    """What is loaded by now stays: Python need not look for cycles in it again and again, which takes 0.2 to 0.4 s
    with PyTorch's objects, in which no token comes and no request is heard."""
    gc.collect()
    gc.freeze()
