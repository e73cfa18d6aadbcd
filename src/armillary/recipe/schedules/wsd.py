"""Warm-up, stable, decay: the full rate for most of the run, then a short descent.

The stable part does not depend on the number of steps, so a run can be made longer later.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from armillary.base.errors import SettingsError
from armillary.recipe.schedules import ScheduleSettings, Steps, count, fits, schedules


@schedules.register
class WarmupStableDecaySettings(ScheduleSettings):
    """1, then over the last `decay` steps from 1 to `final`, linearly or as 1 − √progress."""

    kind: ClassVar[str] = "wsd"
    source: ClassVar[str] = (
        "Hu et al. 2024, MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies; "
        "Hägele et al. 2024, Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations"
    )
    oracle: ClassVar[str] = "tests/recipe/test_schedules.py: its closed form"

    decay: Steps = Field(0.2, description="steps of the descent at the end; below 1, a share of all steps")
    final: float = Field(0.0, ge=0, le=1, description="share of the rate that is left at the end")
    shape: Literal["linear", "sqrt"] = Field("linear", description="of the descent: linear, or sqrt for 1 − √progress")

    def share(self, step: int, steps: int) -> float:
        start = steps - count(self.decay, steps)
        if step <= start:
            return super().share(step, steps)
        progress = (step - start) / (steps - start)
        left = 1 - progress if self.shape == "linear" else 1 - progress**0.5
        return self.final + (1 - self.final) * left

    def after(self, step: int, steps: int) -> float:
        return 1.0

    def check(self, steps: int) -> None:
        super().check(steps)
        fits("decay", self.decay, steps)
        if count(self.warmup, steps) + count(self.decay, steps) > steps:
            raise SettingsError(f"warm-up and decay together are longer than the {steps} steps of the run")
