"""Cross-entropy straight from hidden states, so that full float32 logits never exist.

The fast form forms the logits of a few rows at a time and takes their gradient on the spot, so
nothing is computed twice and nothing of size tokens × vocabulary is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.native.rows import cross_entropy_rows_
from armillary.nn.ops import plain

ELEMENTS = 1 << 23  # logits held at once


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Σ_n weights_n · (−log softmax(cap(hidden_n Wᵀ + b))[targets_n]), in nats.

    hidden: [N, D]; weight: [V, D]; targets: [N] int64; weights: [N] or None = ones; bias: [V].
    Returns a float32 scalar (float64 for float64 input). Rows of weight 0 contribute exactly 0.
    """
    if weights is None:
        weights = torch.ones(targets.shape, dtype=torch.float32, device=hidden.device)
    if plain() or hidden.dtype == torch.float64:
        return linear_cross_entropy_plain(hidden, weight, targets, weights, bias, softcap)
    return _LinearCrossEntropy.apply(hidden, weight, targets, weights, bias, softcap)  # type: ignore[no-any-return,no-untyped-call]


def linear_cross_entropy_plain(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The definition, with all logits at once."""
    logits = F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return (losses * weights.to(losses.dtype)).sum()


def token_nll(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """−log probability of each target, [N] float32 nats, without gradients."""
    weight = weight.to(hidden.dtype)
    out = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    step = max(1, ELEMENTS // weight.shape[0])
    with torch.no_grad():
        for start in range(0, hidden.shape[0], step):
            part = slice(start, start + step)
            logits = _logits(hidden[part], weight, bias, softcap)
            out[part] = F.cross_entropy(logits, targets[part], reduction="none")
    return out


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    logits = F.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype)).float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        bias: Tensor | None,
        softcap: float | None,
    ) -> Tensor:
        cast = weight.to(hidden.dtype)
        wants_weight = ctx.needs_input_grad[1]
        wants_bias = bias is not None and ctx.needs_input_grad[4]
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias and bias is not None else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        step = max(1, ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], step):
            part = slice(start, start + step)
            rows, goal, share = hidden[part], targets[part], weights[part]
            logits = F.linear(rows, cast, None if bias is None else bias.to(hidden.dtype))
            slope = None
            if softcap is not None:
                logits = torch.tanh(logits.float() / softcap)
                slope = 1 - logits**2
                logits = logits * softcap
            losses = cross_entropy_rows_(logits, goal, share)
            total += (losses * share).sum()
            if slope is not None:
                logits.mul_(slope)
            delta = logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(delta, cast, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += delta.t() @ rows
            if grad_bias is not None:
                grad_bias += delta.sum(0, dtype=torch.float32)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        # Each gradient is used once, so it is scaled where it lies.
        return (
            None if grad_hidden is None else grad_hidden.mul_(grad.to(grad_hidden.dtype)),
            None if grad_weight is None else grad_weight.mul_(grad).to(weight_dtype),
            None,
            None,
            None if grad_bias is None else grad_bias.mul_(grad).to(bias_dtype),
            None,
        )
