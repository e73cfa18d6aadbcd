"""Attention whose softmax runs over time, one for each feature: y_t = Σ_f q_tf Σ_s softmax_s(k_sf) v_s.

Causal, the softmax at t is over s ≤ t. With L the running log-sum of exp(k), the weights are
q_tf exp(k_sf − L_tf), and the averages so far are a state that fades by exp(L_{t−1} − L_t): a decay of
its own for each feature. The plain form is that loop over tokens. The fast form halves its chunks
again and again: what the first half gives to the second passes through L at the border between
them, so that no exponent is ever positive, whatever the keys are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.nn.ops import plain
from armillary.nn.ops.linear import LOWEST, linear_attend, whole_max

CHUNK = 64  # a power of two


def column_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    present: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """q, k: [B, T, H, K], of which k are logits; v: [B, T, H, V]; present: [B, T], None: every token is
    there; documents: [B, T] ids, a new id starts anew. state, causal only: averages [B, H, K, V] and
    log-sums [B, H, K] of earlier tokens. Returns y [B, T, H, V] in v's dtype and, if causal, the state
    after the last token in float32 (float64 for float64)."""
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    dtype, q, k, v = v.dtype, q.to(kind), k.to(kind), v.to(kind)
    if present is not None:
        k = k.masked_fill(~present[..., None, None], LOWEST)
        v = v * present[..., None, None].to(kind)
    if not causal:
        return _both_ways(q, k, v, documents).to(dtype), None
    if state is None:
        shape = (q.shape[0], *q.shape[2:])
        state = (q.new_zeros(*shape, v.shape[-1]), q.new_full(shape, LOWEST))
    form = _loop if plain() or kind == torch.float64 or q.shape[1] == 1 else _halves
    y, held = form(q, k, v, state, documents)
    return y.to(dtype), held


def _both_ways(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    if documents is None:
        means = torch.einsum("bshk,bshv->bhkv", torch.softmax(k, 1), v)
        return torch.einsum("bthk,bhkv->bthv", q, means)
    top = whole_max(k.flatten(2), documents).view_as(k)
    heavy = (k - top).exp()
    slot = torch.ones_like(documents)
    slot[:, 1:] = documents[:, 1:] != documents[:, :-1]
    slot = (slot.cumsum(1) - 1)[..., None, None].expand_as(k)  # which document of the row this is
    total = torch.zeros_like(k).scatter_add(1, slot, heavy).gather(1, slot)
    return linear_attend(q / total, heavy, v, causal=False, eps=None, documents=documents)[0]


def _loop(
    q: Tensor, k: Tensor, v: Tensor, state: tuple[Tensor, Tensor], documents: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    means, level = state
    rows = []
    for t in range(q.shape[1]):
        if documents is not None and t > 0:
            level = level.masked_fill((documents[:, t] != documents[:, t - 1])[:, None, None], LOWEST)
        former, level = level, torch.logaddexp(level, k[:, t])
        fade, enter = (former - level).exp(), (k[:, t] - level).exp()
        means = fade[..., None] * means + enter[..., None] * v[:, t, :, None]
        rows.append((q[:, t, :, None] @ means).squeeze(2))
    return torch.stack(rows, 1), (means, level)


def _levels(k: Tensor, level: Tensor, documents: Tensor | None) -> Tensor:
    """L of every token, [B, T, H, K]."""
    if documents is None:
        return torch.logaddexp(torch.logcumsumexp(k, 1), level[:, None])
    found, step = torch.cat([torch.logaddexp(k[:, :1], level[:, None]), k[:, 1:]], 1), 1
    while step < k.shape[1]:  # twice as far each time, as long as it is the same document
        same = (documents[:, step:] == documents[:, :-step])[..., None, None]
        earlier = found[:, :-step].masked_fill(~same, LOWEST)
        found = torch.cat([found[:, :step], torch.logaddexp(found[:, step:], earlier)], 1)
        step *= 2
    return found


def _halves(
    q: Tensor, k: Tensor, v: Tensor, state: tuple[Tensor, Tensor], documents: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    length = q.shape[1]
    chunk = min(CHUNK, 1 << (length - 1).bit_length())
    count = -(-length // chunk)
    levels = _levels(k, state[1], documents)
    end = levels[:, -1]
    behind = count * chunk - length
    if behind:
        q, v = (F.pad(x, (0, 0, 0, 0, 0, behind)) for x in (q, v))
        k = torch.cat([k, k.new_full((1, 1, 1, 1), LOWEST).expand(k.shape[0], behind, *k.shape[2:])], 1)
        levels = torch.cat([levels, levels[:, -1:].expand(-1, behind, -1, -1)], 1)
        if documents is not None:
            documents = torch.cat([documents, documents[:, -1:].expand(-1, behind)], 1)
    q, k, v, levels = (x.unflatten(1, (count, chunk)).transpose(2, 3) for x in (q, k, v, levels))  # [B, n, H, C, ·]
    ids = None if documents is None else documents.unflatten(1, (count, chunk))[:, :, None, :, None]
    y = (q * (k - levels).exp()).sum(-1, keepdim=True) * v  # each token itself
    half = chunk // 2
    while half:
        y = y + _across(q, k, v, levels, ids, half)
        half //= 2
    means, former = state[0], state[1][:, :, None]
    doc = None if ids is None else ids[:, 0, :, :1]
    passed = []
    for i in range(count):
        last = levels[:, i, :, -1:]
        into, out, by = former - levels[:, i], k[:, i] - last, (former - last).transpose(2, 3)
        if ids is not None and doc is not None:
            final = ids[:, i, :, -1:]
            into = into.masked_fill(ids[:, i] != doc, -torch.inf)
            out = out.masked_fill(ids[:, i] != final, -torch.inf)
            by = by.masked_fill(final != doc, -torch.inf)
            doc = final
        passed.append((q[:, i] * into.exp()) @ means)
        means = by.exp() * means + out.exp().transpose(2, 3) @ v[:, i]
        former = last
    y = (y + torch.stack(passed, 1)).transpose(2, 3).flatten(1, 2)[:, :length]
    return y, (means, end)


def _across(q: Tensor, k: Tensor, v: Tensor, levels: Tensor, ids: Tensor | None, half: int) -> Tensor:
    """What the first half of each 2·half tokens gives to the second; zeros for the first."""
    shape = (q.shape[3] // (2 * half), 2, half)
    q, k, v, levels = (x.unflatten(3, shape) for x in (q, k, v, levels))
    border = levels[..., 0, -1:, :]
    out, into = k[..., 0, :, :] - border, border - levels[..., 1, :, :]
    if ids is not None:
        ids = ids.unflatten(3, shape)
        last = ids[..., 0, -1:, :]
        out = out.masked_fill(ids[..., 0, :, :] != last, -torch.inf)
        into = into.masked_fill(ids[..., 1, :, :] != last, -torch.inf)
    scores = (q[..., 1, :, :] * into.exp()) @ out.exp().transpose(-1, -2)
    second = scores @ v[..., 0, :, :]
    return torch.stack([torch.zeros_like(second), second], -3).flatten(3, 5)
