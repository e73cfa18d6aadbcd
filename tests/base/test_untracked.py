"""What the collector of cycles is told to leave alone. Expected values are the collector's own."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import NamedTuple

import pytest

from armillary.base.untracked import untrack

pytestmark = pytest.mark.skipif(sys.implementation.name != "cpython", reason="another collector")


class Pair(NamedTuple):
    number: int
    text: str


class Held:
    pass


def test_it_is_not_visited_and_goes_all_the_same() -> None:
    pair = Pair(1, "one")
    assert gc.is_tracked(pair)
    for _ in range(2):  # and may be told twice
        untrack(pair)
        assert not gc.is_tracked(pair)
    held = Held()
    seen = weakref.ref(held)
    around = Pair(2, held)  # type: ignore[arg-type]
    untrack(around)
    del held
    gc.collect()
    assert seen() is not None
    del around
    assert seen() is None
