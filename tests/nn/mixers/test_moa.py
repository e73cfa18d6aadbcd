"""Mixture of attention heads against transformers' JetMoE, and against multi-query attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.cost import count
from armillary.nn.mechanism import MixerSettings, Place
from armillary.nn.mixers.attention import AttentionSettings
from armillary.nn.mixers.moa import MixtureOfHeads, MixtureOfHeadsSettings
from armillary.nn.positions.rope import RopeSettings
from armillary.nn.taps import Taps
from armillary.nn.training import Training


def built(width: int = 16, **settings: Any) -> MixtureOfHeads:
    made = MixtureOfHeadsSettings(**{"experts": 5, "top": 2, "head_width": 8, **settings}).build(Place(width, path="m"))
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return made


def slopes(y: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad((y * weights).sum(), wanted))


@pytest.mark.parametrize("groups", [1, 2])
def test_it_is_jetmoes(groups: int, agree: Any, load: Any, shake: Any) -> None:
    from transformers import JetMoeConfig
    from transformers.models.jetmoe import modeling_jetmoe as jetmoe

    config = JetMoeConfig(
        hidden_size=16,
        num_key_value_heads=groups,
        kv_channels=8,
        num_local_experts=5,
        num_experts_per_tok=2,
        attn_implementation="eager",
    )
    theirs = jetmoe.JetMoeAttention(config, 0)
    shake(theirs)
    nn.init.normal_(theirs.experts.router.layer.weight)
    nn.init.zeros_(theirs.experts.bias)
    ours = built(kv_heads=groups, position=RopeSettings())
    k, v = theirs.kv_proj.weight.chunk(2)
    experts = theirs.experts
    parts = {"q": experts.input_linear, "o": experts.output_linear, "router": experts.router.layer}
    load(ours, {"k.weight": k, "v.weight": v, **{f"{name}.weight": part.weight for name, part in parts.items()}})
    x = torch.randn(2, 21, 16, requires_grad=True)
    rotary = jetmoe.JetMoeRotaryEmbedding(config)(torch.zeros(1, 21, 16), torch.arange(21)[None])
    mask = torch.full((21, 21), -torch.inf).triu(1)[None, None]
    expected = theirs(x, mask, rotary)[0]
    found = ours(x, Context())
    agree(found, expected, 1e-5)
    mine = slopes(found, [x, ours.q.weight, ours.o.weight, ours.router.weight, ours.k.weight, ours.v.weight])
    other = slopes(expected, [x, *(parts[n].weight for n in ("q", "o", "router")), theirs.kv_proj.weight])
    for a, b in zip(mine, [*other[:4], *other[4].chunk(2)], strict=True):
        agree(a, b, 1e-4)


def test_every_expert_with_gates_of_one_is_multi_query_attention(agree: Any, load: Any) -> None:
    ours = built(experts=4, top=4)
    theirs = AttentionSettings(heads=4, kv_heads=1, head_width=8).build(Place(16))
    load(
        theirs,
        {
            "q.weight": ours.q.weight.flatten(0, 1),
            "k.weight": ours.k.weight,
            "v.weight": ours.v.weight,
            "o.weight": ours.o.weight.transpose(0, 1).flatten(1),
        },
    )
    x = torch.randn(2, 9, 16)
    forced = Taps(edits=[("m.router", torch.ones_like)])
    agree(ours(x, Context(taps=forced)), theirs(x, Context()))


def test_the_load_can_be_watched_and_gates_sum_to_one() -> None:
    mixer, taps = built(), Taps(["m.router"])
    mixer(torch.randn(2, 9, 16), Context(taps=taps))
    gates = taps.seen["m.router"]
    assert gates.shape == (2, 9, 5)
    assert bool(((gates > 0).sum(-1) == 2).all())
    assert torch.allclose(gates.sum(-1), torch.ones(2, 9))


def test_a_token_picks_the_same_in_any_company() -> None:
    mixer = built(width=64, experts=16)
    x = torch.randn(400, 1, 64)
    together = mixer.route(x, Context())
    for start, stop in ((0, 1), (1, 3), (3, 20), (20, 400)):
        alone = mixer.route(x[start:stop], Context())
        assert torch.equal(alone[0], together[0][start:stop])
        assert torch.equal(alone[3], together[3][start:stop])


def test_an_update_stops_the_gradient_of_the_gates_sum(agree: Any) -> None:
    """g_e = p_e / stop_gradient(Σ p): even a single pick, whose gate is 1, teaches the router."""
    x = torch.randn(2, 6, 16)
    for top in (1, 2):
        mixer = built(top=top, balance_weight=0.0, z_weight=0.0)
        experts, gates, _, scores = mixer.route(x, Context(training=Training.of(1)))
        (found,) = torch.autograd.grad((gates * gates.detach()).sum(), scores)
        picked = torch.softmax(scores, -1).gather(-1, experts)
        (expected,) = torch.autograd.grad((picked * (gates / picked.sum(-1, keepdim=True)).detach()).sum(), scores)
        agree(found, expected)
        assert float(found.abs().max()) > 1e-4
        agree(gates.sum(-1), torch.ones(2, 6))


@pytest.mark.parametrize("balance", ["switch", "mutual_information", "concentration"])
def test_losses_are_the_published_ones(balance: str, agree: Any) -> None:
    """The gradient that an update adds is that of the formulas, over the tokens that are there."""
    mixer = built(balance=balance, balance_weight=0.3, z_weight=0.2, normalise=False)
    x = torch.randn(2, 6, 16)
    padding = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    plain = slopes(mixer(x, Context(padding=padding)), [mixer.router.weight])[0]
    found = slopes(mixer(x, Context(padding=padding, training=Training.of(1, 0.5))), [mixer.router.weight])[0]
    scores = x[padding] @ mixer.router.weight.t()  # [10, E]
    p = torch.softmax(scores, -1)
    mean = p.mean(0)
    if balance == "switch":
        counts = torch.zeros(5)
        for row in scores:
            for expert in row.topk(2).indices.tolist():
                counts[expert] += 1
        loss = 5 * sum(counts[e] / 20 * mean[e] for e in range(5))
    else:
        loss = -(mean * mean.log()).sum()
        if balance == "mutual_information":
            loss = -(p * p.log()).sum(-1).mean() - loss
    loss = 0.3 * loss + 0.2 * torch.logsumexp(scores, -1).square().mean()
    (expected,) = torch.autograd.grad(0.5 * loss, mixer.router.weight)
    agree(found - plain, expected, 1e-3)


def test_cost_follows_the_picks() -> None:
    """Sixteen times the experts cost a wider router and nothing else."""
    x = torch.randn(1, 12, 16)
    few, many = (count(lambda e=e: built(experts=e)(x, Context())) for e in (4, 64))
    assert many - few == 12 * 60 * (2 * 16 + 5)
    small, large = MixtureOfHeadsSettings(experts=4, head_width=8), MixtureOfHeadsSettings(experts=64, head_width=8)
    held = [sum(p.numel() for p in s.build(Place(16)).parameters()) for s in (small, large)]
    assert [s.active(n) for s, n in zip((small, large), held, strict=True)] == [
        16 * 8 * 6 + 16 * 4,
        16 * 8 * 6 + 16 * 64,
    ]


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(SettingsError, match="must be at most experts"):
        parse(MixerSettings, {"kind": "moa", "experts": 2, "top": 3})
    with pytest.raises(SettingsError, match="experts"):
        parse(MixerSettings, {"kind": "moa", "experts": 0})
    with pytest.raises(UnsupportedError, match="stick-breaking weights are causal"):
        MixtureOfHeadsSettings(weights="stick_breaking").build(Place(16, order="bidirectional"))
    with pytest.raises(UnsupportedError, match="takes rotations only"):
        built(position={"kind": "alibi"})


def test_a_row_of_padding_alone_gives_zeros() -> None:
    padding = torch.tensor([[True] * 4, [False] * 4])
    y = built()(torch.randn(2, 4, 16), Context(padding=padding, training=Training.of(1)))
    assert bool((y[1] == 0).all()) and bool(y.isfinite().all())
