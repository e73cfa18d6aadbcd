"""What the chunks of matrix states with decay do besides products, beside the plain PyTorch forms."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from armillary.native.library import function, library

_FADE = [c_void_p] * 2 + [c_int64] * 2
_DOTS = [c_void_p] * 3 + [c_int64] * 2


def fade(total: Tensor) -> Tensor:
    """exp(total_i − total_j) for j ≤ i, else 0; total: [..., C] float64, never rising → [..., C, C] float32."""
    if total.device.type != "cpu" or library() is None:
        return fade_plain(total)
    total = total.contiguous()
    pairs = torch.empty(*total.shape, total.shape[-1])
    function("fade", _FADE)(total.data_ptr(), pairs.data_ptr(), total.numel() // total.shape[-1], total.shape[-1])
    return pairs


def dots(a: Tensor, b: Tensor) -> Tensor:
    """Σ a·b over the last axis; float32, of one shape."""
    if a.device.type != "cpu" or library() is None:
        return (a * b).sum(-1)
    a, b = a.contiguous(), b.contiguous()
    sums = torch.empty(a.shape[:-1])
    function("dots", _DOTS)(a.data_ptr(), b.data_ptr(), sums.data_ptr(), sums.numel(), a.shape[-1])
    return sums


def fade_plain(total: Tensor) -> Tensor:
    chunk = total.shape[-1]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=total.device).triu(1)
    # Later pairs are set before the exponential, which would overflow there.
    between = (total[..., :, None] - total[..., None, :]).float()
    return between.masked_fill_(later, -torch.inf).exp_()
