"""The selective scan and the short convolution in C, as functions over tensors.

Their plain PyTorch forms are in `nn.ops.scan` and `nn.ops.short_conv`. All activations of one call are
float32 or all bf16; parameters and states are float32.
"""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from armillary.native.library import function

_ARGUMENTS: dict[str, list[Any]] = {
    "scan": [c_void_p] * 12 + [c_int64] * 5 + [c_int],
    "scan_backward": [c_void_p] * 19 + [c_int64] * 6 + [c_int],
    "short_conv": [c_void_p] * 6 + [c_int64] * 4 + [c_int] * 2,
    "short_conv_backward": [c_void_p] * 10 + [c_int64] * 4 + [c_int] * 2,
}
Slopes = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _call(name: str, tensors: tuple[Tensor | None, ...], *numbers: int) -> None:
    dense = [None if t is None else t.contiguous() for t in tensors]  # held until the call is over
    function(name, _ARGUMENTS[name])(*(None if t is None else t.data_ptr() for t in dense), *numbers)


def scan(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    bias: Tensor,
    state: Tensor | None,
    documents: Tensor | None,
    chunk: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, E], the last state [B, N, E] and, if asked for, the states [B, chunks, N, E] before each chunk."""
    rows, length, channels = u.shape
    states = a.shape[0]
    y = u.new_empty(u.shape)
    end = torch.empty(rows, states, channels)
    kept = torch.empty(rows, -(-length // chunk) if keep else 0, states, channels)
    tensors = (u, dt, a, b, c, d, bias, state, documents, y, end, kept if keep else None)
    _call("scan", tensors, rows, length, channels, states, chunk, u.dtype == torch.bfloat16)
    return y, end, kept


def scan_backward(
    grad: Tensor,
    grad_end: Tensor,
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    bias: Tensor,
    kept: Tensor,
    documents: Tensor | None,
    chunk: int,
    groups: int,
) -> Slopes:
    """Gradients of u, dt, a, b, c, d, bias and the first state."""
    rows, length, channels = u.shape
    states = a.shape[0]
    grad_u, grad_dt = u.new_empty(u.shape), dt.new_empty(dt.shape)
    grad_a, grad_state = torch.empty(rows, states, channels), torch.empty(rows, states, channels)
    grad_d, grad_bias = torch.empty(rows, channels), torch.empty(rows, channels)
    grad_b, grad_c = (torch.zeros(rows, groups, length, states) for _ in range(2))
    slopes = (grad_u, grad_dt, grad_a, grad_b, grad_c, grad_d, grad_bias, grad_state)
    tensors = (grad, grad_end, u, dt, a, b, c, d, bias, kept, documents, *slopes)
    _call("scan_backward", tensors, rows, length, channels, states, chunk, groups, u.dtype == torch.bfloat16)
    grad_b, grad_c = grad_b.sum(1).to(b.dtype), grad_c.sum(1).to(c.dtype)
    return grad_u, grad_dt, grad_a.sum(0), grad_b, grad_c, grad_d.sum(0), grad_bias.sum(0), grad_state


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None, documents: Tensor | None, silu: bool
) -> Tensor:
    """y [B, T, C]; weight [W, C] with the token's own tap first, bias [C]."""
    y = x.new_empty(x.shape)
    tensors = (x, weight, bias, tail, documents, y)
    _call("short_conv", tensors, *x.shape, weight.shape[0], silu, x.dtype == torch.bfloat16)
    return y


def short_conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    tail: Tensor | None,
    documents: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the tail (of no size without one)."""
    rows, _, channels = x.shape
    taps = weight.shape[0]
    grad_x = x.new_empty(x.shape)
    grad_tail = x.new_empty(0) if tail is None else tail.new_empty(tail.shape)
    grad_weight, grad_bias = torch.empty(rows, taps, channels), torch.empty(rows, channels)
    tensors = (grad, x, weight, bias, tail, documents, grad_x, None if tail is None else grad_tail)
    numbers = (*x.shape, taps, silu, x.dtype == torch.bfloat16)
    _call("short_conv_backward", (*tensors, grad_weight, grad_bias), *numbers)
    return grad_x, grad_weight.sum(0), grad_bias.sum(0), grad_tail
