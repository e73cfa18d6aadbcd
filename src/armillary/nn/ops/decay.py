"""Matrix state with decay: S ← g·S + kᵀv, y = q S, shared by every recurrent mixer of that kind.

The plain form is the loop over tokens; the fast form works in chunks, inside which it is a product
with a lower-triangular decay (Sun et al. 2023, Retentive Network; Yang et al. 2023, Gated Linear
Attention Transformers with Hardware-Efficient Training).
"""

from __future__ import annotations

import torch
from torch import Tensor

from armillary.nn.ops import plain

CHUNK = 64


def decay_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    state: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = q_t S_t with S_t = exp(log_decay_t)·S_{t-1} + k_tᵀ v_t, per head.

    q, k: [B, T, H, K]; v: [B, T, H, V]; log_decay: [B or 1, T, H], at most 0, 0 together with k = 0
    leaves the state as it is; state: [B, H, K, V] before the first token, None = zeros; documents:
    [B, T] ids, a new id starts from an empty state. Returns y [B, T, H, V] in v's dtype and the
    state after the last token in float32 (float64 for float64).
    """
    if plain() or q.dtype == torch.float64:
        return decay_attend_plain(q, k, v, log_decay, state=state, documents=documents)
    batch, length, heads, width = q.shape
    if length == 1 and documents is None:
        return _step(q, k, v, log_decay, state)
    if state is None:
        state = torch.zeros(batch, heads, width, v.shape[-1], dtype=torch.float32, device=q.device)
    log_decay = log_decay.expand(batch, -1, -1).float()
    pieces = []
    last = None if documents is None else documents[:, 0]  # the document that the carried state belongs to
    # split, not slices: the backward pass of a slice fills a tensor of the whole length
    parts = [x.split(CHUNK, 1) for x in (q, k, v, log_decay)]
    ids = [None] * len(parts[0]) if documents is None else documents.split(CHUNK, 1)
    for q_part, k_part, v_part, decay_part, id_part in zip(*parts, ids, strict=True):
        y, state = _chunk(q_part, k_part, v_part, decay_part, state, id_part, last)
        last = None if id_part is None else id_part[:, -1]
        pieces.append(y)
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)), state


def decay_attend_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    state: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence itself, token by token."""
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, length, heads, width = q.shape
    held = (
        torch.zeros(batch, heads, width, v.shape[-1], dtype=kind, device=q.device) if state is None else state.to(kind)
    )
    decay = log_decay.expand(batch, -1, -1).to(kind).exp()
    outputs = []
    for t in range(length):
        factor = decay[:, t, :, None, None]
        if documents is not None and t > 0:
            factor = factor * (documents[:, t] == documents[:, t - 1]).to(kind)[:, None, None, None]
        held = factor * held + k[:, t, :, :, None].to(kind) * v[:, t, :, None, :].to(kind)
        outputs.append((q[:, t, :, None].to(kind) @ held).squeeze(2))
    return torch.stack(outputs, 1).to(v.dtype), held


def _step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    added = k[:, 0, :, :, None].float() * v[:, 0, :, None, :].float()
    held = added if state is None else log_decay[:, 0, :, None, None].float().exp() * state + added
    y = q[:, 0, :, None].float() @ held
    return y.transpose(1, 2).to(v.dtype), held


def _chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    documents: Tensor | None,
    last: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One chunk: pairs inside it by a masked product, everything before it through the state."""
    q, k, v_heads = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    total = log_decay.cumsum(1).transpose(1, 2)  # [B, H, C]
    length = total.shape[-1]
    tril = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    allowed = tril[None, None]
    inward = total.exp()
    outward = (total[..., -1:] - total).exp()
    through = total[..., -1].exp()
    if documents is not None:
        allowed = allowed & (documents[:, None, :, None] == documents[:, None, None, :])
        outward = outward * (documents == documents[:, -1:])[:, None]
        if last is not None:
            inward = inward * (documents == last[:, None])[:, None]
            through = through * (documents[:, -1] == last)[:, None]
    # Forbidden pairs are set before the exponential: above the diagonal it would overflow.
    pairs = (total[..., :, None] - total[..., None, :]).masked_fill(~allowed, -torch.inf).exp()
    scores = (q @ k.transpose(2, 3)).float() * pairs
    y = (scores.to(v.dtype) @ v_heads).float() + (q.float() * inward[..., None]) @ state
    state = through[..., None, None] * state + (k.float() * outward[..., None]).transpose(2, 3) @ v_heads.float()
    return y.transpose(1, 2).to(v.dtype), state
