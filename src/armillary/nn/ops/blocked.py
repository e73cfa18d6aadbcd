"""Attention over blocks of query rows, forward and backward, for training on a CPU.

PyTorch's fused CPU kernel spends most of its time outside its matrix products. Here each block of
rows is one batched product against the keys it can reach, one softmax and one product with the
values; the backward pass forms the weights of a block again instead of keeping them, so memory is
linear in length (Dao et al. 2022, FlashAttention; Rabe & Staats 2021). The heads that share keys
are rows of one product. It is one opaque operator, so that compiled blocks neither unroll nor
specialise it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from armillary.native.rows import softmax_rows_, softmax_rows_backward_

ROWS = 128  # query rows at a time: scores of a block stay in the cache


def attend_blocked(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Tensor:
    """softmax(q kᵀ · scale) v for q [B, H, T, K], k and v [B, G, S, K]; causal needs T = S."""
    return _attend(q, k, v, causal, scale)  # type: ignore[no-any-return]


def _folded(q: Tensor, groups: int) -> Tensor:
    """[B, H, T, K] → [B·G, H/G, T, K]."""
    batch, heads, queries, width = q.shape
    return q.reshape(batch * groups, heads // groups, queries, width)


def _weights(q: Tensor, k: Tensor, start: int, stop: int, causal: bool, scale: float) -> tuple[Tensor, Tensor, int]:
    """Rows [start, stop): the queries as rows of one product, their weights, their reach."""
    reach = stop if causal else k.shape[1]
    rows = q[:, :, start:stop].reshape(q.shape[0], -1, q.shape[-1])
    scores = torch.bmm(rows, k[:, :reach].transpose(1, 2))
    softmax_rows_(scores.view(-1, reach), stop - start, start, causal, scale)
    return rows, scores, reach


@torch.library.custom_op("armillary::attend_blocked", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    batch, heads, queries, width = q.shape
    folded, keys, values = _folded(q, k.shape[1]), k.flatten(0, 1), v.flatten(0, 1)
    out = torch.empty(batch, queries, heads, width, dtype=q.dtype, device=q.device).transpose(1, 2)
    for start in range(0, queries, ROWS):
        stop = min(queries, start + ROWS)
        _, weights, reach = _weights(folded, keys, start, stop, causal, scale)
        y = torch.bmm(weights, values[:, :reach])
        out[:, :, start:stop] = y.view(batch, heads, stop - start, width)
    return out


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    batch, heads, queries, width = q.shape
    return q.new_empty(batch, queries, heads, width).transpose(1, 2)


@torch.library.custom_op("armillary::attend_blocked_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, queries, width = q.shape
    groups, length = k.shape[1], k.shape[2]
    folded, keys, values = _folded(q, groups), k.flatten(0, 1), v.flatten(0, 1)
    grads = _folded(grad, groups)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    grad_q = torch.empty(batch, queries, heads, width, dtype=q.dtype, device=q.device).transpose(1, 2)
    grad_k = torch.zeros(batch * groups, length, width, dtype=wide, device=q.device)
    grad_v = torch.zeros_like(grad_k)
    for start in range(0, queries, ROWS):
        stop = min(queries, start + ROWS)
        rows, weights, reach = _weights(folded, keys, start, stop, causal, scale)
        inward = grads[:, :, start:stop].reshape(rows.shape)
        grad_v[:, :reach] += torch.bmm(weights.transpose(1, 2), inward)
        slopes = torch.bmm(inward, values[:, :reach].transpose(1, 2))
        softmax_rows_backward_(weights.view(-1, reach), slopes.view(-1, reach), stop - start, start, causal, scale)
        y = torch.bmm(slopes, keys[:, :reach])
        grad_q[:, :, start:stop] = y.view(batch, heads, stop - start, width)
        grad_k[:, :reach] += torch.bmm(slopes.transpose(1, 2), rows)
    shape = (batch, groups, length, width)
    return grad_q, grad_k.to(k.dtype).view(shape), grad_v.to(v.dtype).view(shape)


@_attend_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, queries, width = q.shape
    grad_q = q.new_empty(batch, queries, heads, width).transpose(1, 2)
    return grad_q, k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v = ctx.saved_tensors
    return (*_attend_backward(grad, q, k, v, ctx.causal, ctx.scale), None, None)


_attend.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.armillary.attend_blocked)
def _flops(q: Any, k: Any, v: Any, causal: bool, scale: float, *, out_shape: Any = None, **_: Any) -> int:
    batch, heads, queries, width = q
    pairs = batch * heads * queries * k[2]
    return int(4 * pairs * width // (2 if causal else 1))


@register_flop_formula(torch.ops.armillary.attend_blocked_backward)
def _flops_backward(
    grad: Any, q: Any, k: Any, v: Any, causal: bool, scale: float, *, out_shape: Any = None, **_: Any
) -> int:
    batch, heads, queries, width = q
    return int(10 * batch * heads * queries * k[2] * width // (2 if causal else 1))
