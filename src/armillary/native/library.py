"""Builds the C library on the machine it runs on, and loads it through ctypes.

It is compiled once per set of sources, compiler and processor, in a few seconds, into the user's cache
(ARMILLARY_CACHE, else XDG_CACHE_HOME/armillary), for exactly this processor. Set
ARMILLARY_NATIVE=0 to do without.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
SOURCES = tuple(
    FOLDER / name for name in ("kernels.c", "conv.c", "scan.c", "decay.c", "tape.c", "choice.c", "write.c", "pack.c")
)
# Sums may be reordered, which vectorising needs. Not -ffast-math: linking with it would make the whole
# process flush subnormal numbers to zero.
MATHEMATICS = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math")
FLAGS = ("-O3", "-march=native", *MATHEMATICS, "-fopenmp", "-fPIC", "-shared", "-std=gnu11")


def compiler() -> str | None:
    """The C compiler to use: $CC, cc, gcc or clang."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(name.split()[0]):
            return name
    return None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None (said once) when it cannot be built here."""
    if os.environ.get("ARMILLARY_NATIVE") == "0":
        return None
    chosen = compiler()
    if chosen is None:
        warnings.warn("no C compiler found: plain PyTorch runs in place of the native kernels", stacklevel=2)
        return None
    target = _cache() / f"kernels-{_key(chosen)}.so"
    if not target.exists():
        problem = _build(chosen, target)
        if problem is not None:
            warnings.warn(f"the native kernels did not build, plain PyTorch runs instead: {problem}", stacklevel=2)
            return None
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        warnings.warn(f"the native kernels do not load, plain PyTorch runs instead: {error}", stacklevel=2)
        return None


def available() -> bool:
    """Whether the native kernels are there."""
    return library() is not None


_functions: dict[str, Any] = {}


class _Named(ctypes.Structure):
    """mirror_t of mirror.h."""

    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_int64))


Mirror = tuple[str, Mapping[str, int]]  # a function of the library that lists numbers, sizes and offsets; and ours


def members(name: str, structure: type[ctypes.Structure]) -> dict[str, int]:
    """Size of a structure and offsets of its fields, as mirror.h lists those of the C type of that name."""
    offsets = {f"{name}.{field[0]}": getattr(structure, field[0]).offset for field in structure._fields_}
    return {name: ctypes.sizeof(structure), **offsets}


def function(name: str, arguments: Sequence[Any], result: Any = None, mirror: Mirror | None = None) -> Any:
    """A function of the library, which must be there, with the C types of its arguments and of what it returns.

    mirror: what it shares with Python. Raises RuntimeError where that is not what it is in C.
    """
    found = _functions.get(name)
    if found is None:
        loaded = library()
        assert loaded is not None
        if mirror is not None:
            _compare(loaded, *mirror)
        found = _functions[name] = loaded[name]  # one of our own: as an attribute it would be shared, with its types
        found.argtypes, found.restype = arguments, result
    return found


def _compare(loaded: ctypes.CDLL, table: str, ours: Mapping[str, int]) -> None:
    listing = getattr(loaded, table)
    listing.argtypes, listing.restype = [ctypes.POINTER(ctypes.c_int64)], ctypes.POINTER(_Named)
    count = ctypes.c_int64()
    lines = listing(ctypes.byref(count))
    theirs = {lines[line].name.decode(): lines[line].value for line in range(count.value)}
    apart = {
        name: (ours.get(name), theirs.get(name)) for name in [*ours, *theirs] if ours.get(name) != theirs.get(name)
    }
    if apart:
        said = ", ".join(f"{name} is {own} and {other}" for name, (own, other) in apart.items())
        raise RuntimeError(f"Python and {table} of the native library do not agree: {said}")


def _cache() -> Path:
    root = os.environ.get("ARMILLARY_CACHE")
    if root is None:
        root = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "armillary")
    folder = Path(root) / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="armillary-"))
    return folder


def _key(chosen: str) -> str:
    """Changes with the source, the flags, the compiler and the processor's abilities."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in (*SOURCES, *sorted(FOLDER.glob("*.h")))))
    digest.update(" ".join((chosen, *FLAGS, platform.machine(), *_openmp())).encode())
    processor = Path("/proc/cpuinfo")
    if processor.exists():
        lines = processor.read_text(errors="replace").splitlines()
        digest.update(next((line for line in lines if line.startswith(("flags", "Features"))), "").encode())
    return digest.hexdigest()[:16]


def _openmp() -> tuple[str, ...]:
    """Link against the OpenMP runtime that PyTorch brought, so that there is one pool of threads."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return ()
    base = Path(spec.origin).parent
    for folder in (base / "lib", base.parent / "torch.libs"):
        for file in sorted(folder.glob("libgomp*.so*")):
            return (f"-L{folder}", f"-l:{file.name}", f"-Wl,-rpath,{folder}", "-Wl,--as-needed")
    return ()


def _build(chosen: str, target: Path) -> str | None:
    """Compile into place, unless another process has meanwhile; returns what went wrong, or None."""
    with open(target.with_suffix(".lock"), "wb") as lock, tempfile.TemporaryDirectory(dir=target.parent) as folder:
        with contextlib.suppress(OSError):  # without locks each compiles for itself, which only takes longer
            fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return None
        made = Path(folder) / "kernels.so"
        command = [*chosen.split(), *FLAGS, *map(str, SOURCES), "-o", str(made), *_openmp(), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if done.returncode != 0:
            return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
        os.replace(made, target)
    return None
