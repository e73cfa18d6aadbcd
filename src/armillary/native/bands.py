"""The softmax of bands as functions over tensors, each beside its plain PyTorch form.

Rows are the tokens of a sequence sorted into groups, in blocks; a row has scores against the tokens
that end with its block and sees those whose places lie in its band.
"""

from __future__ import annotations

from ctypes import c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from armillary.native.library import function
from armillary.native.rows import fits

_SUFFIX = {torch.bfloat16: "bf16", torch.float32: "f32"}
_ARGUMENTS: dict[str, list[Any]] = {
    "band_softmax": [c_void_p] * 4 + [c_int64] * 6 + [c_float],
    "band_softmax_backward": [c_void_p] * 6 + [c_int64] * 6 + [c_float],
}


def _function(name: str, dtype: torch.dtype) -> Any:
    return function(f"{name}_{_SUFFIX[dtype]}", _ARGUMENTS[name])


def band_softmax_(scores: Tensor, places: Tensor, widths: Tensor, first: int, scale: float) -> Tensor:
    """softmax(scores · scale) over the seen pairs, in place; returns the rows' logarithms of the sums,
    [blocks, size] float32, −inf (and weights of 0) where nothing is seen.

    scores: [blocks, size, span] contiguous, of the blocks from `first` on; places: [orders, span −
    size + all rows] int32 contiguous; widths: [orders] int32. A pair is seen in the last order when
    0 < place − place of the key ≤ width there, unless an earlier order has it too.
    """
    if not fits(scores):
        return _band_softmax_plain_(scores, places, widths, first, scale)
    blocks, size, span = scores.shape
    sums = torch.empty(blocks, size, dtype=torch.float32)
    call = _function("band_softmax", scores.dtype)
    orders, stride = places.shape
    pointers = (scores.data_ptr(), sums.data_ptr(), places.data_ptr(), widths.data_ptr())
    call(*pointers, orders, stride, first, blocks, size, span, scale)
    return sums


def band_softmax_backward_(
    scores: Tensor,
    slopes: Tensor,
    sums: Tensor,
    dots: Tensor,
    places: Tensor,
    widths: Tensor,
    first: int,
    scale: float,
) -> None:
    """In place: scores become exp(scores · scale − sums) over the seen pairs, slopes (the gradient of
    these weights) become the gradient of the scores.

    sums: [blocks, size] float32 contiguous, as `band_softmax_` gives them or of several orders
    together; dots: likewise, each row's product of output and gradient; the rest as there.
    """
    if not fits(scores):
        _band_softmax_backward_plain_(scores, slopes, sums, dots, places, widths, first, scale)
        return
    blocks, size, span = scores.shape
    orders, stride = places.shape
    pointers = (t.data_ptr() for t in (scores, slopes, sums, dots, places, widths))
    call = _function("band_softmax_backward", scores.dtype)
    call(*pointers, orders, stride, first, blocks, size, span, scale)


def _seen(places: Tensor, widths: Tensor, first: int, shape: torch.Size) -> Tensor:
    """[blocks, size, span] bool."""
    blocks, size, span = shape
    begin = first * size
    queries = places[:, begin + span - size :][:, : blocks * size].reshape(-1, blocks, size, 1)
    keys = places[:, begin : begin + span + (blocks - 1) * size].unfold(1, span, size)[:, :, None]
    distance = queries - keys
    inside = (distance > 0) & (distance <= widths.view(-1, 1, 1, 1).to(distance))
    return inside[-1] & ~inside[:-1].any(0)


def _band_softmax_plain_(scores: Tensor, places: Tensor, widths: Tensor, first: int, scale: float) -> Tensor:
    """The plain form of `band_softmax_`."""
    kind = torch.promote_types(scores.dtype, torch.float32)
    seen = _seen(places, widths, first, scores.shape)
    wide = (scores.to(kind) * scale).masked_fill(~seen, -torch.inf)
    sums = wide.logsumexp(-1)
    scores.copy_((wide - sums[..., None]).exp().masked_fill(~seen, 0.0))
    return sums


def _band_softmax_backward_plain_(
    scores: Tensor,
    slopes: Tensor,
    sums: Tensor,
    dots: Tensor,
    places: Tensor,
    widths: Tensor,
    first: int,
    scale: float,
) -> None:
    """The plain form of `band_softmax_backward_`."""
    kind = torch.promote_types(scores.dtype, torch.float32)
    hidden = ~_seen(places, widths, first, scores.shape)
    weights = (scores.to(kind) * scale - sums[..., None]).exp().masked_fill(hidden, 0.0)
    slopes.copy_(weights * (slopes.to(kind) - dots[..., None]) * scale)
    scores.copy_(weights)
