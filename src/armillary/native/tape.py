"""The tape of native calls: its records as they lie in memory, weights as it takes them, and its run.

Records and calls are those of record.h; what each does, tape.c and the headers beside it say. Which records a network
needs is its modules' business (nn/tape.py).
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Sequence
from contextlib import suppress
from ctypes import POINTER, Structure, addressof, byref, c_double, c_float, c_int32, c_int64, c_void_p, sizeof
from enum import IntEnum
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from armillary.native.choice import Found, Row, Rows
from armillary.native.library import function, library, members
from armillary.native.pack import GROUP, KINDS, Kind, pack_int4, pack_int8, unpack_int4, unpack_int8

Weights = Literal["float32", "bf16", "float16", "int8", "int4"]
FLOATS: dict[Weights, torch.dtype] = {"float32": torch.float32, "bf16": torch.bfloat16, "float16": torch.float16}
BLOCK = 16  # columns of a product that lie together
TILE = 16  # lines of a tile
STEP = 64  # bytes of a row that products with int8, int4 and, in tiles, bf16 take at once


class Code(IntEnum):
    """What a record does; as in record.h."""

    EMBED = 0
    NORM = 1
    ANGLES = 2
    QUANTISE = 3
    PRODUCT = 4
    HEAD_NORM = 5
    ROTATE = 6
    APPEND = 7
    ATTEND = 8
    ACTIVATE = 9
    ADD = 10
    COPY = 11
    CAP = 12
    RETAIN = 13
    CLIP = 14
    PICK = 15
    CONVOLVE = 16
    GATES = 17
    MAP = 18
    MATRIX = 19
    SELECT = 20
    CUT = 21
    TAKE = 22
    CELL = 23
    SCALED = 24
    ROUTE = 25
    EXPERTS_IN = 26
    EXPERTS_OUT = 27
    ADD_GATED = 28
    FEATURES = 29
    STICK = 30
    APPEND_INT8 = 31
    ATTEND_INT8 = 32
    SWAP = 33


ACTIVATIONS = {"relu": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}
CELLS = {"rnn_tanh": 0, "rnn_relu": 1, "lstm": 2, "gru": 3}


class Fading(IntEnum):
    """How a matrix fades."""

    STILL = 0
    BY_HEAD = 1
    BY_KEY = 2


class Features(IntEnum):
    """Of queries and keys."""

    RELU = 0
    EXP = 1
    UNIT = 2


class Map(IntEnum):
    """Functions of one number."""

    FADE = 0
    ELU_ONE = 1


class Record(Structure):
    """op_t of record.h."""

    _fields_ = (
        ("code", c_int32),
        ("kind", c_int32),
        ("wait", c_int32),
        ("picked", c_int32),
        ("in_stride", c_int64),
        ("out_stride", c_int64),
        ("in", c_void_p),
        ("out", c_void_p),
        ("more", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("rest", c_void_p),
        ("n", c_int64 * 6),
        ("f", c_float * 4),
    )


class Call(Structure):
    """call_t of record.h."""

    _fields_ = (
        ("rows", c_int64),
        ("picks", c_int64),
        ("scratch", c_int64),
        ("room", c_void_p),
        ("ids", c_void_p),
        ("slots", c_void_p),
        ("places", c_void_p),
        ("picked", c_void_p),
    )


# What the library lists, by its names.
_MIRROR = (
    "tape_mirror",
    {
        **Code.__members__,
        **Kind.__members__,
        **Fading.__members__,
        **Map.__members__,
        **{f"{each.name}_FEATURES": each for each in Features},
        **{name.upper(): number for name, number in (ACTIVATIONS | CELLS).items()},
        **{"GROUP": GROUP, "BLOCK": BLOCK, "TILE": TILE, "STEP": STEP},
        **members("op_t", Record),
        **members("call_t", Call),
    },
)
_WRITE = [
    *(c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64, POINTER(Row), POINTER(c_double), c_int64),
    *(c_double, c_double, c_double, POINTER(c_int64), POINTER(c_double)),
]
_WRITE_TOGETHER = [
    *(c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64),
    *(c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_double, c_void_p, c_int64),
]


class Ahead(NamedTuple):
    """How many tokens of each row are made in one call: as many as `draws` [steps, rows] has lines, or fewer where one
    ends, `seconds` have passed, or halt, a number that others may write meanwhile, is not 0."""

    draws: array[float]
    seconds: float
    halt: array[int]


class Program:
    """Records in one piece of memory, run by one call."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = (Record * len(records))(*records)
        self._given = addressof(self.records), len(records)
        self._run = function("tape_run", [c_void_p, c_int64, c_void_p, c_int64], None, _MIRROR)

    def run(self, call: int, threads: int) -> None:
        """call: where a `Call` lies."""
        self._run(*self._given, call, threads)

    def go_on(
        self,
        call: int,
        threads: int,
        scores: tuple[int, int],
        row: Row,
        draws: Sequence[float],
        bounds: tuple[float, float, float],
    ) -> tuple[list[int], list[float]]:
        """Tokens, one for each draw or fewer, each by the scores of the run before it, and their probabilities
        (write.c). scores: where they come to stand, and how many are chosen from; bounds: sure, least, power."""
        run = function("tape_write", _WRITE, c_int64)
        most = len(draws)
        found, sure, given = (c_int64 * most)(), (c_double * most)(), (c_double * most)(*draws)
        made = run(
            *(*self._given, call, threads, *scores, byref(row), given, most),
            *(*bounds, found, sure),
        )
        if made < 0:
            raise MemoryError("no memory for the choice of tokens")
        return found[:made], sure[:made]

    def go_on_together(
        self,
        call: int,
        threads: int,
        scores: tuple[int, int],
        rows: Rows,
        ahead: Ahead,
    ) -> list[float]:
        """A token of each row again and again (write.c): what `Rows.choose` gives, step by step."""
        run = function("tape_write_together", _WRITE_TOGETHER, c_int64)
        count, draws = len(rows.rows), ahead.draws
        found = array("d", bytes(sizeof(Found) * len(draws)))
        made = run(
            *(*self._given, call, threads, *scores, *rows.given),
            *(draws.buffer_info()[0], found.buffer_info()[0], len(draws) // count),
            *(ahead.seconds, ahead.halt.buffer_info()[0], rows.threads(scores[1])),
        )
        if made < 0:
            raise MemoryError("no memory for the choice of tokens")
        return found[: made * count * len(Found._fields_)].tolist()

    def run_in_turn(self, call: int, threads: int, back: bool) -> None:
        """As `run`, one thread after another between any two barriers: forgotten ones show without fail."""
        run = function("tape_run_in_turn", [c_void_p, c_int64, c_void_p, c_int64, c_int64])
        run(*self._given, call, threads, int(back))


def attend_floats(width: int) -> int:
    """Floats that a thread needs for itself to attend with heads of such a width, whichever way it goes."""
    return int(function("tape_attend_floats", [c_int64], c_int64)(width))


def tiles() -> bool:
    """Whether products may go through the processor's tiles (AMX): it has them, and the system lets us."""
    return bool(function("tape_tiles", [], c_int32)())


def alone() -> None:
    """The calling thread lets go of the threads that have worked for it, until it needs any again.

    OpenMP's threads wait for a moment before they sleep, which between the operations of a step is all that they ever
    wait. GNU's do not where there are more of them than processors, and it counts those of each thread that ever
    computed: a step on a thread of its own took 2.1 ms in place of 1.4 where the thread that had loaded the model kept
    its own.
    """
    if library() is not None:
        function("tape_alone", [], c_int32)()


def prepared_bytes(width: int, kind: Kind) -> int:
    """Most bytes of one row as products with such weights take it (prepared.h)."""
    if kind == Kind.BF16:
        return 4 * (-(-width // (STEP // 2)) * (STEP // 2))
    steps = -(-width // STEP)
    return steps * STEP + (4 * steps * STEP // GROUP if kind == Kind.INT4 else 0) + 4


class Memory:
    """Memory for weights in large pieces, each of them in large pages where the system has any: reading on
    through memory is then a third quicker. A piece is given back when nothing in it is used any more."""

    PIECE = 1 << 26

    def __init__(self) -> None:
        self._piece = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """[size] bytes, on a line of the cache."""
        whole = -(-size // 64) * 64
        if whole > len(self._piece):
            self._piece = self._large(max(self.PIECE, whole))
        taken, self._piece = self._piece[:size], self._piece[whole:]
        return taken

    @staticmethod
    def _large(size: int) -> Tensor:
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(size, dtype=torch.uint8)
        piece = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a system that was built without them
            piece.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(piece, dtype=torch.uint8)


def lay_out(weight: Tensor, kind: Kind, memory: Memory) -> tuple[Tensor, ...]:
    """W [N, K] as products hold it (products.h), a copy: its numbers, and in int8 [2, N up to whole blocks] the
    scales and what takes back that numbers of rows are moved up."""
    if kind == Kind.INT8:
        numbers, scales = pack_int8(weight)
        beside = torch.zeros(2, -(-len(scales) // BLOCK) * BLOCK)
        beside[0, : len(scales)] = scales
        beside[1, : len(scales)] = (-128 * numbers.sum(1, dtype=torch.int32)).view(torch.float32)
        return _blocks(numbers, memory), beside
    if kind == Kind.INT4:
        return (_blocks_int4(pack_int4(weight), memory),)
    dtype = next(dtype for dtype, known in KINDS.items() if known == kind)
    return (_blocks(weight.detach().to(dtype), memory),)


def _blocks(numbers: Tensor, memory: Memory) -> Tensor:
    """[N, K] → [blocks, words, 16 columns, numbers of a word]: words of 32 bits, in fp16 of 16; all but float32 up to
    whole steps."""
    word = torch.int16 if numbers.dtype == torch.float16 else torch.int32
    each = word.itemsize // numbers.element_size()
    step = 1 if numbers.dtype == torch.float32 else STEP // numbers.element_size()
    rows, width = numbers.shape
    blocks, words = -(-rows // BLOCK), -(-width // step) * step // each
    out = memory.take(BLOCK * word.itemsize * blocks * words).view(word).view(blocks, words, BLOCK)
    if width % step:
        numbers = torch.nn.functional.pad(numbers, (0, -width % step))
    flat = numbers.contiguous().view(word).view(rows, words)
    whole = rows // BLOCK
    out[:whole].copy_(flat[: whole * BLOCK].view(whole, BLOCK, words).transpose(1, 2))
    if whole < blocks:
        out[whole].zero_()
        out[whole, :, : rows % BLOCK] = flat[whole * BLOCK :].T
    return out.view(numbers.dtype).view(blocks, words, BLOCK, each)


def _blocks_int4(packed: Tensor, memory: Memory) -> Tensor:
    """[N, groups, 18] → [blocks, pairs of groups, 9 lines of 64 bytes]."""
    rows, groups = packed.shape[:2]
    blocks, pairs = -(-rows // BLOCK), -(-groups // 2)
    packed = torch.nn.functional.pad(packed, (0, 0, 0, -groups % 2, 0, -rows % BLOCK))
    out = memory.take(blocks * pairs * 9 * 64).view(blocks, pairs, 9 * 64)
    apart = packed.view(blocks, BLOCK, pairs, 2, 2 + GROUP // 2)
    scales, halves = apart[..., :2].permute(0, 2, 3, 1, 4), apart[..., 2:].unflatten(-1, (-1, 4))
    out[..., :64].view(blocks, pairs, 2, BLOCK, 2).copy_(scales)
    out[..., 64:].view(blocks, pairs, 2, GROUP // 8, BLOCK, 4).copy_(halves.permute(0, 2, 3, 4, 1, 5))
    return out


def as_held(weight: Tensor, weights: Weights) -> Tensor:
    """W [N, K] float64, exactly as products take it when they hold it so."""
    if weights == "int8":
        return unpack_int8(pack_int8(weight), weight.shape[1])
    if weights == "int4":
        return unpack_int4(pack_int4(weight), weight.shape[1])
    return weight.detach().to(FLOATS[weights]).double()
