"""The row kernels as functions over tensors: those over many rows beside their plain PyTorch forms, those for few rows
in place of one operation of PyTorch's, which their callers take otherwise.

`fits` says whether a tensor can go to the C library.
"""

from __future__ import annotations

from ctypes import c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from armillary.native.library import function, library

_SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}
_ARGUMENTS: dict[str, list[Any]] = {
    "softmax_rows": [c_void_p] + [c_int64] * 6 + [c_float],
    "softmax_rows_backward": [c_void_p] * 2 + [c_int64] * 6 + [c_float],
    "cross_entropy_rows": [c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64],
    "few_rows_product": [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64],
    "few_rows_attend": [c_void_p] * 5 + [c_int64] * 8 + [c_float],
    "few_rows_rmsnorm": [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float, c_float],
}


def fits(x: Tensor) -> bool:
    """Whether the C library is there and takes this tensor's type and place: a fake tensor, a subclass or
    one inside a function transform has no memory of its own to read."""
    plain = type(x) in (Tensor, Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    return plain and x.device.type == "cpu" and x.dtype in _SUFFIX and library() is not None


def _function(name: str, dtype: torch.dtype) -> Any:
    return function(f"{name}_{_SUFFIX[dtype]}", _ARGUMENTS[name])


def softmax_rows_(scores: Tensor, size: int, start: int, left: int | None, right: int | None, scale: float) -> Tensor:
    """softmax(scores · scale) over the last axis, in place; scores [rows, S] contiguous.

    Rows come in groups of `size`; row r of a group sees its columns from start + r − left to start + r
    + right (None: to the end), at least one.
    """
    if not fits(scores):
        return softmax_rows_plain_(scores, size, start, left, right, scale)
    rows, columns = scores.shape
    call = _function("softmax_rows", scores.dtype)
    call(scores.data_ptr(), rows, columns, size, start, _far(left), _far(right), scale)
    return scores


def softmax_rows_plain_(
    scores: Tensor, size: int, start: int, left: int | None, right: int | None, scale: float
) -> Tensor:
    """The plain form of `softmax_rows_`."""
    wide = scores if scores.dtype == torch.float64 else scores.float()
    wide = wide * scale
    hidden = torch.zeros(size, scores.shape[1], dtype=torch.bool, device=scores.device)
    if right is not None:
        hidden |= torch.ones_like(hidden).triu_(start + right + 1)
    if left is not None:
        hidden |= torch.ones_like(hidden).tril_(start - left - 1)
    wide.view(-1, size, scores.shape[1]).masked_fill_(hidden, -torch.inf)
    return scores.copy_(torch.softmax(wide, -1))


def softmax_rows_backward_(
    weights: Tensor, slopes: Tensor, size: int, start: int, left: int | None, right: int | None, scale: float
) -> Tensor:
    """Gradient of the scores from the gradient `slopes` of the weights, in place on `slopes`."""
    if not fits(slopes):
        return softmax_rows_backward_plain_(weights, slopes, scale)
    rows, columns = slopes.shape
    call = _function("softmax_rows_backward", slopes.dtype)
    call(weights.data_ptr(), slopes.data_ptr(), rows, columns, size, start, _far(left), _far(right), scale)
    return slopes


def softmax_rows_backward_plain_(weights: Tensor, slopes: Tensor, scale: float) -> Tensor:
    """The plain form of `softmax_rows_backward_`; weights of 0 give 0 whatever the mask was."""
    kind = torch.float64 if slopes.dtype == torch.float64 else torch.float32
    return slopes.copy_(torch._softmax_backward_data(slopes.to(kind), weights.to(kind), -1, kind) * scale)


def _far(bound: int | None) -> int:
    return 2**40 if bound is None else bound


def cross_entropy_rows_(logits: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
    """Losses [rows] in nats, unweighted; `logits` [rows, V] become the gradient of Σ shares·losses."""
    if not fits(logits):
        return cross_entropy_rows_plain_(logits, targets, shares)
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32)
    targets, shares = targets.contiguous(), shares.float().contiguous()
    if rows and (int(targets.min()) < 0 or int(targets.max()) >= columns):
        raise IndexError(f"a target lies outside the {columns} columns")
    call = _function("cross_entropy_rows", logits.dtype)
    call(logits.data_ptr(), targets.data_ptr(), shares.data_ptr(), losses.data_ptr(), rows, columns)
    return losses


def cross_entropy_rows_plain_(logits: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
    """The plain form of `cross_entropy_rows_`."""
    wide = logits.float()
    peak = wide.amax(-1, keepdim=True)
    picked = wide.gather(1, targets[:, None])
    wide = wide.sub_(peak).exp_() if wide is not logits else (wide - peak).exp_()
    total = wide.sum(-1, keepdim=True)
    losses = (total.log() + peak - picked)[:, 0]
    wide.mul_(shares.float()[:, None] / total)
    wide.scatter_add_(1, targets[:, None], -shares.float()[:, None])
    logits.copy_(wide)
    return losses


def few_rows_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, K] Wᵀ → [rows, N] in x's dtype, reading W [N, K] once; W has x's dtype or float32."""
    rows, inner = x.shape
    given = x.to(weight.dtype).contiguous()
    out = torch.empty(rows, weight.shape[0], dtype=weight.dtype)
    call = _function("few_rows_product", weight.dtype)
    call(given.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, inner, weight.shape[0])
    return out.to(x.dtype)


def few_rows_attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float) -> Tensor:
    """Attention of few queries q [B, H, T, K] over k and v [B, G, S, K] → [B, H, T, K].

    Query t of row b sees the first starts[b] + t + 1 keys; starts: [B] int64. k and v may be views
    that end before their storage does, alike in their strides.
    """
    batch, heads, queries, width = q.shape
    groups, keys = k.shape[1], k.shape[2]
    q = q.contiguous()
    out = torch.empty(batch, queries, heads, width, dtype=q.dtype)
    call = _function("few_rows_attend", q.dtype)
    sizes = (batch, groups, heads // groups, queries, keys, width, k.stride(0), k.stride(1))
    call(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), starts.data_ptr(), *sizes, scale)
    return out.transpose(1, 2)


def attendable(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `few_rows_attend` takes these tensors."""
    width = q.shape[-1]
    return (
        q.dtype == k.dtype == v.dtype
        and fits(q)
        and k.stride() == v.stride()
        and k.stride()[2:] == (width, 1)
        and v.shape == k.shape
    )


def few_rows_rmsnorm(x: Tensor, weight: Tensor, epsilon: float, offset: float = 0.0) -> Tensor:
    """x [..., D] / rms(x) · (offset + w) for few rows, x and w of one dtype."""
    columns = x.shape[-1]
    x = x.contiguous()
    out = torch.empty_like(x)
    call = _function("few_rows_rmsnorm", x.dtype)
    call(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // columns, columns, epsilon, offset)
    return out


def read_all(x: Tensor) -> float:
    """Reads a float32 tensor once: the floor that memory bandwidth sets (benchmarks)."""
    return float(function("read_all", [c_void_p, c_int64], c_float)(x.data_ptr(), x.numel()))
