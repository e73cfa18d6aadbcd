"""How fast a run goes: speed, smoothed loss and time left."""

from __future__ import annotations

import math
import time


class Pace:
    """Speed, smoothed loss and time left, of this stretch."""

    def __init__(self, step: int) -> None:
        self.began = time.perf_counter()
        self.first: tuple[int, float] | None = None  # step and time after the slow first update
        self.loss = math.nan
        self.speed = 0.0
        self._tokens = 0
        self._time = 0.0

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def stepped(self, step: int, tokens: int, seconds: float, loss: float) -> None:
        self._tokens += tokens
        self._time += seconds
        now = tokens / seconds
        if self.first is None:
            self.first = (step, time.perf_counter())
            self.speed = now
        else:
            self.speed += (now - self.speed) * (0.1 if step > self.first[0] + 1 else 1.0)
        if math.isfinite(loss):
            self.loss = loss if math.isnan(self.loss) else 0.95 * self.loss + 0.05 * loss

    def lap(self) -> float:
        """Tokens per second since the last call, evaluation and saving left out."""
        speed = self._tokens / self._time if self._time else 0.0
        self._tokens, self._time = 0, 0.0
        return speed

    def left(self, step: int, steps: int) -> float | None:
        if self.first is None or step < self.first[0] + 3:
            return None
        return (time.perf_counter() - self.first[1]) / (step - self.first[0]) * (steps - step)
