"""How many prompt tokens a step takes. Expected values follow from the times that are told."""

from __future__ import annotations

import random

import pytest
from engine_parts import network_of

from armillary.engine.core import Engine
from armillary.engine.pace import (
    FEWEST,
    FIRST,
    FRESH,
    GROWTH,
    KNOWN,
    LEAST,
    LONGEST,
    MANY,
    PATIENT,
    SHARE,
    SHORT,
    WHOLE,
    Pace,
)
from armillary.engine.request import Request
from armillary.engine.sampling import Sampling


def told(pace: Pace, answers: int, seconds: float) -> None:
    for _ in range(KNOWN):
        pace.went(answers, seconds)


def test_a_prompt_by_itself_adds_less_to_a_step_than_the_step_itself_takes() -> None:
    pace = Pace()
    assert pace.budget(4) == pace.budget(0) == FIRST
    pace.read(500, 0.5)  # a millisecond each
    pace.went(4, 0.2)
    assert pace.budget(4) == pytest.approx(SHARE * 200, abs=1)
    assert pace.budget(0) == WHOLE < LONGEST * 1000
    pace.read(LEAST - 1, 100.0)  # says nothing
    assert pace.budget(4) == pytest.approx(SHARE * 200, abs=1)


def test_a_prompt_never_stands_still() -> None:
    pace = Pace()
    pace.read(500, 500.0)
    assert pace.budget(1) == LEAST  # nothing is known of a step
    pace.went(1, 1e-3)
    assert pace.budget(1) == LEAST
    quick = Pace()
    quick.read(1000, 0.1)
    quick.went(1, 1e-3)
    assert quick.budget(1) == int(SHORT / 1e-4)  # in a gap that nobody notices
    slow = Pace()
    told(slow, 1, 1e-3)
    slow.joined(1, [(4, 0)], 1.0)
    assert slow.budget(1, 0, 31) == FEWEST


def test_times_are_followed() -> None:
    pace = Pace()
    pace.read(100, 0.1)
    for _ in range(40):
        pace.read(100, 0.2)
        pace.went(1, 0.5)
    assert pace.token == pytest.approx(0.002, rel=1e-3)
    assert pace.budget(1) == pytest.approx(SHARE * 0.5 / 0.002, abs=1)


def added(tokens: int, context: int) -> float:
    """Seconds: products, attention, keys and values read once."""
    return tokens * (3e-4 + 1e-7 * context) + 2e-7 * context


def held_up(draw: random.Random) -> float:
    """How many times as long a step takes as it would: most a little, one in thirty by a multiple."""
    return 1 + abs(draw.gauss(0, 0.1)) + (5 * draw.random() if draw.random() < 0.03 else 0)


@pytest.mark.parametrize("noise", [False, True])
def test_pieces_fit_into_a_step_all_through_a_long_prompt(noise: bool) -> None:
    """The first pieces feel their way; from then on a step with a piece takes hardly more than it may, and reading does
    not take long."""
    draw, pace, own = random.Random(0), Pace(), 0.01
    told(pace, 4, own)
    context, sizes, over, spent = 0, [], 0, 0.0
    while context < 4000:
        size, factor = pace.budget(4, context, 60), held_up(draw) if noise else 1.0
        took = own + (added(size, context) if size else 0)
        spent += took
        if size == 0:
            pace.went(4, took * factor)
            continue
        assert size <= max(FEWEST, GROWTH * max(sizes[-5:], default=0))
        over += size > FEWEST and took > 1.15 * (1 + SHARE) * own
        pace.joined(4, [(size, context)], took * factor)
        sizes.append(size)
        context += size
    fitting = int((SHARE * own - 2e-7 * 4000) / (3e-4 + 1e-7 * 4000))
    assert FEWEST <= sizes[-2] <= fitting + FEWEST
    assert max(sizes) == pytest.approx(SHARE * own / 3e-4, rel=0.35)
    assert over <= 0.01 * len(sizes)
    assert spent < 1.25 * sum((1 + SHARE) * own / max(FEWEST, room(own, at)) for at in range(4000))
    # and after the long one, the next begins with as many as fit there
    for _ in range(6):
        size = pace.budget(4, 0, 60)
        pace.joined(4, [(size, 0)], own + added(size, 0)) if size else pace.went(4, own)
    assert pace.budget(4, 0, 60) == pytest.approx(SHARE * own / 3e-4, rel=0.35)


def room(own: float, context: int) -> float:
    """Tokens that fit into what a step may take longer."""
    return (SHARE * own - 2e-7 * context) / (3e-4 + 1e-7 * context)


@pytest.mark.parametrize("speed", [0.4, 2.5])
def test_a_machine_may_become_quicker_or_slower(speed: float) -> None:
    """What a step takes without pieces is then not what it was: pieces neither grow into all the difference, nor stay
    at the fewest."""
    draw, pace, own = random.Random(1), Pace(), 0.01
    told(pace, 4, own)
    sizes = []
    for step in range(200):
        factor = held_up(draw) * (1 if step < 40 else 1 / speed)
        size = pace.budget(4, 0, 60)
        if size:
            pace.joined(4, [(size, 0)], (own + added(size, 0)) * factor)
            sizes.append(size)
        else:
            pace.went(4, own * factor)
    fits = room(own, 0)
    assert sum(size > 1.5 * fits for size in sizes) <= 40, "until it is noticed"
    assert sum(size > 1.5 * fits for size in sizes[-80:]) <= 8
    assert sum(sizes[-80:]) / 80 > 0.6 * fits


def test_reading_with_answers_says_nothing_of_reading_alone() -> None:
    """However quick a piece seemed to be, it does not make a step of hundreds of tokens."""
    pace = Pace()
    told(pace, 4, 0.1)
    for _ in range(40):
        pace.joined(4, [(8, 0)], 0.0999)
        assert pace.budget(4, 0, 60) <= 60


def test_one_step_that_is_held_up_changes_little() -> None:
    pace = Pace()
    told(pace, 1, 0.01)
    for _ in range(20):
        pace.joined(1, [(8, 0)], 0.01 + 8 * 5e-4)
    before = pace.budget(1, 0, 63)
    assert before == pytest.approx(SHARE * 0.01 / 5e-4, abs=1)
    pace.went(1, 3.0)
    assert pace.step(1) == 0.01
    pace.joined(1, [(8, 0)], 3.0)
    assert before / 2 <= pace.budget(1, 0, 63) <= before


def test_a_piece_that_was_too_long_is_taken_back_at_once() -> None:
    """What shorter ones took says little of it: products go up by steps."""
    pace, own = Pace(), 0.01
    told(pace, 4, own)
    for _ in range(4):
        pace.joined(4, [(12, 0)], own * (1 + SHARE / 4))
    assert pace.budget(4, 0, 60) == int(GROWTH * 12)
    pace.joined(4, [(30, 0)], own * (1 + 3 * SHARE))
    assert pace.budget(4, 0, 60) == pytest.approx(30 / 3, abs=1)


def test_now_and_then_a_step_goes_without() -> None:
    """So that it stays known what a step takes; sooner, where it is not known yet."""
    pace = Pace()
    assert pace.budget(3, 0, 61) == 0
    assert [pace.budget(3, 0, 61) > 0 for _ in range(PATIENT + 1)] == [True] * PATIENT + [False]
    told(pace, 3, 0.01)
    assert [pace.budget(3, 0, 61) > 0 for _ in range(FRESH + 1)] == [True] * FRESH + [False]
    assert [pace.budget(5, 0, 59) > 0 for _ in range(PATIENT + 1)] == [True] * PATIENT + [False], "of five nothing"
    assert pace.step(5) == pace.step(3) == 0.01


def test_what_pieces_add_is_not_told_before_a_step_without_is_known() -> None:
    pace = Pace()
    pace.joined(2, [(8, 0)], 0.5)
    assert pace.token == 0
    assert pace.budget(2, 0, 62) == 0, "first a step without"
    told(pace, 2, 0.1)
    assert pace.budget(2, 0, 62) == FEWEST
    pace.joined(2, [(FEWEST, 0)], 0.101)
    assert pace.budget(2, 0, 62) == GROWTH * FEWEST


def test_several_prompts_rest_together() -> None:
    """A step that goes without pieces goes without those of every prompt."""
    engine = Engine(network_of(block={"mixer": {"kind": "attention", "heads": 2}, "channel": "ffn"}), slots=4)
    asked = Sampling(max_new_tokens=20, temperature=0)
    answer = engine.submit(Request((1, 2, 3), asked))
    while not answer.choices:
        engine.step()
    engine.pace = Pace()
    prompts = [engine.submit(Request((row, *range(20)), asked)) for row in range(3)]
    engine.step()
    assert engine.pace.step(1) > 0
    assert not any(prompt.choices for prompt in prompts)
    while engine.step():
        pass
    assert all(len(prompt.choices) == 20 for prompt in prompts)


def test_long_steps_take_what_pytorch_reads_in_the_time() -> None:
    pace = Pace()
    told(pace, 4, 0.5)
    pace.read(1000, 1.0)
    assert pace.budget(4, 0, 28) == pytest.approx(SHARE * 500, abs=1)
    assert SHARE * 500 > MANY
    pace.read(1000, 1000.0)
    assert pace.budget(4, 0, 28) <= 28


def test_an_engine_learns_from_prompts_that_are_read_together() -> None:
    engine = Engine(network_of(block={"mixer": {"kind": "attention", "heads": 2}, "channel": "ffn"}), slots=2)
    asked = Sampling(max_new_tokens=4, temperature=0)
    assert LEAST > 30
    engine.run([Request(tuple(range(20)) + (row,) * 10, asked) for row in range(2)])
    assert engine.pace.token > 0
    assert engine.pace.step(2) > 0
