"""Batches are a pure function of seed and index, go through every window, and mix as the weights say."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.base.errors import DataError, InputError
from armillary.data.loader import Loader, Mixture


def numbered(count: int, length: int = 7, first: int = 0) -> list[list[int]]:
    """Documents whose ids count up, so that a window shows where it was cut."""
    ids = range(first, first + count * length)
    return [list(ids[i : i + length]) for i in range(0, len(ids), length)]


def test_windows_are_cut_where_the_definition_says(make_store: Any) -> None:
    store = make_store(numbered(15))  # 105 tokens: (105 - 1) // 8 = 13 windows
    loader = Loader(store, context=8, batch=13, seed=5)
    ids = loader.batch(0).ids
    assert ids.shape == (13, 9) and ids.dtype == torch.int64
    assert sorted(ids[:, 0].tolist()) == [8 * w for w in range(13)]
    assert torch.equal(ids - ids[:, :1], torch.arange(9).expand(13, 9))
    assert loader.batch(0).documents is None


def test_every_epoch_goes_through_every_window_in_another_order(make_store: Any) -> None:
    loader = Loader(make_store(numbered(15)), context=8, batch=4, seed=5)
    starts = torch.cat([loader.batch(i).ids[:, 0] for i in range(26)]).tolist()  # 104 rows: 8 epochs of 13
    epochs = [starts[i : i + 13] for i in range(0, 104, 13)]
    assert all(sorted(epoch) == [8 * w for w in range(13)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8
    assert loader.epochs(26) == (8.0,)


def test_order_depends_on_seed_and_index_alone(make_store: Any) -> None:
    store = make_store(numbered(40))
    loader = Loader(store, context=5, batch=6, seed=1)
    later = loader.batch(17).ids
    assert torch.equal(Loader(store, context=5, batch=6, seed=1).batch(17).ids, later)
    assert torch.equal(loader.batch(17).ids, later)
    assert not torch.equal(Loader(store, context=5, batch=6, seed=2).batch(17).ids, later)


@pytest.mark.parametrize("start", [0, 9])
def test_the_iterator_reads_ahead_without_changing_anything(make_store: Any, start: int) -> None:
    loader = Loader(make_store(numbered(40)), context=5, batch=6, seed=1, isolate=True)
    batches = loader.iterate(start, ahead=3)
    for index, batch in zip(range(start, start + 8), batches, strict=False):
        expected = loader.batch(index)
        assert torch.equal(batch.ids, expected.ids)
        assert batch.documents is not None and expected.documents is not None
        assert torch.equal(batch.documents, expected.documents)
    assert any(thread.name == "loader" for thread in threading.enumerate())
    batches.close()  # type: ignore[attr-defined]
    assert not any(thread.name == "loader" for thread in threading.enumerate())


def test_an_error_in_the_thread_reaches_the_consumer(make_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Loader(make_store(numbered(40)), context=5, batch=6, seed=1)
    good = loader.batch

    def broken(index: int) -> Any:
        if index == 2:
            raise DataError("the disk went away")
        return good(index)

    monkeypatch.setattr(loader, "batch", broken)
    batches = loader.iterate()
    assert len(list(itertools.islice(batches, 2))) == 2
    with pytest.raises(DataError, match="went away"):
        next(batches)


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_ranks_share_one_global_batch(make_store: Any, ranks: int) -> None:
    stores = [make_store(numbered(40)), make_store(numbered(9, first=1000))]

    def loader(rank: int, of: int) -> Loader:
        return Loader(stores, [2.0, 1.0], context=5, batch=6, seed=1, rank=rank, ranks=of)

    for index in (0, 1, 30):
        parts = [loader(rank, ranks).batch(index).ids for rank in range(ranks)]
        assert torch.equal(torch.cat(parts), loader(0, 1).batch(index).ids)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.one_of(st.integers(1, 100).map(float), st.floats(1e-3, 1e3)), min_size=1, max_size=6),
    start=st.integers(0, 10**12),
)
def test_mixtures_follow_the_weights_at_every_moment(weights: list[float], start: int) -> None:
    mixture = Mixture(weights)
    total = sum(Fraction(w) for w in weights)
    counts = [0] * len(weights)
    for row in range(300):
        source, place = mixture(row)
        assert place == counts[source]  # each source's own rows in order, none left out
        counts[source] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (row + 1) * Fraction(weight) / total) < len(weights)
    # far into a run, found without what came before
    for row in range(start, start + 20):
        source, place = mixture(row)
        assert abs(place - row * Fraction(weights[source]) / total) < len(weights)


def test_rows_of_a_run_come_in_the_weights_proportions(make_store: Any) -> None:
    stores = [make_store(numbered(40)), make_store(numbered(9, first=1000)), make_store(numbered(20, first=2000))]
    loader = Loader(stores, [5, 1, 2], context=5, batch=8, seed=3)
    starts = torch.cat([loader.batch(i).ids[:, 0] for i in range(20)])
    assert Counter((starts // 1000).tolist()) == {0: 100, 1: 20, 2: 40}
    small = starts[starts // 1000 == 1].tolist()
    windows = [1000 + 5 * w for w in range(12)]  # 63 tokens: 12 windows, gone through 1 time and more
    assert sorted(small[:12]) == windows and loader.epochs(20)[1] == pytest.approx(20 / 12)
    assert np.allclose(loader.epochs(20), (100 / 55, 20 / 12, 40 / 27))


def test_isolating_names_the_document_of_every_token(make_store: Any) -> None:
    documents = [[1] * 3, [2] * 11, [3], [4] * 6, [5] * 2, [6] * 9]
    store = make_store(documents, per_shard=2)
    loader = Loader(store, context=4, batch=7, seed=0, isolate=True)
    batch = loader.batch(0)
    assert batch.documents is not None and batch.documents.dtype == torch.int64
    assert torch.equal(batch.documents, batch.ids - 1)  # by construction document d holds the id d + 1


def test_stores_shorter_than_a_window_say_what_fits(make_store: Any) -> None:
    store = make_store([[1] * 9], name="the training text of poems")
    assert Loader(store, context=8, batch=1, seed=0).batch(3).ids.shape == (1, 9)
    with pytest.raises(DataError, match="poems has 9 tokens") as caught:
        Loader(store, context=9, batch=1, seed=0)
    assert "largest context that fits is 8" in str(caught.value)
    with pytest.raises(DataError, match="has 0 tokens"):
        Loader(make_store([]), context=1, batch=1, seed=0)


@pytest.mark.parametrize(
    "change",
    [
        {"weights": [1.0]},
        {"weights": [1.0, 0.0]},
        {"weights": [1.0, float("nan")]},
        {"batch": 0},
        {"context": 0},
        {"ranks": 4},
        {"rank": 1},
        {"rank": -1},
    ],
)
def test_sizes_that_do_not_fit_are_refused(make_store: Any, change: dict[str, Any]) -> None:
    stores = [make_store(numbered(9)), make_store(numbered(9))]
    with pytest.raises(InputError):
        Loader(stores, **({"weights": None, "context": 4, "batch": 6, "seed": 0} | change))
