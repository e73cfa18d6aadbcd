"""Query-free attention against attention whose query and key weights are one, and its pairs written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.nn.context import Context
from armillary.nn.mechanism import Place
from armillary.nn.mixers.attention import AttentionSettings
from armillary.nn.mixers.key_value import KeyValue, KeyValueSettings
from armillary.nn.positions.alibi import AlibiSettings
from armillary.nn.positions.rope import RopeSettings

T, WIDTH = 13, 16


def made(order: str = "causal", **settings: Any) -> KeyValue:
    mixer = KeyValueSettings(**settings).build(Place(WIDTH, order=order))
    generator = torch.Generator().manual_seed(3)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return mixer.double()


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
@pytest.mark.parametrize("rotated", [False, True])
def test_it_is_attention_with_tied_products(order: str, rotated: bool, agree: Any) -> None:
    position = RopeSettings() if rotated else None
    mixer = made(order, position=position)
    other = AttentionSettings(position=position).build(Place(WIDTH, order=order)).double()
    other.load_state_dict({**mixer.state_dict(), "q.weight": mixer.k.weight.detach()})
    x = torch.randn(2, T, WIDTH, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, T, WIDTH, dtype=torch.float64)
    found, expected = mixer(x, Context()), other(x, Context())
    agree(found, expected, 1e-9)
    mine = torch.autograd.grad((found * weights).sum(), [x, mixer.k.weight, mixer.v.weight])
    theirs = torch.autograd.grad((expected * weights).sum(), [x, other.q.weight, other.k.weight, other.v.weight])
    agree(mine[0], theirs[0], 1e-9)
    agree(mine[1], theirs[1] + theirs[2], 1e-9)  # one weight in both places
    agree(mine[2], theirs[3], 1e-9)


def test_scores_are_symmetric_until_pairs_are_encoded() -> None:
    """log A_ij + log Z_i = s_ij, so that log A − log Aᵀ of a symmetric s is a difference of row terms."""
    x = torch.randn(1, T, WIDTH, dtype=torch.float64)
    for width in (0, 4):
        with torch.no_grad():
            logs = made("bidirectional", pair_width=width).sight(x, Context())[0].log()
        odd = logs - logs.transpose(1, 2)
        gap = float((odd - odd[:, :, :1] - odd[:, :1, :] + odd[:, :1, :1]).abs().max())
        assert (gap < 1e-9) == (width == 0)


def test_pairs_are_a_product_of_two_encodings(agree: Any) -> None:
    mixer = made(heads=2, pair_width=4)
    x = torch.randn(1, T, WIDTH, dtype=torch.float64)
    speeds = [1.0, 10000 ** (-2 / 4)]
    code = torch.tensor([[f(t * s) for f in (math.sin, math.cos) for s in speeds] for t in range(T)]).double()
    with torch.no_grad():
        found = mixer.sight(x, Context())[0]
        k = mixer.k(x)[0].unflatten(-1, (2, 8))
        for h in range(2):
            for i in range(T):
                scores = [
                    float(k[i, h] @ k[j, h] / math.sqrt(8) + code[i] @ mixer.pair[h] @ code[j]) for j in range(i + 1)
                ]
                agree(found[h, i, : i + 1], torch.softmax(torch.tensor(scores).double(), 0), 1e-6)


def test_a_product_fewer() -> None:
    ours = sum(p.numel() for p in made().parameters())
    assert ours == sum(p.numel() for p in AttentionSettings().build(Place(WIDTH)).parameters()) - WIDTH**2


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"kv_heads \(2\) must be heads \(4\)"):
        KeyValueSettings(kv_heads=2)
    with pytest.raises(SettingsError, match="pair_width"):
        KeyValueSettings(pair_width=3)
    with pytest.raises(SettingsError, match="give one of them"):
        KeyValueSettings(pair_width=4, position=AlibiSettings())
    with pytest.raises(UnsupportedError, match="cannot look at a memory"):
        KeyValueSettings().build(Place(WIDTH, cross=True))
