"""Cross-entropy from hidden states against PyTorch's on full logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.nn.ops import cross_entropy as module
from armillary.nn.ops import plain_ops
from armillary.nn.ops.cross_entropy import linear_cross_entropy, token_nll

N, D, V = 37, 12, 29


def expected_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shares: Tensor, softcap: float | None
) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (F.cross_entropy(logits, targets, reduction="none") * shares).sum()


@pytest.mark.parametrize("elements", [1 << 22, V * 5])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("biased", [False, True])
def test_sum_and_gradients_are_pytorchs(
    biased: bool, softcap: float | None, elements: int, agree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ELEMENTS", elements)
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    bias = torch.randn(V, requires_grad=True) if biased else None
    targets, shares = torch.randint(0, V, (N,)), torch.rand(N)
    shares[3:9] = 0
    learned = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    expected = expected_loss(hidden, weight, bias, targets, shares, softcap)
    theirs = torch.autograd.grad(3 * expected, learned)
    for form in ("fast", "plain"):
        if form == "plain":
            with plain_ops():
                found = linear_cross_entropy(hidden, weight, targets, weights=shares, bias=bias, softcap=softcap)
        else:
            found = linear_cross_entropy(hidden, weight, targets, weights=shares, bias=bias, softcap=softcap)
        assert found.dtype == torch.float32 and found.shape == ()
        agree(found, expected, 1e-6)
        for a, b in zip(torch.autograd.grad(3 * found, learned), theirs, strict=True):
            agree(a, b)
    nll = token_nll(hidden, weight, targets, bias=bias, softcap=softcap)
    agree((nll * shares).sum(), expected, 1e-6)
    assert not nll.requires_grad


def test_a_weight_of_zero_is_exactly_nothing() -> None:
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D)
    targets = torch.randint(0, V, (N,))
    shares = torch.ones(N)
    shares[5] = 0
    far = hidden.detach().clone()
    far[5] = 1e4
    far.requires_grad_()
    losses = [linear_cross_entropy(h, weight, targets, weights=shares) for h in (hidden, far)]
    assert torch.equal(losses[0], losses[1])
    (slope,) = torch.autograd.grad(losses[1], far)
    assert bool((slope[5] == 0).all()) and bool((slope[4] != 0).any())


def test_default_weights_are_ones(agree: Any) -> None:
    hidden, weight, targets = torch.randn(N, D), torch.randn(V, D), torch.randint(0, V, (N,))
    found = linear_cross_entropy(hidden, weight, targets)
    agree(found, F.cross_entropy(hidden @ weight.t(), targets, reduction="sum"), 1e-6)


def test_large_logits_do_not_overflow(agree: Any) -> None:
    hidden, weight, targets = torch.randn(N, D) * 100, torch.randn(V, D) * 100, torch.randint(0, V, (N,))
    found = linear_cross_entropy(hidden, weight, targets)
    agree(found, F.cross_entropy(hidden @ weight.t(), targets, reduction="sum"), 1e-5)


def test_bf16_activations_against_float32(agree: Any) -> None:
    """The loss stays within bf16's rounding of the logits; the gradient of the master weight is float32."""
    hidden, weight = torch.randn(N, D).bfloat16().requires_grad_(), torch.randn(V, D, requires_grad=True)
    targets, shares = torch.randint(0, V, (N,)), torch.rand(N)
    found = linear_cross_entropy(hidden, weight, targets, weights=shares)
    wide = hidden.detach().float().requires_grad_()
    expected = expected_loss(wide, weight, None, targets, shares, None)
    assert found.dtype == torch.float32
    agree(found, expected, 0.01)
    ours, theirs = torch.autograd.grad(found, [hidden, weight]), torch.autograd.grad(expected, [wide, weight])
    assert ours[0].dtype == torch.bfloat16 and ours[1].dtype == torch.float32
    for a, b in zip(ours, theirs, strict=True):
        agree(a.float(), b, 0.03)


def test_full_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ELEMENTS", 64 * 8)
    sizes: list[int] = []
    real = F.linear

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = real(x, weight, bias)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(F, "linear", watched)
    hidden = torch.randn(100, D, requires_grad=True)
    linear_cross_entropy(hidden, torch.randn(64, D, requires_grad=True), torch.randint(0, 64, (100,))).backward()
    token_nll(hidden, torch.randn(64, D), torch.randint(0, 64, (100,)))
    assert len(sizes) > 10 and max(sizes) <= 64 * 8


def test_float64_stays_float64(agree: Any) -> None:
    hidden, weight = torch.randn(N, D).double(), torch.randn(V, D).double()
    targets = torch.randint(0, V, (N,))
    found = linear_cross_entropy(hidden, weight, targets)
    assert found.dtype == torch.float64
    agree(found, F.cross_entropy(hidden @ weight.t(), targets, reduction="sum"), 1e-12)
