"""Efficient Attention against the equations of Shen et al. 2021, with explicit softmaxes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.mechanism import MixerSettings, Order, Place, initialise
from armillary.nn.mixers.efficient import Efficient, EfficientSettings


def built(order: Order = "causal", **changes: Any) -> Efficient:
    mixer = EfficientSettings(**{"heads": 2, **changes}).build(Place(16, order=order))
    initialise(mixer, 3)
    return mixer


def published(mixer: Efficient, x: Tensor) -> Tensor:
    """ρ_q(Q) (ρ_k(K)ᵀ V) of a whole text."""
    heads = []
    for h in range(2):
        q, k, v = (x @ product.weight[8 * h : 8 * h + 8].t() for product in (mixer.q, mixer.k, mixer.v))
        if mixer.soft:
            q, k = torch.softmax(q, 2), torch.softmax(k, 1)
        else:
            q, k = q / x.shape[1] ** 0.5, k / x.shape[1] ** 0.5
        heads.append(q @ (k.transpose(1, 2) @ v))
    return torch.cat(heads, -1) @ mixer.o.weight.t()


@pytest.mark.parametrize("normalisation", ["softmax", "scaling"])
@pytest.mark.parametrize("order", ["causal", "bidirectional"])
@pytest.mark.parametrize("length", [1, 20, 70])
def test_it_is_the_papers(length: int, order: Order, normalisation: str, agree: Any) -> None:
    """Causal, each row is the last row of the published form of the text that ends there."""
    mixer = built(order, normalisation=normalisation)
    x = (torch.randn(2, length, 16) * 2).requires_grad_()
    if order == "bidirectional":
        expected = published(mixer, x)
    else:
        expected = torch.stack([published(mixer, x[:, : t + 1])[:, -1] for t in range(length)], 1)
    found = mixer(x, Context())
    agree(found, expected, 2e-5)
    weights, wanted = torch.randn_like(expected), [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * weights).sum(), wanted)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max()) <= 1e-4 * max(float(b.abs().max()), 0.1)  # one token: k does not matter


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
def test_rows_of_the_implied_matrix_sum_to_one(order: Order) -> None:
    seen = built(order).sight(torch.randn(2, 40, 16), Context()).detach()
    assert float(seen.min()) >= 0
    torch.testing.assert_close(seen.sum(-1), torch.ones(2, 2, 40), rtol=1e-5, atol=1e-5)


def test_the_scaling_variant_is_a_product_over_n(agree: Any) -> None:
    mixer, x = built("bidirectional", normalisation="scaling"), torch.randn(1, 25, 16)
    q, k = (x @ product.weight[:8].t() for product in (mixer.q, mixer.k))
    agree(mixer.sight(x, Context())[:, 0], q @ k.transpose(1, 2) / 25, 1e-5)


@pytest.mark.parametrize("normalisation", ["softmax", "scaling"])
@pytest.mark.parametrize("order", ["causal", "bidirectional"])
def test_a_row_of_nothing_but_padding_is_finite(order: Order, normalisation: str) -> None:
    mixer, x = built(order, normalisation=normalisation), torch.randn(2, 70, 16, requires_grad=True)
    padding = torch.ones(2, 70, dtype=torch.bool)
    padding[1] = False
    y = mixer(x, Context(padding=padding))
    (slope,) = torch.autograd.grad(y[0].square().sum(), x)
    assert bool(y.isfinite().all()) and bool(slope.isfinite().all()) and not slope[1].any()


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(UnsupportedError, match="does not divide into 3 heads"):
        EfficientSettings(heads=3).build(Place(16))
    with pytest.raises(SettingsError, match="normalisation"):
        parse(MixerSettings, {"kind": "efficient", "normalisation": "sparsemax"})
    with pytest.raises(UnsupportedError, match="cannot be extended"):
        built("bidirectional").init_state(1, 1, torch.float32, "cpu")
