"""The tape of native calls: its records as they lie in memory, weights as it takes them, and its run.

Records and calls are those of record.h; what each does, tape.c and the headers beside it say. Which records a network
needs is its modules' business (nn/tape.py).
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from ctypes import Structure, addressof, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum
from typing import Literal

import torch
from torch import Tensor

from armillary.native.library import function

Weights = Literal["float32", "bf16", "int8", "int4"]
GROUP = 32  # numbers of int4 that share a scale
BLOCK = 16  # columns of a product that lie together
TILE = 16  # lines of a tile
STEP = 64  # bytes of a row that products with int8, int4 and, in tiles, bf16 take at once


class Code(IntEnum):
    """What a record does; the order is that of record.h."""

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


class Kind(IntEnum):
    """In what numbers are kept; the order is that of record.h."""

    F32 = 0
    BF16 = 1
    INT8 = 2
    INT4 = 3
    INT64 = 4


KINDS = {torch.float32: Kind.F32, torch.bfloat16: Kind.BF16}  # of numbers that operations read and write
ACTIVATIONS = {"relu": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}


class Record(Structure):
    """op_t of record.h."""

    _fields_ = (
        ("code", c_int32),
        ("kind", c_int32),
        ("wait", c_int32),
        ("picked", c_int32),
        ("in_stride", c_int64),
        ("out_stride", c_int64),
        ("into", c_void_p),
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


class Program:
    """Records in one piece of memory, run by one call."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = (Record * len(records))(*records)
        self._given = addressof(self.records), len(records)
        self._run = function("tape_run", [c_void_p, c_int64, c_void_p, c_int64])

    def run(self, call: int, threads: int) -> None:
        """call: where a `Call` lies."""
        self._run(*self._given, call, threads)

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
    return (_blocks(weight.detach().to(torch.float32 if kind == Kind.F32 else torch.bfloat16), memory),)


def _blocks(numbers: Tensor, memory: Memory) -> Tensor:
    """[N, K] → [blocks, words, 16 columns, numbers of a word of 32 bits]; bf16 and int8 up to whole steps."""
    each = 4 // numbers.element_size()
    step = 1 if each == 1 else STEP // numbers.element_size()
    rows, width = numbers.shape
    blocks, words = -(-rows // BLOCK), -(-width // step) * step // each
    out = memory.take(64 * blocks * words).view(torch.int32).view(blocks, words, BLOCK)
    if width % step:
        numbers = torch.nn.functional.pad(numbers, (0, -width % step))
    flat = numbers.contiguous().view(torch.int32).view(rows, words)
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


def pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W [N, K] → numbers [N, K up to whole groups] int8 and scales [N]: W ≈ numbers · scale, each within
    half a scale, which is the row's largest size / 127."""
    wide = weight.detach().float()
    scales = wide.abs().amax(1) / 127
    numbers = (wide / scales.clamp(min=1e-30)[:, None]).round().clamp(-127, 127).to(torch.int8)
    return torch.nn.functional.pad(numbers, (0, -wide.shape[1] % GROUP)).contiguous(), scales


def unpack_int8(packed: tuple[Tensor, Tensor], width: int) -> Tensor:
    """W [N, K] float64, exactly as the product takes it."""
    numbers, scales = packed
    return numbers[:, :width].double() * scales.double()[:, None]


def pack_int4(weight: Tensor) -> Tensor:
    """W [N, K] → [N, groups, 18] bytes: a bf16 scale, then numbers −8 … 7, i in the low and i + 16 in the
    high half of byte i. The scale takes the number of largest size to −8, so that all 16 are used."""
    wide = torch.nn.functional.pad(weight.detach().float(), (0, -weight.shape[1] % GROUP))
    groups = wide.unflatten(1, (-1, GROUP))
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    scales = (largest / -8).to(torch.bfloat16)
    divisors = torch.where(scales == 0, torch.ones_like(scales), scales).float()
    numbers = (groups / divisors).round().clamp(-8, 7).to(torch.int16) + 8
    halves = (numbers[..., : GROUP // 2] | (numbers[..., GROUP // 2 :] << 4)).to(torch.uint8)
    return torch.cat([scales.contiguous().view(torch.uint8), halves], 2).contiguous()


def unpack_int4(packed: Tensor, width: int) -> Tensor:
    """W [N, K] float64, exactly as the product takes it."""
    scales = packed[..., :2].contiguous().view(torch.bfloat16).double()
    halves = packed[..., 2:].to(torch.int16)
    numbers = torch.cat([halves & 15, halves >> 4], 2).double() - 8
    return (numbers * scales).flatten(1)[:, :width]
