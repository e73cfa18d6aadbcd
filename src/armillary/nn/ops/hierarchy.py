"""Attention over a hierarchy of blocks: near tokens one by one, far ones as means of 2^l tokens.

Node m of level l is 2^l blocks of `block` tokens, held as `block` coarse tokens that stand for 2^l
tokens each. A query sees its own block token by token and, at every level, the sibling of the node
that it lies in: each token of the row is covered exactly once. Causally only left siblings are seen,
by fine queries, O(T·block·log T); both ways queries are means too, O(T·block) (Zhu & Soricut 2021,
H-Transformer-1D). A coarse token weighs as many as it stands for, and all levels share one
normaliser. Levels are the only loop; blocks and nodes are rows of batched products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EMPTY = -1e30  # log weight of nothing; finite, so that differences of two are no NaN


@dataclass(frozen=True)
class Layout:
    """Where tokens stand so that every document begins at a node of its own.

    order: slot → token, None where they are the same; real: [B', S] which slots hold a token; back:
    how to bring slots to tokens; blocks: blocks in use; pairs: pairs of siblings at each level, all of
    which come first.
    """

    real: Tensor
    blocks: int
    pairs: tuple[int, ...]
    order: Tensor | None = None
    slots: Tensor | None = None
    sources: Tensor | None = None

    def spread(self, x: Tensor) -> Tensor:
        """x [B, T, H, K] → [B', H, S, K], zeros where no token stands."""
        size = self.real.shape[1]
        if self.slots is not None:
            assert self.sources is not None
            flat = x.flatten(0, 1)
            placed: Tensor = flat.new_zeros(size, *flat.shape[1:]).index_copy(0, self.slots, flat[self.sources])
            return placed[None].transpose(1, 2)
        if self.order is not None:
            x = x.gather(1, self.order[..., None, None].expand_as(x))
        return F.pad(x.transpose(1, 2), (0, 0, 0, size - x.shape[1]))

    def collect(self, y: Tensor, batch: int, length: int) -> Tensor:
        """[B', H, S, V] → [B, T, H, V], zeros for tokens that are not there."""
        if self.slots is not None:
            assert self.sources is not None
            flat = y[0].transpose(0, 1)
            placed: Tensor = flat.new_zeros(batch * length, *flat.shape[1:])
            placed = placed.index_copy(0, self.sources, flat[self.slots])
            return placed.view(batch, length, *flat.shape[1:])
        y = (y * self.real[:, None, :, None])[:, :, :length].transpose(1, 2)
        if self.order is None:
            return y
        return torch.zeros_like(y).scatter(1, self.order[..., None, None].expand_as(y), y)


def pairs_of(blocks: int) -> tuple[int, ...]:
    """Pairs of siblings at each level of one document of so many blocks."""
    found, level = [], 0
    while 1 << level < blocks:
        found.append(-(-blocks // (1 << level)) // 2)
        level += 1
    return tuple(found)


def layout(
    batch: int, length: int, block: int, device: torch.device, padding: Tensor | None, documents: Tensor | None
) -> Layout:
    """The layout of rows [B, T] whose documents are `documents` and whose real tokens are `padding`."""
    if documents is not None:
        real = torch.ones_like(documents, dtype=torch.bool) if padding is None else padding
        return _packed(real, documents, block)
    blocks = max(1, -(-length // block))
    size = block << (blocks - 1).bit_length()
    if padding is None:
        real = (torch.arange(size, device=device) < length).expand(batch, -1)
        return Layout(real, blocks, pairs_of(blocks))
    order = torch.sort((~padding).to(torch.uint8), dim=1, stable=True).indices  # real tokens first
    real = torch.arange(size, device=device) < padding.sum(1, keepdim=True)
    return Layout(real, blocks, pairs_of(blocks), order=order)


def _packed(real: Tensor, documents: Tensor, block: int) -> Layout:
    """Each document gets a node as large as it needs; larger ones come first, so that every node of
    every level begins at a multiple of its size and siblings of one document come first."""
    rows, places = real.nonzero(as_tuple=True)
    ids = documents[rows, places]
    begins = torch.ones_like(rows, dtype=torch.bool)
    begins[1:] = (rows[1:] != rows[:-1]) | (ids[1:] != ids[:-1])
    which = begins.long().cumsum(0) - 1
    starts = begins.nonzero()[:, 0]
    sizes = torch.bincount(which, minlength=1).tolist()
    levels = [(max(1, -(-size // block)) - 1).bit_length() for size in sizes]
    ranked = sorted(range(len(levels)), key=lambda i: -levels[i])
    offsets, total = [0] * len(levels), 0
    for i in ranked:
        offsets[i] = total
        total += block << levels[i]
    top = max(levels)
    pairs = tuple(sum(1 << (own - level - 1) for own in levels if own > level) for level in range(top))
    moved = torch.tensor(offsets, device=real.device)[which] if len(rows) else which
    rank = torch.arange(len(rows), device=real.device) - (starts[which] if len(rows) else 0)
    slots = moved + rank
    held = torch.zeros(1, total, dtype=torch.bool, device=real.device)
    held[0, slots] = True
    return Layout(held, total // block, pairs, slots=slots, sources=rows * real.shape[1] + places)


def hierarchy_attend(
    q: Tensor, k: Tensor, v: Tensor, held: Layout, *, block: int, scale: float, causal: bool
) -> Tensor:
    """q, k: [B, T, H, K]; v: [B, T, H, V]; both in the layout's order of tokens. Returns [B, T, H, V]."""
    batch, length = q.shape[:2]
    q, k, v = held.spread(q), held.spread(k), held.spread(v)
    y = _causal(q, k, v, held, block, scale) if causal else _both_ways(q, k, v, held, block, scale)
    return held.collect(y, batch, length)


def _weigh(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One level: its attention output [..., V] and the log of its total weight [...]."""
    top = scores.detach().amax(-1, keepdim=True).clamp(min=EMPTY)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    y = (weights.to(v.dtype) @ v) / total.clamp(min=1e-30).to(v.dtype)
    return y, (total.clamp(min=1e-30).log() + top)[..., 0]


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    found = q @ k.transpose(-1, -2)
    return (found if found.dtype == torch.float64 else found.float()) * scale


def _causal(q: Tensor, k: Tensor, v: Tensor, held: Layout, block: int, scale: float) -> Tensor:
    """Fine queries; left siblings are whole, so each coarse token of level l stands for 2^l tokens."""
    size, used = q.shape[2], held.blocks * block
    tril = torch.ones(block, block, dtype=torch.bool, device=q.device).tril()
    rows = [x[:, :, :used].unflatten(2, (held.blocks, block)) for x in (q, k, v)]
    near, weight = _weigh(_scores(rows[0], rows[1], scale).masked_fill(~tril, -torch.inf), rows[2])
    logs = [F.pad(weight.flatten(2), (0, size - used), value=EMPTY)]
    far = []
    for level, pairs in enumerate(held.pairs):
        if level:
            k, v = (_halved(x) * 0.5 for x in (k, v))
        each = block << level
        right = q[:, :, : 2 * pairs * each].unflatten(2, (pairs, 2, each))[:, :, :, 1]
        left_k, left_v = (x[:, :, : 2 * pairs * block].unflatten(2, (pairs, 2, block))[:, :, :, 0] for x in (k, v))
        y, weight = _weigh(_scores(right, left_k, scale), left_v)
        weight = weight + level * math.log(2)
        nothing = torch.full_like(weight, EMPTY)
        full = torch.stack([nothing, weight], 3).flatten(2)
        logs.append(F.pad(full, (0, size - full.shape[2]), value=EMPTY))
        far.append(y)
    if not far:
        return F.pad(near.flatten(2, 3), (0, 0, 0, size - used))
    shares = (torch.stack(logs) - torch.logsumexp(torch.stack(logs), 0)).exp().to(v.dtype)[..., None]
    total = F.pad(near.flatten(2, 3), (0, 0, 0, size - used)) * shares[0]
    for level, (pairs, y) in enumerate(zip(held.pairs, far, strict=True)):
        each = block << level
        share = shares[level + 1][:, :, : 2 * pairs * each].unflatten(2, (pairs, 2, each))[:, :, :, 1]
        total[:, :, : 2 * pairs * each].unflatten(2, (pairs, 2, each))[:, :, :, 1] += y * share
    return total


def _both_ways(q: Tensor, k: Tensor, v: Tensor, held: Layout, block: int, scale: float) -> Tensor:
    """Coarse queries as well; nodes at the end of a document are incomplete, so tokens are counted.
    Levels are joined from the top, each twice as fine as the one above."""
    size, used = q.shape[2], held.blocks * block
    count = held.real[:, None, :, None].to(q.dtype if q.dtype == torch.float64 else torch.float32)
    keys = held.real[:, None, :used].unflatten(2, (held.blocks, block))[..., None, :]
    rows = [x[:, :, :used].unflatten(2, (held.blocks, block)) for x in (q, k, v)]
    near, weight = _weigh(_scores(rows[0], rows[1], scale).masked_fill(~keys, -torch.inf), rows[2])
    found = [(near.flatten(2, 3), weight.flatten(2))]
    real = held.real[:, None, :, None].to(q.dtype)
    q, k, v = q * real, k * real, v * real  # sums of what is there
    for level, pairs in enumerate(held.pairs):
        if level:
            q, k, v, count = (_halved(x) for x in (q, k, v, count))
        reach = 2 * pairs * block
        number = count[:, :, :reach]
        inverse = 1 / number.clamp(min=1)
        sides = [(x[:, :, :reach] * inverse.to(x.dtype)).unflatten(2, (pairs, 2, block)) for x in (q, k, v)]
        number = number[..., 0].unflatten(2, (pairs, 2, block)).flip(3)[..., None, :]
        scores = _scores(sides[0], sides[1].flip(3), scale) + number.clamp(min=1).log()
        y, weight = _weigh(scores.masked_fill(number == 0, -torch.inf), sides[2].flip(3))
        found.append((y.flatten(2, 4), weight.flatten(2)))
    total, weight = found.pop()
    while found:
        fine, own = found.pop()
        if len(found):  # level 0 is as fine as the blocks
            total, weight = _doubled(total), weight.repeat_interleave(2, 2)
        total, weight = _joined(fine, own, total, weight)
    return F.pad(total, (0, 0, 0, size - total.shape[2]))


def _doubled(x: Tensor) -> Tensor:
    """Every row twice: [B, H, S, K] → [B, H, 2S, K]."""
    return x[:, :, :, None].expand(-1, -1, -1, 2, -1).flatten(2, 3)


def _joined(a: Tensor, log_a: Tensor, b: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
    """Two outputs [B, H, S, V] of log weights [B, H, S] as one; the shorter one has nothing at its end."""
    length = max(a.shape[2], b.shape[2])
    log_a, log_b = (F.pad(x, (0, length - x.shape[2]), value=EMPTY) for x in (log_a, log_b))
    a, b = (F.pad(x, (0, 0, 0, length - x.shape[2])) for x in (a, b))
    share = torch.sigmoid(log_a - log_b).to(a.dtype)[..., None]
    return b + share * (a - b), torch.logaddexp(log_a, log_b)


def _halved(x: Tensor) -> Tensor:
    """Sums of neighbours: [B, H, S, K] → [B, H, S/2, K]; a last one without neighbour is in no pair of nodes."""
    count = x.shape[2] // 2
    return x[:, :, 0 : 2 * count : 2] + x[:, :, 1 : 2 * count : 2]


def hierarchy_extend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    held: Mapping[str, Tensor],
    before: Tensor,
    added: Tensor,
    *,
    levels: int,
    blocks: int,
    block: int,
    scale: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A chunk after `before` [B] tokens of each row: its outputs and what is held after it.

    q, k, v: [B, H, C, K]; added: [B] valid tokens of the chunk; held: k and v [B, H, (1 + levels)·block,
    K]: the current block, then for each level l the closed node that bit l of the number of whole blocks
    asks for (the binary decomposition of the past); blocks: how many the current block and the chunk
    touch at most. Returns [B, H, C, V] and the new k and v.
    """
    chunk = q.shape[2]
    whole, filled = before // block, before % block
    after = before + added
    closed, rest = after // block, after % block
    steps = torch.arange(blocks * block, device=q.device)
    inside = steps < filled[:, None]
    source = torch.where(inside, steps.expand_as(inside), block + steps - filled[:, None]).clamp(max=block + chunk - 1)
    runs = {
        n: _take(torch.cat([held[n][:, :, :block], x.to(held[n].dtype)], 2), source) for n, x in (("k", k), ("v", v))
    }
    queries = _take(q, (source - block).clamp(min=0)).unflatten(2, (blocks, block))
    nodes = {name: run.unflatten(2, (blocks, block)) for name, run in runs.items()}
    tril = torch.ones(block, block, dtype=torch.bool, device=q.device).tril()
    keys, values = [nodes["k"]], [nodes["v"]]
    masks = [tril.expand(q.shape[0], 1, blocks, -1, -1)]
    lines = whole[:, None] + torch.arange(blocks, device=q.device)  # [B, blocks]: which block of its row
    kept: dict[str, list[Tensor]] = {"k": [], "v": []}
    for level in range(levels):
        odd = (whole >> level) & 1 == 1
        first = (whole >> (level + 1)) * 2  # index of the first node in the frame of this level
        wanted = ((lines >> level) - 1 - first[:, None]).clamp(min=0)
        newest = ((closed >> level) - 1 - first).clamp(min=0)
        stays = (closed >> level) & 1 == 0
        for name, found in (("k", keys), ("v", values)):
            slot = held[name][:, :, None, (1 + level) * block : (2 + level) * block]
            raw = nodes[name]
            frame = torch.where(
                odd[:, None, None, None, None], torch.cat([slot, raw], 2), torch.cat([raw, raw[:, :, -1:]], 2)
            )
            if frame.shape[2] % 2:
                frame = torch.cat([frame, frame[:, :, -1:]], 2)
            found.append(_take(frame, wanted))
            fresh = _take(frame, newest[:, None])
            kept[name].append(torch.where(stays[:, None, None, None, None], slot, fresh)[:, :, 0])
            pairs = frame.flatten(2, 3).unflatten(2, (frame.shape[2] // 2, block, 2))
            nodes[name] = (pairs[:, :, :, :, 0] + pairs[:, :, :, :, 1]) * 0.5
        used = (lines >> level) & 1 == 1
        masks.append(used[:, None, :, None, None].expand(-1, -1, -1, block, block))
    scores = _scores(queries, torch.cat(keys, 3).to(q.dtype), scale)
    stands = torch.arange(-1, levels, device=q.device).clamp(min=0).to(scores.dtype) * math.log(2)
    scores = scores + stands.repeat_interleave(block)
    weights = torch.softmax(scores.masked_fill(~torch.cat(masks, -1), -torch.inf), -1)
    y = (weights.to(v.dtype) @ torch.cat(values, 3).to(v.dtype)).flatten(2, 3)
    y = _take(y, filled[:, None] + torch.arange(chunk, device=q.device))
    moved = (closed - whole)[:, None] * block + torch.arange(block, device=q.device)
    live = (torch.arange(block, device=q.device) < rest[:, None])[:, None, :, None]
    state = {}
    for name in ("k", "v"):
        current = torch.where(live, _take(runs[name], moved.clamp(max=blocks * block - 1)), held[name][:, :, :block])
        state[name] = torch.cat([current, *kept[name]], 2)
    return y, state


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Entries index [B, n] of axis 2 of x [B, H, S, …]."""
    index = index.view(index.shape[0], 1, index.shape[1], *[1] * (x.dim() - 3))
    return x.gather(2, index.expand(-1, x.shape[1], -1, *x.shape[3:]))
