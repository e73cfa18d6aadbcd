"""Native attention over keys and values in 8 bits, against plain steps over the same kind of state."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from native_parts import VECTORS, Walk, built, check_bits, worst
from torch import Tensor

from armillary.base.settings import parse
from armillary.engine.slots import Slots
from armillary.native import available
from armillary.nn.cache import Int8
from armillary.nn.network import ModelSettings, Network, build
from armillary.nn.tape import NoStep, Tape

pytestmark = pytest.mark.skipif(not available(), reason="there is no C compiler here")
MIXERS: dict[str, dict[str, Any]] = {
    "grouped": {"heads": 6, "kv_heads": 1, "head_width": 48, "position": "rope"},
    "narrow": {"heads": 6, "kv_heads": 2, "head_width": 11},
    "slopes": {"heads": 4, "position": "alibi", "softcap": 2.0, "sinks": True},
}
STEPS: list[tuple[list[int], list[list[int]]]] = [
    ([0], [list(range(40))]),  # a plain chunk
    ([2], [[1, 2, 3]]),
    ([0, 2], [[4], [4]]),
    ([0, 1, 2], [[3, 4], [2], [1, 9, 8, 7]]),
    *[([0, 1, 2], [[at], [at + 1], [3]]) for at in range(3)],
]


def network(kind: str) -> Network:
    block = {"mixer": {"kind": "attention", **MIXERS[kind]}, "channel": "gated"}
    settings = {"width": 40, "depth": 1, "vocabulary": 40, "context": 64, "block": block}
    return build(parse(ModelSettings, settings), seed=3).eval()


def slots(kind: str, weights: Any, rows: int = 3) -> Slots:
    return Slots(network(kind), rows, 64, Int8(), weights=weights)


def follow(slots: Slots) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The scores of some steps, and what is held then."""
    walk = Walk(slots)
    for rows, chunks in STEPS:
        walk.step(rows, chunks, last=False)
    slots.settle()
    return walk.scores, slots.state.blocks[0]["mixer"].tensors


@cache
def plainly(kind: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    return follow(slots(kind, "plain"))


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("form", VECTORS)
@torch.no_grad()
def test_the_tape_gives_what_plain_steps_give(form: str, kind: str) -> None:
    scores, held = plainly(kind)
    with built(form):
        taped = slots(kind, "float32")
        assert taped.replay is not None and not taped.replay.tape.plain
        found, kept = follow(taped)
    assert worst(found, scores) < 1e-4
    assert kept["k"].dtype == torch.int8
    for name, tensor in held.items():
        # a number between two steps may fall to either, where sums end otherwise
        assert (kept[name].double() - tensor.double()).abs().max() <= 1
        assert torch.equal(kept[name], tensor) or name in ("k", "v")


@pytest.mark.parametrize("kind", MIXERS)
@torch.no_grad()
def test_threads_and_neighbours_change_no_bit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network(kind)
    check_bits(lambda: Slots(made, 3, 64, Int8(), weights="float32"), monkeypatch)


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("product", ["k", "v"])
@torch.no_grad()
def test_what_is_no_number_is_not_hidden(product: str, kind: str) -> None:
    made = network(kind)
    made.get_parameter(f"blocks.0.mixer.inner.{product}.weight")[0, 0] = torch.nan
    slots, plain = (Slots(made, 1, 64, Int8(), weights=how) for how in ("float32", "plain"))  # type: ignore[arg-type]
    for ids in ([1, 2, 3], [4]):
        found, expected = (each.extend([0], [ids], last=False)[0].isnan().any(-1) for each in (slots, plain))
        assert found.any() and torch.equal(found, expected)


def test_numbers_in_8_bits_are_no_others() -> None:
    """They take operations of their own: those of wider numbers would write beyond them."""
    tape = Tape(2, 8)
    x = tape.embed(torch.ones(3, 16))
    held = torch.zeros(1, 1, 8, 16, dtype=torch.int8)
    with pytest.raises(NoStep, match="int8"):
        tape.append(held, x)
    with pytest.raises(NoStep, match="int8"):
        tape.attend(x, held, held, 1, scale=1.0)
