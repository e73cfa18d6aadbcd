"""Native steps of mixtures of experts, against the same network in float64 without a tape.

The oracle is the channel's own `extend`, which its own tests compare with transformers' blocks.
"""

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
from armillary.nn.describe import plain_steps
from armillary.nn.network import ModelSettings, Network, build
from armillary.nn.steps.experts import route
from armillary.nn.tape import Tape
from armillary.testing.held import with_held

pytestmark = pytest.mark.skipif(not available(), reason="there is no C compiler here")
CLOSE = 1e-4
CHANNELS: dict[str, dict[str, Any]] = {
    "mixtral": {"experts": 8, "hidden": 32},
    "deepseek": {
        "experts": 7,
        "top": 3,
        "hidden": 20,
        "scores": "sigmoid",
        "scale": 1.5,
        "bias_rate": 0.1,
        "shared": 24,
    },
    "qwen": {"experts": 5, "top": 4, "hidden": 17, "normalise": False, "shared": 24, "shared_gate": True},
    "plain": {"experts": 4, "top": 1, "hidden": 48, "gated": False, "bias": True, "normalise": False},
    "corrected": {
        "experts": 6,
        "hidden": 16,
        "bias_rate": 0.1,
        "activation": "gelu_tanh",
        "bias": True,
        "capacity": 1.0,
    },
    "one": {"experts": 1, "top": 1, "hidden": 16},
}


def network(channel: Any, **settings: Any) -> Network:
    block = {"mixer": {"kind": "attention", "heads": 2, "position": "rope"}, "channel": channel}
    given = {"width": 40, "depth": 2, "vocabulary": 40, "context": 64, "block": block, "head": {"tied": False}}
    made = build(parse(ModelSettings, {**given, **settings}), seed=3).eval()
    generator = torch.Generator().manual_seed(1)
    for name, buffer in made.named_buffers():
        if name.endswith("correction"):
            buffer.uniform_(-0.3, 0.3, generator=generator)
    for name, parameter in made.named_parameters():
        if "experts" in name and name.endswith("bias"):
            torch.nn.init.normal_(parameter, generator=generator)
    return made


def taped(made: Network, weights: Any = "float32") -> Slots:
    slots = Slots(made, 3, 64, weights=weights)
    assert slots.replay is not None and not slots.replay.tape.plain
    return slots


def follow(slots: Slots) -> list[Tensor]:
    walk = Walk(slots)
    for rows, chunks in (
        ([0], [list(range(30))]),
        ([2], [[1, 2, 3]]),
        ([0, 2], [[4], [4]]),
        ([0, 1, 2], [[3, 4], [2], [1, 9, 8, 7]]),
        *[([0, 1, 2], [[at], [at + 1], [3]]) for at in range(4)],
    ):
        walk.step(rows, chunks, last=False)
    return walk.scores


@cache
def exact(kind: str) -> list[Tensor]:
    made = network({"kind": "moe", **CHANNELS[kind]}).double().compute(torch.float64)
    return follow(Slots(made, 3, 64, weights="plain"))


@pytest.mark.parametrize("kind", CHANNELS)
@pytest.mark.parametrize("form", VECTORS)
@torch.no_grad()
def test_the_tape_gives_what_plain_steps_give(form: str, kind: str) -> None:
    expected = exact(kind)
    with built(form):
        assert worst(follow(taped(network({"kind": "moe", **CHANNELS[kind]}))), expected) < CLOSE


@pytest.mark.parametrize("kind", ["qwen", "deepseek"])
@pytest.mark.parametrize("weights", ["float32", "bf16", "float16", "int8", "int4"])
@torch.no_grad()
def test_threads_and_neighbours_change_no_bit(weights: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network({"kind": "moe", **CHANNELS[kind]}, width=72)
    check_bits(lambda: taped(made, weights), monkeypatch)


@pytest.mark.parametrize("weights", ["bf16", "float16", "int8", "int4"])
@torch.no_grad()
def test_other_weights(weights: Any) -> None:
    """A network of exactly the numbers that products hold, with the router in float32 beside them."""
    made = network({"kind": "moe", **CHANNELS["corrected"]})
    text = [(7 * at) % 40 for at in range(30)]
    found = taped(made, weights).extend([0], [text], last=False)
    plain = Slots(with_held(made, weights), 1, 64, weights="plain").extend([0], [text], last=False)[0]
    apart = (found[0] - plain).norm(dim=-1) / plain.norm(dim=-1)
    if weights in ("bf16", "float16"):
        assert float(apart.max()) < CLOSE
    else:
        # 0.7 % in each of 13 products; a token of which that moves a pick is further off, and stands in the tail
        assert float(apart.median()) < 0.007 * 13**0.5


@torch.no_grad()
def test_picks_and_gates_against_arithmetic() -> None:
    scores = torch.tensor([[0.5, 2.0, 2.0, -1.0], [3.0, -80.0, 1.0, 2.9]])
    for sigmoid in (False, True):
        for correction in (None, torch.tensor([0.0, 0.0, 0.0, 5.0])):
            tape = Tape(2, 1, threads=1)
            given = tape.pick(tape.embed(scores))
            tape.close(route(tape, given, 2, sigmoid=sigmoid, normalise=True, correction=correction, factor=1.5))
            found = tape.run([0, 0], [0, 0], [0, 1], [0, 1])
            # of equal ones the first
            expected = [[3, 1], [3, 0]] if correction is not None else [[1, 2], [0, 3]]
            assert found[:, :2].tolist() == expected
            every = torch.sigmoid(scores.double()) if sigmoid else scores.double().softmax(-1)
            gates = every.gather(1, torch.tensor(expected))
            assert torch.allclose(found[:, 2:].double(), 1.5 * gates / gates.sum(1, keepdim=True), rtol=1e-6)


@torch.no_grad()
def test_only_the_picked_experts_are_read() -> None:
    made = network({"kind": "moe", **CHANNELS["mixtral"]}, depth=1)
    before = taped(made).extend([0], [[5]]).clone()
    inner: Any = made.get_submodule("blocks.0.channel.inner")
    read = []
    hook = inner.experts.register_forward_pre_hook(lambda module, given: read.append(given[1].flatten().tolist()))
    Slots(made, 1, 64, weights="plain").extend([0], [[5]])
    hook.remove()
    (picked,) = read
    for expert in set(range(8)) - set(picked):
        inner.experts.down.weight[expert] = torch.nan
    assert torch.equal(taped(made).extend([0], [[5]]), before)
    inner.experts.down.weight[picked[0]] = torch.nan
    assert taped(made).extend([0], [[5]]).isnan().any()


def test_what_has_no_native_step_says_so() -> None:
    tasks = {"kind": "task_moe", "experts": 4, "hidden": 8, "tasks": 3}
    assert "task" in plain_steps(network(tasks))["blocks.0.channel"]
    assert not plain_steps(network({**tasks, "routed_by": "token"}))
