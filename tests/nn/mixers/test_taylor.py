"""The Taylor kernel against the formula of Li et al. 2020: the explicit matrix 1 + q̂·k̂, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.nn.context import Context
from armillary.nn.mechanism import Order, Place, initialise
from armillary.nn.mixers.taylor import TaylorAttention, TaylorSettings


def built(order: Order = "causal") -> TaylorAttention:
    mixer = TaylorSettings(heads=2).build(Place(16, order=order))
    initialise(mixer, 3)
    return mixer


def published(mixer: TaylorAttention, x: Tensor, causal: bool) -> Tensor:
    """o_t = (Σ v_j + q̂ᵀ Σ k̂ v_jᵀ) / (n + q̂ᵀ Σ k̂), written with the n summed tokens of each t."""
    heads = []
    for h in range(2):
        q, k, v = (x @ product.weight[8 * h : 8 * h + 8].t() for product in (mixer.q, mixer.k, mixer.v))
        q, k = (z / z.norm(dim=-1, keepdim=True) for z in (q, k))
        rows = []
        for t in range(x.shape[1]):
            n = t + 1 if causal else x.shape[1]
            keys, values = k[:, :n], v[:, :n]
            above = values.sum(1) + torch.einsum("bk,bjk,bjv->bv", q[:, t], keys, values)
            below = n + torch.einsum("bk,bjk->b", q[:, t], keys)
            rows.append(above / below[:, None])
        heads.append(torch.stack(rows, 1))
    return torch.cat(heads, -1) @ mixer.o.weight.t()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [2, 70])
def test_it_is_the_papers(length: int, causal: bool, agree: Any) -> None:
    mixer = built("causal" if causal else "bidirectional")
    x = torch.randn(2, length, 16, requires_grad=True)
    found, expected = mixer(x, Context()), published(mixer, x, causal)
    agree(found, expected, 2e-5)
    weights, wanted = torch.randn_like(expected), [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * weights).sum(), wanted)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 1e-4)


def test_weights_are_the_row_normalised_matrix(agree: Any) -> None:
    mixer, x = built(), torch.randn(1, 30, 16)
    seen = mixer.sight(x, Context())
    for h in range(2):
        q, k = (x @ product.weight[8 * h : 8 * h + 8].t() for product in (mixer.q, mixer.k))
        similar = (1 + torch.cosine_similarity(q[:, :, None], k[:, None], dim=-1)).tril()
        agree(seen[:, h], similar / similar.sum(-1, keepdim=True), 2e-5)
    assert float(seen.min()) >= -1e-6


def test_lengths_of_queries_and_keys_do_not_matter(agree: Any) -> None:
    mixer, x = built(), torch.randn(2, 20, 16)
    before = mixer(x, Context())
    with torch.no_grad():
        mixer.q.weight.mul_(7.0)
        mixer.k.weight.mul_(3.0)
    agree(mixer(x, Context()), before, 1e-4)


def test_vectors_of_zeros_and_opposite_vectors_are_finite() -> None:
    mixer = built()
    with torch.no_grad():
        mixer.k.weight.copy_(-mixer.q.weight)  # every token looks away from itself
    x = torch.randn(1, 9, 16)
    x[:, 4] = 0
    x.requires_grad_()
    y = mixer(x, Context())
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert bool(y.isfinite().all()) and bool(slope.isfinite().all())
