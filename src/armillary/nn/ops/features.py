"""Positive random features of the softmax kernel, as logarithms.

E[Σ_f φ_f(q) φ_f(k)] = exp(q·k) for φ_f(x) = exp(ω_f·x − |x|²/2)/√m with ω_f standard normal; rows of ω
that are orthogonal in blocks lower the variance (Choromanski et al. 2021, Rethinking Attention with
Performers). Logarithms are given back, since the features themselves overflow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def orthogonal_features(count: int, width: int, seed: int, heads: int = 1) -> Tensor:
    """ω [heads, count, width] float64 on the CPU, a function of the seed: directions orthogonal within
    blocks of `width` rows, lengths those of independent normal rows."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    blocks = -(-count // width)
    kind = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    square = torch.randn(heads, blocks, width, width, **kind)  # type: ignore[call-overload]
    turned, triangle = torch.linalg.qr(square)
    turned = turned * torch.diagonal(triangle, dim1=-2, dim2=-1).sign()[..., None, :]  # uniform over rotations
    rows = turned.transpose(-1, -2).reshape(heads, blocks * width, width)[:, :count]
    lengths = torch.randn(heads, count, width, **kind).norm(dim=-1, keepdim=True)  # type: ignore[call-overload]
    found: Tensor = rows * lengths
    return found


def log_features(x: Tensor, omega: Tensor) -> Tensor:
    """log φ(x): x [B, H, T, K] and ω [H, m, K] → [B, H, T, m], in float32 (float64 for float64)."""
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, omega = x.to(kind), omega.to(device=x.device, dtype=kind)
    half = x.square().sum(-1, keepdim=True) * 0.5
    return x @ omega.transpose(1, 2) - (half + 0.5 * math.log(omega.shape[1]))
