"""Native steps of mixers (nn/steps) but for attention, against the same network in float64 without a tape.

The oracle is each mixer's own `extend`, whose equations its own tests compare with the papers'. Steps differ in
kind: alone and together, one token and several, ragged, with plain chunks and snapshots in between. They are taken
by every form of the library that this processor has.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from native_parts import TEXTS, VECTORS, Walk, built, one_by_one, three_threads, ways, worst
from torch import Tensor

from armillary.base.settings import parse
from armillary.engine.slots import Slots
from armillary.native import available
from armillary.nn.describe import plain_steps
from armillary.nn.example import Example
from armillary.nn.mechanism import channels, mixers
from armillary.nn.network import ModelSettings, Network, build
from armillary.testing.held import with_held

pytestmark = pytest.mark.skipif(not available(), reason="there is no C compiler here")
CLOSE = 1e-4
NATIVE = {
    "attention",
    "gated_conv",
    "gated_delta",
    "gla",
    "gru",
    "linear",
    "lstm",
    "mamba",
    "mamba2",
    "moa",
    "performer",
    "retention",
    "rnn",
    "stick_breaking",
    "taylor",
    "window",
}
NATIVE_CHANNELS = {"ffn", "gated", "moe"}
# Widths of values that take stripes of 4, 2 and 1 vectors and single columns, shared keys, long convolutions.
SHAPES: dict[str, dict[str, Any]] = {
    "mamba2_groups": {"kind": "mamba2", "head_width": 12, "state_width": 20, "groups": 2, "taps": 5},
    "mamba2_one": {"kind": "mamba2", "head_width": 96, "state_width": 16},
    "mamba2_heads": {"kind": "mamba2", "head_width": 12, "state_width": 9, "groups": 8, "step_limits": (0.05, 0.2)},
    "mamba_uneven": {"kind": "mamba", "expand": 1.5, "states": 5, "kernel": 1, "conv_bias": False, "bias": True},
    "mamba_wide": {"kind": "mamba", "expand": 3.0, "kernel": 3, "rank": 7},
    "gla_wide": {"kind": "gla", "heads": 1, "expand_keys": 1.0, "expand": 1.25},
    "gla_small": {"kind": "gla", "heads": 8, "expand": 1.5, "temperature": 1.0},
    "delta_shared": {"kind": "gated_delta", "heads": 4, "key_heads": 2, "head_width": 10, "expand": 1.5},
    "delta_plain": {"kind": "gated_delta", "heads": 3, "head_width": 20, "expand": 3.0, "fading": False, "taps": 1},
    "linear": {"kind": "linear", "heads": 2, "head_width": 57},
    "performer": {"kind": "performer", "heads": 3, "features": 40},
    "performer_pairs": {"kind": "performer", "heads": 2, "features": 22, "hyperbolic": True},
    "performer_relu": {"kind": "performer", "heads": 2, "features": 22, "kernel": "relu"},
    "taylor": {"kind": "taylor", "heads": 2},
    "moa_groups": {"kind": "moa", "top": 3, "kv_heads": 2, "head_width": 12, "position": "rope"},
    "moa_sticks": {"kind": "moa", "kv_heads": 3, "head_width": 8, "weights": "stick_breaking", "normalise": False},
    "stick": {"kind": "stick_breaking", "heads": 4, "kv_heads": 2, "head_width": 13},
    "retention": {"kind": "retention", "heads": 3, "expand": 1.25},
    "gru": {"kind": "gru", "hidden": 37},
    "lstm": {"kind": "lstm", "hidden": 37},
    "rnn": {"kind": "rnn", "hidden": 37, "activation": "relu"},
    "gated_conv": {"kind": "gated_conv", "hidden": 37, "kernel": 4, "activation": "silu"},
}


def network(mixer: Any, **settings: Any) -> Network:
    block = {"mixer": mixer, "channel": {"kind": "gated", "hidden": 32}}
    model = parse(ModelSettings, {"width": 48, "depth": 2, "vocabulary": 40, "context": 64, "block": block, **settings})
    made = build(model, seed=3).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:  # gains, skips and biases that begin as 1 or 0 would hide a mistake
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return made


def examples(native: set[str]) -> dict[str, Any]:
    return {
        f"{kind}-{example.name}": example.settings
        for kind in sorted(native)
        for example in mixers.get(kind).examples()
        if example.place.get("order", "causal") == "causal" and not example.place.get("cross")
    }


LOOKS = examples({"attention", "window"})
CASES = examples(NATIVE - {"attention", "window"}) | SHAPES


def taped(made: Network, weights: str = "float32", rows: int = 3) -> Slots:
    slots = Slots(made, rows, 64, weights=weights)  # type: ignore[arg-type]
    assert slots.replay is not None and not slots.replay.tape.plain
    return slots


def follow(slots: Slots) -> list[Tensor]:
    """The scores of steps of every kind."""
    walk = Walk(slots)
    step = walk.step
    step([0], [list(range(20))])  # within a tape's rows
    step([2], [[1, 2, 3]])
    kept = slots.snapshot(2)
    step([1], [[5] * 40], plain=True)
    for token in range(3):
        step([0, 2], [[token], [token + 5]])
    step([0, 2], [[1, 4, 5], [2]], last=False)  # ragged, with a row between that takes no part
    slots.go_back(2, 3, kept)
    step([0, 1, 2], [[3, 4], [2], [1, 9, 8, 7]], last=False)
    slots.clear(1)
    step([1], [[7]])
    step([0, 1, 2], [[3], [2], [1]])
    return walk.scores


@cache
def exact(name: str) -> list[Tensor]:
    """What the network gives in float64, without a tape."""
    slots = Slots(network(CASES[name]).double().compute(torch.float64), 3, 64, weights="plain")
    assert all(tensor.dtype == torch.float64 for tensor in slots.state.blocks[0]["mixer"].tensors.values())
    return follow(slots)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", VECTORS)
@torch.no_grad()
def test_the_tape_gives_what_plain_steps_give(form: str, name: str) -> None:
    expected = exact(name)
    with built(form):
        assert worst(follow(taped(network(CASES[name]))), expected) < CLOSE


@pytest.mark.parametrize("mixer", CASES.values(), ids=CASES)
@torch.no_grad()
def test_threads_and_neighbours_change_no_bit(mixer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network(mixer)
    chunks = TEXTS
    single = one_by_one(taped(made))
    with three_threads(monkeypatch):
        for way in ways(monkeypatch):
            together = taped(made)
            assert together.replay is not None and together.replay.tape.threads == 3
            if together.replay.tape.single:  # a chunk of several tokens is a plain one
                assert not together.replay.takes(chunks)
                for step in range(5):
                    found = together.extend([0, 1, 2], [ids[step : step + 1] for ids in chunks])[:, 0]
                    assert all(torch.equal(found[row], single[row][step]) for row in range(3)), way
                continue
            begun = together.extend([0, 1, 2], [ids[:3] for ids in chunks], last=False).clone()
            assert all(torch.equal(begun[row], single[row][:3]) for row in range(3)), way
            rest = together.extend([0, 2], [chunks[0][3:], chunks[2][3:4]], last=False).clone()
            assert torch.equal(rest[0], single[0][3:]) and torch.equal(rest[1, :1], single[2][3:4]), way


@pytest.mark.parametrize("weights", ["bf16", "float16", "int8", "int4"])
@pytest.mark.parametrize("mixer", ["mamba2", "mamba", "gla", "gated_delta", "linear", "lstm", "gated_conv"])
@torch.no_grad()
def test_other_weights_step_by_the_tape_alone(mixer: str, weights: Any) -> None:
    made = network({"kind": mixer, **({"head_width": 16} if mixer == "mamba2" else {})}, head={"tied": False})
    slots, alone = taped(made, weights), taped(made, weights)
    text = [(7 * at) % 40 for at in range(30)]
    whole = slots.extend([0], [text], last=False)
    pieces = [alone.extend([0], [text[at : at + 1]], last=False).clone()[0] for at in range(30)]
    assert torch.equal(whole[0], torch.cat(pieces))
    plain = Slots(with_held(made, weights), 1, 64, weights="plain").extend([0], [text], last=False)
    apart = float((whole[0] - plain[0]).norm() / plain[0].norm())
    # what is multiplied is rounded to 127 steps of its largest, some 3 deviations: 0.7 % in each of 11 products
    assert apart < (CLOSE if weights in ("bf16", "float16") else 0.007 * 11**0.5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_convolutions_whose_tails_are_kept_in_16_bits(dtype: torch.dtype) -> None:
    mixer = {"kind": "mamba2", "head_width": 16}
    made = network(mixer).to(dtype).compute(dtype)
    slots = taped(made, "auto")
    assert slots.state.blocks[0]["mixer"].tensors["conv_v"].dtype == dtype
    assert worst(follow(slots), follow(Slots(made, 3, 64, weights="plain"))) < 0.1


@torch.no_grad()
def test_states_of_other_types_stay_plain() -> None:
    made = network("mamba")
    slots = Slots(made.double().compute(torch.float64), 1, 64, weights="auto")
    assert slots.replay is None
    assert "grid" in plain_steps(network({"kind": "gated_conv", "grid": (4, 4)}))["blocks.0.mixer"]


@torch.no_grad()
def test_poisoned_rows_stay_alone() -> None:
    made = network("gated_delta")
    slots, other = taped(made), taped(made)
    for each in (slots, other):
        each.extend([0, 1, 2], [[1], [2], [3]])
    slots.state.blocks[0]["mixer"].tensors["matrix"][1] = torch.nan
    found, expected = slots.extend([0, 1, 2], [[1], [2], [3]]), other.extend([0, 1, 2], [[1], [2], [3]])
    assert found[1].isnan().all() and torch.equal(found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("mixer", [*CASES.values(), *LOOKS.values()], ids=[*CASES, *LOOKS])
@torch.no_grad()
def test_what_is_no_number_is_not_hidden(mixer: Any) -> None:
    """NaN in the first number of each of a mixer's weights shows in the scores where plain steps show it, too.

    Not always at every token: plain steps multiply it by weights of zero as well.
    """
    made = network(mixer)
    for name, weight in made.get_submodule("blocks.0.mixer").named_parameters():
        first = weight.view(-1)[:1]
        kept = first.clone()
        first.fill_(torch.nan)
        slots, plain = (Slots(made, 1, 64, weights=how) for how in ("float32", "plain"))  # type: ignore[arg-type]
        for ids in ([1, 2, 3], [4]):
            found, expected = (each.extend([0], [ids], last=False)[0].isnan().any(-1) for each in (slots, plain))
            assert found.any() == expected.any() and (expected | ~found).all(), name
        first.copy_(kept)


@torch.no_grad()
def test_of_a_branch_that_turns_out_to_be_plain_no_weight_is_held() -> None:
    """Its products come before what has no native step."""
    made, none = network("lln"), network("additive")
    kept = [sum(len(each) for each in Slots(one, 1, 64).replay.tape.pieces) for one in (made, none)]  # type: ignore[union-attr]
    assert "blocks.0.mixer" in plain_steps(made) and kept[0] == kept[1] > 0


def test_which_mechanisms_step_natively() -> None:
    """So that one that falls back to plain steps does not go unnoticed."""

    def steps(kind: str, example: Example, **block: Any) -> bool | None:
        if example.place.get("order", "causal") != "causal" or example.place.get("cross"):
            return None
        settings = {"width": 16, "depth": 1, "vocabulary": 20, "context": 64}
        made = build(ModelSettings(**settings, block={kind: example.settings, **block}), device="meta")  # type: ignore[arg-type]
        found = plain_steps(made)
        return not found.keys() & {"", f"blocks.0.{kind}"}

    look = {"kind": "attention", "heads": 2}
    native = {
        "mixer": {kind for kind, one in dict(mixers).items() if steps("mixer", one.examples()[0], channel="gated")},
        "channel": {kind for kind, one in dict(channels).items() if steps("channel", one.examples()[0], mixer=look)},
    }
    assert native == {"mixer": NATIVE, "channel": NATIVE_CHANNELS}
