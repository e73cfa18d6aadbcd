"""How many prompt tokens a step takes. Expected values follow from the times that are told."""

from __future__ import annotations

import pytest
from engine_parts import network_of

from armillary.engine.core import Engine
from armillary.engine.pace import FIRST, LEAST, LONGEST, SHARE, SHORT, WHOLE, Pace
from armillary.engine.request import Request
from armillary.engine.sampling import Sampling


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


def test_an_engine_learns_from_prompts_that_are_read_together() -> None:
    engine = Engine(network_of(block={"mixer": {"kind": "attention", "heads": 2}, "channel": "ffn"}), slots=2)
    asked = Sampling(max_new_tokens=4, temperature=0)
    assert LEAST > 30
    engine.run([Request(tuple(range(20)) + (row,) * 10, asked) for row in range(2)])
    assert engine.pace.token > 0 and engine.pace.step > 0
