"""Watermarks: a statistical mark on the tokens of an answer, which whoever holds the key can find again.

Two kinds, both keyed by the tokens before a place (`context` of them). `kgw` adds a bias to the scores of a
keyed share of the vocabulary (Kirchenbauer et al. 2023, A Watermark for Large Language Models). `gumbel`
draws with keyed noise in place of random noise, so that over keys every token is as likely as without
(Aaronson 2023, in Kuditipudi et al. 2023, Robust Distortion-free Watermarks for Language Models).

What holds for both: a context that came before in the answer marks nothing (the same noise twice would be
seen, as loops); nor do the first `context` tokens, whose context is the prompt, which a detector does not
know. They are drawn freely, so answers to one prompt differ by their seeds. The detector counts the first
token after each context only, so that without the mark its counts are independent of each other, whatever
the text: z is about N(0, 1), and p is exact. Each token is in the share by itself, instead of exactly so
many of the vocabulary, so that a detector need not know how many entries an embedding has.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from armillary.base.errors import InputError
from armillary.engine.steps import Step
from armillary.text import Tokenizer

KEY = "ARMILLARY_WATERMARK_KEY"
LEAST = 16  # bytes of a key

Kind = Literal["gumbel", "kgw"]


@dataclass(frozen=True)
class Watermark:
    """How answers are marked (see `sampling.Mark`), and how the mark is found again.

    key: a secret of at least 16 bytes, which appears in no text about the watermark; context: tokens that
    the noise of a place depends on: fewer survive more editing, more are harder to learn from answers;
    kgw: share: of the vocabulary whose scores are raised (γ), and bias: by how much (δ, nats).
    """

    key: bytes = field(repr=False)
    kind: Kind = "gumbel"
    context: int = 4
    share: float = 0.5
    bias: float = 2.0

    def __post_init__(self) -> None:
        if len(self.key) < LEAST:
            raise InputError(f"the watermark's key has {len(self.key)} bytes", hint=f"give at least {LEAST}")
        if self.kind not in ("gumbel", "kgw"):
            raise InputError(f"there is no watermark of kind '{self.kind}'", hint="use gumbel or kgw")
        if self.context < 1:
            raise InputError(f"a watermark's context is {self.context}", hint="give at least one token")
        if not 0 < self.share < 1 or not self.bias > 0:
            raise InputError("a watermark's share lies between 0 and 1, and its bias above 0")

    @property
    def draws(self) -> bool:
        return self.kind == "gumbel"

    def begin(self) -> Step:
        """For the choice of one answer's tokens."""
        return _Marking(self)

    def noise(self, context: Sequence[int], count: int) -> np.ndarray:
        """Keyed uniform numbers in (0, 1) of the first `count` tokens after a context, float64."""
        secret = hashlib.blake2b(self.key).digest()
        place = np.asarray(context, dtype="<i8").tobytes()
        seed = hashlib.blake2b(place, key=secret, digest_size=16, person=self.kind.encode()).digest()
        raw = np.random.Philox(key=int.from_bytes(seed, "little")).random_raw(count)
        return ((np.atleast_1d(raw) >> np.uint64(11)) + 0.5) * 2.0**-53


class _Marking:
    """The mark on one answer."""

    def __init__(self, how: Watermark) -> None:
        self.how, self.ids, self.seen = how, list[int](), set[tuple[int, ...]]()

    def apply(self, scores: Tensor, ids: Sequence[int]) -> Tensor:
        """Scores [V] that are drawn from → with the share raised, or with one token left, which is the draw."""
        context = self._context()
        if context is None or context in self.seen:
            return scores
        noise = torch.from_numpy(self.how.noise(context, len(scores))).to(scores.device)
        if self.how.kind == "kgw":
            return scores + self.how.bias * (noise < self.how.share)
        token = (scores.double() - (-noise.log()).log()).argmax()
        only = torch.full_like(scores, -torch.inf)
        only[token] = 0.0
        return only

    def accept(self, token: int) -> None:
        context = self._context()
        if context is not None:
            self.seen.add(context)
        self.ids.append(token)

    def _context(self) -> tuple[int, ...] | None:
        return tuple(self.ids[-self.how.context :]) if len(self.ids) >= self.how.context else None


@dataclass(frozen=True)
class Detection:
    """z: how far the marks lie above what unmarked text has, in its standard deviations; p: how probable
    as many are without the mark; counted: tokens that could carry it, of so many `tokens`."""

    z: float
    p: float
    counted: int
    tokens: int


def detect(
    given: str | Sequence[int] | Tensor,
    mark: Watermark,
    tokenizer: Tokenizer | None = None,
    *,
    counted: Sequence[bool] | None = None,
) -> Detection:
    """Whether a text, or token ids, carry a watermark; only its key and settings are needed, no model.

    counted: for each token whether it counts; leave out what was forced (see `free`). One test at p < 1e-5
    is a strict one; with many texts, or many parts of one, p has to be smaller as many times.
    """
    if isinstance(given, str):
        if tokenizer is None:
            raise InputError("a text needs the tokenizer that its tokens came from", hint="or give token ids")
        given = tokenizer.encode(given)
    ids = [int(token) for token in given]
    if counted is not None and len(counted) != len(ids):
        raise InputError(f"'counted' speaks of {len(counted)} tokens, and there are {len(ids)}")
    if ids and min(ids) < 0:
        raise InputError("token ids are at least 0")
    values = [float(mark.noise(context, ids[at] + 1)[-1]) for at, context in _places(ids, mark.context, counted)]
    count = len(values)
    if count == 0:
        return Detection(0.0, 1.0, 0, len(ids))
    if mark.kind == "kgw":
        green = sum(value < mark.share for value in values)
        z = (green - mark.share * count) / math.sqrt(count * mark.share * (1 - mark.share))
        return Detection(z, _binomial_tail(green, count, mark.share), count, len(ids))
    total = -sum(math.log1p(-value) for value in values)  # a sum of as many exponentials
    tail = torch.special.gammaincc(torch.tensor(float(count), dtype=torch.float64), torch.tensor(total).double())
    return Detection((total - count) / math.sqrt(count), float(tail), count, len(ids))


def free(ids: Sequence[int], constraint: Step, vocabulary: int, least: int = 2) -> list[bool]:
    """For each token of a constrained answer, whether at least `least` tokens were allowed in its place: those
    that a grammar forced carry no mark. constraint: a fresh one."""
    found = []
    for at, token in enumerate(ids):
        scores = constraint.apply(torch.zeros(vocabulary), ids[:at])
        found.append(int(torch.isfinite(scores).sum()) >= least)
        constraint.accept(token)
    return found


def read_key(path: str | Path | None = None) -> bytes:
    """The secret in a file, or in the environment's ARMILLARY_WATERMARK_KEY; blanks at its ends do not count."""
    if path is not None:
        try:
            key = Path(path).read_bytes().strip()
        except OSError as error:
            raise InputError(f"the watermark's key cannot be read: {error.strerror}", where=str(path)) from None
    else:
        key = os.environ.get(KEY, "").encode().strip()
    if not key:
        raise InputError("there is no watermark key", hint=f"name a file that holds one, or set {KEY}")
    return key


def _places(ids: list[int], size: int, counted: Sequence[bool] | None) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The first place after each context, as far as it counts, and the context."""
    seen: set[tuple[int, ...]] = set()
    for at in range(size, len(ids)):
        context = tuple(ids[at - size : at])
        if context not in seen and (counted is None or counted[at]):
            yield at, context
        seen.add(context)


def _binomial_tail(least: int, count: int, share: float) -> float:
    """Probability of at least `least` hits among `count`."""
    hits = torch.arange(least, count + 1, dtype=torch.float64)
    n = torch.tensor(float(count), dtype=torch.float64)
    ways = torch.lgamma(n + 1) - torch.lgamma(hits + 1) - torch.lgamma(n - hits + 1)
    return min(1.0, float((ways + hits * math.log(share) + (n - hits) * math.log1p(-share)).exp().sum()))
