"""Softmax attention: one op for every mask, bias and variant.

The plain form is the definition. The fast form takes a fused kernel where the request allows it
(on a CPU our own, see `blocked`), a folded pair of products for a few queries (decoding), and
otherwise walks over blocks of query rows, so that no T×T tensor outlives a block, in the backward
pass either (Dao et al. 2022, FlashAttention; Rabe & Staats 2021, Self-attention Does Not Need O(n²)
Memory).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from armillary.native.rows import attendable, few_rows_attend
from armillary.nn.mask import Causal, Mask, PerHead, Window, dense
from armillary.nn.ops import plain, readable
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
    any other change of the scores, before the bias; where it makes H' heads out of H, v has as many groups
    (or divides them). A query that may see nothing gives zeros. Returns
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
    marked = mask is not None and mask.most(keys) > 0
    if fusable and queries <= FEW and not torch.is_grad_enabled():
        return _few(q, k, v, mask, scale), None
    if fusable and v.shape[-1] == q.shape[-1]:
        band = _band(mask, queries, keys)
        if band is not None and q.device.type == "cpu" and q.dtype != torch.float64:
            return _banded(q, k, v, *band, scale), None
        if mask is None or (isinstance(mask, Causal) and band is not None):
            return _fused(q, k, v, None, mask is not None, scale), None
    apart = whole and mask is not None and queries == keys and 1 < mask.residues() < queries
    # Not in a graph, which would hold every residue's attention, nor where a window spares more.
    if apart and mask is not None and not torch.compiler.is_compiling() and mask.low(queries) == 0:
        return _residues(q, k, v, mask, scale, softcap), None
    places = _places(mask, keys) if whole and mask is not None and marked else None
    far = _Far.of(k, v, mask, places) if mask is not None and places is not None else None
    pieces = []
    mass: Tensor | None = None
    for start in range(0, queries, BLOCK):
        stop = min(queries, start + BLOCK)
        low, reach = 0, keys
        if mask is not None and (far is not None or not marked):
            low, reach = mask.low(start), mask.reach(stop, keys)
        low = min(low, reach - 1)  # rows that see nothing still need a key to be masked
        how = (mask, bias, scale, softcap, sinks, modify, want_mass)
        part, weight = _rows(q, k, v, start, stop, low, reach, *how, far)
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
        marked, keys = None, k.shape[2]
        if places is not None and mask.most(keys):
            marked = _places(mask, keys)
            places = None if marked is None else places
        others = 0 if marked is None else marked.shape[1]
        if places is not None and places.shape[1] + others < keys:
            return _gathered(q, k, v, places, marked, mask, scale, softcap), None
    weights = attend_weights(q, k, mask=mask, bias=bias, scale=scale, softcap=softcap, sinks=sinks, modify=modify)
    y = weights.to(v.dtype) @ _per_head(v, weights.shape[1])
    return y, weights.sum(2) if want_mass else None


def _gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: Tensor,
    marked: Tensor | None,
    mask: Mask,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Every query against its own few keys, places [T, n], and those that are marked for all."""
    queries, keys = q.shape[2], k.shape[2]
    rows, columns = torch.arange(queries, device=q.device), torch.arange(keys, device=q.device)
    places = places.sort(1).values  # what two parts of a mask name twice counts once
    chosen = places.clamp(0, keys - 1)
    known = places == chosen
    known[:, 1:] &= places[:, 1:] != places[:, :-1]

    seen = mask.rows(rows, columns).expand(-1, -1, queries, -1)
    allowed = seen.gather(3, chosen.expand(*seen.shape[:2], -1, -1)) & known
    k, v = _per_head(k, q.shape[1]), _per_head(v, q.shape[1])
    scores = (q[:, :, :, None] @ k[:, :, chosen].transpose(3, 4))[:, :, :, 0]
    if marked is None:
        weights = _softmax(scores, allowed, None, scale, softcap, None)
        return (weights.to(v.dtype)[:, :, :, None] @ v[:, :, chosen])[:, :, :, 0]
    far = _Far.of(k, v, mask, marked)
    again = (far.places[:, None, :, None] == places[:, None]).any(-1)[:, None]
    beyond = far.allowed(rows) & ~again
    scores = torch.cat([scores, q @ far.k.transpose(2, 3)], 3)
    weights = _softmax(scores, _beside(allowed, beyond), None, scale, softcap, None).to(v.dtype)
    near, rest = weights.split([places.shape[1], far.places.shape[1]], 3)
    y: Tensor = (near[:, :, :, None] @ v[:, :, chosen])[:, :, :, 0] + rest @ far.v
    return y


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
    far: _Far | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One block of query rows against the keys it can reach; the mask is made inside, so that the
    backward pass makes it again instead of keeping it."""

    def block(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = torch.arange(start, stop, device=q.device)
        columns = torch.arange(low, reach, device=q.device)
        allowed = None if mask is None else mask.rows(rows, columns)
        if far is not None:
            assert allowed is not None
            beyond = (far.places < low) | (far.places >= reach)
            allowed = _beside(allowed, far.allowed(rows) & beyond[:, None, None])
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
        return weights.to(v.dtype) @ _per_head(v, weights.shape[1]), weights.sum(2) if want_mass else None

    q, k, v = q[:, :, start:stop], k[:, :, low:reach], v[:, :, low:reach]
    if far is not None:
        k, v = torch.cat([k, far.k], 2), torch.cat([v, far.v], 2)
    if torch.is_grad_enabled() and stop - start == BLOCK:
        return checkpoint(block, q, k, v, use_reentrant=False)  # type: ignore[no-any-return]
    return block(q, k, v)


@dataclass(frozen=True)
class _Far:
    """The keys that are marked for all queries, picked: places [B or 1, n], negative for none, keys and
    values [B, G, n, …], and the mask on them."""

    places: Tensor
    k: Tensor
    v: Tensor
    mask: Mask

    @staticmethod
    def of(k: Tensor, v: Tensor, mask: Mask, places: Tensor) -> _Far:
        index = places.clamp(min=0)
        picked = [x.take_along_dim(index[:, None, :, None], 2) for x in (k, v)]
        return _Far(places, picked[0], picked[1], mask.take(index, k.shape[2]))

    def allowed(self, rows: Tensor) -> Tensor:
        columns = torch.arange(self.places.shape[1], device=rows.device)
        return self.mask.rows(rows, columns) & (self.places >= 0)[:, None, None]


def _places(mask: Mask, keys: int) -> Tensor | None:
    """Where the marked keys are, as `marked_places`; None where they may be all."""
    marks = mask.marks(keys)
    assert marks is not None
    places = marked_places(marks, mask.most(keys))
    return places if places.shape[1] < keys else None


def marked_places(marks: Tensor, most: int) -> Tensor:
    """Where marks [B or 1, S] are True, [B or 1, n] in order, −1 for none; n is the largest number of them
    in a row, or `most` where that cannot be looked at (in a graph, on an accelerator)."""
    count = marks.sum(1)
    if readable(marks):
        most = int(count.max())
    elif most < marks.shape[1]:
        torch._assert_async((count <= most).all(), "more keys are marked than positions counted from 0 allow")
    places = marks.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return places.masked_fill(~marks.gather(1, places), -1)


def _beside(a: Tensor, b: Tensor) -> Tensor:
    """[…, q, n] and […, q, m] → […, q, n + m], broadcast over the axes before the last."""
    shape = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return torch.cat([a.expand(*shape, -1), b.expand(*shape, -1)], -1)


def _residues(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float | None) -> Tensor:
    """A mask that keeps places apart whose distance is no multiple of a number: each residue by itself."""
    length, gap = q.shape[2], mask.residues()
    steps = torch.arange(length, device=q.device)
    parts = []
    for r in range(gap):
        own = [x[:, :, r::gap] for x in (q, k, v)]
        parts.append(attend(*own, mask=_Residue(mask, steps[r::gap]), scale=scale, softcap=softcap)[0])
    order = torch.cat([steps[r::gap] for r in range(gap)])
    return torch.cat(parts, 2)[:, :, order.argsort()]


@dataclass(frozen=True, eq=False)
class _Residue(Mask):
    """The part of a mask that some places [n] have among themselves."""

    whole: Mask
    places: Tensor

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        return self.whole.rows(self.places[q], self.places[k])


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
