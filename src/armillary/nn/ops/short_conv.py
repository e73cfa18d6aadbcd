"""The short causal depthwise convolution in front of recurrent mixers: each channel sees its last few tokens.

y_t = act(b + Σ_j w_j x_{t−j}) over the W taps of a channel (Fu et al. 2023, Hungry Hungry Hippos; Gu &
Dao 2023, Mamba). Its state is the tail: the last W − 1 inputs of each row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    return short_conv_plain(x, weight, bias, silu=silu, tail=tail, documents=documents)


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
