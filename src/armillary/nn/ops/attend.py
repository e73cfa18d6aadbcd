"""Softmax attention: one op for every mask, bias and variant.

The plain form is the definition. The fast form takes a fused kernel where the request allows it
(on a CPU our own, see `blocked`), a folded pair of products for a few queries (decoding), and
otherwise walks over blocks of query rows, so that no T×T tensor outlives a block, in the backward
pass either (Dao et al. 2022, FlashAttention; Rabe & Staats 2021, Self-attention Does Not Need O(n²)
Memory).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from armillary.native.rows import attendable, few_rows_attend
from armillary.nn.mask import Causal, Mask, PerHead, Window, dense
from armillary.nn.ops import plain
from armillary.nn.ops.blocked import attend_blocked

Bias = Callable[[Tensor, Tensor], Tensor]  # rows of queries [q], columns of keys [S] → [B or 1, H or 1, q, S]
Modify = Callable[[Tensor, Tensor, Tensor], Tensor]  # scores [B, H, q, S], rows [q], columns [S] → other scores
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
    modify: Modify | None = None,
    want_mass: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """softmax(modify(cap(q kᵀ · scale)) + bias, masked) v.

    q: [B, H, T, K]; k: [B, G, S, K]; v: [B, G, S, V] with H a multiple of G; sinks: [H] logits that
    take part in the softmax and carry no value (Xiao et al. 2023, Efficient Streaming Language
    Models with Attention Sinks; learned form). softcap c: c·tanh(score/c) before bias and mask; modify:
    any other change of the scores, before the bias. A query that may see nothing gives zeros. Returns
    y [B, H, T, V] and, when asked, the mass [B, H, S] that each key received, summed over queries.
    """
    whole = bias is None and sinks is None and modify is None and not want_mass
    if whole and isinstance(mask, PerHead) and len(set(mask.heads)) > 1:
        return _each_kind_of_head(q, k, v, mask, scale, softcap), None
    if plain():
        return attend_plain(
            q, k, v, mask=mask, bias=bias, scale=scale, softcap=softcap, sinks=sinks, modify=modify, want_mass=want_mass
        )
    queries, keys = q.shape[2], k.shape[2]
    fusable = whole and softcap is None
    if fusable and queries <= FEW and not torch.is_grad_enabled():
        return _few(q, k, v, mask, scale), None
    if fusable and v.shape[-1] == q.shape[-1]:
        band = _band(mask, queries, keys)
        if band is not None and q.device.type == "cpu" and q.dtype != torch.float64:
            return _banded(q, k, v, *band, scale), None
        if mask is None or (isinstance(mask, Causal) and band is not None):
            return _fused(q, k, v, None, mask is not None, scale), None
    pieces = []
    mass: Tensor | None = None
    for start in range(0, queries, BLOCK):
        stop = min(queries, start + BLOCK)
        low, reach = (0, keys) if mask is None else (mask.low(start), mask.reach(stop, keys))
        low = min(low, reach - 1)  # rows that see nothing still need a key to be masked
        part, weight = _rows(q, k, v, start, stop, low, reach, mask, bias, scale, softcap, sinks, modify, want_mass)
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
    modify: Modify | None = None,
    want_mass: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The definition, with the whole [B, H, T, S] matrix, or with the part of it that the mask leaves."""
    simple = bias is None and sinks is None and modify is None and not want_mass
    if simple and mask is not None and not isinstance(mask, PerHead):
        places = mask.candidates(q.shape[2], k.shape[2], q.device)
        if places is not None and places.shape[1] < k.shape[2]:
            return _gathered(q, k, v, places, mask, scale, softcap), None
    weights = attend_weights(q, k, mask=mask, bias=bias, scale=scale, softcap=softcap, sinks=sinks, modify=modify)
    y = weights.to(v.dtype) @ _per_head(v, q.shape[1])
    return y, weights.sum(2) if want_mass else None


def _gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: Tensor,
    mask: Mask,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Every query against its own few keys, places [T, n]."""
    queries, keys = q.shape[2], k.shape[2]
    rows, columns = torch.arange(queries, device=q.device), torch.arange(keys, device=q.device)
    chosen = places.clamp(0, keys - 1)

    seen = mask.rows(rows, columns).expand(-1, -1, queries, -1)
    allowed = seen.gather(3, chosen.expand(*seen.shape[:2], -1, -1)) & (places == chosen)
    k, v = _per_head(k, q.shape[1]), _per_head(v, q.shape[1])
    scores = (q[:, :, :, None] @ k[:, :, chosen].transpose(3, 4))[:, :, :, 0]
    weights = _softmax(scores, allowed, None, scale, softcap, None)
    return (weights.to(v.dtype)[:, :, :, None] @ v[:, :, chosen])[:, :, :, 0]


def attend_weights(
    q: Tensor,
    k: Tensor,
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    modify: Modify | None = None,
) -> Tensor:
    """The attention weights [B, H, T, S], in float32 (float64 for float64 input)."""
    queries = torch.arange(q.shape[2], device=q.device)
    keys = torch.arange(k.shape[2], device=q.device)
    allowed = dense(mask, q.shape[2], k.shape[2], q.device)
    added = None if bias is None else bias(queries, keys)
    change = None if modify is None else partial(_changed, modify, queries, keys)
    return _softmax(q @ _per_head(k, q.shape[1]).transpose(2, 3), allowed, added, scale, softcap, sinks, change)


def _changed(modify: Modify, rows: Tensor, columns: Tensor, scores: Tensor) -> Tensor:
    return modify(scores, rows, columns)


def _softmax(
    scores: Tensor,
    allowed: Tensor | None,
    added: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    change: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    scores = (scores if scores.dtype == torch.float64 else scores.float()) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if change is not None:
        scores = change(scores)
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
    modify: Modify | None,
    want_mass: bool,
) -> tuple[Tensor, Tensor | None]:
    """One block of query rows against the keys it can reach; the mask is made inside, so that the
    backward pass makes it again instead of keeping it."""

    def block(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = torch.arange(start, stop, device=q.device)
        columns = torch.arange(low, reach, device=q.device)
        allowed = None if mask is None else mask.rows(rows, columns)
        added = None if bias is None else bias(rows, columns)
        plainly = softcap is None and sinks is None and modify is None and not want_mass
        if plainly and v.shape[-1] == q.shape[-1]:
            if added is None:
                return _fused(q, k, v, allowed, False, scale), None
            if not added.requires_grad:
                added = added.to(q.dtype)
                both = added if allowed is None else added.masked_fill(~allowed, -torch.inf)
                return _fused(q, k, v, both.expand(q.shape[0], q.shape[1], -1, -1), False, scale), None
        change = None if modify is None else partial(_changed, modify, rows, columns)
        weights = _softmax(q @ _per_head(k, q.shape[1]).transpose(2, 3), allowed, added, scale, softcap, sinks, change)
        return weights.to(v.dtype) @ _per_head(v, q.shape[1]), weights.sum(2) if want_mass else None

    q, k, v = q[:, :, start:stop], k[:, :, low:reach], v[:, :, low:reach]
    if torch.is_grad_enabled() and stop - start == BLOCK:
        return checkpoint(block, q, k, v, use_reentrant=False)  # type: ignore[no-any-return]
    return block(q, k, v)


def _band(mask: Mask | None, queries: int, keys: int) -> tuple[int | None, int | None, int] | None:
    """(left, right, dilation) when a mask is a band along the diagonal and nothing else."""
    if mask is None:
        return None, None, 1
    if queries != keys or not isinstance(mask, (Causal, Window)):
        return None
    if isinstance(mask.offset, Tensor) or mask.offset != 0:
        return None
    if isinstance(mask, Causal):
        return None, 0, 1
    if mask.queries is not None or mask.keys is not None:
        return None
    return mask.left, mask.right, mask.dilation


def _banded(
    q: Tensor, k: Tensor, v: Tensor, left: int | None, right: int | None, dilation: int, scale: float
) -> Tensor:
    """A dilated band is a plain one among the tokens of each residue; at the end a residue may lack a token."""
    if dilation == 1:
        return attend_blocked(q, k, v, left=left, right=right, scale=scale)
    length = q.shape[2]
    left, right = (None if bound is None else bound // dilation for bound in (left, right))
    out = torch.empty_like(q)
    for first, stop in ((0, length % dilation), (length % dilation, dilation)):
        # residues [first, stop) have equally many tokens
        steps = torch.arange(first, length, dilation, device=q.device)
        if stop == first or not len(steps):
            continue
        places = steps[None] + torch.arange(stop - first, device=q.device)[:, None]
        parts = [x[:, :, places].transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
        y = attend_blocked(parts[0], parts[1], parts[2], left=left, right=right, scale=scale)
        out = out.index_copy(2, places.flatten(), y.unflatten(0, (-1, stop - first)).transpose(1, 2).flatten(2, 3))
    return out


def _each_kind_of_head(q: Tensor, k: Tensor, v: Tensor, mask: PerHead, scale: float, softcap: float | None) -> Tensor:
    """Heads with equal masks together, so that each kind is lowered by itself."""
    heads, share = q.shape[1], q.shape[1] // k.shape[1]
    order: list[int] = []
    parts = []
    for one in dict.fromkeys(mask.heads):
        chosen = [head for head in range(heads) if mask.heads[head] == one]
        groups = [head // share for head in chosen]
        y, _ = attend(q[:, chosen], k[:, groups], v[:, groups], mask=one, scale=scale, softcap=softcap)
        parts.append(y)
        order += chosen
    back = sorted(range(heads), key=order.__getitem__)
    return torch.cat(parts, 1)[:, back]


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
