"""Taps by themselves: patterns, the record, lazy values, joining and mistakes."""

from __future__ import annotations

import pytest
import torch

from armillary.base.errors import InputError
from armillary.nn.taps import Taps


def test_patterns_choose_what_is_seen() -> None:
    taps = Taps(["blocks.*.mixer.weights", "norm"])
    for name in ("blocks.0.mixer.weights", "blocks.11.mixer.weights", "blocks.0.mixer.v", "norm", "logits"):
        taps(name, torch.zeros(1))
    assert list(taps.seen) == ["blocks.0.mixer.weights", "blocks.11.mixer.weights", "norm"]


def test_the_latest_call_is_read_and_all_are_kept() -> None:
    taps = Taps(["a"])
    for step in range(3):
        taps("a", torch.tensor(step))
    assert int(taps.seen["a"]) == 2
    assert [int(value) for value in taps.seen.steps("a")] == [0, 1, 2]
    assert taps.seen.steps("b") == []
    assert "b" not in taps.seen and taps.seen.get("b") is None
    with pytest.raises(InputError, match="nothing was seen at 'b'"):
        taps.seen["b"]


def test_edits_apply_in_order_before_the_record() -> None:
    taps = Taps(["a"], [("a", lambda x: x + 1), ("*", lambda x: x * 10), ("b", lambda x: x * 0)])
    assert int(taps("a", torch.tensor(2))) == 30
    assert int(taps.seen["a"]) == 30
    assert taps.edited("a") and taps.edited("z") and not Taps(["a"]).edited("a")


def test_an_edit_keeps_shape_and_type() -> None:
    assert Taps(edits=[("a", lambda x: x.double())])("a", torch.zeros(2)).dtype == torch.float32
    for wrong, said in ((lambda x: x[:1], r"\(1,\)"), (lambda x: 3, "int")):
        with pytest.raises(InputError, match=rf"the edit at 'a' returned {said}\n.*\(2,\)"):
            Taps(edits=[("a", wrong)])("a", torch.zeros(2))  # type: ignore[list-item]


def test_lazy_values_are_made_once_and_only_when_read() -> None:
    made = []

    def make() -> torch.Tensor:
        made.append(1)
        return torch.tensor(5)

    taps = Taps(["a"])
    taps.lazy("a", make)
    taps.lazy("b", make)
    assert not made and list(taps.seen) == ["a"]
    assert int(taps.seen["a"]) == 5 and int(taps.seen["a"]) == 5
    assert len(made) == 1


def test_joined_taps_keep_their_own_records() -> None:
    one, two = Taps(["a"], [("a", lambda x: x + 1)]), Taps(["*"], [("a", lambda x: x * 2)])
    both = one.joined(two)
    assert int(both("a", torch.tensor(3))) == 8
    assert int(one.seen["a"]) == 4 and int(two.seen["a"]) == 8
    both.lazy("c", lambda: torch.tensor(1))
    assert "c" in two.seen and "c" not in one.seen
    assert both.edited("a") and both.watches("c") and not both.edited("c")
