"""States: what a mechanism carries from chunk to chunk, owned by the mechanism that made it.

Kinds: span (grows with tokens), window (bounded), fixed (constant), scored (lossy). Without
gradients storage is written in place; with gradients tensors are replaced. A row whose chunk is
empty, and tokens beyond a row's length, leave the state bit-identical.

An engine keeps many sequences in the rows of one state: `rows` is a part of it over the same storage,
`absorb` takes back what a chunk on such a part left behind. Where the entries of the tokens stand on
their own (`divisible`), they can be cut out and pasted, so that sequences with a common beginning
share it.
"""

from __future__ import annotations

import copy
import mmap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from armillary.base.errors import UnsupportedError
from armillary.nn.mask import Beside, Causal, Mask, Segments


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros that take memory only where they are written: room for tokens that may never come."""
    if torch.device(device).type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    size = dtype.itemsize
    for dimension in shape:
        size *= dimension
    return _untouched(size).view(dtype).view(*shape)


def _untouched(size: int) -> Tensor:
    """[size] bytes, zeros. numpy asks the system for large pages (2 MB) from some size on: the first token of a row
    would then take what all of its tokens need, and wait until that is cleared."""
    if size < 1 << 20 or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return torch.from_numpy(np.zeros(size, np.uint8))
    piece = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system that was built without them
        piece.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(piece, dtype=torch.uint8)


class State:
    """Tensors with the batch as their first axis."""

    kind: ClassVar[str]
    divisible: ClassVar[bool] = False  # the entries of a token depend on no later token

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    @property
    def batch(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def select(self, rows: Tensor) -> Self:
        """A new state that holds the given rows (repeats allowed: beams)."""
        return self._with({name: t.index_select(0, rows) for name, t in self.tensors.items()})

    @classmethod
    def join(cls, states: Sequence[Self]) -> Self:
        """One state whose batch is the states' batches one after another."""
        if len({frozenset(state.tensors) for state in states}) > 1:
            raise UnsupportedError(
                "states that hold different tensors cannot be joined", hint="give every source a padding, or none"
            )
        for name, first in states[0].tensors.items():
            sizes = {state.tensors[name].shape[1:] for state in states}
            if len(sizes) > 1:
                raise UnsupportedError(
                    f"states whose '{name}' differ in size cannot be joined ({tuple(first.shape[1:])} and others)",
                    hint="pad the sources to one length",
                )
        return states[0]._with({name: torch.cat([s.tensors[name] for s in states]) for name in states[0].tensors})

    def snapshot(self) -> Self:
        """A copy that later calls do not touch; give it back to `restore`."""
        return self._with({name: t.clone() for name, t in self.tensors.items()})

    def restore(self, snapshot: Self) -> None:
        self.tensors = {name: t.clone() for name, t in snapshot.tensors.items()}

    def rows(self, first: int, count: int) -> Self:
        """The state of `count` rows from `first` on, over the same storage; give it back to `absorb` after
        every chunk."""
        return self._with({name: t.narrow(0, first, count) for name, t in self.tensors.items()})

    def absorb(self, first: int, part: Self) -> None:
        """Make the rows from `first` on those of `part`: what `rows` gave, or a state of its own."""
        self._fit(part)
        for name, t in part.tensors.items():
            mine = self.tensors[name].narrow(0, first, t.shape[0])
            if t.data_ptr() == mine.data_ptr() and t.shape == mine.shape:
                continue
            if t.shape != mine.shape:  # entries along axis 2 that were not needed yet
                mine = mine.narrow(2, 0, t.shape[2])
            mine.copy_(t)

    def _fit(self, part: Self) -> None:
        """Grow to the size of `part`, where states grow."""

    def put(self, name: str, value: Tensor) -> None:
        """Give a tensor of constant size new contents: in place without gradients, replaced with them."""
        if torch.is_grad_enabled():
            self.tensors[name] = value
        else:
            self.tensors[name].copy_(value)

    def truncate(self, lengths: Tensor) -> None:
        """Forget the tokens from lengths[b] on; only where the past can be cut (span)."""
        raise UnsupportedError(f"a {self.kind} state cannot be truncated", hint="take a snapshot before and restore it")

    def to(self, device: torch.device | str) -> Self:
        return self._with({name: t.to(device) for name, t in self.tensors.items()})

    def _with(self, tensors: Mapping[str, Tensor]) -> Self:
        other = copy.copy(self)
        other.tensors = dict(tensors)
        return other


class FixedState(State):
    """Tensors of constant size (recurrent matrices, an encoder's keys and values)."""

    kind: ClassVar[str] = "fixed"

    @classmethod
    def zeros(
        cls,
        shapes: Mapping[str, Sequence[int]],
        batch: int,
        dtype: torch.dtype,
        device: torch.device | str,
        wide: Sequence[str] = (),
    ) -> Self:
        """Zeros of these shapes for each row; those named in `wide`, which sum over all tokens, in float32
        at least."""
        kinds = {name: torch.promote_types(dtype, torch.float32) if name in wide else dtype for name in shapes}
        return cls({n: torch.zeros(batch, *shape, dtype=kinds[n], device=device) for n, shape in shapes.items()})

    def expect(self, shapes: Mapping[str, Sequence[int]], batch: int, where: str, settings: str) -> None:
        """Raise UnsupportedError unless this holds tensors of these shapes for `batch` rows; settings: the
        names of those that the shapes follow from."""
        for name, shape in shapes.items():
            held = self.tensors.get(name)
            if held is None or held.shape[1:] != torch.Size(shape):
                found = "none" if held is None else str(tuple(held.shape[1:]))
                raise UnsupportedError(
                    f"the state's '{name}' should be {tuple(shape)} for each row; there is {found}",
                    where=where,
                    hint=f"a state fits mixers of the same {settings} only",
                )
            if held.shape[0] != batch:
                raise UnsupportedError(
                    f"a state of {held.shape[0]} rows was given {batch}", where=where, hint="select or join rows first"
                )


class CountedState(State):
    """A state that knows how many tokens each row has seen.

    lengths: [B]; `uniform` is their common value as a Python number, or None once rows differ, so that
    the common case needs no look at the data.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        first = next(iter(self.tensors.values()))
        self.lengths = torch.zeros(first.shape[0], dtype=torch.int64, device=first.device)
        self.uniform: int | None = 0

    @property
    def longest(self) -> int:
        return self.uniform if self.uniform is not None else int(self.lengths.max())

    def select(self, rows: Tensor) -> Self:
        other = super().select(rows)
        other._set_lengths(self.lengths[rows])
        return other

    @classmethod
    def join(cls, states: Sequence[Self]) -> Self:
        joined = super().join(states)
        joined._set_lengths(torch.cat([state.lengths for state in states]))
        return joined

    def restore(self, snapshot: Self) -> None:
        super().restore(snapshot)
        self._set_lengths(snapshot.lengths)

    def to(self, device: torch.device | str) -> Self:
        other = super().to(device)
        other.lengths = self.lengths.to(device)
        return other

    def rows(self, first: int, count: int) -> Self:
        other = super().rows(first, count)
        other.lengths = self.lengths.narrow(0, first, count).clone()
        if self.uniform is None:
            other._set_lengths(other.lengths)
        return other

    def absorb(self, first: int, part: Self) -> None:
        super().absorb(first, part)
        lengths = self.lengths.clone()
        lengths[first : first + part.batch] = part.lengths
        self._set_lengths(lengths)

    def resume(self, lengths: Tensor) -> None:
        """Somebody else wrote the entries of tokens up to lengths[b]."""
        self._set_lengths(lengths)

    def _set_lengths(self, lengths: Tensor) -> None:
        self.lengths = lengths.clone()
        same = bool((lengths == lengths[0]).all())
        self.uniform = int(lengths[0]) if same else None


class SpanState(CountedState):
    """Tensors that grow by one entry per token along axis 2: [B, G, capacity, …]."""

    kind: ClassVar[str] = "span"
    divisible: ClassVar[bool] = True

    @property
    def capacity(self) -> int:
        return next(iter(self.tensors.values())).shape[2]

    def append(self, parts: Mapping[str, Tensor], lengths: Tensor | None = None) -> dict[str, Tensor]:
        """Add parts [B, G, T, …] after each row's tokens; returns the views [B, G, longest, …].

        lengths: [B] valid tokens of each row's chunk; None means all T.
        """
        count = next(iter(parts.values())).shape[2]
        if lengths is not None and self.uniform is not None and bool((lengths == count).all()):
            lengths = None
        if lengths is None and self.uniform is not None:
            start, stop = self.uniform, self.uniform + count
            self._make_room(stop)
            for name, part in parts.items():
                if torch.is_grad_enabled():
                    self.tensors[name] = torch.cat([self.tensors[name][:, :, :start], part], 2)
                else:
                    self.tensors[name][:, :, start:stop] = part
            self.uniform = stop
            self.lengths = self.lengths + count
        else:
            valid = self._valid(lengths, count)
            rows, tokens = valid.nonzero(as_tuple=True)
            slots = self.lengths[rows] + tokens
            added = valid.sum(1)
            self._make_room(int((self.lengths + added).max()))
            for name, part in parts.items():
                target = self.tensors[name].clone() if torch.is_grad_enabled() else self.tensors[name]
                target[rows, :, slots] = part[rows, :, tokens].to(target.dtype)
                self.tensors[name] = target
            self.lengths = self.lengths + added
            self.uniform = None
        longest = self.longest
        return {name: t[:, :, :longest] for name, t in self.tensors.items()}

    def truncate(self, lengths: Tensor) -> None:
        self._set_lengths(torch.minimum(self.lengths, lengths.to(self.lengths)))

    def cut(self, row: int, start: int, stop: int) -> dict[str, Tensor]:
        """A copy of the entries of a row's tokens from `start` to before `stop`, [G, stop − start, …]."""
        return {name: t[row, :, start:stop].clone() for name, t in self.tensors.items()}

    def paste(self, row: int, start: int, entries: Mapping[str, Tensor]) -> None:
        """Make such entries those of the row's tokens from `start` on; what came behind is forgotten."""
        count = next(iter(entries.values())).shape[1]
        self._make_room(start + count)
        for name, entry in entries.items():
            self.tensors[name][row, :, start : start + count] = entry
        lengths = self.lengths.clone()
        lengths[row] = start + count
        self._set_lengths(lengths)

    def _fit(self, part: Self) -> None:
        self._reserve(part.capacity)

    @classmethod
    def join(cls, states: Sequence[Self]) -> Self:
        capacity = max(state.capacity for state in states)
        for state in states:
            state._reserve(capacity)
        return super().join(states)

    def _valid(self, lengths: Tensor | None, count: int) -> Tensor:
        steps = torch.arange(count, device=self.lengths.device)
        if lengths is None:
            return torch.ones(len(self.lengths), count, dtype=torch.bool, device=steps.device)
        return steps[None] < lengths[:, None]

    def _make_room(self, capacity: int) -> None:
        # Doubling keeps growth linear in total; a caller that knows its length asks for it at once.
        if capacity > self.capacity:
            self._reserve(max(capacity, 2 * self.capacity))

    def _reserve(self, capacity: int) -> None:
        held = self.capacity
        if capacity <= held:
            return
        for name, t in self.tensors.items():
            grown = t.new_zeros(*t.shape[:2], capacity, *t.shape[3:])
            grown[:, :, :held] = t
            self.tensors[name] = grown


class WindowState(CountedState):
    """The last `window` tokens of each row, in a ring along axis 2: [B, G, window, …]; the token with
    index i of its row (counted from 0) lies in slot i % window. What looks back at them counts by their index, so
    a ring may hold more of them than are looked at.
    """

    kind: ClassVar[str] = "window"

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.window = next(iter(self.tensors.values())).shape[2]

    def widen(self, window: int) -> None:
        """Make room for so many tokens, at least, before the first of them is there."""
        if window > self.window:
            assert self.uniform == 0, "tokens would have to move"
            for name, t in self.tensors.items():
                self.tensors[name] = zeros((*t.shape[:2], window, *t.shape[3:]), t.dtype, t.device)
            self.window = window

    def append(self, parts: Mapping[str, Tensor], lengths: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """What the tokens of a chunk can look back at, and the chunk itself; then the ring moves on.

        parts: [B, G, T, …]; lengths: [B] valid tokens of each row's chunk, None means all T.
        Returns tensors [B, G, window + T, …] and the index of each entry in its row [B or 1, window +
        T] int64, negative where a slot is still empty. Tokens of the chunk beyond a row's length come
        behind its valid ones, as causality wants it.
        """
        count = next(iter(parts.values())).shape[2]
        if lengths is not None and self.uniform is not None and bool((lengths == count).all()):
            lengths = None
        steps = torch.arange(count, device=self.lengths.device)
        slots = torch.arange(self.window, device=self.lengths.device)
        seen = self.lengths[:1] if self.uniform is not None else self.lengths
        # the newest index below `seen` that lies in the slot
        index = seen[:, None] - 1 - (seen[:, None] - 1 - slots) % self.window
        places = torch.cat([index, seen[:, None] + steps], 1)
        held = {
            name: torch.cat([self.tensors[name], part.to(self.tensors[name].dtype)], 2) for name, part in parts.items()
        }
        if lengths is None and self.uniform is not None:
            kept = min(count, self.window)
            where = (self.uniform + steps[count - kept :]) % self.window
            for name, part in parts.items():
                target = self.tensors[name].clone() if torch.is_grad_enabled() else self.tensors[name]
                target[:, :, where] = part[:, :, count - kept :].to(target.dtype)
                self.tensors[name] = target
            self.uniform += count
            self.lengths = self.lengths + count
        else:
            added = torch.full_like(self.lengths, count) if lengths is None else lengths.to(self.lengths)
            fresh = (steps < added[:, None]) & (steps >= added[:, None] - self.window)
            rows, tokens = fresh.nonzero(as_tuple=True)
            where = (self.lengths[rows] + tokens) % self.window
            for name, part in parts.items():
                target = self.tensors[name].clone() if torch.is_grad_enabled() else self.tensors[name]
                target[rows, :, where] = part[rows, :, tokens].to(target.dtype)
                self.tensors[name] = target
            self.lengths = self.lengths + added
            self.uniform = None
        return held, places


class NodeState(CountedState):
    """The current block of each row and one closed node per level, in groups of `block` entries along
    axis 2: [B, G, (1 + levels)·block, …]. It grows by one group each time that the past doubles; what
    far groups hold are means (see `nn.ops.hierarchy`)."""

    kind: ClassVar[str] = "scored"

    def __init__(self, tensors: Mapping[str, Tensor], block: int) -> None:
        super().__init__(tensors)
        self.block = block

    @staticmethod
    def levels_for(tokens: int, block: int) -> int:
        """How many levels a past of so many tokens takes."""
        return (tokens // block).bit_length()

    @property
    def levels(self) -> int:
        return next(iter(self.tensors.values())).shape[2] // self.block - 1

    def reserve(self, levels: int) -> None:
        missing = (levels - self.levels) * self.block
        if missing > 0:
            for name, t in self.tensors.items():
                self.tensors[name] = torch.cat([t, t.new_zeros(*t.shape[:2], missing, *t.shape[3:])], 2)

    def advance(self, tensors: Mapping[str, Tensor], count: int, lengths: Tensor | None) -> None:
        """What is held after a chunk of `count` tokens, of which lengths [B] are valid."""
        for name, value in tensors.items():
            if torch.is_grad_enabled():
                self.tensors[name] = value
            else:
                self.tensors[name].copy_(value)
        self.lengths = self.lengths + (count if lengths is None else lengths.to(self.lengths))
        self.uniform = self.uniform + count if lengths is None and self.uniform is not None else None

    def _fit(self, part: Self) -> None:
        self.reserve(part.levels)

    @classmethod
    def join(cls, states: Sequence[Self]) -> Self:
        levels = max(state.levels for state in states)
        for state in states:
            state.reserve(levels)
        return super().join(states)


class SlideState(State):
    """The last `window` tokens of each row in order, the newest last, and what a token sees of them:
    its own segment and the `memory` tokens before it. Drivers give it to mixers that they drive.

    tensors: [B, G, window, …] by name; "index" [B, 1, window] counts the tokens of a row from 0, −1
    where there is none yet. detached: no gradient flows to tokens of earlier segments; entries that
    were computed from inputs cut off from the graph stand for them (names "kept_…").
    """

    kind: ClassVar[str] = "window"

    def __init__(self, tensors: Mapping[str, Tensor], segment: int, memory: int, detached: bool = False) -> None:
        super().__init__(tensors)
        self.segment, self.memory, self.detached = segment, memory, detached
        self.names = tuple(tensors)
        first = next(iter(self.tensors.values()))
        self.window = first.shape[2]
        index = torch.full((first.shape[0], 1, self.window), -1, dtype=torch.int64, device=first.device)
        self.tensors["index"] = index

    def see(
        self, parts: Mapping[str, Tensor], kept: Mapping[str, Tensor] | None, lengths: Tensor | None
    ) -> tuple[dict[str, Tensor], Mask]:
        """Take in a chunk; returns what its tokens look at, and how far each looks.

        parts: [B, G, T, …] by name; kept: the same from detached inputs, or None; lengths: [B] valid
        tokens of each row's chunk, None means all T.
        """
        count = next(iter(parts.values())).shape[2]
        steps = torch.arange(count, device=self.tensors["index"].device)
        fresh = dict(parts) | {"index": self.tensors["index"][:, :, -1:] + 1 + steps}
        for name, part in (kept or {}).items():
            fresh[f"kept_{name}"] = part
            self.tensors.setdefault(f"kept_{name}", self.tensors[name].detach())
        held = {
            name: torch.cat([self.tensors[name], part.to(self.tensors[name].dtype)], 2) for name, part in fresh.items()
        }
        for name, tensor in held.items():
            self._keep(name, tensor, count, lengths)
        index = held.pop("index")[:, 0]
        queries, causal = fresh["index"][:, 0], Causal(self.window)
        if kept is None:
            return held, causal & Segments(self.segment, self.memory, queries, index)
        before = Segments(self.segment, self.memory, queries, index, "before")
        own = Segments(self.segment, self.memory, queries, index, "own")
        double = {name: torch.cat([held.get(f"kept_{name}", held[name]), held[name]], 2) for name in parts}
        return double, Beside(causal & before, self.window + count, causal & own)

    def _keep(self, name: str, held: Tensor, count: int, lengths: Tensor | None) -> None:
        """The newest `window` of what was held and the chunk; rows take in as many as they have."""
        if lengths is None:
            last = held[:, :, count:]
        else:
            places = lengths[:, None] + torch.arange(self.window, device=held.device)
            shape = (len(held), 1, self.window, *[1] * (held.dim() - 3))
            last = held.gather(2, places.view(shape).expand(-1, held.shape[1], -1, *held.shape[3:]))
        if torch.is_grad_enabled():
            self.tensors[name] = last
        else:
            self.tensors[name].copy_(last)
