"""Stick-breaking attention: each key, from the nearest on, breaks its share off what is left.

With l the score of a pair and β = σ(l), the weight of key j for query i is β_ij · Π (1 − β_im) over
the visible keys m behind j (Shen et al. 2023, ModuleFormer). In logarithms that is l_ij − Σ_{m ≥ j}
softplus(l_im), one sum from the newest key on. The plain form holds the whole [B, H, T, S]; the fast
form walks over blocks of rows and forms each again in the backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from armillary.nn.mask import Mask
from armillary.nn.ops import plain

BLOCK = 256  # query rows at a time


def stick_attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | None, scale: float) -> Tensor:
    """q [B, H, T, K]; k [B, G, S, K]; v [B, G, S, V], H a multiple of G → [B, H, T, V].

    Keys that the mask hides break nothing off. A query that may see nothing gives zeros; weights sum
    to at most 1, the rest of the stick is dropped.
    """
    assert mask is not None, "a stick has an end: the order of the keys must be causal"
    queries, keys = q.shape[2], k.shape[2]
    if plain():
        return _rows(q, k, v, mask, 0, queries, 0, keys, scale)
    pieces = []
    for start in range(0, queries, BLOCK):
        stop = min(queries, start + BLOCK)
        low, reach = mask.low(start), mask.reach(stop, keys)
        low = min(low, reach - 1)
        parts = q[:, :, start:stop], k[:, :, low:reach], v[:, :, low:reach]
        if torch.is_grad_enabled() and queries > BLOCK:
            y = checkpoint(_rows, *parts, mask, start, stop, low, reach, scale, use_reentrant=False)
        else:
            y = _rows(*parts, mask, start, stop, low, reach, scale)
        pieces.append(y)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)


def _rows(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, start: int, stop: int, low: int, reach: int, scale: float
) -> Tensor:
    """Query rows [start, stop) against keys [low, reach)."""
    # Keys from the newest to the oldest, so that the sum over those behind a key is a running sum.
    columns = torch.arange(reach - 1, low - 1, -1, device=q.device)
    allowed = mask.rows(torch.arange(start, stop, device=q.device), columns)
    batch, heads, queries, width = q.shape
    groups, keys = k.shape[1], k.shape[2]
    folded = q.reshape(batch, groups, heads // groups * queries, width)
    scores = (folded @ k.flip(2).transpose(2, 3)).view(batch, heads, queries, keys)
    scores = (scores if scores.dtype == torch.float64 else scores.float()) * scale
    broken = F.softplus(scores).masked_fill(~allowed, 0.0).cumsum(-1)
    weights = (scores - broken).masked_fill(~allowed, -torch.inf).exp()
    y = weights.to(v.dtype).view(batch, groups, heads // groups * queries, keys) @ v.flip(2)
    return y.view(batch, heads, queries, v.shape[-1])
