"""How many tokens are guessed, in a simulation whose costs and chances are known.

Expected values are counted out from them: a step of n tokens takes `step(n)` seconds, g guesses take `g · guess`, and
each guess is right with chance `right` if all before it were.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from armillary.engine import odds as module
from armillary.engine.odds import Chances, Odds, Times

MOST = 6


@dataclass
class World:
    """Answers that go on one step after another; unsure: the chance that a draft stops before its next guess."""

    right: float
    guess: float = 0.1
    more: float = 0.03
    unsure: float = 0.0
    answers: int = 1
    noise: float = 0.0
    draw: random.Random = field(default_factory=lambda: random.Random(4))
    seconds: float = 0.0
    tokens: int = 0
    guesses: int = 0

    def step(self, tokens: float) -> float:
        return 1 + self.more * (tokens - 1)

    def rate(self, count: int) -> float:
        """Tokens a second of an answer, expected."""
        hold, reach, made, tokens = 1.0, 1.0, 0.0, 1.0
        for _ in range(count):
            reach, hold = reach * (1 - self.unsure), hold * (1 - self.unsure) * self.right
            made, tokens = made + reach, tokens + hold
        return tokens / (self.step(self.answers * (1 + made)) + self.answers * made * self.guess)

    def best(self, most: int = MOST) -> int:
        return max(range(most + 1), key=self.rate)

    def go(self, odds: Odds, steps: int) -> None:
        """So many steps, all answers alike in what is guessed for them."""
        for _ in range(steps):
            rows, kept = 0, list[tuple[int, int, int]]()
            for _ in range(self.answers):
                asked, _ = odds.count("greedy", self.answers)
                made = next((place for place in range(asked) if self.draw.random() < self.unsure), asked)
                right = next((place for place in range(made) if self.draw.random() >= self.right), made)
                if asked:
                    took = made * self.guess * self.disturbed()
                    odds.asked(made, took)
                    self.seconds += took
                kept.append((asked, made, right))
                rows += 1 + made
            took = self.step(rows) * self.disturbed()
            odds.went(rows, rows - self.answers, took)
            self.seconds += took
            for asked, made, right in kept:
                if asked:
                    odds.chances("greedy").saw(asked, made, right)
                self.tokens += 1 + right
                self.guesses += made

    def disturbed(self) -> float:
        """A factor: now and then something else holds everything up."""
        return 5.0 if self.draw.random() < self.noise / 4 else 1 + self.noise * self.draw.random()


def test_times_between_and_beyond_what_was_seen() -> None:
    times = Times()
    assert times.of(3) == 0.0
    times.saw(2, 1.0)
    assert [times.of(count) for count in (1, 2, 5)] == [1.0, 1.0, 1.0]
    for seconds in (2.0, 2.0, 40.0):  # one that was held up
        times.saw(6, seconds)
    assert times.of(3) == pytest.approx(1.25)
    assert times.of(6) == 2.0
    assert times.of(10) == pytest.approx(3.0)
    assert (times.often(6), times.often(7)) == (3, 0)


def test_more_tokens_take_no_less_time_and_old_times_are_forgotten() -> None:
    times = Times()
    times.saw(1, 1.0, when=1)
    times.saw(3, 9.0, when=2)  # held up
    times.saw(4, 2.0, when=9)
    assert times.of(3) == 2.0
    times.forget(before=9)
    assert [times.of(count) for count in (1, 4)] == [2.0, 2.0]
    assert times.often(3) == 0


def test_who_was_held_up_once_gets_over_it() -> None:
    world, odds = World(right=0.9), Odds(MOST)
    slow = world.more
    world.more = 40.0  # of whatever guesses were tried with
    world.go(odds, 60)
    assert odds.best("greedy")[0] == 0
    world.more = slow
    world.go(odds, 2 * module.OLD)
    assert odds.best("greedy")[0] >= world.best() - 1


def test_chances_are_those_that_were_seen() -> None:
    chances, draw = Chances(3), random.Random(1)
    for _ in range(4000):
        made = next((place for place in range(3) if draw.random() < 0.2), 3)
        right = next((place for place in range(made) if draw.random() >= 0.6), made)
        chances.saw(3, made, right)
    made, right = chances.expected(3)
    assert made == pytest.approx(0.8 + 0.8**2 + 0.8**3, rel=0.1)
    assert right == pytest.approx(0.48 + 0.48**2 + 0.48**3, rel=0.2)


@pytest.mark.parametrize(
    "world",
    [
        lambda: World(right=0.9),
        lambda: World(right=0.6),
        lambda: World(right=0.75, unsure=0.2),
        lambda: World(right=0.8, more=0.2),
        lambda: World(right=0.7, answers=4, more=0.01),
        lambda: World(right=0.8, noise=0.2),
    ],
    ids=["sure", "half", "stops", "dear rows", "four answers", "disturbed"],
)
def test_as_many_as_bring_most(world: Callable[[], World]) -> None:
    learnt, odds = world(), Odds(MOST)
    learnt.go(odds, 1500)
    assert learnt.best() > 0, "or this test says nothing"
    found, _ = odds.best("greedy", learnt.answers)
    assert learnt.rate(found) >= 0.97 * learnt.rate(learnt.best())
    # what came of it, learning included; what holds a step up is no fault of guesses
    if not learnt.noise:
        rate = learnt.tokens / learnt.seconds / learnt.answers
        assert rate >= 0.93 * learnt.rate(learnt.best())


@pytest.mark.parametrize("right", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("answers", [1, 3])
def test_guesses_that_do_not_pay_are_left_out(right: float, answers: int) -> None:
    world, odds = World(right=right, guess=0.3, more=0.15, answers=answers), Odds(MOST)
    assert world.best() == 0
    world.go(odds, 200)  # in which it finds out
    world.seconds, world.tokens, world.guesses = 0.0, 0, 0
    world.go(odds, 4000)
    plain = world.step(answers) / answers  # seconds of a token
    assert world.seconds / world.tokens <= 1.01 * plain
    assert 0 < world.guesses < 0.02 * world.tokens, "it tries again now and then"


def test_finding_out_is_soon_done() -> None:
    world, odds = World(right=0.0, guess=0.3, more=0.15), Odds(MOST)
    world.go(odds, 400)
    assert world.seconds <= 1.03 * 400 * world.step(1) + module.TRIED * MOST * (world.guess + world.more)


def test_what_changes_is_noticed() -> None:
    world, odds = World(right=0.05, guess=0.2), Odds(MOST)
    world.go(odds, 500)
    assert odds.best("greedy")[0] == 0
    world.right = 0.95
    world.go(odds, 6000)
    assert odds.best("greedy")[0] >= world.best() - 1
    world.right, before = 0.05, world.guesses
    world.go(odds, 150)
    assert odds.best("greedy")[0] == 0
    assert world.guesses - before < 80 * MOST


def test_kinds_are_kept_apart() -> None:
    world, odds = World(right=0.05, guess=0.2), Odds(MOST)
    world.go(odds, 500)
    assert odds.count("greedy")[0] == 0
    assert odds.count("drawn") == (MOST, 0.0)


def test_the_chance_that_makes_up_for_a_guess() -> None:
    """What a guess takes is 0.1 + 0.03, in which 0.13 · rate tokens would come."""
    world, odds = World(right=0.8), Odds(MOST)
    world.go(odds, 1500)
    count, least = odds.best("greedy")
    assert least == pytest.approx(0.13 * world.rate(count), rel=0.1)


def test_a_step_without_guesses_now_and_then() -> None:
    world, odds = World(right=1.0), Odds(MOST)
    world.go(odds, 3000)
    assert odds.steps.often(1) >= module.PLAIN
    assert world.guesses >= 0.98 * MOST * 3000
