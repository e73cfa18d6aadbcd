"""Exact attention inside a window, a positive-feature estimate outside it, under one normaliser.

Chen et al. 2021, Scatterbrain: Unifying Sparse and Low-rank Attention Approximation. Tokens outside
every window of a chunk are summed per feature: their share is one more softmax logit per feature,
log φ_f(q) + log Σ φ_f(k), whose value is their φ-weighted mean. Sums run up to the window (both ways:
down to it as well), so that nothing is ever subtracted; every feature carries its own maximum.
Chunks of tokens are the only loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EMPTY = -1e30  # logarithm of nothing; finite, so that differences of two are no NaN
TINY = 1e-30


@dataclass(frozen=True)
class Totals:
    """Far tokens, per feature f: top [B, H, m] (the largest log φ_f), mass Σ φ_f(k)·e^−top [B, H, m],
    sums Σ φ_f(k)·e^−top·v [B, H, m, V]; owner [B]: the document that they belong to, None = only one."""

    top: Tensor
    mass: Tensor
    sums: Tensor
    owner: Tensor | None = None

    def absorb(self, k: Tensor, v: Tensor, live: Tensor, owner: Tensor | None = None) -> Totals:
        """With tokens k (log features) [B, H, n, m] and v [B, H, n, V], of which live [B or 1, n] count;
        another owner than before begins anew."""
        top, mass, sums = self.top, self.mass, self.sums
        if owner is not None and self.owner is not None:
            kept = (owner == self.owner)[:, None, None]
            top, mass = top.masked_fill(~kept, EMPTY), mass.masked_fill(~kept, 0)
            sums = sums.masked_fill(~kept[..., None], 0)
        gone = ~live[:, None, :, None]
        peak = torch.maximum(top, k.detach().masked_fill(gone, EMPTY).amax(2))
        shrunk = (top - peak).exp()
        weights = (k - peak[:, :, None]).masked_fill(gone, EMPTY).exp()
        added = (weights.transpose(2, 3).to(v.dtype) @ v).to(sums.dtype)
        return Totals(peak, mass * shrunk + weights.sum(2), sums * shrunk[..., None] + added, owner)


def nothing(k: Tensor, v: Tensor, owner: Tensor | None = None) -> Totals:
    """No token yet, for log features k [B, H, T, m] and values [B, H, T, V]."""
    batch, heads, _, features = k.shape
    top = torch.full((batch, heads, features), EMPTY, dtype=k.dtype, device=k.device)
    mass = torch.zeros(batch, heads, features, dtype=k.dtype, device=k.device)
    sums = torch.zeros(batch, heads, features, v.shape[-1], dtype=k.dtype, device=k.device)
    return Totals(top, mass, sums, owner)


def chunk_for(window: int) -> int:
    """Tokens per chunk: about as many as they look back at."""
    return min(max(window, 64), 256)


def scatter_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    fk: Tensor,
    *,
    window: int,
    scale: float,
    causal: bool,
    valid: Tensor | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Pairs less than `window` apart weigh exp(q·k·scale), others Σ_f φ_f(q) φ_f(k).

    q, k: [B, H, T, K]; v: [B, H, T, V]; fq, fk: log features [B, H, T, m]; valid, documents: [B, T].
    Returns [B, H, T, V]; a query that sees nothing gives zeros.
    """
    length, chunk = q.shape[2], chunk_for(window)
    places = torch.arange(length, device=q.device)[None]
    if documents is not None:  # one number for each run of tokens of a document
        begins = torch.zeros_like(documents)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        documents = begins.cumsum(1)
    starts = range(0, length, chunk)
    # Split, not sliced: the backward pass of a slice fills a tensor of the whole length.
    qs, ks, vs, fqs, fks = (x.split(chunk, 2) for x in (q, k, v, fq, fk))
    behind = _suffixes(fks, vs, starts, chunk, window, valid, documents) if not causal else {}
    before: Totals | None = None
    done, pieces = 0, []
    for start in starts:
        stop = min(length, start + chunk)
        low, high = max(0, start - window), stop if causal else min(length, stop + window)
        if low > done:
            part = slice(done, low)
            owner = None if documents is None else documents[:, low - 1]
            before = (before or nothing(fk, v, owner)).absorb(
                _part(fks, chunk, part), _part(vs, chunk, part), _live(places, part, valid, documents, owner), owner
            )
            done = low
        near, here = slice(low, high), slice(start, stop)
        far = [totals for totals in (before, behind.get(start)) if totals is not None]
        pieces.append(
            _chunk(
                qs[start // chunk],
                _part(ks, chunk, near),
                _part(vs, chunk, near),
                fqs[start // chunk],
                _part(fks, chunk, near),
                apart=places[:, here, None] - places[:, None, near],
                seen=_seen(here, near, valid, documents),
                far=far,
                owners=None if documents is None else documents[:, here],
                bands=(max(0, stop - window - low), high - low if causal else max(0, start + window - low)),
                window=window,
                scale=scale,
                causal=causal,
            )
        )
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)


def scatter_extend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    fk: Tensor,
    far: Totals,
    *,
    lines: Tensor,
    columns: Tensor,
    window: int,
    scale: float,
) -> Tensor:
    """Queries of a chunk at places lines [B or 1, C] against k, v, fk [B, H, S, …] at places columns [B or
    1, S] (in any order, negative = no token) and the totals of all tokens before those."""
    columns = columns[:, None]
    return _chunk(
        q,
        k,
        v,
        fq,
        fk,
        apart=lines[:, :, None] - columns,
        seen=columns >= 0,
        far=[far],
        owners=None,
        bands=(k.shape[2], k.shape[2]),
        window=window,
        scale=scale,
        causal=True,
    )


def _chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    fk: Tensor,
    *,
    apart: Tensor,
    seen: Tensor | None,
    far: list[Totals],
    owners: Tensor | None,
    bands: tuple[int, int],
    window: int,
    scale: float,
    causal: bool,
) -> Tensor:
    """Columns below bands[0] and from bands[1] on may be out of the window of some query."""
    keys = k.shape[2]
    scores = (q @ k.transpose(2, 3)).to(fq.dtype) * scale
    left, right = min(bands[0], keys), max(min(bands[1], keys), min(bands[0], keys))
    if left or right < keys:
        most = fq.detach().amax(-1, keepdim=True)
        queries = (fq - most).exp().to(v.dtype)
        near = ((apart < window) & (apart > -window))[:, None]
        pieces = [scores[..., left:right]]
        if left:
            guess = _estimate(queries, most, fk[:, :, :left])
            pieces.insert(0, torch.where(near[..., :left], scores[..., :left], guess))
        if right < keys:
            guess = _estimate(queries, most, fk[:, :, right:])
            pieces.append(torch.where(near[..., right:], scores[..., right:], guess))
        scores = torch.cat(pieces, -1)
    allowed = (apart >= 0)[:, None] if causal else None
    if seen is not None:
        allowed = seen[:, None] if allowed is None else allowed & seen[:, None]
    if allowed is not None:
        scores = scores.masked_fill(~allowed, EMPTY)
    values = []
    for totals in far:
        there = totals.mass > 0
        share = fq + (totals.top + totals.mass.clamp(min=TINY).log())[:, :, None]
        gate = there[:, :, None]
        if owners is not None:
            assert totals.owner is not None
            gate = gate & (owners == totals.owner[:, None])[:, None, :, None]
        scores = torch.cat([scores, share.masked_fill(~gate, EMPTY)], -1)
        values.append((totals.sums / totals.mass.clamp(min=TINY)[..., None]).to(v.dtype))
    weights = torch.softmax(scores, -1)
    if seen is not None:  # a query that sees nothing has equal weights above
        weights = weights.masked_fill(scores == EMPTY, 0)
    weights = weights.to(v.dtype)
    y = weights[..., :keys] @ v
    return y if not values else y + weights[..., keys:] @ torch.cat(values, 2)


def _estimate(queries: Tensor, most: Tensor, fk: Tensor) -> Tensor:
    """log Σ_f φ_f(q) φ_f(k), every vector of features taken relative to its largest."""
    top = fk.detach().amax(-1, keepdim=True)
    keys = (fk - top).exp().to(queries.dtype)
    product = (queries @ keys.transpose(2, 3)).to(fk.dtype)
    return (product + TINY).log() + most + top.transpose(2, 3)


def _part(pieces: tuple[Tensor, ...], chunk: int, part: slice) -> Tensor:
    """Some places of axis 2 of what was split into chunks."""
    first, last = part.start // chunk, (part.stop - 1) // chunk
    joined = pieces[first] if first == last else torch.cat(pieces[first : last + 1], 2)
    return joined[:, :, part.start - first * chunk : part.stop - first * chunk]


def _suffixes(
    fks: tuple[Tensor, ...],
    vs: tuple[Tensor, ...],
    starts: range,
    chunk: int,
    window: int,
    valid: Tensor | None,
    documents: Tensor | None,
) -> dict[int, Totals]:
    """For each chunk, the totals of the tokens beyond its reach to the right."""
    length = sum(piece.shape[2] for piece in fks)
    places = torch.arange(length, device=vs[0].device)[None]
    found: dict[int, Totals] = {}
    after: Totals | None = None
    done = length
    for start in reversed(starts):
        high = min(length, min(length, start + chunk) + window)
        if high < done:
            part = slice(high, done)
            owner = None if documents is None else documents[:, high]
            after = (after or nothing(fks[0], vs[0], owner)).absorb(
                _part(fks, chunk, part), _part(vs, chunk, part), _live(places, part, valid, documents, owner), owner
            )
            done = high
        if after is not None:
            found[start] = after
    return found


def _live(places: Tensor, part: slice, valid: Tensor | None, documents: Tensor | None, owner: Tensor | None) -> Tensor:
    """[B or 1, n]: which tokens of a part are summed: real ones of the owner's document."""
    live = places[:, part] >= 0
    if valid is not None:
        live = live & valid[:, part]
    if documents is not None and owner is not None:
        live = live & (documents[:, part] == owner[:, None])
    return live


def _seen(here: slice, near: slice, valid: Tensor | None, documents: Tensor | None) -> Tensor | None:
    """[B, C or 1, S]: real keys of the query's document; None = all."""
    seen = None if valid is None else valid[:, None, near]
    if documents is not None:
        same = documents[:, here, None] == documents[:, None, near]
        seen = same if seen is None else seen & same
    return seen
