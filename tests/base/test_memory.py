"""Memory and pauses of a process that serves: what one thread gives back others take, and what was loaded is not looked
through again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from armillary.base.memory import _tears, begin_whole

HEAPS = """
import ctypes, os, sys, tempfile, threading
from armillary.base.memory import share
if "share" in sys.argv:
    share()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def take():
    libc.malloc(100_000)
    together.wait()
together = threading.Barrier(4)
threads = [threading.Thread(target=take) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc.fopen.restype = ctypes.c_void_p
with tempfile.NamedTemporaryFile() as place:  # glibc's own account of its heaps
    file = ctypes.c_void_p(libc.fopen(place.name.encode(), b"w"))
    libc.malloc_info(0, file)
    libc.fclose(file)
    print(open(place.name).read().count("<heap nr="))
print(os.environ.get("MKL_DISABLE_FAST_MM"))
"""

TORN = """
import ctypes, os, random, sys
from armillary.base.memory import begin_whole
if "whole" in sys.argv: begin_whole()
class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c mapped d e used free top".split()]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Heap
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.posix_memalign.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
libc.mallopt(-3, 2**25)  # as it is after a block of that size: smaller ones come out of the heap
libc.mallopt(-1, 2**30)
draw, large, small, place = random.Random(1), [None] * 40, [None] * 20000, ctypes.c_void_p()
before = libc.mallinfo2().arena
for _ in range(15000):
    one = draw.randrange(40)
    libc.free(large[one])
    libc.posix_memalign(ctypes.byref(place), 64, 64 * draw.randrange(1000, 9000))
    large[one] = place.value
    for _ in range(4):
        one = draw.randrange(20000)
        libc.free(small[one])
        small[one] = libc.malloc(draw.randrange(24, 124) if draw.random() < 0.875 else draw.randrange(1000, 4000))
print(round((libc.mallinfo2().arena - before) / 2**20), os.environ.get("GLIBC_TUNABLES"), *sys.argv[1:])
"""

FROZEN = """
import gc, weakref
from armillary.base.memory import settle
loaded = [[] for _ in range(1000)]
settle()
assert gc.get_freeze_count() > 1000
assert not any(one is loaded for one in gc.get_objects())  # what Python looks through
class Node: pass
one = Node(); one.itself = one; seen = weakref.ref(one)
del one
gc.collect()
assert seen() is None  # what comes later is looked through as before
"""

BACK = """
import ctypes, sys, time
from armillary.base.memory import give_back
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [libc.malloc(50_000) for _ in range(2000)]
for block in blocks: ctypes.memset(ctypes.c_void_p(block), 1, 50_000)
for place, block in enumerate(blocks):
    if place % 20: libc.free(block)  # what stays stands between what is free
before = resident()
if "give" in sys.argv: give_back(0.05)
time.sleep(0.5)
print(round(before - resident()))
"""


def said(source: str, *words: str, **more: str) -> list[str]:
    around = {name: value for name, value in os.environ.items() if name not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")}
    done = subprocess.run(
        [sys.executable, "-c", source, *words], env=around | more, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heaps")
def test_threads_share_one_heap() -> None:
    if "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        pytest.skip("another C library")
    apart, _ = said(HEAPS)
    assert int(apart) > 1  # the control: left as they are, threads have heaps of their own
    assert said(HEAPS, "share") == ["1", "1"]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heaps")
def test_what_the_environment_says_holds() -> None:
    heaps, fast = said(HEAPS, "share", MALLOC_ARENA_MAX="3", MKL_DISABLE_FAST_MM="0")
    assert int(heaps) > 1
    assert fast == "0"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heaps")
def test_what_is_free_between_what_stays_is_given_back() -> None:
    assert int(said(BACK)[0]) < 10  # the control, in MiB: of itself it stays
    assert int(said(BACK, "give")[0]) > 60  # of 95 MB that are free


@pytest.mark.skipif(not _tears(), reason="a C library that does not tear its heap")
def test_the_heap_is_not_torn() -> None:
    torn, *_ = said(TORN, "and", "more")
    whole, given, *words = said(TORN, "whole", "and", "more")
    assert words == ["whole", "and", "more"]  # it began anew as it was begun
    assert "arena_max=1" in given  # what `share` would have done
    assert int(whole) < 0.6 * int(torn)
    _, kept, *_ = said(TORN, "whole", GLIBC_TUNABLES="glibc.malloc.arena_max=2")
    assert kept == "glibc.malloc.arena_max=2"


@pytest.mark.skipif(not _tears(), reason="a C library that does not tear its heap")
def test_only_a_command_of_its_own_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    begun = list[list[str]]()
    monkeypatch.setattr(os, "execv", lambda _, words: begun.append(words[1:]))
    monkeypatch.setattr(sys, "argv", ["armillary", "serve", "m"])
    begin_whole()  # within this test's process
    assert not begun
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "armillary", "serve", "m"])
    begin_whole()
    assert begun == [["-m", "armillary", "serve", "m"]]


def test_what_is_loaded_is_not_looked_through_again() -> None:
    said(FROZEN)
