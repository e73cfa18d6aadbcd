"""Weighted means of everything so far, restarted at will: the plain form is the recurrence, one token at a
time; the fast form takes a chunk at a time, so that no difference of two large sums is ever formed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from armillary.nn.ops import plain

CHUNK = 128


def running_mean(
    v: Tensor,
    weights: Tensor,
    fresh: Tensor,
    *,
    mean: Tensor | None = None,
    mass: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y_t = Σ w_s v_s / Σ w_s over the tokens s ≤ t since the last fresh one, the mean so far among them.

    v: [B, T, H, K]; weights: [B, T], not negative, 0 for a token that is not there; fresh: [B, T] bool, tokens
    that begin anew; mean [B, H, K] and mass [B]: of what came before, None for nothing. Returns y [B, T,
    H, K] and the mean and the mass after the last token, all in float32 (float64 for float64 v). Where
    nothing has weight, y is 0.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    v, weights = v.to(wide), weights.to(wide)
    mean = v.new_zeros(v.shape[0], *v.shape[2:]) if mean is None else mean
    mass = weights.new_zeros(len(v)) if mass is None else mass
    return (_one_by_one if plain() else _in_chunks)(v, weights, fresh, mean, mass)


def _one_by_one(v: Tensor, weights: Tensor, fresh: Tensor, mean: Tensor, mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = []
    for t in range(v.shape[1]):
        mean = mean.masked_fill(fresh[:, t, None, None], 0)
        mass = mass.masked_fill(fresh[:, t], 0) + weights[:, t]
        share = (weights[:, t] / mass).masked_fill(mass == 0, 0)
        mean = mean + share[:, None, None] * (v[:, t] - mean)
        rows.append(mean)
    return torch.stack(rows, 1), mean, mass


def _in_chunks(v: Tensor, weights: Tensor, fresh: Tensor, mean: Tensor, mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    part = fresh.long().cumsum(1)
    pieces, current = [], torch.zeros_like(part[:, 0])
    for start in range(0, v.shape[1], CHUNK):
        stop = min(v.shape[1], start + CHUNK)
        own = part[:, start:stop]
        seen = (own[:, :, None] == own[:, None]).tril()
        shares = weights[:, None, start:stop] * seen
        before = mass[:, None] * (own == current[:, None])
        total = shares.sum(2) + before
        divisor = torch.where(total == 0, 1, total)
        mixed = torch.einsum("bts,bshk->bthk", shares / divisor[..., None], v[:, start:stop])
        mixed = mixed + (before / divisor)[..., None, None] * mean[:, None]
        pieces.append(mixed)
        mean, mass, current = mixed[:, -1], total[:, -1], own[:, -1]
    return torch.cat(pieces, 1), mean, mass
