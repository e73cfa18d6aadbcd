"""How many prompt tokens a step takes: as many as the running answers' own time allows.

A prompt may make a step of running answers up to twice as long as it is without, so that no gap between
their tokens doubles. Few tokens at a time are read slowly, so two things are always allowed: a gap that
nobody notices, and a piece of LEAST tokens however long it takes. Times are learnt from the steps.
"""

from __future__ import annotations

WHOLE = 2048  # prompt tokens in a step, at the most
FIRST = 256  # while it is not known how long a token takes
LEAST = 48  # however slow: fewer take nearly as long
SHARE = 0.8  # of the time of a step of running answers: what a prompt may add to it
SHORT = 0.03  # seconds that it may add in any case
LONGEST = 5.0  # seconds of a step where nobody waits for the next token
RECENT = 0.3  # weight of the last time in what is learnt


class Pace:
    """token: seconds of a prompt token; step: seconds of a step of running answers; 0 until known."""

    def __init__(self) -> None:
        self.token = self.step = 0.0

    def read(self, tokens: int, seconds: float) -> None:
        """Tokens of prompts were read in a step; a few say nothing of what many cost."""
        if tokens >= LEAST:
            self.token = _learnt(self.token, seconds / tokens)

    def went(self, seconds: float) -> None:
        """Running answers went a step on."""
        self.step = _learnt(self.step, seconds)

    def budget(self, answering: bool) -> int:
        """Tokens of the next step; answering: there are running answers."""
        if self.token == 0:
            return FIRST
        seconds = max(SHORT, SHARE * self.step) if answering else LONGEST
        return max(LEAST, min(WHOLE, int(seconds / self.token)))


def _learnt(before: float, now: float) -> float:
    return now if before == 0 else (1 - RECENT) * before + RECENT * now
