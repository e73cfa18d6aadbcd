"""What is kept of earlier sequences: a tree of tokens, with the states that they led to.

An edge holds tokens and, for states that are divisible, the entries of those tokens, so that sequences
with a common beginning share it. States of other kinds (windows, recurrent matrices, scored memories)
are kept whole, as snapshots, at single places: a place can be gone on from if every state is there,
entries along the way and a snapshot in the place itself. Without states that need snapshots every
token is such a place. Trees of different `space`s never meet: a space is a tenant, an adapter, or
whatever else the states depend on.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from armillary.nn.state import State

Name = tuple[int, str]  # block and branch
Entries = Mapping[Name, Mapping[str, Tensor]]  # of the tokens of one edge: [G, tokens, …]
Snapshot = Mapping[Name, State]


TOKEN = array("i").itemsize  # bytes of a token that is kept
BESIDE = 512  # bytes that a tensor takes besides its numbers, and about as many a node: of short texts the most


def nbytes(entries: Entries) -> int:
    return sum(t.nbytes + BESIDE for parts in entries.values() for t in parts.values())


def least(states: Iterable[State]) -> int:
    """Bytes that a kept beginning takes besides the numbers of its states."""
    return BESIDE * (1 + sum(2 + len(state.tensors) for state in states))


@dataclass(eq=False)
class Node:
    """The tokens since the parent, and what is kept of them."""

    tokens: array[int]  # as a tuple they take nine times the memory
    entries: Entries
    parent: Node | None
    snapshot: Snapshot | None = None
    used: int = 0
    children: dict[int, Node] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return nbytes(self.entries) + self.snapshot_bytes + TOKEN * len(self.tokens) + BESIDE

    @property
    def snapshot_bytes(self) -> int:
        if self.snapshot is None:
            return 0
        return sum(state.nbytes for state in self.snapshot.values()) + least(self.snapshot.values())


@dataclass(frozen=True)
class Match:
    """length: tokens that can be gone on from; common: tokens that some earlier sequence began with, too;
    path: for each edge its entries and how many tokens of it are meant; snapshot: at `length`."""

    length: int = 0
    common: int = 0
    path: tuple[tuple[Entries, int], ...] = ()
    snapshot: Snapshot | None = None


class Prefixes:
    """divisible: whether every token is a place to go on from, no snapshot being needed."""

    def __init__(self, divisible: bool) -> None:
        self.divisible = divisible
        self.nbytes = 0
        self._roots: dict[Hashable, Node] = {}
        self._clock = 0

    def match(self, ids: Sequence[int], most: int, space: Hashable = "") -> Match:
        """The longest beginning of at most `most` tokens that can be gone on from."""
        node, at, path = self._roots.get(space), 0, list[tuple[Node, int]]()
        best, best_path = 0, 0
        self._clock += 1
        while node is not None:
            child = node.children.get(ids[at]) if at < len(ids) else None
            if child is None:
                break
            same = _common(child.tokens, ids, at)
            path.append((child, same))
            at += same
            child.used = self._clock
            whole = same == len(child.tokens)
            if self.divisible:
                best, best_path = min(at, most), len(path)
            elif whole and at <= most and child.snapshot is not None:
                best, best_path = at, len(path)
            if not whole:
                break
            node = child
        if best == 0:
            return Match(common=at)
        taken, left = [], best
        for child, same in path[:best_path]:
            if left > 0:
                taken.append((child.entries, min(same, left)))
                left -= same
        return Match(best, at, tuple(taken), None if self.divisible else path[best_path - 1][0].snapshot)

    def insert(
        self, ids: Sequence[int], cut: Callable[[int, int], Entries], snapshot: Snapshot | None, space: Hashable = ""
    ) -> None:
        """Keep a sequence; cut(start, stop) gives the entries of tokens that are not kept yet."""
        node = self._roots.setdefault(space, Node(array("i"), {}, None))
        self._clock += 1
        at = 0
        while at < len(ids):
            child = node.children.get(ids[at])
            if child is None:
                child = Node(array("i", ids[at:]), cut(at, len(ids)), node)
                node.children[ids[at]] = child
                self.nbytes += child.nbytes
            same = _common(child.tokens, ids, at)
            if same < len(child.tokens):
                child = self._split(child, same)
            child.used = self._clock
            node, at = child, at + same
        if snapshot and not self.divisible and node.snapshot is None and node.parent is not None:
            node.snapshot = snapshot
            self.nbytes += node.snapshot_bytes

    def shrink(self, size: int) -> int:
        """Forget what was used longest ago, at least `size` bytes if there are so many; returns how many."""
        before, goal = self.nbytes, self.nbytes - size
        while self.nbytes > max(0, goal):
            nodes = [node for root in self._roots.values() for node in _below(root)]
            if not nodes:
                break
            for node in sorted(nodes, key=lambda one: one.used):
                if self.nbytes <= max(0, goal):
                    break
                if not node.children:
                    self._drop(node)
                elif node.snapshot is not None:
                    self.nbytes -= node.snapshot_bytes
                    node.snapshot = None
        return before - self.nbytes

    def _drop(self, node: Node) -> None:
        assert node.parent is not None and not node.children
        self.nbytes -= node.nbytes
        del node.parent.children[node.tokens[0]]

    def _split(self, node: Node, at: int) -> Node:
        """Put a node in the middle of an edge; returns it."""
        assert node.parent is not None
        before = node.nbytes
        first, rest = _halves(node.entries, at)
        above = Node(node.tokens[:at], first, node.parent, used=node.used)
        node.parent.children[above.tokens[0]] = above
        node.tokens, node.entries, node.parent = node.tokens[at:], rest, above
        above.children[node.tokens[0]] = node
        self.nbytes += above.nbytes + node.nbytes - before
        return above


def _halves(entries: Entries, at: int) -> tuple[Entries, Entries]:
    first = {name: {part: t[:, :at].clone() for part, t in parts.items()} for name, parts in entries.items()}
    rest = {name: {part: t[:, at:].clone() for part, t in parts.items()} for name, parts in entries.items()}
    return first, rest


def _common(tokens: array[int], ids: Sequence[int], at: int) -> int:
    """How many of `tokens` stand in ids from `at` on."""
    most = min(len(tokens), len(ids) - at)
    if array("i", ids[at : at + most]) == tokens[:most]:
        return most
    return next(step for step in range(most) if tokens[step] != ids[at + step])


def _below(root: Node) -> list[Node]:
    found, open_ = [], list(root.children.values())
    while open_:
        node = open_.pop()
        found.append(node)
        open_.extend(node.children.values())
    return found
