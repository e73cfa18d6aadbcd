"""Bootstrap intervals against the normal approximation, an enumeration of all resamples, and their coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from armillary.evaluate.intervals import Interval, bits_per_byte, difference, perplexity, ratio, resampled_sums


def sample(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Nats and bytes of documents of very different sizes and difficulty."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(200, 4000, count).astype(float)
    return sizes * generator.normal(1.2, 0.25, count), sizes


def test_the_value_is_the_ratio_of_sums() -> None:
    found = bits_per_byte([10.0, 30.0], [5, 15])
    assert found.value == pytest.approx(40 / 20 / math.log(2))
    assert perplexity([10.0, 30.0], [5, 15]).value == pytest.approx(math.exp(2.0))


def test_many_documents_agree_with_the_normal_approximation() -> None:
    nats, sizes = sample(800, seed=1)
    found = ratio(nats, sizes)
    # delta method for a ratio of means
    residual = nats - found.value * sizes
    error = math.sqrt(residual.var(ddof=1) / len(nats)) / sizes.mean()
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.12 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.12 * error)
    narrow = ratio(nats, sizes, level=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.6745 * error, rel=0.08)


def test_three_documents_agree_with_all_27_resamples() -> None:
    nats, sizes = np.array([1.0, 5.0, 12.0]), np.array([2.0, 4.0, 5.0])
    every = [nats[list(draw)].sum() / sizes[list(draw)].sum() for draw in itertools.product(range(3), repeat=3)]
    found = ratio(nats, sizes, level=0.8, resamples=20_000)
    assert found.low == pytest.approx(np.quantile(every, 0.1), abs=0.03)
    assert found.high == pytest.approx(np.quantile(every, 0.9), abs=0.03)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    trials = 400
    hits = 0
    for trial in range(trials):
        nats, sizes = sample(60, seed=1000 + trial)
        found = ratio(nats, sizes, resamples=500, seed=trial)
        hits += found.low <= 1.2 <= found.high
    # percentile intervals of 60 documents cover a little less than 95%; the spread of the count is ±2.2%
    assert 0.90 <= hits / trials <= 0.98


def test_a_paired_difference_is_sharper_than_two_intervals() -> None:
    nats, sizes = sample(100, seed=4)
    better = nats * 0.99 - np.random.default_rng(0).normal(0, 1, 100)
    found = difference(nats, better, sizes)
    assert found.low > 0
    assert found.value == pytest.approx(bits_per_byte(nats, sizes).value - bits_per_byte(better, sizes).value)
    apart = bits_per_byte(nats, sizes)
    assert found.high - found.low < 0.1 * (apart.high - apart.low)
    same = difference(nats, nats, sizes)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_equal_seeds_draw_equal_documents() -> None:
    columns = np.stack(sample(50, seed=2), axis=1)
    first = resampled_sums(columns, seed=5)
    assert np.array_equal(first, resampled_sums(columns, seed=5))
    assert not np.array_equal(first, resampled_sums(columns, seed=6))
    assert np.allclose(first.mean(0), columns.sum(0), rtol=0.02)


def test_chunks_of_resamples_are_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = np.stack(sample(50, seed=2), axis=1)
    whole = resampled_sums(columns, resamples=101)
    monkeypatch.setattr("armillary.evaluate.intervals.CHUNK", 700)
    # the same draws; a product of other shapes may add in another order
    np.testing.assert_allclose(resampled_sums(columns, resamples=101), whole, rtol=1e-12)


def test_one_document_has_no_interval() -> None:
    found = bits_per_byte([7.0], [10])
    assert found.low is None and found.high is None
    assert str(found) == f"{found.value:.3f}"
    assert str(Interval(1.0, 0.5, 1.5)) == "1.000 [0.500, 1.500]"


def test_useless_input_is_refused() -> None:
    with pytest.raises(ValueError, match="no documents"):
        ratio([], [])
    with pytest.raises(ValueError, match="divide"):
        ratio([1.0], [0.0])
    with pytest.raises(ValueError, match="one number per document"):
        ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="level"):
        ratio([1.0, 2.0], [1.0, 2.0], level=95)
