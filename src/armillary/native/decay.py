"""What the chunks of matrix states with decay do besides products, beside the plain PyTorch forms."""

from __future__ import annotations

from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from armillary.native.library import library

_ARGUMENTS: dict[str, list[Any]] = {"fade": [c_void_p] * 2 + [c_int64] * 2, "dots": [c_void_p] * 3 + [c_int64] * 2}
_functions: dict[str, Any] = {}


def _function(name: str) -> Any:
    found = _functions.get(name)
    if found is None:
        loaded = library()
        assert loaded is not None
        found = getattr(loaded, name)
        found.argtypes, found.restype = _ARGUMENTS[name], None
        _functions[name] = found
    return found


def fade(total: Tensor) -> Tensor:
    """exp(total_i − total_j) for j ≤ i, else 0; total: [..., C] float64, never rising → [..., C, C] float32."""
    if total.device.type != "cpu" or library() is None:
        return fade_plain(total)
    total = total.contiguous()
    pairs = torch.empty(*total.shape, total.shape[-1])
    _function("fade")(total.data_ptr(), pairs.data_ptr(), total.numel() // total.shape[-1], total.shape[-1])
    return pairs


def dots(a: Tensor, b: Tensor) -> Tensor:
    """Σ a·b over the last axis; float32, of one shape."""
    if a.device.type != "cpu" or library() is None:
        return (a * b).sum(-1)
    a, b = a.contiguous(), b.contiguous()
    sums = torch.empty(a.shape[:-1])
    _function("dots")(a.data_ptr(), b.data_ptr(), sums.data_ptr(), sums.numel(), a.shape[-1])
    return sums


def fade_plain(total: Tensor) -> Tensor:
    chunk = total.shape[-1]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=total.device).triu(1)
    # Later pairs are set before the exponential, which would overflow there.
    between = (total[..., :, None] - total[..., None, :]).float()
    return between.masked_fill_(later, -torch.inf).exp_()
