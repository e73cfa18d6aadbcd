"""Intervals and corrections against published tables, simulation and plain formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest

from armillary.compare.statistics import (
    exponent,
    holm,
    normal_quantile,
    over_runs,
    proportion,
    spread,
    t_quantile,
    t_tail,
)


# Student's table, as in Fisher & Yates 1963, Statistical Tables.
@pytest.mark.parametrize(
    "freedom, share, value",
    [
        (1, 0.975, 12.706),
        (2, 0.975, 4.303),
        (4, 0.975, 2.776),
        (9, 0.975, 2.262),
        (30, 0.975, 2.042),
        (4, 0.995, 4.604),
    ],
)
def test_student(freedom: int, share: float, value: float) -> None:
    assert t_quantile(share, freedom) == pytest.approx(value, abs=6e-4)
    assert t_tail(value, freedom) == pytest.approx(2 * (1 - share), rel=2e-3)


def test_student_has_its_known_limits() -> None:
    for t in (0.1, 1.0, 7.0):  # one degree of freedom is Cauchy's distribution, many are the normal one
        assert t_tail(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-9)
        assert t_tail(t, 1e7) == pytest.approx(math.erfc(t / math.sqrt(2)), rel=1e-4)
    assert normal_quantile(0.975) == pytest.approx(1.959964, abs=1e-5)


def test_holm() -> None:
    # The worked steps of the procedure: 4 · 0.005, 3 · 0.01, 2 · 0.03, and never below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_proportion() -> None:
    found = proportion(9, 10)
    assert (found.low, found.high) == (pytest.approx(0.596, abs=1e-3), pytest.approx(0.982, abs=1e-3))
    sure = proportion(10, 10)
    assert sure.high == pytest.approx(1.0) and sure.low == pytest.approx(0.722, abs=1e-3)
    with pytest.raises(ValueError):
        proportion(3, 2)


def test_one_seed_or_one_document_says_nothing_of_both() -> None:
    sizes = [10, 20, 30]
    one = spread([[1.0, 2.0, 3.0]], sizes)
    assert one.seeds.low is None and one.documents.low is not None and one.both.low is None and one.p is None
    alone = spread([[1.0], [2.0]], [10])
    assert alone.documents.low is None and alone.seeds.low is not None and alone.both.low is None
    assert one.value == pytest.approx(6 / 60 / math.log(2))
    with pytest.raises(ValueError):
        spread([[1.0, 2.0]], sizes)


def test_the_interval_over_both_holds_the_others_and_agrees_with_p() -> None:
    draw = np.random.default_rng(0)
    for shift in (0.0, 0.05, 0.3):
        sizes = draw.integers(100, 300, 12)
        parts = (0.02 * draw.standard_normal((4, 1)), 0.03 * draw.standard_normal((1, 12)))
        found = spread((shift + parts[0] + parts[1]) * sizes, sizes)
        wide = found.both.high - found.both.low  # type: ignore[operator]
        for narrow in (found.seeds, found.documents):
            assert wide >= narrow.high - narrow.low  # type: ignore[operator]
        assert found.p is not None
        assert (found.p < 0.05) == (not found.both.low <= 0 <= found.both.high)  # type: ignore[operator]


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """300 experiments with known means: seeds and documents both vary."""
    draw = np.random.default_rng(1)
    inside = 0
    sizes = np.full(16, 100)
    for _ in range(300):
        noise = 0.05 * draw.standard_normal((3, 1)) + 0.05 * draw.standard_normal((1, 16))
        found = spread((1.0 + noise) * sizes * math.log(2), sizes)
        inside += found.both.low <= 1.0 <= found.both.high  # type: ignore[operator]
    assert inside >= 277  # 95 % less three standard deviations


def test_growth() -> None:
    lengths = [64, 128, 256, 512]
    exact = exponent(lengths, [3e-6 * n**1.5 for n in lengths])
    assert exact.value == pytest.approx(1.5) and exact.low == pytest.approx(1.5, abs=1e-6)
    rough = exponent(lengths, [1.0, 2.2, 3.7, 8.5])
    slope, rest = np.polyfit(np.log(lengths), np.log([1.0, 2.2, 3.7, 8.5]), 1, cov=True)
    half = 4.302653 * math.sqrt(rest[0, 0])
    assert rough.value == pytest.approx(slope[0]) and rough.high == pytest.approx(slope[0] + half, rel=1e-5)
    assert exponent([1, 2], [1, 2]).low is None


def test_over_runs() -> None:
    found = over_runs([1.0, 2.0, 3.0])
    assert found.value == 2 and found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), rel=1e-5)
    assert over_runs([1.0]).low is None
