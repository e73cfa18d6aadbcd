"""How the learning rate moves over a run: one file per schedule.

A schedule is a pure function of the step: `share(step, steps)` in [0, 1] times the learning rate.
Steps count from 0; update number `step` uses `share(step, steps)`, so the first update already
moves the weights, and a decay arrives at its end with the last update done, not before it.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

from pydantic import Field

from armillary.base.errors import SettingsError
from armillary.base.registry import Registry
from armillary.base.settings import Choice

schedules: Registry[ScheduleSettings] = Registry("schedule", "armillary.recipe.schedules", default="cosine")

Steps = Annotated[int | float, Field(ge=0)]


class ScheduleSettings(Choice):
    """A linear warm-up, then what the kind says."""

    choices: ClassVar[Registry[ScheduleSettings]] = schedules

    warmup: Steps = Field(0.02, description="steps until the full rate; below 1, a share of all steps")

    def share(self, step: int, steps: int) -> float:
        """The share of the learning rate that update `step` (0 ≤ step < steps) uses."""
        warmup = count(self.warmup, steps)
        if step < warmup:
            return (step + 1) / warmup
        return self.after(step - warmup, steps - warmup)

    def after(self, step: int, steps: int) -> float:
        """The share at `step` of the `steps` that follow the warm-up."""
        raise NotImplementedError

    def check(self, steps: int) -> None:
        """Raise SettingsError when the parts of the schedule do not fit into `steps`."""
        fits("warmup", self.warmup, steps)


def count(length: int | float, steps: int) -> int:
    """A length in steps: itself when whole, else that share of `steps`, rounded down."""
    return length if isinstance(length, int) else math.floor(length * steps + 1e-9)  # 0.29 · 100 is 28.999…


def fits(name: str, length: int | float, steps: int) -> None:
    """Raise SettingsError unless `length` is whole and at most `steps`, or a share of at most 1."""
    if isinstance(length, float) and length > 1:
        raise SettingsError(
            f"a share of all steps is at most 1.0, found {length}", path=(name,), hint="a whole number counts steps"
        )
    if isinstance(length, int) and length > steps:
        raise SettingsError(f"{length} steps do not fit into a run of {steps}", path=(name,))
