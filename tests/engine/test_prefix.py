"""The tree of kept beginnings: against a plain list of everything that was inserted."""

from __future__ import annotations

import random

import torch

from armillary.engine.prefix import BESIDE, Prefixes
from armillary.nn.state import FixedState

NAME = (0, "mixer")


def entries_of(ids):
    """Entries from which it can be read off which tokens they belong to: each is its token."""

    def cut(start: int, stop: int):
        return {NAME: {"k": torch.tensor(ids[start:stop], dtype=torch.float32)[None, :, None]}}

    return cut


def snapshot_of(ids):
    return {NAME: FixedState({"sum": torch.tensor([[float(sum(ids))]])})}


def longest(ids, kept, most: int) -> int:
    """The oracle: how far `ids` agree with any of the kept sequences."""
    best = 0
    for other in kept:
        same = 0
        while same < min(len(ids), len(other)) and ids[same] == other[same]:
            same += 1
        best = max(best, same)
    return min(best, most)


def test_every_token_is_a_place_where_states_are_divisible() -> None:
    chance = random.Random(1)
    tree, kept = Prefixes(divisible=True), []
    for _ in range(300):
        ids = [chance.randrange(3) for _ in range(chance.randrange(1, 12))]
        found = tree.match(ids, len(ids) - 1)
        assert found.length == longest(ids, kept, len(ids) - 1)
        read = [int(x) for entries, count in found.path for x in entries[NAME]["k"][0, :count, 0]]
        assert read == ids[: found.length]
        tree.insert(ids, entries_of(ids), None)
        kept.append(ids)
    distinct = {tuple(ids[:end]) for ids in kept for end in range(1, len(ids) + 1)}
    # a node ends where a sequence does, and where two part
    nodes = {ids for ids in distinct if list(ids) in kept or sum(other[:-1] == ids for other in distinct) > 1}
    # a common beginning is kept once: 4 bytes of the entry, 4 of the id; and each node has a tensor
    assert tree.nbytes == 8 * len(distinct) + 2 * BESIDE * len(nodes)


def test_snapshots_are_places_where_they_are_not() -> None:
    chance = random.Random(2)
    tree, kept = Prefixes(divisible=False), []
    for _ in range(300):
        ids = [chance.randrange(2) for _ in range(chance.randrange(1, 9))]
        found = tree.match(ids, len(ids) - 1)
        ends = [len(other) for other in kept if len(other) < len(ids) and ids[: len(other)] == other]
        assert found.length == max(ends, default=0)
        if found.length:
            assert found.snapshot is not None
            assert float(found.snapshot[NAME].tensors["sum"]) == sum(ids[: found.length])
        assert found.common == longest(ids, kept, len(ids))
        tree.insert(ids, entries_of(ids), snapshot_of(ids))
        kept.append(ids)


def test_what_was_used_longest_ago_goes_first() -> None:
    tree = Prefixes(divisible=True)
    for first in range(4):
        tree.insert([first, 8, 9], entries_of([first, 8, 9]), None)
    tree.match([0, 8, 9], 3)
    each = 24 + 2 * BESIDE
    assert tree.shrink(each) == each
    assert [tree.match([first, 8, 9], 3).length for first in range(4)] == [3, 0, 3, 3]
    assert tree.shrink(10**6) == 3 * each
    assert tree.nbytes == 0


def test_spaces_never_meet() -> None:
    tree = Prefixes(divisible=True)
    tree.insert([1, 2, 3], entries_of([1, 2, 3]), None, space="a")
    assert tree.match([1, 2, 3, 4], 3, space="a").length == 3
    assert tree.match([1, 2, 3, 4], 3, space="b").length == 0
