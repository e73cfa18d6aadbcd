"""What a handful of paired runs allows to say: intervals, p-values, corrections, growth exponents.

Two things vary: the seed of a run (first weights, order of the data) and the documents it is
measured on. Each is described alone, Student's t over seeds and the bootstrap over documents, and
both together by recovering the variances from the two intervals (Zou & Donner 2008, Construction of
confidence intervals about effect measures: a general approach), so that the common interval is wider
than each; what is claimed rests on it. Several comparisons with one reference are
corrected after Holm 1979, A Simple Sequentially Rejective Multiple Test Procedure. Proportions have
the interval of Wilson 1927, Probable Inference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from armillary.evaluate.intervals import LEVEL, Interval, resampled_sums

Floats = NDArray[np.float64]
BITS = 1 / math.log(2)


@dataclass(frozen=True)
class Spread:
    """A mean with its interval over seeds (None for one seed), over documents (None for one document),
    and over both. The last is None when either is: what has not been varied may vary."""

    value: float
    seeds: Interval
    documents: Interval
    both: Interval
    errors: tuple[tuple[float, float], ...] = ()  # standard error and degrees of freedom, of each

    @property
    def p(self) -> float | None:
        """1 less the level at which the interval over both would just reach 0; None without one."""
        if self.both.low is None:
            return None
        if not any(error for error, _ in self.errors):
            return 1.0 if self.value == 0 else 0.0
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if half_width(self.errors, 1 - middle) > abs(self.value) else (low, middle)
        return high


def spread(nats: Sequence[Sequence[float]] | Floats, sizes: Sequence[int] | Floats, *, seed: int = 0) -> Spread:
    """Bits per byte over runs and documents.

    nats: [seeds, documents], of one variant, or differences of two, paired by seed and document;
    sizes: [documents] bytes. Every run is measured on the same documents.
    """
    values, weights = np.asarray(nats, np.float64) * BITS, np.asarray(sizes, np.float64)
    if values.ndim != 2 or values.shape[1] != len(weights) or not values.size:
        raise ValueError(f"nats of shape {values.shape} do not fit {len(weights)} documents")
    each = values.sum(1) / weights.sum()
    value = float(each.mean())
    runs, documents = values.shape
    errors: list[tuple[float, float]] = []
    over_seeds = over_documents = Interval(value, None, None)
    if runs > 1:
        errors.append((float(each.std(ddof=1)) / runs**0.5, runs - 1))
        over_seeds = _around(value, *errors[-1])
    if documents > 1:
        sums = resampled_sums(np.stack([values.mean(0), weights], axis=1), seed=seed)
        drawn = sums[:, 0] / sums[:, 1]
        errors.append((float(drawn.std(ddof=1)), documents - 1))
        low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        over_documents = Interval(value, float(low), float(high))
    if len(errors) < 2:
        return Spread(value, over_seeds, over_documents, Interval(value, None, None), tuple(errors))
    half = half_width(errors, LEVEL)
    return Spread(value, over_seeds, over_documents, Interval(value, value - half, value + half), tuple(errors))


def half_width(errors: Sequence[tuple[float, float]], level: float) -> float:
    """Of the interval around a sum of independent estimates, from the half-widths of their own."""
    return math.hypot(*(t_quantile((1 + level) / 2, freedom) * error for error, freedom in errors))


def over_runs(values: Sequence[float]) -> Interval:
    """The mean of one number per run, with its t interval."""
    data = np.asarray(values, np.float64)
    mean = float(data.mean())
    if len(data) < 2:
        return Interval(mean, None, None)
    return _around(mean, float(data.std(ddof=1)) / len(data) ** 0.5, len(data) - 1)


def percent_apart(values: Sequence[float], base: Sequence[float]) -> Interval:
    """Paired differences from `base`, one number per run of each, in % of its mean: their mean with its t interval."""
    middle = float(np.mean(base))
    return over_runs([100 * (a - b) / middle for a, b in zip(values, base, strict=True)])


def holm(values: Sequence[float]) -> list[float]:
    """p-values of several comparisons, each raised so that all hold together."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = highest
    return adjusted


def proportion(right: int, count: int, level: float = LEVEL) -> Interval:
    """right of count, with Wilson's interval."""
    if not 0 <= right <= count or not count:
        raise ValueError(f"{right} of {count} is no proportion")
    z = normal_quantile((1 + level) / 2)
    share = right / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), level)


def exponent(lengths: Sequence[float], times: Sequence[float]) -> Interval:
    """The b of time = a · length^b: least squares on logarithms, with the t interval of the slope."""
    x, y = np.log(np.asarray(lengths, np.float64)), np.log(np.asarray(times, np.float64))
    if len(x) < 2 or len(x) != len(y) or np.ptp(x) == 0:
        raise ValueError("a slope needs at least two different lengths, each with its time")
    x = x - x.mean()
    slope = float((x * y).sum() / (x * x).sum())
    freedom = len(x) - 2
    if freedom < 1:
        return Interval(slope, None, None)
    rest = y - y.mean() - slope * x
    return _around(slope, math.sqrt(float((rest * rest).sum()) / freedom / float((x * x).sum())), freedom)


def _around(value: float, error: float, freedom: float) -> Interval:
    half = t_quantile((1 + LEVEL) / 2, freedom) * error
    return Interval(value, value - half, value + half)


# -- Student's t, so that SciPy is not needed


def t_tail(t: float, freedom: float) -> float:
    """P(|T| ≥ t) for Student's t with `freedom` degrees of freedom."""
    return _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


def t_quantile(share: float, freedom: float) -> float:
    """The t with P(T ≤ t) = share, for share ≥ ½."""
    low, high = 0.0, 1.0
    while t_tail(high, freedom) / 2 > 1 - share:
        low, high = high, 2 * high
    for _ in range(52):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, freedom) / 2 > 1 - share else (low, middle)
    return (low + high) / 2


def normal_quantile(share: float) -> float:
    """The z with P(Z ≤ z) = share, for share ≥ ½."""
    low, high = 0.0, 40.0
    for _ in range(52):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erfc(middle / math.sqrt(2)) / 2 > 1 - share else (low, middle)
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised I_x(a, b) by its continued fraction (DLMF 8.17.22), which converges fast on one side."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    value = 1.0
    for i in range(60 + 4 * math.isqrt(int(max(a, b)) + 1), 0, -1):
        m = i // 2
        if i % 2:
            term = -(a + m) * (a + b + m) / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) / ((a + 2 * m - 1) * (a + 2 * m))
        value = 1 + term * x / value
    return front / a / value
