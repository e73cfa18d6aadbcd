"""Additive attention against the equations of Wu et al. 2021 (Fastformer) and of Ladaformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.mechanism import MixerSettings, Order, Place, initialise

KINDS = ("additive", "lada")


def built(kind: str, order: Order = "causal") -> Any:
    mixer = parse(MixerSettings, {"kind": kind, "heads": 2}).build(Place(16, order=order))
    initialise(mixer, 3)
    return mixer


def heads(x: Tensor) -> list[Tensor]:
    return [x[..., :8], x[..., 8:]]


def pooled(logits: Tensor, x: Tensor) -> Tensor:
    """One average of x [B, T, D] for each head: [B, D]."""
    return torch.cat(
        [(torch.softmax(logits[..., h : h + 1] / 8**0.5, 1) * part).sum(1) for h, part in enumerate(heads(x))], -1
    )


def published(kind: str, mixer: Any, x: Tensor, causal: bool) -> Tensor:
    """The paper's equations; causal, for the text so far at each token, p_j keeping its own g_j."""
    q, k, v = (x @ product.weight.t() for product in (mixer.q, mixer.k, mixer.v))
    length = x.shape[1]
    ends = range(1, length + 1) if causal else [length] * length
    alpha = q @ mixer.alpha.weight.t()
    g = torch.stack([pooled(alpha[:, :n], q[:, :n]) for n in ends], 1)
    if kind == "lada":
        return (g * k * v) @ mixer.o.weight.t()
    p = g * k
    beta = p @ mixer.beta.weight.t()
    keys = torch.stack([pooled(beta[:, :n], p[:, :n]) for n in ends], 1)
    return (keys * v) @ mixer.o.weight.t() + q


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 20, 70])
def test_it_is_the_papers(length: int, causal: bool, kind: str, agree: Any) -> None:
    mixer = built(kind, "causal" if causal else "bidirectional")
    x = (torch.randn(2, length, 16) * 2).requires_grad_()
    found, expected = mixer(x, Context()), published(kind, mixer, x, causal)
    agree(found, expected, 2e-5)
    weights, wanted = torch.randn_like(expected), [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * weights).sum(), wanted)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max()) <= 1e-4 * max(float(b.abs().max()), 0.1)  # one token: α does not matter


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_causal_row_is_the_bidirectional_one(kind: str, agree: Any) -> None:
    ahead, both = built(kind), built(kind, "bidirectional")
    x = torch.randn(2, 30, 16)
    if kind == "lada":
        agree(ahead(x, Context())[:, -1], both(x, Context())[:, -1])
    seen = ahead.sight(x, Context())
    torch.testing.assert_close(seen.sum(-1), torch.ones(2, 2, 30), rtol=1e-5, atol=1e-5)


def test_equal_logits_make_the_global_query_the_mean(agree: Any) -> None:
    mixer = built("lada", "bidirectional")
    with torch.no_grad():
        mixer.alpha.weight.zero_()
    x = torch.randn(2, 11, 16)
    q, k, v = (x @ product.weight.t() for product in (mixer.q, mixer.k, mixer.v))
    agree(mixer(x, Context()), (q.mean(1, keepdim=True) * k * v) @ mixer.o.weight.t())


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_permuted_tokens_permute_outputs(kind: str, agree: Any) -> None:
    mixer, x, order = built(kind, "bidirectional"), torch.randn(2, 13, 16), torch.randperm(13)
    agree(mixer(x[:, order], Context()), mixer(x, Context())[:, order])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_logits_of_any_size_stay_causal_and_finite(size: float, kind: str) -> None:
    mixer, x = built(kind), torch.randn(1, 100, 16)
    base, moved = mixer(x, Context()), x.clone()
    moved[:, 60:] *= size
    y = mixer(moved, Context())
    assert bool(y.isfinite().all())
    torch.testing.assert_close(y[:, :60], base[:, :60], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["causal", "bidirectional"])
def test_a_row_of_nothing_but_padding_is_finite(order: Order, kind: str) -> None:
    mixer, x = built(kind, order), torch.randn(2, 70, 16, requires_grad=True)
    padding = torch.ones(2, 70, dtype=torch.bool)
    padding[1] = False
    y = mixer(x, Context(padding=padding))
    (slope,) = torch.autograd.grad(y[0].square().sum(), x)
    assert bool(y.isfinite().all()) and bool(slope.isfinite().all()) and not slope[1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_built_says_why(kind: str) -> None:
    with pytest.raises(UnsupportedError, match="does not divide into 3 heads"):
        parse(MixerSettings, {"kind": kind, "heads": 3}).build(Place(16))
    with pytest.raises(SettingsError, match="heads"):
        parse(MixerSettings, {"kind": kind, "heads": 0})
    with pytest.raises(UnsupportedError, match="cannot be extended"):
        built(kind, "bidirectional").init_state(1, 1, torch.float32, "cpu")
