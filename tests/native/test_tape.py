"""The tape of native calls against the same network without it, and its quantised products against float64.

Float32 stays within 1e-4 of the plain step. Every kind of weights gives a row the same bits whoever steps
beside it. Quantised products are compared with float64 arithmetic over exactly the numbers that they
hold: what is left is the rounding of one float32 sum.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from native_parts import TEXTS, VECTORS, Walk, built, three_threads, ways, worst
from torch import Tensor

from armillary.base.settings import parse
from armillary.engine import replay
from armillary.engine.slots import Slots
from armillary.native import available
from armillary.native.tape import as_held
from armillary.nn.network import ModelSettings, Network, build

pytestmark = pytest.mark.skipif(not available(), reason="there is no C compiler here")
CLOSE = 1e-4
KINDS = ("float32", "bf16", "float16", "int8", "int4")


def network(**settings: Any) -> Network:
    model = parse(ModelSettings, {"width": 32, "depth": 2, "vocabulary": 40, "context": 64, **settings})
    return build(model, seed=3).eval()


def look(**settings: Any) -> dict[str, Any]:
    return {"mixer": {"kind": "attention", "heads": 4, **settings}, "channel": "gated"}


NETWORKS: dict[str, dict[str, Any]] = {
    "grouped": {"block": look(position="rope", kv_heads=2)},
    "slopes": {"block": look(position="alibi")},
    "everything": {
        "block": look(
            softcap=2.0,
            sinks=True,
            kv_heads=1,
            bias=True,
            norm={"kind": "rmsnorm", "unit_offset": True},
            position={"kind": "rope", "fraction": 0.5, "pairing": "interleaved"},
        )
    },
    "clipped": {"block": look(head_width=6, clip=0.7, norm="rmsnorm", norm_over="all")},
    "low_rank": {"block": look(), "linear": {"all": {"kind": "low_rank", "rank": 8}}},
    "post": {
        "position": "learned",
        "block": {**look(), "channel": {"kind": "ffn", "bias": True}, "norm": "layernorm", "norm_at": "post"},
        "norm": None,
        "head": {"tied": False, "bias": True, "softcap": 3.0, "scale": 0.5},
    },
    "side_by_side": {
        "position": "sinusoidal",
        "block": {**look(), "parallel": True, "norm_at": "sandwich"},
    },
    "after": {
        "block": {
            "branches": [
                {"name": "look", "mixer": {"kind": "attention", "heads": 2, "position": "rope"}, "norm_at": "after"},
                {"name": "more", "mixer": {"kind": "retention", "heads": 2}, "beside": True, "scale": 0.5},
                {"name": "channel", "channel": {"kind": "ffn", "activation": "relu"}},
            ]
        },
        "embed_scale": 3.0,
        "embed_norm": "layernorm",
    },
    "window": {
        "block": {
            "mixer": {"kind": "window", "window": 4, "heads": 2, "position": "rope"},
            "channel": {"kind": "gated", "activation": "gelu_tanh"},
        }
    },
    "retention": {"block": {"mixer": {"kind": "retention", "heads": 2}, "channel": "gated"}},
    "some_plain": {
        "blocks": {"other": {"mixer": "additive", "channel": "gated"}, "look": look(position="rope")},
        "pattern": ["other", "look"],
        "depth": 4,
    },
}


def both(made: Network, weights: str = "float32") -> tuple[Slots, Slots]:
    return Slots(made, 3, 64, weights=weights), Slots(made, 3, 64, weights="plain")  # type: ignore[arg-type]


def follow(slots: Slots) -> list[Tensor]:
    """The scores of steps of every kind, with plain chunks in between."""
    walk = Walk(slots)
    step = walk.step
    step([0], [list(range(20))])
    step([2], [[1, 2, 3]])
    for token in range(3):
        step([0, 2], [[token], [token + 5]])
    step([1], [[5] * 30], plain=True)
    step([0, 2], [[1, 4, 5], [2]], last=False)
    for token in range(3):
        step([0, 1, 2], [[token], [token + 1], [token + 2]])
    slots.clear(1)
    step([1], [[7]])
    step([0, 1, 2], [[3], [2], [1]])
    slots.settle()
    assert slots.state.lengths.tolist() == [30, 2, 11]
    return walk.scores


@cache
def plainly(name: str) -> list[Tensor]:
    return follow(both(network(**NETWORKS[name]))[1])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("form", VECTORS)
@torch.no_grad()
def test_the_tape_gives_what_plain_steps_give(form: str, name: str) -> None:
    expected = plainly(name)
    with built(form):
        taped = both(network(**NETWORKS[name]))[0]
        assert taped.replay is not None
        left = {"some_plain": ["blocks.0.mixer", "blocks.2.mixer"]}
        assert list(taped.replay.tape.plain) == left.get(name, [])
        assert worst(follow(taped), expected) < CLOSE


@torch.no_grad()
def test_two_threads_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    made = network(**NETWORKS["everything"])
    plain = Slots(made, 3, 64, weights="float32")
    with three_threads(monkeypatch):
        taped = Slots(made, 3, 64, weights="float32")
        assert taped.replay is not None and taped.replay.tape.threads == 3
        assert worst(follow(taped), follow(plain)) == 0


@pytest.mark.filterwarnings("ignore:the weights of")
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_no_thread_takes_from_another_without_waiting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network(**NETWORKS[name])
    expected = Slots(made, 3, 64, weights="int8").extend([0, 1, 2], TEXTS, last=False).clone()
    with three_threads(monkeypatch):
        for way in ways(monkeypatch):
            turns = Slots(made, 3, 64, weights="int8")
            assert turns.replay is not None and turns.replay.tape.threads == 3
            assert torch.equal(turns.extend([0, 1, 2], TEXTS, last=False), expected), way


@torch.no_grad()
def test_without_tiles_steps_of_many_tokens_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "tiles", lambda: False)
    taped, plain = both(network(**NETWORKS["grouped"]))
    most = replay.MOST
    assert taped.replay is not None and taped.replay.tape.rows == taped.replay.beside == most
    assert [taped.replay.takes([[1]] * count) for count in (most, most + 1)] == [True, False]
    found, expected = (slots.extend([0, 1], [[5] * (most - 20), [6] * 20]) for slots in (taped, plain))
    assert (found - expected).abs().max() < CLOSE


@pytest.mark.parametrize("name", ["grouped", "everything", "window"])
@torch.no_grad()
def test_with_tiles_every_step_that_is_all_native_is_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "tiles", lambda: True)
    taped, plain = both(network(**NETWORKS[name]))
    assert taped.replay is not None
    many = [[5 + place % 20 for place in range(50)], [7] * 45]
    assert taped.replay.takes(many) is not bool(taped.replay.tape.plain)
    found, expected = (slots.extend([0, 1], many, last=False) for slots in (taped, plain))
    for row, chunk in enumerate(many):
        assert (found[row, : len(chunk)] - expected[row, : len(chunk)]).abs().max() < CLOSE


@torch.no_grad()
def test_rings_hold_a_whole_step_and_begin_empty_again() -> None:
    """Many tokens of one sequence in a step: each still finds its window. Then another sequence in the same row."""
    taped, plain = both(network(**NETWORKS["window"]))
    assert taped.replay is not None and taped.beside == taped.replay.tape.rows
    for text in ([list(range(30))], [[9, 9, 8]]):
        for each in (taped, plain):
            each.clear(1)
        for chunk in (text[0], [4], [5, 6]):
            found, expected = (each.extend([1], [chunk], last=False) for each in (taped, plain))
            assert (found - expected).abs().max() < CLOSE
    rings = [slots.state.blocks[0]["mixer"].tensors["k"].shape[2] for slots in (taped, plain)]
    assert rings == [4 + taped.replay.tape.rows - 1, 4]


@torch.no_grad()
def test_bf16_networks_stay_close() -> None:
    made = network(**NETWORKS["grouped"]).to(torch.bfloat16).compute(torch.bfloat16)
    taped, plain = both(made, "auto")
    assert taped.replay is not None and taped.replay.weights == "bf16"
    assert worst(follow(taped), follow(plain)) < 0.05


@torch.no_grad()
def test_auto_takes_bf16_only_where_nothing_is_lost() -> None:
    made = network(**NETWORKS["grouped"])
    assert both(made, "auto")[0].replay.weights == "float32"  # type: ignore[union-attr]
    made.to(torch.bfloat16).to(torch.float32)
    taped, plain = both(made, "auto")
    assert taped.replay is not None and taped.replay.weights == "bf16"
    assert worst(follow(taped), follow(plain)) < CLOSE


@pytest.mark.parametrize("masters", [torch.float16, torch.float32])
@torch.no_grad()
def test_networks_in_fp16_go_through_the_tape(masters: torch.dtype) -> None:
    """However many tokens a step has: PyTorch's products in fp16 are slow on a CPU. Scores against float32's."""
    made = network(**NETWORKS["grouped"]).to(torch.float16)
    wide = copy.deepcopy(made).to(torch.float32).compute(torch.float32)
    taped = Slots(made.to(masters).compute(torch.float16), 1, 64)
    assert taped.replay is not None and taped.replay.weights == "float16"
    assert taped.replay.takes([[7] * 60])
    assert {t.dtype for _, _, s in taped.state.each() for t in s.tensors.values()} == {torch.float16}
    text, plain = [[5 + place % 20 for place in range(40)]], Slots(wide, 1, 64, weights="plain")
    found, expected = (slots.extend([0], text, last=False) for slots in (taped, plain))
    # keys and values are rounded to within 2^-11 of their size, all else is float32
    assert 0 < (found - expected).abs().max() < 2.0**-10 * expected.abs().max()


@torch.no_grad()
def test_auto_takes_fp16_where_nothing_is_lost() -> None:
    made = network(**NETWORKS["grouped"])
    made.to(torch.float16).to(torch.float32)
    taped, plain = both(made, "auto")
    assert taped.replay is not None and taped.replay.weights == "float16"
    assert not taped.replay.other and worst(follow(taped), follow(plain)) < CLOSE


@pytest.mark.parametrize("weights", KINDS)
@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours(weights: str) -> None:
    blocks = {"look": look(position="rope", kv_heads=2), "state": NETWORKS["retention"]["block"]}
    made = network(width=72, vocabulary=101, depth=3, blocks=blocks, pattern=["look", "state"])
    prompts = [[1, 2, 3, 4, 5, 6], [9, 8, 7, 9, 9, 1], [7, 7, 7, 7, 7, 7]]
    alone, together = Slots(made, 3, 64, weights=weights), Slots(made, 3, 64, weights=weights)  # type: ignore[arg-type]
    single = [torch.cat([alone.extend([row], [[id_]]).clone()[:, 0] for id_ in ids]) for row, ids in enumerate(prompts)]
    begun = together.extend([0, 1, 2], [ids[:3] for ids in prompts], last=False).clone()
    rest = together.extend([0, 1, 2], [prompts[0][3:5], prompts[1][3:], prompts[2][3:4]], last=False).clone()
    for row, count in enumerate((2, 3, 1)):
        assert torch.equal(begun[row], single[row][:3])
        assert torch.equal(rest[row, :count], single[row][3 : 3 + count])


@pytest.mark.parametrize("inputs", [32, 50])
def test_what_quantising_loses(inputs: int) -> None:
    weight = torch.randn(9, inputs, generator=torch.Generator().manual_seed(1))
    weight[3] = 0
    largest = weight.abs().amax(1, keepdim=True).double()
    lost = (as_held(weight, "int8") - weight).abs()
    assert (lost <= largest / 127 / 2 * 1.0001).all()
    lost = (as_held(weight, "int4") - weight).abs()
    padded = torch.nn.functional.pad(weight, (0, -inputs % 32)).unflatten(1, (-1, 32))
    steps = (padded.abs().amax(2) / 8).repeat_interleave(32, 1)[:, :inputs].double()
    # half a step; the far end of the other sign (7 steps of 8) a whole one; the scale in bf16 moves 8 steps by 2^-9
    assert (lost <= steps * (1 + 8 * 2.0**-8)).all()
    assert (lost <= steps * (0.5 + 8 * 2.0**-8)).double().mean() > 0.95
    assert (lost[3] == 0).all()


@torch.no_grad()
def test_quantised_scores_stay_close() -> None:
    made = network(**NETWORKS["grouped"])
    plain = Slots(made, 1, 64, weights="plain").extend([0], [list(range(30))], last=False)
    apart = {}
    for weights in ("int8", "int4"):
        found = Slots(made, 1, 64, weights=weights).extend([0], [list(range(30))], last=False)
        apart[weights] = float((found - plain).norm() / plain.norm())
    # Of normal weights in groups of 32 the largest is 2.1 deviations, so a step is 2.1/8 of one, and a product
    # is off by 1/√12 of it, 7.6 %; there are 15, each but the last two beside the stream. In int8 the
    # weights' step is 16 times finer, and the numbers that are multiplied are rounded alike.
    assert apart["int8"] < 0.03 and apart["int4"] < 0.076 * 15**0.5


@torch.no_grad()
def test_weights_that_changed_are_packed_again() -> None:
    made = network(**NETWORKS["grouped"])
    before = Slots(made, 1, 64, weights="int8").extend([0], [[1, 2]]).clone()
    made.blocks.get_parameter("0.channel.inner.down.weight").mul_(3.0)
    after = Slots(made, 1, 64, weights="int8").extend([0], [[1, 2]])
    assert (before - after).abs().max() > 1e-3
    made.to(torch.bfloat16).to(torch.float32)
    rounded = Slots(made, 1, 64, weights="int8").extend([0], [[1, 2]]).clone()
    fresh = build(made.settings, seed=9)
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(Slots(fresh.eval(), 1, 64, weights="int8").extend([0], [[1, 2]]), rounded)


@torch.no_grad()
def test_what_cannot_be_done_is_said() -> None:
    made = network(form="prefix", block=look())
    with pytest.warns(UserWarning, match="int8"):
        assert Slots(made, 1, 64, weights="int8").replay is None
    assert Slots(made, 1, 64).replay is None
    with pytest.warns(UserWarning, match=r"blocks\.0\.mixer"):
        assert Slots(network(block={"mixer": "additive", "channel": "gated"}), 1, 64, weights="int4").replay is not None
