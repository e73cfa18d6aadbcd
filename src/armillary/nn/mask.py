"""Masks: composable predicates over (query, key) pairs, lowered to whatever the op wants.

`rows(q, k)` answers for the query rows q [q] and key columns k [S] of one call, with a bool tensor
that broadcasts to [B, H, q, S]; so an op can ask for a few rows at a time and T×T need not exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


class Mask:
    """Base of all predicates; True means that the query may look at the key."""

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        raise NotImplementedError

    def reach(self, stop: int, keys: int) -> int:
        """No query row below `stop` looks at a key at or beyond this bound."""
        return keys

    def low(self, start: int) -> int:
        """No query row from `start` on looks at a key below this bound."""
        return 0

    def __and__(self, other: Mask) -> Mask:
        return Both(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Either(self, other)


@dataclass(frozen=True)
class Causal(Mask):
    """Key s is visible to query t when s <= t + offset; offset counts the keys before the chunk
    (one number, or [B] of them for ragged rows)."""

    offset: int | Tensor = 0

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        if isinstance(self.offset, Tensor):
            last = q[None] + self.offset[:, None]
            return (k[None, None] <= last[:, :, None])[:, None]
        return (k[None] <= q[:, None] + self.offset)[None, None]

    def reach(self, stop: int, keys: int) -> int:
        return keys if isinstance(self.offset, Tensor) else min(keys, stop + self.offset)


@dataclass(frozen=True)
class Window(Mask):
    """Key s is visible to query t when −right ≤ t − s ≤ left and dilation divides t − s.

    left, right: how far a query looks; None = without end. t and s are places in the row: rows and
    columns of the call with `offset` keys before the chunk, or the given indices [B or 1, T] and
    [B or 1, S] (of a ring, whose slots are in no order; an empty slot has a negative index).
    """

    left: int | None = None
    right: int | None = 0
    dilation: int = 1
    offset: int | Tensor = 0
    queries: Tensor | None = None
    keys: Tensor | None = None

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        columns = k[None] if self.keys is None else self.keys[:, k]
        if self.queries is not None:
            lines = self.queries[:, q]
        else:
            lines = q[None] + (self.offset[:, None] if isinstance(self.offset, Tensor) else self.offset)
        distance = lines[:, :, None] - columns[:, None]
        seen = columns[:, None] >= 0
        if self.left is not None:
            seen = seen & (distance <= self.left)
        if self.right is not None:
            seen = seen & (distance >= -self.right)
        if self.dilation > 1:
            seen = seen & (distance % self.dilation == 0)
        return seen[:, None]

    def reach(self, stop: int, keys: int) -> int:
        if self.right is None or self.keys is not None or isinstance(self.offset, Tensor):
            return keys
        return min(keys, stop + self.offset + self.right)

    def low(self, start: int) -> int:
        if self.left is None or self.keys is not None or isinstance(self.offset, Tensor):
            return 0
        return max(0, start + self.offset - self.left)


@dataclass(frozen=True)
class Others(Mask):
    """A query does not look at itself."""

    offset: int | Tensor = 0

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        lines = q[None] + (self.offset[:, None] if isinstance(self.offset, Tensor) else self.offset)
        return (lines[:, :, None] != k)[:, None]


@dataclass(frozen=True)
class PerHead(Mask):
    """Another predicate for each head (or each group of heads)."""

    heads: tuple[Mask, ...]

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.cat(torch.broadcast_tensors(*(mask.rows(q, k) for mask in self.heads)), 1)

    def reach(self, stop: int, keys: int) -> int:
        return max(mask.reach(stop, keys) for mask in self.heads)

    def low(self, start: int) -> int:
        return min(mask.low(start) for mask in self.heads)


@dataclass(frozen=True)
class Prefix(Mask):
    """Every query sees the first length[b] keys of its row (joined with `Causal` by |)."""

    length: Tensor

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        return (k[None] < self.length[:, None])[:, None, None]


@dataclass(frozen=True)
class Documents(Mask):
    """Queries see keys of their own document; ids [B, T] and [B, S]."""

    queries: Tensor
    keys: Tensor

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        return (self.queries[:, q, None] == self.keys[:, None, k])[:, None]


@dataclass(frozen=True)
class Keys(Mask):
    """Only keys marked True in valid [B, S] are seen (padding)."""

    valid: Tensor

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        return self.valid[:, None, None, k]


@dataclass(frozen=True)
class Segments(Mask):
    """A query sees its own segment and the `memory` tokens before that segment begins.

    queries [B or 1, T], keys [B or 1, S]: the index of each token in its row, negative where there is
    none; part: both, or only the own segment, or only what lies before it. Not causal by itself.
    """

    length: int
    memory: int
    queries: Tensor
    keys: Tensor
    part: Literal["both", "own", "before"] = "both"

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        lines, columns = self.queries[:, q, None], self.keys[:, None, k]
        begin = lines // self.length * self.length
        seen = (columns >= 0) & (columns >= (begin if self.part == "own" else begin - self.memory))
        if self.part == "before":
            seen = seen & (columns < begin)
        return seen[:, None]


@dataclass(frozen=True)
class Beside(Mask):
    """Two sets of keys side by side: the first `split` as `first` says (None: all seen), the others,
    counted from there, as `rest` says."""

    first: Mask | None
    split: int
    rest: Mask

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        there = self.rest.rows(q, (k - self.split).clamp(min=0))
        if self.split == 0:
            return there
        here = there.new_ones(()) if self.first is None else self.first.rows(q, k.clamp(max=self.split - 1))
        return torch.where(k < self.split, here, there)


@dataclass(frozen=True)
class Both(Mask):
    """a ∧ b."""

    a: Mask
    b: Mask

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        return self.a.rows(q, k) & self.b.rows(q, k)

    def reach(self, stop: int, keys: int) -> int:
        return min(self.a.reach(stop, keys), self.b.reach(stop, keys))

    def low(self, start: int) -> int:
        return max(self.a.low(start), self.b.low(start))


@dataclass(frozen=True)
class Either(Mask):
    """a ∨ b."""

    a: Mask
    b: Mask

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        return self.a.rows(q, k) | self.b.rows(q, k)

    def reach(self, stop: int, keys: int) -> int:
        return max(self.a.reach(stop, keys), self.b.reach(stop, keys))

    def low(self, start: int) -> int:
        return min(self.a.low(start), self.b.low(start))


def both(a: Mask | None, b: Mask | None) -> Mask | None:
    """a ∧ b, where None allows everything."""
    if a is None or b is None:
        return a if b is None else b
    return a & b


def dense(mask: Mask | None, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """The whole predicate as bool, broadcastable to [B, H, T, S]; for oracles and pictures."""
    if mask is None:
        return None
    return mask.rows(torch.arange(queries, device=device), torch.arange(keys, device=device))
