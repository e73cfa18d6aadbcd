"""The memory of a tape: buffers that its operations share, and who touches what between two barriers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from armillary.native.pack import Kind
from armillary.native.tape import TILE, prepared_bytes

WHOLE = 0  # the part of a buffer that an operation touches: all of it, whoever wrote what
ROWS = -1  # or the rows that fall to a thread; above 0: the thread's share of so many units
Use = tuple["Buffer | int", int]  # a buffer, or where a state lies, and the part of it


@dataclass(eq=False)
class Buffer:
    """[rows, width] float32; own: one for every thread, each of which holds all of it."""

    tensor: Tensor
    width: int
    own: bool
    prepared: dict[Kind, Buffer] = field(default_factory=dict)  # the same rows as products with such weights take them

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
        self._prepared: list[Buffer] = []

    def buffer(self, width: int, *, own: bool = False, kind: Kind = Kind.F32) -> Buffer:
        """Room for a value; it goes back when the branch that asked for it is written down. kind: other than
        F32 for rows that are prepared for products with such weights."""
        if kind == Kind.F32:
            dtype, size = torch.float32, self.rows * width
        else:
            dtype, size = torch.int8, -(-self.rows // TILE) * TILE * prepared_bytes(width, kind)
        # up to whole lines of the cache and one more, so that threads share none
        line = 64 // dtype.itemsize
        size = (-(-size // line) + 1) * line
        free = self._free.get((size, own, dtype))
        tensor = free.pop() if free else torch.zeros(self.threads if own else 1, size, dtype=dtype)
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
            self._free.setdefault((tensor.shape[1], buffer.own, tensor.dtype), []).append(tensor)
        del self._lent[mark:]
        for buffer in self._prepared:
            buffer.prepared.clear()
        self._prepared.clear()

    def keep(self, tensor: Tensor) -> int:
        """Where a tensor lies that records point at."""
        self._kept.append(tensor)
        return tensor.data_ptr()

    def vector(self, tensor: Tensor | None) -> int:
        """A gain, a bias: float32."""
        if tensor is None:
            return 0
        return self.keep(tensor.detach().float().contiguous())

    def prepared(self, x: Buffer, kind: Kind) -> tuple[Buffer, bool]:
        """Room for x as products with such weights take it, and whether it is filled."""
        if kind in x.prepared:
            return x.prepared[kind], True
        x.prepared[kind] = self.buffer(x.width, own=True, kind=kind)
        self._prepared.append(x)
        return x.prepared[kind], False

    def touch(self, reads: Sequence[Use], writes: Sequence[Use]) -> bool:
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
