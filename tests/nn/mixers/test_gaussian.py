"""Gaussian-weighted attention against its formula, as loops over heads and pairs of tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.nn.context import Context
from armillary.nn.mechanism import Place
from armillary.nn.mixers.gaussian import Gaussian, GaussianSettings

T, WIDTH, HEADS = 11, 16, 2


def made(order: str = "causal", **settings: Any) -> Gaussian:
    mixer = GaussianSettings(heads=HEADS, **settings).build(Place(WIDTH, order=order))
    generator = torch.Generator().manual_seed(3)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    with torch.no_grad():
        mixer.log_sigma.copy_(torch.tensor([2.0, 5.0]).log())
    return mixer.double()


def written_out(mixer: Gaussian, x: Tensor, form: str, order: str) -> Tensor:
    rows = []
    for row in x:
        q, k, v = (row @ product.weight.t() for product in (mixer.q, mixer.k, mixer.v))
        heads = []
        for h in range(HEADS):
            part = slice(h * 8, h * 8 + 8)
            sigma = mixer.log_sigma[h].exp()
            outputs = []
            for i in range(T):
                scores = []
                seen = range(i + 1) if order == "causal" else range(T)
                for j in seen:
                    s = (q[i, part] * k[j, part]).sum() / math.sqrt(8)
                    fall = (i - j) ** 2 / sigma**2
                    weighted = {"added": s - fall, "signed": torch.exp(-fall) * s}
                    scores.append(weighted[form] if form in weighted else (torch.exp(-fall) * s).abs())
                weights = torch.stack(scores).exp()
                outputs.append((weights[:, None] * v[: len(scores), part]).sum(0) / weights.sum())
            heads.append(torch.stack(outputs))
        rows.append(torch.cat(heads, -1) @ mixer.o.weight.t())
    return torch.stack(rows)


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
@pytest.mark.parametrize("form", ["absolute", "signed", "added"])
def test_it_is_its_formula(form: str, order: str, agree: Any) -> None:
    mixer = made(order, form=form)
    x = torch.randn(2, T, WIDTH, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, T, WIDTH, dtype=torch.float64)
    found, expected = mixer(x, Context()), written_out(mixer, x, form, order)
    agree(found, expected, 1e-9)
    wanted = [x, mixer.log_sigma, mixer.q.weight, mixer.v.weight]
    ours = torch.autograd.grad((found * weights).sum(), wanted)
    for a, b in zip(ours, torch.autograd.grad((expected * weights).sum(), wanted), strict=True):
        agree(a, b, 1e-8)


def test_a_vanishing_width_leaves_the_diagonal(agree: Any) -> None:
    """σ → 0: the softmax of |own score| beside zeros."""
    mixer = made("bidirectional")
    nn.init.constant_(mixer.log_sigma, math.log(1e-3))
    x = torch.randn(1, T, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        q, k = (product(x).unflatten(-1, (HEADS, 8)).transpose(1, 2) for product in (mixer.q, mixer.k))
        own = (q * k).sum(-1).abs() / math.sqrt(8)
        agree(mixer.sight(x, Context()), torch.softmax(torch.diag_embed(own), -1), 1e-9)


def test_sigma_starts_where_it_is_told_and_learns() -> None:
    mixer = GaussianSettings(sigma=7.0).build(Place(WIDTH))
    mixer.reset(None)
    torch.testing.assert_close(mixer.log_sigma.exp(), torch.full((4,), 7.0))
    for parameter in mixer.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.5)
    mixer(torch.randn(1, T, WIDTH), Context()).square().sum().backward()
    assert (mixer.log_sigma.grad != 0).all()


def test_long_sequences_go_block_by_block(agree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from armillary.nn.ops import attend as module

    mixer = made()
    x = torch.randn(2, 40, WIDTH, dtype=torch.float64, requires_grad=True)
    whole = mixer(x, Context())
    slope = torch.autograd.grad(whole.square().sum(), x)[0]
    monkeypatch.setattr(module, "BLOCK", 16)
    pieces = mixer(x, Context())
    agree(pieces, whole, 1e-9)
    agree(torch.autograd.grad(pieces.square().sum(), x)[0], slope, 1e-9)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SettingsError, match="sigma"):
        GaussianSettings(sigma=0.0)
    with pytest.raises(SettingsError, match="heads"):
        GaussianSettings(heads=0)
    with pytest.raises(UnsupportedError, match="does not divide into 3 heads"):
        GaussianSettings(heads=3).build(Place(WIDTH))
    with pytest.raises(UnsupportedError, match="cannot look at a memory"):
        GaussianSettings().build(Place(WIDTH, cross=True))
