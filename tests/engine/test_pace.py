"""How many prompt tokens a step takes. Expected values follow from the times that are told."""

from __future__ import annotations

import pytest

from armillary.engine.pace import FIRST, LEAST, LONGEST, SHARE, SHORT, WHOLE, Pace


def test_a_prompt_adds_less_to_a_step_than_the_step_itself_takes() -> None:
    pace = Pace()
    assert pace.budget(True) == pace.budget(False) == FIRST
    pace.read(500, 0.5)  # a millisecond each
    pace.went(0.1)
    assert pace.budget(True) == int(SHARE * 100)
    assert pace.budget(False) == WHOLE < LONGEST * 1000
    pace.read(LEAST - 1, 100.0)  # says nothing
    assert pace.budget(True) == int(SHARE * 100)


def test_a_prompt_never_stands_still() -> None:
    pace = Pace()
    pace.read(500, 500.0)
    assert pace.budget(True) == LEAST  # nothing is known of a step
    pace.went(1e-3)
    assert pace.budget(True) == LEAST
    quick = Pace()
    quick.read(1000, 0.1)
    quick.went(1e-3)
    assert quick.budget(True) == int(SHORT / 1e-4)  # in a gap that nobody notices
    assert Pace().budget(True) == FIRST


def test_times_are_followed() -> None:
    pace = Pace()
    pace.read(100, 0.1)
    for _ in range(40):
        pace.read(100, 0.2)
        pace.went(0.5)
    assert pace.token == pytest.approx(0.002, rel=1e-3)
    assert pace.budget(True) == pytest.approx(SHARE * 0.5 / 0.002, abs=1)
