"""The memory of a tape: buffers that its operations share, and who touches what between two barriers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from armillary.native.tape import line_bytes

WHOLE = 0  # the part of a buffer that an operation touches: all of it, whoever wrote what
ROWS = -1  # or the rows that fall to a thread; above 0: the thread's share of so many units
Use = tuple["Buffer | int", int]  # a buffer, or where a state lies, and the part of it


@dataclass(eq=False)
class Buffer:
    """[rows, width] float32; own: one for every thread, each of which holds all of it."""

    tensor: Tensor
    width: int
    own: bool
    lines: Buffer | None = None  # the same rows in int8

    @property
    def at(self) -> int:
        return self.tensor.data_ptr()

    @property
    def stride(self) -> int:
        return self.tensor.stride(0) * self.tensor.element_size() if self.own else 0


class Buffers:
    """rows: of every buffer; threads: how many own ones there are."""

    def __init__(self, rows: int, threads: int) -> None:
        self.rows, self.threads = rows, threads
        self.touched: dict[int, set[tuple[int, bool]]] = {}
        self._kept: list[Tensor] = []  # what records point at
        self._free: dict[tuple[int, bool, torch.dtype], list[Tensor]] = {}
        self._lent: list[Buffer] = []
        self._lined: list[Buffer] = []

    def buffer(self, width: int, *, own: bool = False, lines: bool = False) -> Buffer:
        """Room for a value; it goes back when the branch that asked for it is written down."""
        bytes_ = line_bytes(width) if lines else 4 * width
        dtype = torch.int8 if lines else torch.float32
        free = self._free.get((bytes_, own, dtype))
        if free:
            tensor = free.pop()
        else:
            # a line of the cache more, so that threads share none
            size = self.rows * bytes_ // dtype.itemsize + 64 // dtype.itemsize
            tensor = torch.zeros(self.threads if own else 1, size, dtype=dtype)
        made = Buffer(tensor, width, own)
        self._lent.append(made)
        return made

    def scratched(self) -> int:
        """Where `release` goes back to."""
        return len(self._lent)

    def release(self, mark: int) -> None:
        """Let the buffers asked for since then be used again."""
        for buffer in self._lent[mark:]:
            tensor = buffer.tensor
            bytes_ = (tensor.shape[1] - 64 // tensor.element_size()) * tensor.element_size() // self.rows
            self._free.setdefault((bytes_, buffer.own, tensor.dtype), []).append(tensor)
        del self._lent[mark:]
        for buffer in self._lined:
            buffer.lines = None
        self._lined.clear()

    def keep(self, tensor: Tensor) -> int:
        """Where a tensor lies that records point at."""
        self._kept.append(tensor)
        return tensor.data_ptr()

    def vector(self, tensor: Tensor | None) -> int:
        """A gain, a bias: float32."""
        if tensor is None:
            return 0
        return self.keep(tensor.detach().float().contiguous())

    def lined(self, x: Buffer) -> tuple[Buffer, bool]:
        """Room for x in int8, and whether it is filled."""
        if x.lines is not None:
            return x.lines, True
        x.lines = self.buffer(x.width, own=True, lines=True)
        self._lined.append(x)
        return x.lines, False

    def touch(self, reads: Sequence[tuple[Buffer | int, int]], writes: Sequence[tuple[Buffer | int, int]]) -> bool:
        """Whether what other threads do to the same memory has to be over first."""
        uses = [(what, part, False) for what, part in reads] + [(what, part, True) for what, part in writes]
        shared = [
            (what if isinstance(what, int) else what.at, part, write)
            for what, part, write in uses
            if isinstance(what, int) or not what.own
        ]
        waits = any(
            (write or wrote) and (part != other or part == WHOLE)
            for place, part, write in shared
            for other, wrote in self.touched.get(place, ())
        )
        if waits:
            self.touched.clear()
        for place, part, write in shared:
            self.touched.setdefault(place, set()).add((part, write))
        return waits
