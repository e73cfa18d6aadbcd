"""Attention and state spaces in one network, by turns and side by side: the block's formula, and the mixed state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.base.settings import parse
from armillary.nn.block import BlockSettings
from armillary.nn.context import Context
from armillary.nn.mechanism import Place
from armillary.nn.network import ModelSettings, Network, build

ATTENTION = {"kind": "attention", "heads": 2, "kv_heads": 1, "position": "rope"}
STATE = {"kind": "mamba2", "head_width": 8, "state_width": 4}
SIDES = [
    {"name": "look", "mixer": ATTENTION, "norm_at": "sandwich", "scale": 0.5},
    {"name": "state", "mixer": STATE, "norm_at": "sandwich", "scale": 0.5, "beside": True},
    {"name": "channel", "channel": "gated"},
]
FORMS: dict[str, dict[str, Any]] = {
    "by turns": {
        "depth": 4,
        "pattern": ["state", "state", "look"],
        "blocks": {
            "state": {"mixer": STATE, "channel": "gated"},
            "look": {"mixer": ATTENTION, "channel": "gated"},
        },
    },
    "side by side": {"depth": 2, "block": {"branches": SIDES}},
    "every kind": {
        "depth": 3,
        "pattern": ["a", "b", "c"],
        "blocks": {
            "a": {"mixer": {"kind": "gla", "heads": 2, "rank": 2}, "channel": "gated"},
            "b": {"mixer": {"kind": "gated_delta", "heads": 2, "head_width": 4}, "channel": "gated"},
            "c": {"mixer": {"kind": "window", "heads": 2, "window": 5}, "channel": "gated"},
        },
    },
}


def network(form: str) -> Network:
    made = build(parse(ModelSettings, {"width": 16, "vocabulary": 23, **FORMS[form]}))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return made


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def test_heads_side_by_side_are_normed_and_mixed_by_learned_scales(agree: Any) -> None:
    """y = x + ½ (β₁ ⊙ norm(look(n₁(x))) + β₂ ⊙ norm(state(n₂(x)))), then the channel on y."""
    block = parse(BlockSettings, {"branches": SIDES}).build(Place(16))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x = torch.randn(2, 11, 16)
    look, state, channel = block.branches()
    y = x
    for branch in (look, state):
        assert branch.norm_after is not None
        inner = branch.inner(rms(x, branch.norm.weight), Context())
        y = y + 0.5 * rms(inner, branch.norm_after.weight)
    expected = y + channel.inner(rms(y, channel.norm.weight), Context())
    found = block(x, Context())
    agree(found, expected)
    for slope in torch.autograd.grad(found.square().sum(), [look.norm_after.weight, state.norm_after.weight]):
        assert bool((slope != 0).all())  # a scale for each channel, and every one of them learns


@pytest.mark.parametrize("form", FORMS)
def test_a_mixed_state_serves_any_chunks(form: str, agree: Any) -> None:
    """Whole, in chunks, token by token, ragged, with rows taken and put back: the same numbers."""
    model = network(form)
    ids = torch.randint(0, 23, (3, 14), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids)
        for cuts in ([9, 1, 4], [1] * 14):
            state = model.init_state(3)
            agree(torch.cat([model.extend(part, state) for part in ids.split(cuts, 1)], 1), whole, 1e-4)
        kinds = {each.kind for _, _, each in state.each()}
        assert kinds == ({"fixed", "window"} if form == "every kind" else {"fixed", "span"})
        state = model.init_state(3)
        model.extend(ids[:, :5], state)
        kept = state.snapshot()
        model.extend(ids[:, 6:9], state)
        state.restore(kept)
        rows = torch.tensor([2, 0])
        picked = state.select(rows)
        found = model.extend(ids[rows, 5:9], picked, lengths=torch.tensor([4, 2]))
        agree(found[0], whole[2, 5:9], 1e-4)
        agree(found[1, :2], whole[0, 5:7], 1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_packed_documents_stay_apart(form: str, agree: Any) -> None:
    model = network(form)
    ids = torch.randint(0, 23, (1, 14), generator=torch.Generator().manual_seed(2))
    documents = torch.tensor([[0] * 6 + [1] * 8])
    positions = torch.cat([torch.arange(6), torch.arange(8)])[None]
    with torch.no_grad():
        packed = model(ids, documents=documents, positions=positions)
        agree(packed[:, :6], model(ids[:, :6]), 1e-4)
        agree(packed[:, 6:], model(ids[:, 6:]), 1e-4)
