"""The order is a permutation, differs between epochs, seeds and sources, and never changes by accident."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.data.order import Permutation

SEEDS = st.integers(0, 2**64)


@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 10**6), stream=st.integers(0, 100))
def test_it_is_a_permutation(size: int, seed: int, epoch: int, stream: int) -> None:
    items = Permutation(size, seed=seed, epoch=epoch, stream=stream)(np.arange(size))
    assert np.array_equal(np.sort(items), np.arange(size))


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 2**61), seed=SEEDS, data=st.data())
def test_any_position_is_found_on_its_own(size: int, seed: int, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True))
    order = Permutation(size, seed=seed, epoch=3)
    together = order(positions)
    assert together.tolist() == [int(order(p)) for p in positions]
    assert len(set(together.tolist())) == len(positions)
    assert together.min() >= 0 and together.max() < size


@pytest.mark.parametrize("change", [{"seed": 8}, {"epoch": 1}, {"stream": 1}])
def test_seed_epoch_and_stream_each_change_the_order(change: dict[str, int]) -> None:
    base = {"seed": 7, "epoch": 0, "stream": 0}
    first = Permutation(1000, **base)(np.arange(1000))
    other = Permutation(1000, **(base | change))(np.arange(1000))
    # two independent orders agree on 1 position of 1000 on average (Poisson): 12 is out of reach
    assert np.count_nonzero(first == other) < 12


@pytest.mark.parametrize("size", [5, 7, 16, 30])
def test_every_item_is_as_likely_at_every_place(size: int) -> None:
    epochs = 4000
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[np.arange(size), Permutation(size, seed=1, epoch=epoch)(np.arange(size))] += 1
    expected = epochs / size
    chi = ((counts - expected) ** 2 / expected).sum()
    degrees = (size - 1) ** 2
    assert chi < degrees + 6 * np.sqrt(2 * degrees)  # six standard deviations of the chi-square law


def test_neighbours_do_not_stay_together() -> None:
    items = Permutation(10_000, seed=0, epoch=0)(np.arange(10_000)).astype(np.float64)
    # correlation of neighbours in a random order: normal with deviation 1/sqrt(n) = 0.01
    assert abs(np.corrcoef(items[:-1], items[1:])[0, 1]) < 0.05


def test_the_order_is_the_same_in_every_version() -> None:
    """Written down when the order was defined: a change would break the resuming of every run."""
    assert Permutation(10, seed=0, epoch=0)(np.arange(10)).tolist() == [1, 8, 2, 5, 9, 4, 6, 7, 0, 3]
    assert Permutation(10**12, seed=12345, epoch=6, stream=2)([0, 1, 10**12 - 1]).tolist() == [
        441917041385,
        990965476720,
        247489742438,
    ]


def test_positions_outside_are_refused() -> None:
    order = Permutation(10, seed=0, epoch=0)
    with pytest.raises(IndexError):
        order([10])
    with pytest.raises(IndexError):
        order([-1])
    with pytest.raises(ValueError):
        Permutation(0, seed=0, epoch=0)
