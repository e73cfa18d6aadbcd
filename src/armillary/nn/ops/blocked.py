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
from armillary.nn.ops import product_dtype

ROWS = 128  # query rows at a time: scores of a block stay in the cache


def attend_blocked(q: Tensor, k: Tensor, v: Tensor, *, left: int | None, right: int | None, scale: float) -> Tensor:
    """softmax(q kᵀ · scale) v for q [B, H, T, K], k and v [B, G, S, K], where query t sees the keys from
    t − left to t + right (None: to the end). A bound needs T = S."""
    return _attend(q, k, v, left, right, scale)  # type: ignore[no-any-return]


def _folded(q: Tensor, groups: int) -> Tensor:
    """[B, H, T, K] → [B·G, H/G, T, K]."""
    batch, heads, queries, width = q.shape
    return q.reshape(batch * groups, heads // groups, queries, width)


def _bounds(start: int, stop: int, keys: int, left: int | None, right: int | None) -> tuple[int, int]:
    """The keys that rows [start, stop) can reach."""
    return 0 if left is None else max(0, start - left), keys if right is None else min(keys, stop + right)


def _weights(
    q: Tensor, k: Tensor, start: int, stop: int, left: int | None, right: int | None, scale: float
) -> tuple[Tensor, Tensor, slice]:
    """Rows [start, stop): the queries as rows of one product, their weights, the keys that they reach."""
    low, reach = _bounds(start, stop, k.shape[1], left, right)
    rows = q[:, :, start:stop].reshape(q.shape[0], -1, q.shape[-1])
    scores = torch.bmm(rows, k[:, low:reach].transpose(1, 2))
    softmax_rows_(scores.view(-1, reach - low), stop - start, start - low, left, right, scale)
    return rows, scores, slice(low, reach)


@torch.library.custom_op("armillary::attend_blocked", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, left: int | None, right: int | None, scale: float) -> Tensor:
    batch, heads, queries, width = q.shape
    out = torch.empty(batch, queries, heads, width, dtype=q.dtype, device=q.device).transpose(1, 2)
    q, k, v = (x.to(product_dtype(x)) for x in (q, k, v))
    folded, keys, values = _folded(q, k.shape[1]), k.flatten(0, 1), v.flatten(0, 1)
    for start in range(0, queries, ROWS):
        stop = min(queries, start + ROWS)
        _, weights, seen = _weights(folded, keys, start, stop, left, right, scale)
        y = torch.bmm(weights, values[:, seen])
        out[:, :, start:stop] = y.view(batch, heads, stop - start, width)
    return out


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, left: int | None, right: int | None, scale: float) -> Tensor:
    batch, heads, queries, width = q.shape
    return q.new_empty(batch, queries, heads, width).transpose(1, 2)


@torch.library.custom_op("armillary::attend_blocked_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, left: int | None, right: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, queries, width = q.shape
    groups, length, given = k.shape[1], k.shape[2], q.dtype
    grad_q = torch.empty(batch, queries, heads, width, dtype=given, device=q.device).transpose(1, 2)
    grad, q, k, v = (x.to(product_dtype(x)) for x in (grad, q, k, v))
    folded, keys, values = _folded(q, groups), k.flatten(0, 1), v.flatten(0, 1)
    grads = _folded(grad, groups)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    grad_k = torch.zeros(batch * groups, length, width, dtype=wide, device=q.device)
    grad_v = torch.zeros_like(grad_k)
    for start in range(0, queries, ROWS):
        stop = min(queries, start + ROWS)
        rows, weights, seen = _weights(folded, keys, start, stop, left, right, scale)
        count, begun = seen.stop - seen.start, start - seen.start
        inward = grads[:, :, start:stop].reshape(rows.shape)
        grad_v[:, seen] += torch.bmm(weights.transpose(1, 2), inward)
        slopes = torch.bmm(inward, values[:, seen].transpose(1, 2))
        lines = weights.view(-1, count), slopes.view(-1, count)
        softmax_rows_backward_(*lines, stop - start, begun, left, right, scale)
        y = torch.bmm(slopes, keys[:, seen])
        grad_q[:, :, start:stop] = y.view(batch, heads, stop - start, width)
        grad_k[:, seen] += torch.bmm(slopes.transpose(1, 2), rows)
    shape = (batch, groups, length, width)
    return grad_q, grad_k.to(given).view(shape), grad_v.to(given).view(shape)


@_attend_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, left: int | None, right: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, queries, width = q.shape
    grad_q = q.new_empty(batch, queries, heads, width).transpose(1, 2)
    return grad_q, k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.left, ctx.right, ctx.scale = inputs
    ctx.save_for_backward(q, k, v)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v = ctx.saved_tensors
    return (*_attend_backward(grad, q, k, v, ctx.left, ctx.right, ctx.scale), None, None, None)


_attend.register_autograd(_backward, setup_context=_keep)


def _pairs(queries: int, keys: int, left: int | None, right: int | None) -> int:
    """How many (query, key) pairs are seen; the diagonal of a causal triangle counts by half."""
    if left is None and right == 0:
        return queries * keys // 2
    bounds = (_bounds(t, t + 1, keys, left, right) for t in range(queries))
    return sum(reach - low for low, reach in bounds)


@register_flop_formula(torch.ops.armillary.attend_blocked)
def _flops(
    q: Any, k: Any, v: Any, left: int | None, right: int | None, scale: float, *, out_shape: Any = None, **_: Any
) -> int:
    batch, heads, queries, width = q
    return int(4 * batch * heads * _pairs(queries, k[2], left, right) * width)


@register_flop_formula(torch.ops.armillary.attend_blocked_backward)
def _flops_backward(
    grad: Any,
    q: Any,
    k: Any,
    v: Any,
    left: int | None,
    right: int | None,
    scale: float,
    *,
    out_shape: Any = None,
    **_: Any,
) -> int:
    batch, heads, queries, width = q
    return int(10 * batch * heads * _pairs(queries, k[2], left, right) * width)
