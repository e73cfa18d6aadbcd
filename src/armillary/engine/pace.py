"""How many prompt tokens a step takes: as many as the running answers' own time allows.

A prompt may make a step of running answers up to SHARE longer than it is without: steps vary, and no gap between their
tokens shall double. What that comes to is learnt from the steps. There are two ways to read a piece of a prompt: in
one call with the answers' tokens, where a native step takes both, or by itself with PyTorch's products, which
is quicker for many tokens and slow for a few: then LEAST are read, however long they take, or as many as take SHORT, so
that next to short steps the bound of SHARE does not hold.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

import numpy as np

WHOLE = 2048  # prompt tokens in a step, at the most
FIRST = 256  # while it is not known how long a token takes
LEAST = 48  # by themselves, however slow: fewer take nearly as long
MANY = 4 * LEAST  # from here on the time of a token by itself says what others would take
FEWEST = 2  # in one call with the answers, however slow
SHARE = 0.4  # of the time of a step of running answers: what a prompt may add to it
SHORT = 0.03  # seconds that tokens read by themselves may add in any case
LONGEST = 5.0  # seconds of a step where nobody waits for the next token
RECENT = 0.3  # weight of the last time in what is learnt
FRESH = 32  # steps with pieces after which one goes without, so that its own time stays known
KNOWN = 3  # steps without pieces after which their time counts as known
PATIENT = 4  # steps with pieces between steps that go without because their time is not known
GROWTH = 2  # times as many tokens as the last piece had, at the most: what is learnt of few says little of many


class Beside:
    """What pieces add to a step that computes them in one call with its answers: with n tokens behind c earlier
    ones, a n + b n c + d c seconds (products; attention; reading keys and values), by least squares over
    recent pieces, older ones counting less and less."""

    FORGET, RIDGE, UNIT = 0.97, 0.05, 1024.0

    def __init__(self) -> None:
        self._squares, self._times = np.zeros((3, 3)), np.zeros(3)
        self._rates: np.ndarray | None = None

    def saw(self, pieces: Sequence[tuple[int, int]], seconds: float) -> None:
        """pieces: tokens of each, and how many came before."""
        x = self._features(pieces)
        self._squares = self.FORGET * self._squares + np.outer(x, x)
        self._times = self.FORGET * self._times + x * seconds
        self._rates = None

    def fitting(self, context: int, seconds: float, most: int) -> int:
        """Tokens that come to so many seconds behind `context` earlier ones, at the most `most`."""
        if self._rates is None:
            self._rates = np.linalg.solve(self._squares + self.RIDGE * np.eye(3), self._times)
        token, look, read = self._rates.tolist()
        c = context / self.UNIT
        each, left = token + look * c, seconds - read * c
        return most if each * most <= left else max(0, int(left / each))

    def _features(self, pieces: Sequence[tuple[int, int]]) -> np.ndarray:
        contexts = [(count, before / self.UNIT) for count, before in pieces]
        return np.array([sum(n for n, _ in contexts), sum(n * c for n, c in contexts), sum(c for _, c in contexts)])


class Pace:
    """token: seconds of a prompt token read by itself, 0 until known."""

    def __init__(self) -> None:
        self.token = 0.0
        self.beside = Beside()
        self._steps: dict[int, deque[float]] = {}  # by the number of answers: the last times
        self._pieces = PATIENT  # steps with pieces since the last one without
        self._last = FEWEST  # tokens of the last piece read with answers

    def read(self, tokens: int, seconds: float) -> None:
        """Tokens of prompts were read by themselves; a few say nothing of what many cost."""
        if tokens >= LEAST:
            self.token = seconds / tokens if self.token == 0 else _learnt(self.token, seconds / tokens)

    def went(self, answers: int, seconds: float) -> None:
        """So many running answers went a step on, without any piece."""
        self._steps.setdefault(answers, deque(maxlen=5)).append(seconds)
        self._pieces = 0

    def joined(self, answers: int, pieces: Sequence[tuple[int, int]], seconds: float) -> None:
        """So many answers went on, and pieces were read in the same call; pieces: tokens, and how many came
        before them."""
        own, tokens = self.step(answers), sum(count for count, _ in pieces)
        if own == 0:  # what they added cannot be told
            return
        # a step that was held up by something else is no measure
        added = min(max(0.0, seconds - own), 3 * SHARE * own)
        self.beside.saw(pieces, added)
        self.token = self.token or added / tokens
        self._last = tokens

    def step(self, answers: int) -> float:
        """Seconds of a step of so many answers, or of the nearest number that was seen; 0 when none was."""
        if not self._steps:
            return 0.0
        return statistics.median(self._steps[min(self._steps, key=lambda seen: abs(seen - answers))])

    def budget(self, answers: int, context: int = 0, most: int = 0) -> int:
        """Prompt tokens of the next step; answers: how many go on in it; context: tokens before the piece; most: how
        many tokens one call takes with those of the answers, 0 where prompts are read by themselves."""
        if not answers:
            return FIRST if self.token == 0 else max(LEAST, min(WHOLE, int(LONGEST / self.token)))
        seconds = SHARE * self.step(answers)
        if most <= 0:
            if self.token == 0:
                return FIRST
            return max(LEAST, min(WHOLE, int(max(SHORT, seconds) / self.token)))
        self._pieces += 1
        known = len(self._steps.get(answers, ())) >= KNOWN
        if self._pieces > (FRESH if known else PATIENT):
            self._pieces = 0
            return 0
        alone = int(seconds / self.token) if self.token else 0
        if alone > max(most, MANY):  # long steps, in which PyTorch's products read more
            return min(WHOLE, alone)
        return max(min(FEWEST, most), self.beside.fitting(context, seconds, min(most, GROWTH * self._last)))


def _learnt(before: float, now: float) -> float:
    return (1 - RECENT) * before + RECENT * now
