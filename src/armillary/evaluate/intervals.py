"""How sure a measurement is: bootstrap intervals over documents, and paired differences of two models.

Documents, not tokens, are drawn again: the tokens of one document depend on each other, so that
intervals over tokens would be far too narrow. After B. Efron and R. Tibshirani, "An Introduction to
the Bootstrap" (1993), chapters 12-13 (percentile intervals).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
RESAMPLES = 2000
LEVEL = 0.95
CHUNK = 4_000_000  # counts held at a time


@dataclass(frozen=True)
class Interval:
    """A measured value and the ends of its confidence interval (None where one document says nothing of spread)."""

    value: float
    low: float | None
    high: float | None
    level: float = LEVEL

    def to_data(self) -> dict[str, Any]:
        return {"value": self.value, "low": self.low, "high": self.high, "level": self.level}

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def resampled_sums(columns: Floats, *, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """columns: [documents, K] → [resamples, K]: the columns' sums over documents drawn with replacement.

    Equal seeds and numbers of documents draw the same documents, so two models can be compared in pairs.
    """
    count = len(columns)
    generator = np.random.default_rng(seed)
    share = np.full(count, 1.0 / count)
    step = max(1, CHUNK // count)
    parts = [
        generator.multinomial(count, share, size=min(step, resamples - done)) @ columns
        for done in range(0, resamples, step)
    ]
    return np.concatenate(parts)


def ratio(
    above: ArrayLike, below: ArrayLike, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Σ above / Σ below over documents ([N] each), with its percentile interval. Raises ValueError."""
    columns = _columns(above, below)
    total = columns.sum(0)
    if total[1] <= 0:
        raise ValueError("there is nothing to divide by")
    sums = _drawn(columns, 1, resamples, seed)
    return _interval(float(total[0] / total[1]), None if sums is None else sums[:, 0] / sums[:, 1], level)


def bits_per_byte(nats: ArrayLike, sizes: ArrayLike, **options: Any) -> Interval:
    """Σ nats / ln 2 / Σ bytes. nats, sizes: [N], per document; options: as in `ratio`."""
    return ratio(np.asarray(nats, np.float64) / math.log(2), sizes, **options)


def perplexity(nats: ArrayLike, tokens: ArrayLike, **options: Any) -> Interval:
    """exp(Σ nats / Σ tokens), per token: comparable only between models of one tokenizer."""
    found = ratio(nats, tokens, **options)
    low, high = (None if end is None else _exp(end) for end in (found.low, found.high))
    return Interval(_exp(found.value), low, high, found.level)


def difference(
    first: ArrayLike,
    second: ArrayLike,
    sizes: ArrayLike,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Bits per byte of a first model minus those of a second on the same documents.

    first, second: [N] nats per document; sizes: [N] bytes. Both are resampled together, so the spread
    between documents that is common to both drops out; 0 outside the interval tells them apart.
    """
    columns = _columns(np.asarray(first, np.float64) - np.asarray(second, np.float64), sizes)
    return bits_per_byte(columns[:, 0], columns[:, 1], level=level, resamples=resamples, seed=seed)


def _columns(above: ArrayLike, below: ArrayLike) -> Floats:
    left, right = np.asarray(above, np.float64), np.asarray(below, np.float64)
    if left.ndim != 1 or left.shape != right.shape:
        raise ValueError(f"one number per document is needed, found shapes {left.shape} and {right.shape}")
    if left.size == 0:
        raise ValueError("there are no documents")
    return np.stack([left, right], axis=1)


def _drawn(columns: Floats, below: int, resamples: int, seed: int) -> Floats | None:
    """Resampled sums whose divisor is not zero, or None for a single document."""
    if len(columns) < 2:
        return None
    sums = resampled_sums(columns, resamples=resamples, seed=seed)
    return sums[sums[:, below] > 0]


def _interval(value: float, drawn: Floats | None, level: float) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level {level} is not between 0 and 1")
    if drawn is None:
        return Interval(value, None, None, level)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), level)


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # beyond that a float64 overflows, and the figure says nothing more
