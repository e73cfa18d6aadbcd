"""Gated linear attention against the equations of Yang et al. 2024, written out as loops over heads and tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.mechanism import MixerSettings, Place
from armillary.nn.mixers.gla import GatedLinear, GatedLinearSettings


@pytest.fixture
def mixer() -> GatedLinear:
    made = GatedLinearSettings(heads=2, rank=3, temperature=4.0).build(Place(16))
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return made


def published(mixer: GatedLinear, x: Tensor) -> Tensor:
    """The recurrence of section 4 with the layer of section 4.4, one head and token after the other."""
    alpha = torch.sigmoid(x @ mixer.decay_in.weight.t() @ mixer.decay_out.weight.t() + mixer.decay_out.bias) ** 0.25
    heads = []
    for h in range(2):
        keys, values = slice(4 * h, 4 * h + 4), slice(8 * h, 8 * h + 8)
        q = x @ mixer.q.weight[keys].t() / 2
        k, v = x @ mixer.k.weight[keys].t(), x @ mixer.v.weight[values].t()
        state, rows = torch.zeros(x.shape[0], 4, 8), []
        for t in range(x.shape[1]):
            state = alpha[:, t, keys, None] * state + k[:, t, :, None] * v[:, t, None, :]
            rows.append((q[:, t, None] @ state)[:, 0])
        y = torch.stack(rows, 1)
        heads.append(y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight)
    gate = x @ mixer.gate.weight.t()
    return (gate * torch.sigmoid(gate) * torch.cat(heads, -1)) @ mixer.o.weight.t()


@pytest.mark.parametrize("cuts", [[33], [16, 1, 16], [1] * 33])
def test_it_is_the_papers(cuts: list[int], mixer: GatedLinear, agree: Any) -> None:
    x = torch.randn(2, 33, 16, requires_grad=True)
    weights = torch.randn(2, 33, 16)
    state = mixer.init_state(2, 1, torch.float32, "cpu")
    whole = len(cuts) == 1
    found = (
        mixer(x, Context()) if whole else torch.cat([mixer.extend(c, state, Context()) for c in x.split(cuts, 1)], 1)
    )
    expected = published(mixer, x)
    agree(found, expected, 2e-5)
    wanted = [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * weights).sum(), wanted)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 1e-4)


def test_what_cannot_be_says_why(mixer: GatedLinear) -> None:
    with pytest.raises(SettingsError, match="heads"):
        parse(MixerSettings, {"kind": "gla", "heads": 0})
    with pytest.raises(UnsupportedError, match="8 key and 16 value features do not divide into 3 heads"):
        GatedLinearSettings(heads=3).build(Place(16))
    with pytest.raises(UnsupportedError, match="cannot be bidirectional"):
        GatedLinearSettings().build(Place(16, order="bidirectional"))
    other = GatedLinearSettings(heads=4).build(Place(16)).init_state(2, 1, torch.float32, "cpu")
    with pytest.raises(UnsupportedError, match=r"'matrix' should be \(2, 4, 8\).*\(4, 2, 4\)"):
        mixer.extend(torch.randn(2, 1, 16), other, Context())


def test_a_row_of_padding_is_finite(mixer: GatedLinear) -> None:
    y = mixer(torch.randn(2, 5, 16), Context(padding=torch.tensor([[True] * 5, [False] * 5])))
    assert bool(y.isfinite().all())
