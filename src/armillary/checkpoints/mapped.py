"""Tensors that are a file's bytes: in memory where they are looked at, given back when they are not needed.

A model whose weights are packed for native steps looks at its own hardly ever again. They stay where plain steps and
adapters find them, and the system holds what it has room for.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_maps: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # by where they begin in memory


class Mapped:
    """A file, for as long as a tensor lies over it. What is written to a tensor stays in memory, not in the file."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        _maps[torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()] = self._map

    def tensor(self, begin: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """The numbers from byte `begin` on; None where they cannot be read in place."""
        count = torch.Size(shape).numel()
        if count == 0 or begin % dtype.itemsize:
            return None
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=begin).view(shape)


def forget(tensor: Tensor) -> None:
    """Give the memory of a tensor over a file back until it is looked at again; nothing for others, and for one that
    was changed in place."""
    if not hasattr(mmap, "MADV_DONTNEED") or tensor._version or not tensor.is_contiguous():
        return
    begin, size = tensor.data_ptr(), tensor.nbytes
    for start, held in _maps.items():
        if start <= begin < start + len(held):
            # only pages that are this tensor's alone: its neighbour may have been changed
            first = -(-(begin - start) // mmap.PAGESIZE) * mmap.PAGESIZE
            stop = (begin - start + size) // mmap.PAGESIZE * mmap.PAGESIZE
            if first < stop:
                held.madvise(mmap.MADV_DONTNEED, first, stop - first)
            return
