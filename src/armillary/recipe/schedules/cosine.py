"""Cosine decay: fast in the middle, slow at both ends."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field

from armillary.recipe.schedules import ScheduleSettings, schedules


@schedules.register
class CosineSettings(ScheduleSettings):
    """final + (1 − final) · (1 + cos(π · step / steps)) / 2 after the warm-up."""

    kind: ClassVar[str] = "cosine"
    source: ClassVar[str] = "Loshchilov and Hutter 2017, SGDR: Stochastic Gradient Descent with Warm Restarts"
    oracle: ClassVar[str] = "tests/recipe/test_schedules.py: its closed form"

    final: float = Field(0.1, ge=0, le=1, description="share of the rate that is left at the end")

    def after(self, step: int, steps: int) -> float:
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * step / steps)) / 2
