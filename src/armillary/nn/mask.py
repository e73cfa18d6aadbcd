"""Masks: composable predicates over (query, key) pairs, lowered to whatever the op wants.

`rows(q, k)` answers for the query rows q [q] and key columns k [S] of one call, with a bool tensor
that broadcasts to [B, H, q, S]; so an op can ask for a few rows at a time and T×T need not exist.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
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

    def candidates(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """For every query the keys [queries, n] beyond which it sees none, where they are fewer than all; an
        index that is not a key (negative, or ≥ keys) stands for nothing."""
        return None

    def marks(self, keys: int) -> Tensor | None:
        """Keys, bool [B or 1, S], that queries may see from anywhere: `low`, `reach` and `candidates` bound
        the others only."""
        return None

    def most(self, keys: int) -> int:
        """At most so many keys of a row are marked; known without a look at the data."""
        return 0

    def residues(self) -> int:
        """Queries and keys whose places in the row differ by no multiple of this do not see each other."""
        return 1

    def take(self, places: Tensor, keys: int) -> Mask:
        """The same predicate on some of the keys, at places [B or 1, n]."""
        return Taken(self, places, keys)

    def __and__(self, other: Mask) -> Mask:
        return Both(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Either(self, other)


@dataclass(frozen=True, eq=False)
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

    def take(self, places: Tensor, keys: int) -> Mask:
        return Window(None, 0, 1, self.offset, keys=places)


@dataclass(frozen=True, eq=False)
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

    def candidates(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        if self.keys is not None or self.queries is not None or isinstance(self.offset, Tensor):
            return None
        back, ahead = self.spans(keys)
        steps = torch.arange(-back, ahead + 1, device=device) * self.dilation
        return torch.arange(queries, device=device)[:, None] + self.offset + steps

    def residues(self) -> int:
        aligned = self.queries is None and self.keys is None and isinstance(self.offset, int) and self.offset == 0
        return self.dilation if aligned else 1

    def spans(self, keys: int) -> tuple[int, int]:
        """How many keys back and ahead a query can look among so many."""
        most = (keys - 1) // self.dilation
        back, ahead = (most if far is None else min(most, far // self.dilation) for far in (self.left, self.right))
        return back, ahead

    def take(self, places: Tensor, keys: int) -> Mask:
        return replace(self, keys=places if self.keys is None else _picked(self.keys, places))


@dataclass(frozen=True, eq=False)
class Others(Mask):
    """A query does not look at itself; offset and keys as for `Window`; alone: [B or 1, T], the queries
    that nevertheless do, since they have nobody else."""

    offset: int | Tensor = 0
    keys: Tensor | None = None
    alone: Tensor | None = None

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        columns = k[None] if self.keys is None else self.keys[:, k]
        lines = q[None] + (self.offset[:, None] if isinstance(self.offset, Tensor) else self.offset)
        seen = lines[:, :, None] != columns[:, None]
        if self.alone is not None:
            seen = seen | self.alone[:, q, None]
        return seen[:, None]

    def take(self, places: Tensor, keys: int) -> Mask:
        return replace(self, keys=places if self.keys is None else _picked(self.keys, places))


@dataclass(frozen=True, eq=False)
class PerHead(Mask):
    """Another predicate for each query head; heads with the very same one are worked on together."""

    heads: tuple[Mask, ...]

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.cat(torch.broadcast_tensors(*(mask.rows(q, k) for mask in self.heads)), 1)

    def reach(self, stop: int, keys: int) -> int:
        return max(mask.reach(stop, keys) for mask in self.heads)

    def low(self, start: int) -> int:
        return min(mask.low(start) for mask in self.heads)

    def marks(self, keys: int) -> Tensor | None:
        found = [each for each in (mask.marks(keys) for mask in self.heads) if each is not None]
        return torch.stack(torch.broadcast_tensors(*found)).any(0) if found else None

    def most(self, keys: int) -> int:
        return min(keys, sum(mask.most(keys) for mask in dict.fromkeys(self.heads)))

    def take(self, places: Tensor, keys: int) -> Mask:
        kinds = {one: one.take(places, keys) for one in dict.fromkeys(self.heads)}
        return PerHead(tuple(kinds[one] for one in self.heads))


@dataclass(frozen=True, eq=False)
class Prefix(Mask):
    """Every query sees the first length[b] keys of its row (joined with `Causal` by |)."""

    length: Tensor

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        return (k[None] < self.length[:, None])[:, None, None]

    def take(self, places: Tensor, keys: int) -> Mask:
        return Keys(places < self.length[:, None])


@dataclass(frozen=True, eq=False)
class Marked(Mask):
    """Every query sees the marked keys of its row, bool [B or 1, S]; bound: how many those can be, where
    that is known without a look at them."""

    seen: Tensor
    bound: int | None = None

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        return self.seen[:, None, None, k]

    def reach(self, stop: int, keys: int) -> int:
        return 0

    def low(self, start: int) -> int:
        return sys.maxsize

    def candidates(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        return torch.empty(queries, 0, dtype=torch.int64, device=device)

    def marks(self, keys: int) -> Tensor | None:
        return self.seen

    def most(self, keys: int) -> int:
        return keys if self.bound is None else min(keys, max(1, self.bound))

    def take(self, places: Tensor, keys: int) -> Mask:
        return replace(self, seen=_picked(self.seen, places))


@dataclass(frozen=True, eq=False)
class Spans(Mask):
    """Queries see keys of their own stretch of `size` positions; positions [B or 1, T] and [B or 1, S]."""

    queries: Tensor
    keys: Tensor
    size: int

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        return (self.queries[:, q, None] // self.size == self.keys[:, None, k] // self.size)[:, None]

    def take(self, places: Tensor, keys: int) -> Mask:
        return replace(self, keys=_picked(self.keys, places))


@dataclass(frozen=True, eq=False)
class Documents(Mask):
    """Queries see keys of their own document; ids [B, T] and [B, S]."""

    queries: Tensor
    keys: Tensor

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        return (self.queries[:, q, None] == self.keys[:, None, k])[:, None]

    def take(self, places: Tensor, keys: int) -> Mask:
        return replace(self, keys=_picked(self.keys, places))


@dataclass(frozen=True, eq=False)
class Keys(Mask):
    """Only keys marked True in valid [B, S] are seen (padding)."""

    valid: Tensor

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        return self.valid[:, None, None, k]

    def take(self, places: Tensor, keys: int) -> Mask:
        return replace(self, valid=_picked(self.valid, places))


@dataclass(frozen=True, eq=False)
class Pairs(Mask):
    """Query t sees key s where seen[b, t, s]; seen: bool [B or 1, T, S]. For what no rule says, such as the
    order of a permutation."""

    seen: Tensor

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        return self.seen[:, q][:, :, k][:, None]


@dataclass(frozen=True, eq=False)
class Taken(Mask):
    """Any predicate on some of its `keys` keys, at places [B or 1, n]."""

    whole: Mask
    places: Tensor
    keys: int

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        seen = self.whole.rows(q, torch.arange(self.keys, device=k.device))
        batch = max(seen.shape[0], len(self.places))
        index = self.places[:, None, None, k].expand(batch, seen.shape[1], len(q), -1)
        return seen.expand(batch, -1, len(q), -1).gather(3, index)


@dataclass(frozen=True, eq=False)
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


@dataclass(frozen=True, eq=False)
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


@dataclass(frozen=True, eq=False)
class Both(Mask):
    """a ∧ b. Where both mark keys, the bounds and marks of a alone are used."""

    a: Mask
    b: Mask

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        return self.a.rows(q, k) & self.b.rows(q, k)

    def _bounding(self, keys: int) -> list[Mask]:
        return [self.a] if self.a.most(keys) and self.b.most(keys) else [self.a, self.b]

    def reach(self, stop: int, keys: int) -> int:
        return min(each.reach(stop, keys) for each in self._bounding(keys))

    def low(self, start: int) -> int:
        return max(each.low(start) for each in self._bounding(1))

    def candidates(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        found = [each.candidates(queries, keys, device) for each in self._bounding(keys)]
        return min((each for each in found if each is not None), key=lambda each: each.shape[1], default=None)

    def marks(self, keys: int) -> Tensor | None:
        a, b = (self.a, self.b) if self.a.most(keys) else (self.b, self.a)
        marked = a.marks(keys)
        return marked & b.valid if marked is not None and isinstance(b, Keys) else marked

    def most(self, keys: int) -> int:
        return self.a.most(keys) or self.b.most(keys)

    def residues(self) -> int:
        return max(self.a.residues(), self.b.residues())

    def take(self, places: Tensor, keys: int) -> Mask:
        return self.a.take(places, keys) & self.b.take(places, keys)


@dataclass(frozen=True, eq=False)
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

    def candidates(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        found = [each.candidates(queries, keys, device) for each in (self.a, self.b)]
        return None if found[0] is None or found[1] is None else torch.cat([found[0], found[1]], 1)

    def marks(self, keys: int) -> Tensor | None:
        a, b = self.a.marks(keys), self.b.marks(keys)
        return a | b if a is not None and b is not None else a if b is None else b

    def most(self, keys: int) -> int:
        return min(keys, self.a.most(keys) + self.b.most(keys))

    def take(self, places: Tensor, keys: int) -> Mask:
        return self.a.take(places, keys) | self.b.take(places, keys)


def _picked(each: Tensor, places: Tensor) -> Tensor:
    """each [B or 1, S] at places [B or 1, n]."""
    batch = max(len(each), len(places))
    return each.expand(batch, -1).gather(1, places.expand(batch, -1))


def both(a: Mask | None, b: Mask | None) -> Mask | None:
    """a ∧ b, where None allows everything; kinds of heads stay apart."""
    if a is None or b is None:
        return a if b is None else b
    if isinstance(b, PerHead) and not isinstance(a, PerHead):
        a, b = b, a
    if isinstance(a, PerHead) and not isinstance(b, PerHead):
        kinds = {one: one & b for one in dict.fromkeys(a.heads)}
        return PerHead(tuple(kinds[one] for one in a.heads))
    return a & b


def dense(mask: Mask | None, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """The whole predicate as bool, broadcastable to [B, H, T, S]; for oracles and pictures."""
    if mask is None:
        return None
    return mask.rows(torch.arange(queries, device=device), torch.arange(keys, device=device))
