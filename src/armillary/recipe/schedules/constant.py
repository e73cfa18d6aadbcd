"""The full rate from the end of the warm-up on."""

from __future__ import annotations

from typing import ClassVar

from armillary.recipe.schedules import ScheduleSettings, schedules


@schedules.register
class ConstantSettings(ScheduleSettings):
    """1 after the warm-up."""

    kind: ClassVar[str] = "constant"
    oracle: ClassVar[str] = "tests/recipe/test_schedules.py: its closed form"

    def after(self, step: int, steps: int) -> float:
        return 1.0
