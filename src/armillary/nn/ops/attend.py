"""Softmax attention: one op for every mask, bias and variant.

The plain form is the definition. The fast form takes a fused kernel where the request allows it
(on a CPU our own, see `blocked`), a folded pair of products for a few queries (decoding), and
otherwise walks over blocks of query rows, so that no T×T tensor outlives a block, in the backward
pass either (Dao et al. 2022, FlashAttention; Rabe & Staats 2021, Self-attention Does Not Need O(n²)
Memory).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from armillary.native.rows import attendable, few_rows_attend
from armillary.nn.mask import Causal, Mask, dense
from armillary.nn.ops import plain
from armillary.nn.ops.blocked import attend_blocked

Bias = Callable[[Tensor, Tensor], Tensor]  # rows of queries [q], columns of keys [S] → [B or 1, H or 1, q, S]
BLOCK = 512  # query rows at a time
FEW = 16  # up to this many query rows, two products beat the fused kernel on a CPU


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    want_mass: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """softmax(cap(q kᵀ · scale) + bias, masked) v.

    q: [B, H, T, K]; k: [B, G, S, K]; v: [B, G, S, V] with H a multiple of G; sinks: [H] logits that
    take part in the softmax and carry no value (Xiao et al. 2023, Efficient Streaming Language
    Models with Attention Sinks; learned form). softcap c: c·tanh(score/c) before bias and mask.
    A query that may see nothing gives zeros. Returns y [B, H, T, V] and, when asked, the mass
    [B, H, S] that each key received, summed over queries.
    """
    if plain():
        return attend_plain(
            q, k, v, mask=mask, bias=bias, scale=scale, softcap=softcap, sinks=sinks, want_mass=want_mass
        )
    queries, keys = q.shape[2], k.shape[2]
    fusable = bias is None and softcap is None and sinks is None and not want_mass
    if fusable and queries <= FEW and not torch.is_grad_enabled():
        return _few(q, k, v, mask, scale), None
    if fusable and v.shape[-1] == q.shape[-1]:
        simple = isinstance(mask, Causal) and not isinstance(mask.offset, Tensor) and mask.offset == 0
        if mask is None or (simple and queries == keys):
            if q.device.type == "cpu" and q.dtype != torch.float64:
                return attend_blocked(q, k, v, causal=mask is not None, scale=scale), None
            return _fused(q, k, v, None, mask is not None, scale), None
    pieces = []
    mass: Tensor | None = None
    for start in range(0, queries, BLOCK):
        stop = min(queries, start + BLOCK)
        low, reach = (0, keys) if mask is None else (mask.low(start), mask.reach(stop, keys))
        low = min(low, reach - 1)  # rows that see nothing still need a key to be masked
        part, weight = _rows(q, k, v, start, stop, low, reach, mask, bias, scale, softcap, sinks, want_mass)
        pieces.append(part)
        if weight is not None:
            weight = F.pad(weight, (low, keys - reach))
            mass = weight if mass is None else mass + weight
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)), mass


def attend_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    want_mass: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The definition, with the whole [B, H, T, S] matrix."""
    weights = attend_weights(q, k, mask=mask, bias=bias, scale=scale, softcap=softcap, sinks=sinks)
    y = weights.to(v.dtype) @ _per_head(v, q.shape[1])
    return y, weights.sum(2) if want_mass else None


def attend_weights(
    q: Tensor,
    k: Tensor,
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The attention weights [B, H, T, S], in float32 (float64 for float64 input)."""
    queries = torch.arange(q.shape[2], device=q.device)
    keys = torch.arange(k.shape[2], device=q.device)
    allowed = dense(mask, q.shape[2], k.shape[2], q.device)
    added = None if bias is None else bias(queries, keys)
    return _softmax(q @ _per_head(k, q.shape[1]).transpose(2, 3), allowed, added, scale, softcap, sinks)


def _softmax(
    scores: Tensor,
    allowed: Tensor | None,
    added: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    scores = (scores if scores.dtype == torch.float64 else scores.float()) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if added is not None:
        scores = scores + added.to(scores.dtype)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    weights = torch.softmax(scores, -1)
    if allowed is not None:
        weights = weights.masked_fill(~allowed, 0.0)  # a row with nothing to see is 0/0 above
    return weights


def _rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    stop: int,
    low: int,
    reach: int,
    mask: Mask | None,
    bias: Bias | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    want_mass: bool,
) -> tuple[Tensor, Tensor | None]:
    """One block of query rows against the keys it can reach; the mask is made inside, so that the
    backward pass makes it again instead of keeping it."""

    def block(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = torch.arange(start, stop, device=q.device)
        columns = torch.arange(low, reach, device=q.device)
        allowed = None if mask is None else mask.rows(rows, columns)
        added = None if bias is None else bias(rows, columns)
        if softcap is None and sinks is None and not want_mass and v.shape[-1] == q.shape[-1]:
            if added is None:
                return _fused(q, k, v, allowed, False, scale), None
            if not added.requires_grad:
                added = added.to(q.dtype)
                both = added if allowed is None else added.masked_fill(~allowed, -torch.inf)
                return _fused(q, k, v, both.expand(q.shape[0], q.shape[1], -1, -1), False, scale), None
        weights = _softmax(q @ _per_head(k, q.shape[1]).transpose(2, 3), allowed, added, scale, softcap, sinks)
        return weights.to(v.dtype) @ _per_head(v, q.shape[1]), weights.sum(2) if want_mass else None

    q, k, v = q[:, :, start:stop], k[:, :, low:reach], v[:, :, low:reach]
    if torch.is_grad_enabled() and stop - start == BLOCK:
        return checkpoint(block, q, k, v, use_reentrant=False)  # type: ignore[no-any-return]
    return block(q, k, v)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _few(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float) -> Tensor:
    """Few queries: the heads that share keys become rows of one product, so keys are read once."""
    batch, heads, queries, width = q.shape
    groups, keys = k.shape[1], k.shape[2]
    if mask is None or isinstance(mask, Causal):
        offset = keys if mask is None else mask.offset
        if not torch.compiler.is_compiling() and attendable(q, k, v):
            starts = offset if isinstance(offset, Tensor) else torch.full((batch,), offset)
            return few_rows_attend(q, k, v, starts, scale)
    folded = q.reshape(batch, groups, heads // groups * queries, width)
    scores = (folded @ k.transpose(2, 3)).view(batch, heads, queries, keys)
    lone = queries == 1 and isinstance(mask, Causal) and not isinstance(mask.offset, Tensor)
    allowed = None if mask is None or lone else dense(mask, queries, keys, q.device)
    weights = _softmax(scores, allowed, None, scale, None, None)
    y = weights.to(v.dtype).view(batch, groups, heads // groups * queries, keys) @ v
    return y.view(batch, heads, queries, v.shape[-1])


def _per_head(x: Tensor, heads: int) -> Tensor:
    """[B, G, S, K] → [B, H, S, K], each group serving its heads."""
    batch, groups, keys, width = x.shape
    if groups == heads:
        return x
    return x[:, :, None].expand(batch, groups, heads // groups, keys, width).reshape(batch, heads, keys, width)
