"""Schedules against their closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.base.errors import SettingsError
from armillary.base.settings import parse
from armillary.recipe import TrainingSettings
from armillary.recipe.schedules import ScheduleSettings, count, schedules


def schedule(**data: object) -> ScheduleSettings:
    return parse(ScheduleSettings, data)


def test_the_registered_schedules() -> None:
    assert schedules.names() == ["constant", "cosine", "wsd"]


@pytest.mark.parametrize("kind", ["cosine", "constant", "wsd"])
def test_warm_up_is_a_line_that_ends_at_one(kind: str) -> None:
    made = schedule(kind=kind, warmup=4)
    assert [made.share(step, 100) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule(kind=kind, warmup=0).share(0, 100) == 1.0
    assert schedule(kind=kind, warmup=0.04).share(1, 100) == 0.5


def test_cosine() -> None:
    made = schedule(kind="cosine", warmup=0, final=0.0)
    expected = [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]  # cos 0, 45°, 90°, 135°
    assert [made.share(step, 4) for step in range(4)] == pytest.approx(expected, abs=1e-15)
    made = schedule(kind="cosine", warmup=10, final=0.2)
    assert made.share(60, 110) == pytest.approx(0.6)  # halfway between 1 and 0.2
    assert made.share(109, 110) == pytest.approx(0.2 + 0.8 * math.sin(math.pi / 200) ** 2)  # (1 − cos x) / 2 = sin² x/2


def test_constant() -> None:
    assert {schedule(kind="constant", warmup=3).share(step, 50) for step in range(2, 50)} == {1.0}


def test_warm_up_stable_decay() -> None:
    made = schedule(kind="wsd", warmup=2, decay=4)
    assert [made.share(step, 10) for step in range(10)] == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    made = schedule(kind="wsd", warmup=0, decay=0.4, final=0.5)
    assert [made.share(step, 10) for step in range(10)] == [1, 1, 1, 1, 1, 1, 1, 0.875, 0.75, 0.625]
    made = schedule(kind="wsd", warmup=0, decay=4, shape="sqrt")
    expected = [1.0, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)]
    assert [made.share(step, 4) for step in range(4)] == pytest.approx(expected, abs=1e-15)
    assert {schedule(kind="wsd", warmup=0, decay=0).share(step, 10) for step in range(10)} == {1.0}
    made = schedule(kind="wsd", warmup=5, decay=5)  # no stable part at all
    assert [made.share(step, 10) for step in (3, 4, 5, 6)] == [0.8, 1.0, 1.0, 0.8]


def test_the_stable_part_of_wsd_does_not_depend_on_the_length() -> None:
    made = schedule(kind="wsd", warmup=10, decay=20)
    assert [made.share(step, 100) for step in range(80)] == [made.share(step, 500) for step in range(80)]


@given(
    kind=st.sampled_from(["cosine", "constant", "wsd"]),
    warmup=st.integers(0, 40) | st.floats(0, 0.5),
    steps=st.integers(80, 300),
)
def test_a_share_is_positive_at_most_one_and_never_rises_after_the_warm_up(
    kind: str, warmup: int | float, steps: int
) -> None:
    made = schedule(kind=kind, warmup=warmup)
    made.check(steps)
    shares = [made.share(step, steps) for step in range(steps)]
    assert all(0 < share <= 1 for share in shares)  # no update is spent on a rate of nothing
    rest = shares[count(warmup, steps) :]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(rest))


@pytest.mark.parametrize("length, steps, expected", [(7, 100, 7), (0.29, 100, 29), (0.5, 7, 3), (1.0, 9, 9), (0, 5, 0)])
def test_a_length_is_a_count_or_a_share(length: int | float, steps: int, expected: int) -> None:
    assert count(length, steps) == expected


@pytest.mark.parametrize("data, key, words", [
    ({"warmup": 101}, "warmup", "101 steps do not fit into a run of 100"),
    ({"warmup": 1.5}, "warmup", "at most 1.0, found 1.5"),
    ({"kind": "wsd", "decay": 101}, "decay", "do not fit"),
    ({"kind": "wsd", "decay": 1.01}, "decay", "at most 1.0"),
    ({"kind": "wsd", "warmup": 50, "decay": 0.51}, None, "warm-up and decay together are longer than the 100 steps"),
])  # fmt: skip
def test_what_does_not_fit_the_run(data: dict[str, object], key: str | None, words: str) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        parse(TrainingSettings, {"steps": 100, "schedule": data})
    assert caught.value.path == ("schedule", *([key] if key else []))
    assert parse(TrainingSettings, {"steps": 1000, "schedule": {"kind": "wsd", "warmup": 101}})


def test_the_rate_is_the_share_of_the_learning_rate() -> None:
    made = parse(TrainingSettings, {"steps": 10, "optimiser": {"learning_rate": 0.5}, "schedule": {"warmup": 2}})
    assert made.rate(0) == 0.25 and made.rate(1) == 0.5
    assert made.rate(9) == pytest.approx(0.5 * made.schedule.share(9, 10))
