"""Transformer-XL's recurrence against the paper's formula as loops, and against one long forward pass."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.base.errors import ArmillaryError, SettingsError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.network import ModelSettings, Network, build

IDS = torch.randint(0, 24, (2, 22), generator=torch.Generator().manual_seed(3))


def network(driver: dict[str, Any] | None, **more: Any) -> Network:
    data = {
        "width": 16,
        "depth": 2,
        "vocabulary": 24,
        "block": {"mixer": {"kind": "attention", "heads": 2, "position": "transformer_xl"}, "channel": "gated"},
        "driver": driver,
    }
    made = build(parse(ModelSettings, data | more))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return made


def paper(net: Network, x: Tensor, segment: int, memory: int) -> Tensor:
    """Segment by segment and layer by layer: h̃ = [SG(cached h); h]; q from h, k and v from h̃; the score of
    every pair by itself."""
    caches: list[Tensor] = [x[:, :0] for _ in net.blocks]
    outputs = []
    for begin in range(0, x.shape[1], segment):
        h = x[:, begin : begin + segment]
        for layer, block in enumerate(net.blocks):
            cached = caches[layer].detach()
            caches[layer] = torch.cat([cached, h], 1)[:, -memory:] if memory else h[:, :0]
            mixer, norm = block.mixer.inner, block.mixer.norm
            both = torch.cat([norm(cached).detach(), norm(h)], 1)  # cached is what the products read
            position, heads, width = mixer.position, mixer.heads, mixer.width
            q = (norm(h) @ mixer.q.weight.t()).unflatten(-1, (heads, width))
            k = (both @ mixer.k.weight.t()).unflatten(-1, (heads, width))
            v = (both @ mixer.v.weight.t()).unflatten(-1, (heads, width))
            rows = []
            for i in range(h.shape[1]):
                seen = cached.shape[1] + i + 1
                distances = [cached.shape[1] + i - j for j in range(seen)]
                r = torch.stack([sinusoids(d, x.shape[2]) for d in distances])
                moved = (r @ position.r.weight.t()).unflatten(-1, (heads, width))
                score = torch.einsum("bhk,bshk->bhs", q[:, i] + position.u, k[:, :seen])
                score = score + torch.einsum("bhk,shk->bhs", q[:, i] + position.v, moved)
                weights = torch.softmax(score / math.sqrt(width), -1)
                rows.append(torch.einsum("bhs,bshk->bhk", weights, v[:, :seen]).flatten(1))
            h = h + torch.stack(rows, 1) @ mixer.o.weight.t()
            h = h + block.channel(h, Context())
        outputs.append(h)
    return torch.cat(outputs, 1)


def sinusoids(distance: int, width: int) -> Tensor:
    angles = [distance / 10000 ** (2 * f / width) for f in range(width // 2)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])


@pytest.mark.parametrize(("segment", "memory"), [(4, 4), (5, 3), (4, 9), (6, 0)])
def test_outputs_and_gradients_are_the_papers(segment: int, memory: int, agree: Any) -> None:
    net = network({"kind": "transformer_xl", "segment": segment, "memory": memory})
    found = net.driver(net.blocks, net.embed(IDS), Context())
    expected = paper(net, net.embed(IDS), segment, memory)
    agree(found, expected)
    weights = torch.randn_like(expected)
    wanted = [net.embed.weight, *net.blocks.parameters()]
    for a, b in zip(
        torch.autograd.grad((found * weights).sum(), wanted),
        torch.autograd.grad((expected * weights).sum(), wanted),
        strict=True,
    ):
        agree(a, b, 1e-4)


def test_recomputing_segments_changes_no_gradient(agree: Any) -> None:
    net = network({"kind": "transformer_xl", "segment": 5, "memory": 4})
    wanted = list(net.parameters())

    def slopes() -> list[Tensor]:
        return list(torch.autograd.grad(net(IDS).square().sum(), wanted))

    plain = slopes()
    net.recompute_blocks()
    for a, b in zip(slopes(), plain, strict=True):
        agree(a, b)


@torch.no_grad()
def test_with_memory_for_everything_it_is_one_long_forward_pass(agree: Any) -> None:
    net, plain = network({"kind": "transformer_xl", "segment": 4, "memory": 64}), network(None)
    plain.load_state_dict(net.state_dict())
    agree(net(IDS), plain(IDS))


@torch.no_grad()
def test_without_memory_a_segment_stands_alone(agree: Any) -> None:
    net = network({"kind": "transformer_xl", "segment": 5, "memory": 0})
    agree(net(IDS)[:, 5:10], net(IDS[:, 5:10]))
    changed = IDS.clone()
    changed[:, :5] = (changed[:, :5] + 1) % 24
    assert torch.equal(net(changed)[:, 5:], net(IDS)[:, 5:])


@torch.no_grad()
def test_layers_reach_as_far_as_their_lengths_say() -> None:
    """Two layers with 3 and 0: token 8 of segment [8, 12) sees 3 tokens back through the first layer only."""
    net = network({"kind": "transformer_xl", "segment": 4, "memory": [3, 0]})
    base = net(IDS)
    for place, felt in ((4, False), (5, True), (7, True)):
        changed = IDS.clone()
        changed[:, place] = (changed[:, place] + 1) % 24
        assert bool((net(changed)[:, 8] != base[:, 8]).any()) is felt


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(SettingsError, match="memory lists 3 layers, but the stack has 2"):
        network({"kind": "transformer_xl", "memory": [1, 2, 3]})
    with pytest.raises(SettingsError, match="negative"):
        network({"kind": "transformer_xl", "memory": -1})
    with pytest.raises(ArmillaryError, match="cannot drive 'retention'"):
        network({"kind": "transformer_xl"}, block={"mixer": "retention", "channel": "gated"}).init_state(1)
    with pytest.raises(ArmillaryError, match="packed documents"):
        network({"kind": "transformer_xl"}).hidden(IDS, documents=torch.zeros_like(IDS))
