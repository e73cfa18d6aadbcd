"""Softmax attention along bands of sorted orders, shared by every mixer that sorts tokens into groups.

An order sorts the tokens by (group, position); in it a token sees the `width` tokens of its group
just before it. Several orders (rounds of hashing, a local window, which is an order of one group)
are joined in one softmax over the union, in which a pair counts once, however many orders have it. A
token that sees no other sees itself.

`places` say it all: token t sees token s in an order when 0 < place(t) − place(s) ≤ width, since
places rise by 1 inside a group and jump by more than the width between groups. The plain form is
this definition with a T×T mask; the fast form sorts and works in blocks of the order, forward and
backward, so time and memory are linear in length (Kitaev et al. 2020, Reformer).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from armillary.native.bands import band_softmax_, band_softmax_backward_
from armillary.nn.ops import plain, product_dtype

SIZE = 64  # tokens of a block
BLOCKS = 64  # at a time: their scores stay in the cache
TOKENS = 16384  # of several heads at a time
NOWHERE = -(2**30)  # the place of what no token sees


def sort_groups(groups: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """groups [..., T] int64 → the order, [..., T] int64 (which token stands where, by group, then
    position), and every token's place, [..., T] int32."""
    order = torch.argsort(groups, stable=True, dim=-1)
    grouped = groups.gather(-1, order)
    fresh = torch.zeros_like(grouped)
    fresh[..., 1:] = (grouped[..., 1:] != grouped[..., :-1]).long()
    length = groups.shape[-1]
    sorted_places = torch.arange(length, device=groups.device) + min(width, length) * fresh.cumsum(-1)
    places = torch.empty_like(sorted_places).scatter_(-1, order, sorted_places)
    return order, places.int()


def band_attend(
    q: Tensor, k: Tensor, v: Tensor, orders: Sequence[Tensor], places: Tensor, widths: Sequence[int], scale: float
) -> Tensor:
    """softmax(q kᵀ · scale) v over the pairs that any order's band has; itself where there is none.

    q, k: [B, H, T, K]; v: [B, H, T, V]; orders: of each order the tokens in it, sorted by place,
    [B, H, L] int64; places: [B, H, R, T] int32; widths: R of them. Returns [B, H, T, V].
    """
    widths = [min(width, q.shape[2]) for width in widths]  # as far apart as `sort_groups` puts two groups
    if plain() or q.dtype == torch.float64:
        weights = band_weights(q, k, orders, places, widths, scale)
        return weights.to(v.dtype) @ v
    y, sums = _attend(q, k, v, list(orders), places, widths, scale)
    return torch.where((sums == -torch.inf)[..., None], v, y)


def band_weights(
    q: Tensor, k: Tensor, orders: Sequence[Tensor], places: Tensor, widths: Sequence[int], scale: float
) -> Tensor:
    """The definition: the weights [B, H, T, T] in float32 (float64 for float64 input)."""
    seen = band_seen(orders, places, widths)
    alone = torch.eye(q.shape[2], dtype=torch.bool, device=q.device) & ~seen.any(-1, keepdim=True)
    scores = q @ k.transpose(2, 3)
    scores = (scores if scores.dtype == torch.float64 else scores.float()) * scale
    return torch.softmax(scores.masked_fill(~(seen | alone), -torch.inf), -1)


def band_seen(orders: Sequence[Tensor], places: Tensor, widths: Sequence[int]) -> Tensor:
    """Which pairs [B, H, T, T] any order has, tokens seeing none but others."""
    seen = found = torch.zeros(1, dtype=torch.bool, device=places.device)
    for number, (order, width) in enumerate(zip(orders, widths, strict=True)):
        place = places[:, :, number].long()
        distance = place[..., :, None] - place[..., None, :]
        inside = (distance > 0) & (distance <= width)
        member = torch.zeros_like(place, dtype=torch.bool).scatter(-1, order, True)
        seen = seen | (inside & ~found & member[..., :, None] & member[..., None, :])
        found = found | inside
    return seen


def ranks(groups: Tensor) -> Tensor:
    """How many tokens of its group come before each, [..., T] int64."""
    order = torch.argsort(groups, stable=True, dim=-1)
    grouped = groups.gather(-1, order)
    steps = torch.arange(groups.shape[-1], device=groups.device).expand_as(groups)
    fresh = torch.ones_like(grouped, dtype=torch.bool)
    fresh[..., 1:] = grouped[..., 1:] != grouped[..., :-1]
    begun = torch.where(fresh, steps, 0).cummax(-1).values
    return torch.empty_like(groups).scatter_(-1, order, steps - begun)


def chunk_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Tensor,
    codes: Tensor,
    held: Mapping[str, Tensor],
    orders: Sequence[tuple[int, int]],
    *,
    scale: float,
    spacing: int,
) -> Tensor:
    """`band_attend` of a chunk's queries over what its bands hold of earlier tokens and the chunk itself.

    q, k, v: [B, H, T, K]; groups: [B, H, R, T] of the chunk's tokens; codes: [B, H, T, R], spacing ·
    group + number in the group; held: k, v [B, H, slots, K] and codes [B, H, slots, R], a ring for
    every group of every order, and counts [B, H, groups]; orders: (groups, width) of each.
    """
    slots = held["k"].shape[2]
    if q.shape[2] * sum(width for _, width in orders) <= slots:
        return _few(q, k, v, groups, codes, held, orders, scale)
    # Each order sorts the tokens of its own rings and those of the chunk. Places count from the oldest
    # that the chunk could see; a token that an order's ring has lost is nowhere in it.
    length, device = q.shape[2], q.device
    every = torch.cat([held["codes"], codes], 2).transpose(2, 3)  # [B, H, R, slots + T]
    tokens = torch.arange(slots, slots + length, device=device)
    sorted_orders, places, start, first = [], [], 0, 0
    for number, (count, width) in enumerate(orders):
        code = every[:, :, number]
        group, serial = code.div(spacing, rounding_mode="floor"), code.remainder(spacing)
        begun = held["counts"][:, :, first : first + count]
        begun = torch.cat([begun, torch.zeros_like(begun[..., :1])], -1)  # of tokens that are not there
        step = serial - begun.gather(2, group.clamp(min=0)) + width
        absent = (group < 0) | (step < 0)
        place = torch.where(
            group == count, count * (2 * width + length + 1) + serial, group * (2 * width + length + 1) + step
        )
        place = place.masked_fill(absent, NOWHERE)
        ring = torch.arange(start, start + count * width, device=device)
        members = torch.cat([ring, tokens])
        sorted_orders.append(members[torch.argsort(place[:, :, members], dim=-1, stable=True)])
        places.append(place)
        start, first = start + count * width, first + count
    whole = [torch.cat([held[name].to(x.dtype), x], 2) for name, x in (("k", q), ("k", k), ("v", v))]
    widths = [width for _, width in orders]
    y = band_attend(whole[0], whole[1], whole[2], sorted_orders, torch.stack(places, 2).int(), widths, scale)
    return y[:, :, slots:]


def _few(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Tensor,
    codes: Tensor,
    held: Mapping[str, Tensor],
    orders: Sequence[tuple[int, int]],
    scale: float,
) -> Tensor:
    """A few queries: each gathers the rings of its own groups."""
    batch, heads, length, _ = q.shape
    device = q.device
    widths = torch.tensor([width for _, width in orders], device=device)
    rings, start = [], 0
    for number, (count, size) in enumerate(orders):
        rings.append(start + groups[:, :, number, :, None] * size + torch.arange(size, device=device))
        start += count * size
    slots = torch.cat(rings, -1)  # [B, H, T, C]
    ring = torch.arange(len(orders), device=device).repeat_interleave(widths, output_size=slots.shape[3])

    def gathered(x: Tensor) -> Tensor:
        at = slots.flatten(2)[..., None].expand(-1, -1, -1, x.shape[3])
        return x.gather(2, at).view(batch, heads, length, -1, x.shape[3])

    distance = codes[:, :, :, None] - gathered(held["codes"])
    inside = (distance > 0) & (distance <= widths)
    older = inside.any(-1) & (inside.long().argmax(-1) == ring)  # in the first order that has the pair
    distance = codes[:, :, :, None] - codes[:, :, None]
    newer = ((distance > 0) & (distance <= widths)).any(-1)
    alone = ~(older.any(-1) | newer.any(-1))[..., None] & torch.eye(length, dtype=torch.bool, device=device)
    scores = torch.cat([(gathered(held["k"]).to(q.dtype) @ q[..., None])[..., 0], q @ k.transpose(2, 3)], -1)
    scores = (scores if scores.dtype == torch.float64 else scores.float()) * scale
    weights = torch.softmax(scores.masked_fill(~torch.cat([older, newer | alone], -1), -torch.inf), -1).to(v.dtype)
    past = weights[..., None, : slots.shape[3]] @ gathered(held["v"]).to(v.dtype)
    return past[..., 0, :] + weights[..., slots.shape[3] :] @ v


class _Sorted:
    """One order of one head: tensors in its order, in blocks with what its rows look back at."""

    def __init__(self, order: Tensor, width: int) -> None:
        self.order, self.width = order, width
        self.rows = order.shape[0]
        self.blocks = -(-self.rows // SIZE)
        self.before = -(-width // SIZE) if width < self.rows else self.blocks
        self.span = (self.before + 1) * SIZE

    def rows_of(self, x: Tensor) -> Tensor:
        """x [T, K] → [blocks, SIZE, K], zeros behind the last."""
        out = x.new_empty(self.blocks * SIZE, x.shape[1])
        torch.index_select(x, 0, self.order, out=out[: self.rows])
        out[self.rows :] = 0
        return out.view(self.blocks, SIZE, -1)

    def keys_of(self, x: Tensor) -> Tensor:
        """x [T, K] → [blocks, span, K], a view in which blocks overlap."""
        lead, width = self.before * SIZE, x.shape[1]
        out = x.new_empty(lead + self.blocks * SIZE, width)
        out[:lead] = 0
        torch.index_select(x, 0, self.order, out=out[lead : lead + self.rows])
        out[lead + self.rows :] = 0
        return out.as_strided((self.blocks, self.span, width), (SIZE * width, width, 1))

    def places_of(self, places: Tensor) -> Tensor:
        """[orders, T] → [orders, before and rows]."""
        lead = self.before * SIZE
        out = places.new_full((places.shape[0], lead + self.blocks * SIZE), NOWHERE)
        out[:, lead : lead + self.rows] = places.index_select(1, self.order)
        return out

    def column(self, x: Tensor, fill: float) -> Tensor:
        """x [T] → [blocks, SIZE]."""
        out = x.new_full((self.blocks * SIZE,), fill)
        out[: self.rows] = x.index_select(0, self.order)
        return out.view(self.blocks, SIZE)

    def parts(self) -> list[slice]:
        return [slice(start, min(self.blocks, start + BLOCKS)) for start in range(0, self.blocks, BLOCKS)]


def _heaps(orders: list[Tensor], places: Tensor, widths: list[int]) -> Iterator[tuple[slice, list[Tensor], Tensor]]:
    """Heads of the batch one behind the other, TOKENS at a time, as one long row: which rows of [B·H·T, …], their
    orders, and their places [R, rows], so far apart that no head sees another."""
    length, every = places.shape[3], places.shape[0] * places.shape[1]
    jump = int(places.max()) + max(widths) + 1
    each = max(1, min(TOKENS // max(order.shape[2] for order in orders), (2**31 - 1) // jump))
    flat = places.flatten(0, 1)
    for first in range(0, every, each):
        last = min(every, first + each)
        shift = torch.arange(last - first, device=places.device)
        own = flat[first:last]
        moved = torch.where(own == NOWHERE, own, own + (shift * jump).to(own.dtype)[:, None, None])
        yield (
            slice(first * length, last * length),
            [(order.flatten(0, 1)[first:last] + (shift * length)[:, None]).flatten() for order in orders],
            moved.transpose(0, 1).flatten(1),
        )


def _flat(x: Tensor) -> Tensor:
    """[B, H, T, K] → [B·H·T, K], in the type to multiply in."""
    return x.to(product_dtype(x)).reshape(-1, x.shape[3])


@torch.library.custom_op("armillary::band_attend", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, orders: list[Tensor], places: Tensor, widths: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:3], v.shape[-1])
    rows, keys, values = _flat(q), _flat(k), _flat(v)
    out = torch.zeros(values.shape, dtype=torch.float32, device=q.device)
    sums = torch.full((len(out),), -torch.inf, dtype=torch.float32, device=q.device)
    limits = torch.tensor(widths, dtype=torch.int32, device=q.device)
    for heap, own, at in _heaps(orders, places, widths):
        total, logs = out[heap], sums[heap]
        for number, order in enumerate(own):
            part = _Sorted(order, widths[number])
            asked, looked, given = part.rows_of(rows[heap]), part.keys_of(keys[heap]), part.keys_of(values[heap])
            seats, bounds = part.places_of(at[: number + 1]), limits[: number + 1]
            ys, found = [], []
            for piece in part.parts():
                weights = torch.bmm(asked[piece], looked[piece].transpose(1, 2))
                found.append(band_softmax_(weights, seats, bounds, piece.start, scale))
                ys.append(torch.bmm(weights, given[piece]))
            y, log = torch.cat(ys).flatten(0, 1)[: part.rows].float(), torch.cat(found).flatten()[: part.rows]
            if number > 0:
                old = logs[order]
                both = torch.logaddexp(old, log)
                share = (log - both).exp().nan_to_num_(0.0)  # of this order; of nothing where none has anything
                y, log = torch.lerp(total[order], y, share[:, None]), both
            total[order], logs[order] = y, log
    return out.to(v.dtype).view(shape), sums.view(shape[:3])


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, orders: list[Tensor], places: Tensor, widths: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = q.shape
    return v.new_empty(batch, heads, length, v.shape[-1]), q.new_empty(batch, heads, length, dtype=torch.float32)


@torch.library.custom_op("armillary::band_attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    out: Tensor,
    sums: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    orders: list[Tensor],
    places: Tensor,
    widths: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dots, logs = (grad.float() * out.float()).sum(-1).flatten(), sums.flatten()
    limits = torch.tensor(widths, dtype=torch.int32, device=q.device)
    sources = [_flat(x) for x in (q, k, v, grad)]
    totals = [torch.zeros(x.shape, dtype=torch.float32, device=q.device) for x in sources[:3]]
    for heap, own, at in _heaps(orders, places, widths):
        rows, keys, values, inward = (x[heap] for x in sources)
        for number, order in enumerate(own):
            part = _Sorted(order, widths[number])
            log, dot = part.column(logs[heap], -torch.inf), part.column(dots[heap], 0.0)
            given = (part.rows_of(rows), part.keys_of(keys), part.keys_of(values), part.rows_of(inward))
            found = _pieces(part, *given, log, dot, part.places_of(at[: number + 1]), limits[: number + 1], scale)
            inverse: Tensor | None = None
            if part.rows == len(rows):  # every token is in the order: a sum over its inverse
                inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=q.device))
            for total, slopes in zip(totals, found, strict=True):
                if inverse is None:
                    total[heap].index_add_(0, order, slopes.float())
                else:
                    total[heap] += slopes.index_select(0, inverse)
    return tuple(total.to(x.dtype).view(x.shape) for total, x in zip(totals, (q, k, v), strict=True))  # type: ignore[return-value]


def _pieces(
    part: _Sorted,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    inward: Tensor,
    log: Tensor,
    dot: Tensor,
    at: Tensor,
    limits: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values in the part's order."""
    size = (part.before + part.blocks, SIZE)
    grad_q = torch.empty_like(rows)
    grad_k = torch.zeros(*size, keys.shape[-1], dtype=torch.float32, device=rows.device)
    grad_v = torch.zeros(*size, values.shape[-1], dtype=torch.float32, device=rows.device)
    for piece in part.parts():
        weights = torch.bmm(rows[piece], keys[piece].transpose(1, 2))
        slopes = torch.bmm(inward[piece], values[piece].transpose(1, 2))
        band_softmax_backward_(weights, slopes, log[piece], dot[piece], at, limits, piece.start, scale)
        torch.bmm(slopes, keys[piece], out=grad_q[piece])
        for total, left, right in ((grad_k, slopes, rows[piece]), (grad_v, weights, inward[piece])):
            sums = torch.bmm(left.transpose(1, 2), right).unflatten(1, (part.before + 1, SIZE))
            for step in range(part.before + 1):
                total[piece.start + step : piece.stop + step] += sums[:, step]
    lead = part.before
    return (
        grad_q.flatten(0, 1)[: part.rows],
        grad_k[lead:].flatten(0, 1)[: part.rows],
        grad_v[lead:].flatten(0, 1)[: part.rows],
    )


@_attend_backward.register_fake
def _(
    grad: Tensor,
    out: Tensor,
    sums: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    orders: list[Tensor],
    places: Tensor,
    widths: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, orders, places, ctx.widths, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, places, *output, *orders)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    q, k, v, places, out, sums, *orders = ctx.saved_tensors
    slopes = _attend_backward(grad, out, sums, q, k, v, orders, places, ctx.widths, ctx.scale)
    return (*slopes, [None] * len(orders), None, None, None)


_attend.register_autograd(_backward, setup_context=_keep)


def _pairs(q: Any, orders: Any, widths: Any) -> int:
    batch, heads = q[:2]
    return int(sum(batch * heads * order[2] * (width + SIZE) for order, width in zip(orders, widths, strict=True)))


@register_flop_formula(torch.ops.armillary.band_attend)
def _flops(q: Any, k: Any, v: Any, orders: Any, places: Any, widths: Any, scale: float, **_: Any) -> int:
    return 2 * _pairs(q, orders, widths) * int(q[3] + v[3])


@register_flop_formula(torch.ops.armillary.band_attend_backward)
def _flops_backward(
    grad: Any,
    out: Any,
    sums: Any,
    q: Any,
    k: Any,
    v: Any,
    orders: Any,
    places: Any,
    widths: Any,
    scale: float,
    **_: Any,
) -> int:
    return 2 * _pairs(q, orders, widths) * int(3 * q[3] + 2 * v[3])
