"""Attention over open blocks: work in proportion to the pairs of blocks that a layout opens.

The plain form masks the whole matrix. The fast form takes tiles (one block of queries of one head),
puts those that open equally many key blocks together, gathers their keys and values and forms the
scores of many tiles in one batched product, so few tiles at a time that the scores stay in the
cache; the backward pass forms them again (Gray et al. 2017, GPU Kernels for Block-Sparse Weights;
Dao et al. 2022, FlashAttention). It is one opaque operator, since what it does depends on the layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from armillary.native.rows import softmax_rows_, softmax_rows_backward_
from armillary.nn.ops import plain, product_dtype

SCORES = 1 << 18  # scores formed at once, so that they and what they come from stay in the cache


def attend_block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Tensor,
    *,
    rows: int,
    columns: int,
    scale: float,
    causal: bool = True,
    gate: Tensor | None = None,
    documents: Tensor | None = None,
    padding: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale + gate) v over the open blocks; y [B, H, T, V].

    q: [B, H, T, K]; k, v: [B, G, S, K] and [B, G, S, V] with H a multiple of G; layout: bool [B or 1,
    H or 1, ⌈T/rows⌉, ⌈S/columns⌉], which blocks of `columns` keys a block of `rows` queries looks at.
    causal: inside a block a query sees no later key, and later blocks count as closed; then rows
    divides columns. gate: [B, H, T, ⌈S/columns⌉], the logarithm of a factor on the weights of a query
    in a block, -inf where it is closed for that query alone. documents: [B, T] ids (T = S) that keep
    apart; padding: [B, S] real keys. offset: [B] int64 keys before the first query (0), multiples of
    `rows`. A query that may see nothing gives zeros.
    """
    heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
    assert layout.shape[2:] == (-(-queries // rows), -(-keys // columns)), "the layout has another number of blocks"
    assert not causal or columns % rows == 0, "a tile of queries must lie in one block of keys"
    assert heads % k.shape[1] == 0
    if plain():
        return attend_block_sparse_plain(
            q,
            k,
            v,
            layout,
            rows=rows,
            columns=columns,
            scale=scale,
            causal=causal,
            gate=gate,
            documents=documents,
            padding=padding,
            offset=offset,
        )
    out: Tensor = _attend(q, k, v, gate, layout, documents, padding, offset, rows, columns, causal, scale)
    return out


def attend_block_sparse_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Tensor,
    *,
    rows: int,
    columns: int,
    scale: float,
    causal: bool = True,
    gate: Tensor | None = None,
    documents: Tensor | None = None,
    padding: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """The definition, with the whole [B, H, T, S] matrix."""
    queries, keys = q.shape[2], k.shape[2]
    each = q.shape[1] // k.shape[1]
    allowed = layout.repeat_interleave(rows, 2)[:, :, :queries].repeat_interleave(columns, 3)[..., :keys]
    if causal:
        last = torch.arange(queries, device=q.device)[None] + (0 if offset is None else offset[:, None])
        allowed = allowed & (torch.arange(keys, device=q.device) <= last[..., None])[:, None]
    if documents is not None:
        allowed = allowed & (documents[:, None, :, None] == documents[:, None, None, :])
    if padding is not None:
        allowed = allowed & padding[:, None, None]
    scores = q @ k.repeat_interleave(each, 1).transpose(2, 3)
    scores = (scores if scores.dtype == torch.float64 else scores.float()) * scale
    if gate is not None:
        spread = gate.to(scores.dtype).repeat_interleave(columns, 3)[..., :keys]
        allowed = allowed & (spread > -torch.inf)
        scores = scores + spread.masked_fill(~allowed, 0.0)
    weights = torch.softmax(scores.masked_fill(~allowed, -torch.inf), -1).masked_fill(~allowed, 0.0)
    return weights.to(v.dtype) @ v.repeat_interleave(each, 1)


def open_pairs(layout: Tensor, batch: int, heads: int, rows: int, columns: int, causal: bool) -> int:
    """How many scores the fast form computes for a layout (queries from the first key on)."""
    whole = layout.expand(batch, heads, -1, -1)
    if causal:
        first = torch.arange(whole.shape[2], device=layout.device) * rows // columns
        whole = whole & (torch.arange(whole.shape[3], device=layout.device) <= first[:, None])
    return int(whole.sum()) * rows * columns


@dataclass
class _Group:
    """Tiles that open equally many blocks. tiles: [n] index of (b, h, block of queries); blocks: [n, c]
    their key blocks in order; kv: [n] index of (b, g); row: [n] b; start: where the first query stands
    in its own block when that is open (then it is the last), else None; partial: a block that is not
    whole is among those open."""

    tiles: Tensor
    blocks: Tensor
    kv: Tensor
    row: Tensor
    start: int | None
    partial: bool


def _groups(
    q: Tensor, k: Tensor, layout: Tensor, offset: Tensor | None, rows: int, columns: int, causal: bool
) -> Iterator[_Group]:
    batch, heads, _, _ = q.shape
    groups, keys = k.shape[1], k.shape[2]
    count_q, count_k = layout.shape[2:]
    whole = layout.expand(batch, heads, count_q, count_k)
    phase = torch.full((batch, heads, count_q), -1, device=q.device)
    if causal:
        first = torch.arange(count_q, device=q.device) * rows + (0 if offset is None else offset[:, None])
        first = first.expand(batch, -1)
        own = (first // columns).clamp(max=count_k - 1)
        whole = whole & (torch.arange(count_k, device=q.device) <= own[..., None])[:, None]
        open_own = whole.gather(3, own[:, None, :, None].expand(-1, heads, -1, -1))[..., 0]
        phase = torch.where(open_own, (first % columns)[:, None], -1)
    flat = whole.reshape(-1, count_k)
    counts = flat.sum(1)
    starts = counts.cumsum(0) - counts
    columns_of = flat.nonzero()[:, 1]
    key = counts * (columns + 1) + phase.reshape(-1) + 1
    order = key.argsort(stable=True)
    values, sizes = torch.unique_consecutive(key[order], return_counts=True)
    for (value, size), part in zip(
        zip(values.tolist(), sizes.tolist(), strict=True), order.split(sizes.tolist()), strict=True
    ):
        count, where = value // (columns + 1), value % (columns + 1) - 1
        if not count or not size:
            continue
        for tiles in part.split(max(1, SCORES // (rows * count * columns))):
            blocks = columns_of[starts[tiles][:, None] + torch.arange(count, device=q.device)]
            row = tiles // (heads * count_q)
            head = tiles // count_q % heads
            ragged = keys % columns != 0 and where < 0
            partial = ragged and bool((blocks[:, -1] == count_k - 1).any())
            kv = row * groups + head // (heads // groups)
            yield _Group(tiles, blocks, kv, row, where if where >= 0 else None, partial)


@dataclass
class _Inputs:
    """The tensors of a call, in the shapes that tiles are taken from."""

    q: Tensor  # [B·H·tiles, rows, K]
    k: Tensor  # [B·G, S, K]
    v: Tensor
    gate: Tensor | None  # [B·H·tiles, rows, blocks]
    documents: Tensor | None
    padding: Tensor | None
    rows: int
    columns: int
    scale: float

    @property
    def masked(self) -> bool:
        return not (self.gate is None and self.documents is None and self.padding is None)


def _tiled(x: Tensor, rows: int) -> Tensor:
    """[B, H, T, K] → [B·H·tiles, rows, K], zeros behind the end."""
    short = -x.shape[2] % rows
    x = F.pad(x, (0, 0, 0, short)) if short else x
    return x.reshape(-1, rows, x.shape[-1])


def _taken(x: Tensor, group: _Group, columns: int) -> Tensor:
    """The open blocks of x [B·G, S, K], side by side: [n, c · columns, K]."""
    total, keys, width = x.shape
    if keys % columns == 0:
        each = keys // columns
        picked = x.reshape(total * each, columns * width).index_select(
            0, (group.kv[:, None] * each + group.blocks).view(-1)
        )
    else:
        picked = x.reshape(total * keys, width).index_select(
            0, (group.kv[:, None] * keys + _places(group, columns).clamp(max=keys - 1)).view(-1)
        )
    return picked.view(len(group.tiles), -1, width)


def _places(group: _Group, columns: int) -> Tensor:
    """[n, c · columns]: the index of each gathered key in its row."""
    steps = torch.arange(columns, device=group.blocks.device)
    return (group.blocks[..., None] * columns + steps).flatten(1)


def _weights(inputs: _Inputs, group: _Group) -> tuple[Tensor, Tensor, Tensor]:
    """The queries of some tiles [n, rows, K], their keys, and their weights [n, rows, c · columns]."""
    rows, columns = inputs.rows, inputs.columns
    q = inputs.q.index_select(0, group.tiles)
    k = _taken(inputs.k, group, columns)
    scores = torch.bmm(q, k.transpose(1, 2))
    count, width = group.blocks.shape[1], scores.shape[-1]
    if not (inputs.masked or group.partial):
        start = (count - 1) * columns + (group.start or 0)
        right = None if group.start is None else 0
        softmax_rows_(scores.view(-1, width), rows, start, None, right, inputs.scale)
        return q, k, scores
    wide = (scores if scores.dtype == torch.float64 else scores.float()) * inputs.scale
    closed = _closed(inputs, group, wide)
    if inputs.gate is not None:
        factor = inputs.gate[group.tiles].gather(2, group.blocks[:, None].expand(-1, rows, -1)).to(wide.dtype)
        wide.view(len(q), rows, count, columns).add_(factor[..., None])
        shut = factor == -torch.inf
        closed = closed | shut.repeat_interleave(columns, 2)
    wide.masked_fill_(closed, -torch.inf)
    # a row with nothing to see is 0/0
    return q, k, torch.softmax(wide, -1).masked_fill_(closed, 0.0).to(scores.dtype)


def _closed(inputs: _Inputs, group: _Group, scores: Tensor) -> Tensor:
    """Bool, broadcastable to the scores: what the diagonal, documents, padding and the end rule out."""
    rows, columns, keys = inputs.rows, inputs.columns, inputs.k.shape[1]
    width = scores.shape[-1]
    closed = torch.zeros(1, 1, width, dtype=torch.bool, device=scores.device)
    if group.start is not None:
        last = width - columns + group.start
        closed = torch.ones(rows, width, dtype=torch.bool, device=scores.device).triu_(last + 1)[None]
    places = _places(group, columns)
    if keys % columns:
        closed = closed | (places >= keys)[:, None]
        places = places.clamp(max=keys - 1)
    if inputs.padding is not None:
        closed = closed | ~inputs.padding[group.row[:, None], places][:, None]
    if inputs.documents is not None:
        tiles = inputs.q.shape[0] // inputs.documents.shape[0]  # of one row of the batch
        per_head = -(-inputs.documents.shape[1] // rows)
        steps = torch.arange(rows, device=scores.device)
        own = (group.tiles % tiles % per_head)[:, None] * rows + steps
        own = own.clamp(max=inputs.documents.shape[1] - 1)
        theirs = inputs.documents[group.row[:, None], places]
        closed = closed | (inputs.documents[group.row[:, None], own][..., None] != theirs[:, None])
    return closed


def _prepared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    documents: Tensor | None,
    padding: Tensor | None,
    rows: int,
    columns: int,
    scale: float,
) -> _Inputs:
    tiled = None if gate is None else _tiled(gate, rows)
    kind = product_dtype(q)
    q, k, v = _tiled(q, rows).to(kind), k.flatten(0, 1).to(kind), v.flatten(0, 1).to(kind)
    return _Inputs(q, k, v, tiled, documents, padding, rows, columns, scale)


def _untiled(x: Tensor, like: Tensor) -> Tensor:
    """[B·H·tiles, rows, V] → [B, H, T, V]."""
    batch, heads, queries, _ = like.shape
    return x.view(batch, heads, -1, x.shape[-1])[:, :, :queries]


@torch.library.custom_op("armillary::attend_block_sparse", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    layout: Tensor,
    documents: Tensor | None,
    padding: Tensor | None,
    offset: Tensor | None,
    rows: int,
    columns: int,
    causal: bool,
    scale: float,
) -> Tensor:
    inputs = _prepared(q, k, v, gate, documents, padding, rows, columns, scale)
    out = torch.zeros(*inputs.q.shape[:2], v.shape[-1], dtype=q.dtype, device=q.device)
    for group in _groups(q, k, layout, offset, rows, columns, causal):
        _, _, weights = _weights(inputs, group)
        out[group.tiles] = torch.bmm(weights, _taken(inputs.v, group, columns)).to(q.dtype)
    return _untiled(out, q).contiguous()


@_attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    layout: Tensor,
    documents: Tensor | None,
    padding: Tensor | None,
    offset: Tensor | None,
    rows: int,
    columns: int,
    causal: bool,
    scale: float,
) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[-1])


@torch.library.custom_op("armillary::attend_block_sparse_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    layout: Tensor,
    documents: Tensor | None,
    padding: Tensor | None,
    offset: Tensor | None,
    rows: int,
    columns: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = _prepared(q, k, v, gate, documents, padding, rows, columns, scale)
    inward = _tiled(grad, rows).to(inputs.q.dtype)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    grad_q = torch.zeros_like(inputs.q)
    blocks = layout.shape[3]
    grad_k = torch.zeros(k.shape[0] * k.shape[1] * blocks, columns * k.shape[3], dtype=wide, device=q.device)
    grad_v = torch.zeros(k.shape[0] * k.shape[1] * blocks, columns * v.shape[3], dtype=wide, device=q.device)
    grad_gate = torch.zeros(0 if inputs.gate is None else inputs.gate.shape, dtype=wide, device=q.device)
    for group in _groups(q, k, layout, offset, rows, columns, causal):
        queries, keys, weights = _weights(inputs, group)
        given = inward.index_select(0, group.tiles)
        into = (group.kv[:, None] * blocks + group.blocks).view(-1)
        add = torch.bmm(weights.transpose(1, 2), given)
        grad_v.index_add_(0, into, add.view(len(into), -1).to(wide))
        slopes = torch.bmm(given, _taken(inputs.v, group, columns).transpose(1, 2))
        width = slopes.shape[-1]
        softmax_rows_backward_(weights.view(-1, width), slopes.view(-1, width), rows, 0, None, None, scale)
        grad_q[group.tiles] = torch.bmm(slopes, keys)
        add = torch.bmm(slopes.transpose(1, 2), queries)
        grad_k.index_add_(0, into, add.view(len(into), -1).to(wide))
        if inputs.gate is not None:
            shares = slopes.to(wide).view(len(queries), rows, -1, columns).sum(-1) / scale
            grad_gate[group.tiles[:, None], :, group.blocks] = shares.transpose(1, 2)
    kept = k.shape[2]
    grad_k = grad_k.view(*k.shape[:2], -1, k.shape[3])[:, :, :kept].to(k.dtype, copy=True)
    grad_v = grad_v.view(*v.shape[:2], -1, v.shape[3])[:, :, :kept].to(v.dtype, copy=True)
    if gate is not None:
        grad_gate = _untiled(grad_gate, q).to(gate.dtype, copy=True)
    return _untiled(grad_q, q).to(q.dtype).contiguous(), grad_k.contiguous(), grad_v.contiguous(), grad_gate


@_attend_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    layout: Tensor,
    documents: Tensor | None,
    padding: Tensor | None,
    offset: Tensor | None,
    rows: int,
    columns: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gates = q.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), gates


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.rows, ctx.columns, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    q, k, v, gate = _attend_backward(grad, *tensors, ctx.rows, ctx.columns, ctx.causal, ctx.scale)
    return q, k, v, None if tensors[3] is None else gate, *[None] * 8


_attend.register_autograd(_backward, setup_context=_keep)


def _pairs(q: Tensor, layout: Tensor, rows: int, columns: int, causal: bool) -> int:
    return open_pairs(layout, q.shape[0], q.shape[1], rows, columns, causal)


@register_flop_formula(torch.ops.armillary.attend_block_sparse, get_raw=True)
def _flops(q: Tensor, k: Tensor, v: Tensor, gate: Any, layout: Tensor, *rest: Any, **_: Any) -> int:
    rows, columns, causal, _scale = rest[-4:]
    return 2 * (q.shape[-1] + v.shape[-1]) * _pairs(q, layout, rows, columns, causal)


@register_flop_formula(torch.ops.armillary.attend_block_sparse_backward, get_raw=True)
def _flops_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Any, layout: Tensor, *rest: Any, **_: Any
) -> int:
    rows, columns, causal, _scale = rest[-4:]
    return (6 * q.shape[-1] + 4 * v.shape[-1]) * _pairs(q, layout, rows, columns, causal)
