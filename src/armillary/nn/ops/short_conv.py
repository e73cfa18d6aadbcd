"""The short causal depthwise convolution in front of recurrent mixers: each channel sees its last few tokens.

y_t = act(b + Σ_j w_j x_{t−j}) over the W taps of a channel (Fu et al. 2023, Hungry Hungry Hippos; Gu &
Dao 2023, Mamba). Its state is the tail: the last W − 1 inputs of each row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from armillary.native import scan as native
from armillary.nn.ops import native_here, plain


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    silu: bool = True,
    tail: Tensor | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """x [B, T, C] → [B, T, C] in x's dtype, sums in float32 (float64 for float64).

    weight: [C, W], the last tap belongs to the token itself (as in `torch.nn.Conv1d`); bias: [C]; silu:
    whether the result passes x·σ(x); tail: [B, W − 1, C], what came before (see `next_tail`), None =
    zeros; documents: [B, T] ids, a token sees nothing from before its document began (nor any tail). Tokens that are
    not there must be zeros in x; rows of a ragged chunk need nothing, what is invalid stands behind.
    """
    if plain() or not native_here(x):
        return short_conv_plain(x, weight, bias, silu=silu, tail=tail, documents=documents)
    weight = weight.float().flip(1).t()
    bias = weight.new_zeros(weight.shape[1]) if bias is None else bias.float()
    tail = None if tail is None else tail.to(x.dtype)
    documents = None if documents is None else documents.long()
    return _conv(x, weight, bias, tail, documents, silu)  # type: ignore[no-any-return]


def short_conv_plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    silu: bool = True,
    tail: Tensor | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """The sum itself, one shifted copy of the input per tap."""
    wide = torch.promote_types(x.dtype, torch.float32)
    length, taps = x.shape[1], weight.shape[1]
    line = _before(x, tail, taps).to(wide)
    weight = weight.to(wide)
    y = line[:, taps - 1 :] * weight[:, -1]
    same: Tensor | None = None  # whether a token's document had begun j tokens ago
    for j in range(1, taps):
        term = line[:, taps - 1 - j : taps - 1 - j + length]
        if documents is not None:
            ends = max(0, length - j)
            step = torch.zeros_like(documents, dtype=torch.bool)
            step[:, j:] = documents[:, 1 : ends + 1] == documents[:, :ends]
            same = step if same is None else same & step
            term = term.masked_fill(~same[..., None], 0)
        y = y + term * weight[:, -1 - j]
    if bias is not None:
        y = y + bias.to(wide)
    return (F.silu(y) if silu else y).to(x.dtype)


def next_tail(x: Tensor, tail: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The last W − 1 inputs [B, W − 1, C] once a chunk x [B, T, C] has come, of which each row has
    lengths [B] valid tokens (None: all); a row without any keeps its tail bit for bit."""
    kept = tail.shape[1]
    line = torch.cat([tail, x.to(tail.dtype)], 1)
    if lengths is None:
        return line[:, line.shape[1] - kept :]
    places = lengths[:, None] + torch.arange(kept, device=x.device)
    return line.gather(1, places[..., None].expand(-1, -1, x.shape[2]))


def short_conv_flops(channels: int, taps: int, tokens: float, *, bias: bool = True, silu: bool = True) -> float:
    """FLOPs of the plain form over `tokens` tokens."""
    return tokens * channels * (2.0 * taps - 1 + bias + silu)


def _before(x: Tensor, tail: Tensor | None, taps: int) -> Tensor:
    """x with the W − 1 inputs before it."""
    if tail is None:
        return F.pad(x, (0, 0, taps - 1, 0))
    return torch.cat([tail.to(x.dtype), x], 1)


# -- the fast form: one opaque operator


@torch.library.custom_op("armillary::short_conv", mutates_args=())
def _conv(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None, documents: Tensor | None, silu: bool) -> Tensor:
    return native.short_conv(x, weight, bias, tail, documents, silu)


@_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None, documents: Tensor | None, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("armillary::short_conv_backward", mutates_args=())
def _conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None, documents: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return native.short_conv_backward(grad, x, weight, bias, tail, documents, silu)


@_conv_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor | None, documents: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_tail = x.new_empty(0) if tail is None else tail.new_empty(tail.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape), of_tail


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, tail, documents = ctx.saved_tensors
    *slopes, of_tail = _conv_backward(grad, x, weight, bias, tail, documents, ctx.silu)
    return (*slopes, None if tail is None else of_tail, None, None)


_conv.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.armillary.short_conv)
def _flops(x: Any, weight: Any, *rest: Any, **_: Any) -> int:
    return int(short_conv_flops(x[2], weight[0], x[0] * x[1]))


@register_flop_formula(torch.ops.armillary.short_conv_backward)
def _flops_backward(grad: Any, x: Any, weight: Any, *rest: Any, **_: Any) -> int:
    return int(3 * short_conv_flops(x[2], weight[0], x[0] * x[1]))
