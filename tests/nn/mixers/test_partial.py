"""Partial attention against loops over heads and pairs of tokens, and multi-head attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context, Memory
from armillary.nn.mechanism import MixerSettings, Place, initialise
from armillary.nn.mixers.attention import AttentionSettings
from armillary.nn.mixers.partial import Partial, PartialSettings
from armillary.nn.positions.transformer_xl import TransformerXLPositionSettings


def built(**place: Any) -> Partial:
    settings = PartialSettings(heads=5, head_width=6, score_heads=2, ratio=2.0, bias=True)
    mixer = settings.build(Place(16, path="here", **place))
    initialise(mixer, 1)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return mixer


def by_pair(mixer: Partial, x: Tensor, source: Tensor, causal: bool, padding: Tensor | None = None) -> Tensor:
    """Each token, each head: scores of pairs through the network over heads, one by one."""
    q, k = (product(z).unflatten(-1, (2, 6)) for product, z in ((mixer.q, x), (mixer.k, source)))
    v, u = mixer.v(source).unflatten(-1, (5, 6)), mixer.u(x).unflatten(-1, (5, 6))
    rows = []
    for b in range(len(x)):
        for i in range(x.shape[1]):
            seen = [j for j in range(source.shape[1]) if (j <= i or not causal) and (padding is None or padding[b, j])]
            scores = []
            for j in seen:
                z = torch.stack([q[b, i, g] @ k[b, j, g] / 6**0.5 for g in range(2)])
                z = F.relu(mixer.mix_in @ z + mixer.mix_in_bias)
                scores.append(mixer.mix_out @ z + mixer.mix_out_bias)
            weights = torch.softmax(torch.stack(scores), 0)  # [S, H]
            heads = []
            for h in range(5):
                a = sum((weights[n, h] * v[b, j, h] for n, j in enumerate(seen)), torch.zeros(6, dtype=x.dtype))
                a = a + F.linear(
                    F.relu(F.linear(a, mixer.up.weight, mixer.up.bias)), mixer.down.weight, mixer.down.bias
                )
                heads.append(F.relu(u[b, i, h]) * a)
            rows.append(mixer.o(torch.cat(heads)))
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
def test_it_is_the_released_formula(order: Any, agree: Any) -> None:
    # Doubles: a constant on all scores of a head changes nothing, so that mix_out_bias has slopes of rounding alone.
    mixer, x = built(order=order).double(), torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    padding = torch.tensor([[True] * 5, [True, True, True, False, False]])
    for real in (None, padding):
        found, expected = mixer(x, Context(padding=real)), by_pair(mixer, x, x, order == "causal", real)
        agree(found, expected)
    weights = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad((found * weights).sum(), [x, *mixer.parameters()]),
        torch.autograd.grad((expected * weights).sum(), [x, *mixer.parameters()]),
        strict=True,
    ):
        agree(a, b)


def test_it_looks_at_a_memory(agree: Any) -> None:
    mixer, x, memory = built(cross=True), torch.randn(1, 3, 16), torch.randn(1, 4, 16)
    agree(mixer(x, Context(memory=Memory(memory))), by_pair(mixer, x, memory, False))


def test_where_the_small_networks_do_nothing_it_is_multi_head_attention(agree: Any) -> None:
    """Mixing is the identity (scores moved above 0, then softmax moves them back), the heads' network gives 0
    and every gate is 1."""
    place, x = Place(16), torch.randn(2, 7, 16)
    mixer = PartialSettings(heads=4, score_heads=4, bias=True).build(place)
    whole = AttentionSettings(heads=4, bias=True).build(place)
    initialise(mixer, 1)
    with torch.no_grad():
        mixer.mix_in.copy_(torch.eye(4))
        mixer.mix_in_bias.fill_(50.0)
        mixer.mix_out.copy_(torch.eye(4))
        mixer.down.weight.zero_()
        mixer.u.weight.zero_()
        mixer.u.bias.fill_(1.0)
    whole.load_state_dict({name: p for name, p in mixer.state_dict().items() if name in whole.state_dict()})
    agree(mixer(x, Context()), whole(x, Context()), 1e-4)


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(SettingsError, match="score_heads, not kv_heads"):
        parse(MixerSettings, {"kind": "partial", "heads": 4, "kv_heads": 2})
    with pytest.raises(UnsupportedError, match="rotations and biases only"):
        PartialSettings(position=TransformerXLPositionSettings()).build(Place(16))
    with pytest.raises(UnsupportedError, match="does not divide into 4 heads"):
        PartialSettings(heads=4).build(Place(18))
