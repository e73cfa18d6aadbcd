"""Matrix state with decay: S ← g·S + kᵀv, y = q S, shared by every recurrent mixer of that kind.

The plain form is the loop over tokens. The fast form works in chunks, inside which it is a product
with a lower-triangular decay, and makes everything again in the backward pass, so that memory holds
inputs, outputs and one state per segment (Sun et al. 2023, Retentive Network; Yang et al. 2023,
Gated Linear Attention Transformers with Hardware-Efficient Training; Dao & Gu 2024, Transformers are
SSMs). It is one opaque operator, so that compiled blocks neither unroll nor specialise it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from armillary.native.decay import dots
from armillary.nn.ops import plain
from armillary.nn.ops.matrix_state import Decays, Segments, product, walk

CHUNK = 64  # tokens whose pairs are formed
SEGMENT = 512  # tokens at a time


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

    q, k: [B, T, G, K], each serving H / G heads next to each other; v: [B, T, H, V]; log_decay: [B or
    1, T, H], at most 0, 0 together with k = 0 leaves the state as it is; state: [B, H, K, V] before
    the first token, None = zeros; documents: [B, T] ids, a new id starts from an empty state. Returns
    y [B, T, H, V] in v's dtype and the state after the last token in float32 (float64 for float64).
    """
    if plain() or q.dtype == torch.float64:
        return decay_attend_plain(q, k, v, log_decay, state=state, documents=documents)
    if q.shape[1] == 1:
        return _step(q, k, v, log_decay, state)
    log_decay = log_decay.expand(v.shape[0], -1, -1)
    y, end, _ = _attend(q, k, v, log_decay, state, documents)
    return y.to(v.dtype), end


def decay_attend_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    state: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence itself, token by token; log_decay may be one per key feature, [B or 1, T, H, K]."""
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, length, heads, width = v.shape
    q, k = (x.repeat_interleave(heads // x.shape[2], 2).to(kind) for x in (q, k))
    shape = (batch, heads, q.shape[3], width)
    held = torch.zeros(shape, dtype=kind, device=q.device) if state is None else state.to(kind)
    decay = log_decay.to(kind).exp()
    decay = decay.expand(batch, *decay.shape[1:])
    decay = decay[..., None] if decay.dim() == 4 else decay[..., None, None]
    outputs = []
    for t in range(length):
        factor = decay[:, t]
        if documents is not None and t > 0:
            factor = factor * (documents[:, t] == documents[:, t - 1]).to(kind)[:, None, None, None]
        held = factor * held + k[:, t, :, :, None] * v[:, t, :, None, :].to(kind)
        outputs.append((q[:, t, :, None] @ held).squeeze(2))
    return torch.stack(outputs, 1).to(v.dtype), held


def _step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    groups, heads = q.shape[2], v.shape[2]
    q, k = (x[:, 0, :, None].float() for x in (q, k))  # [B, G, 1, K]
    held = k[..., None] * v[:, 0, :, None].float().unflatten(1, (groups, -1))  # [B, G, R, K, V]
    if state is not None:
        factor = log_decay[:, 0, :, None, None].float().exp()
        held = torch.addcmul(held, factor.unflatten(1, (groups, -1)), state.unflatten(1, (groups, -1)))
    y = q[..., None, :] @ held
    return y.view(len(v), 1, heads, -1).to(v.dtype), held.flatten(1, 2)


class _Work:
    """The chunks of one call. With R heads to a group, values are worked on as [B, n, G, C, R, V], so that
    products with keys and states are one for all heads of a group."""

    def __init__(self, q: Tensor, v: Tensor) -> None:
        self.batch, length, self.heads, self.values = v.shape
        self.groups, self.keys = q.shape[2:]
        self.each = self.heads // self.groups
        self.segments = Segments.of(length, CHUNK, SEGMENT)
        self.bounds = self.segments.bounds

    def take(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Values [B, T, H, V] → [B, n, G, C, R, V]."""
        return self.segments.heads(x.unflatten(2, (self.groups, self.each)).flatten(3), start, stop).unflatten(  # type: ignore[no-any-return]
            -1, (self.each, -1)
        )

    def give(self, target: Tensor, x: Tensor, start: int, stop: int) -> None:
        self.segments.give(target.unflatten(2, (self.groups, self.each)).flatten(3), x.flatten(4), start, stop)

    def decays(self, log_decay: Tensor, documents: Tensor | None, start: int, stop: int) -> Decays:
        borders = self.segments.documents(documents, start, stop)
        return Decays.of(self.segments.take(log_decay, start, stop), borders)

    def wide(self, factor: Tensor) -> Tensor:
        """[B, n, H, C] → [B, n, G, C, R, 1], as values have it."""
        return factor.unflatten(2, (self.groups, self.each)).transpose(3, 4)[..., None]  # type: ignore[no-any-return]

    def by_head(self, x: Tensor) -> Tensor:
        """[B, n, G, C, R, V] → [B, n, H, C, V]."""
        return x.transpose(3, 4).reshape(*x.shape[:2], self.heads, x.shape[3], -1)

    def by_group(self, x: Tensor) -> Tensor:
        """The way back, as a view."""
        return x.unflatten(2, (self.groups, self.each)).transpose(3, 4)  # type: ignore[no-any-return]

    def inner(self, state: Tensor) -> Tensor:
        """A state [B, H, K, V] as it is worked on, [B, G, K, R, V]."""
        return state.float().unflatten(1, (self.groups, self.each)).transpose(2, 3).contiguous()  # type: ignore[no-any-return]

    def outer(self, state: Tensor) -> Tensor:
        return state.transpose(2, 3).flatten(1, 2).contiguous()

    def weigh(self, pairs: Tensor, by_group: Tensor) -> Tensor:
        """pairs [B, n, H, C, C] times [B, n, G, C, C], in place."""
        pairs.unflatten(2, (self.groups, self.each)).mul_(by_group[:, :, :, None])
        return pairs

    def results(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.empty(v.shape, dtype=torch.float32, device=v.device)
        end = torch.empty(self.batch, self.heads, self.keys, self.values, dtype=torch.float32, device=v.device)
        shape = (len(self.bounds), self.batch, self.groups, self.keys, self.each, self.values)
        return y, end, torch.empty(shape, dtype=torch.float32, device=v.device)


@torch.library.custom_op("armillary::decay_attend", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, documents: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y in float32, the last state, and the state before each segment."""
    work = _Work(q, v)
    y, end, held = work.results(v)
    current = torch.zeros_like(held[0]) if state is None else work.inner(state)
    for i, (start, stop) in enumerate(work.bounds):
        held[i] = current
        by = work.decays(log_decay, documents, start, stop)
        qs, ks = work.segments.heads(q, start, stop), work.segments.heads(k, start, stop)
        vs = work.take(v, start, stop)
        weights = work.weigh(by.pairs, product(qs, ks.transpose(3, 4)))
        inside = work.by_group(product(weights, work.by_head(vs)))
        added = product(ks.transpose(3, 4), (vs * work.wide(by.outward)).flatten(4))
        states = walk(added.unflatten(-1, (work.each, -1)), work.wide(by.through), current)
        current = states[:, -1]
        mixed = product(qs, states[:, :-1].flatten(4)).unflatten(-1, (work.each, -1))
        work.give(y, torch.addcmul(inside, mixed, work.wide(by.inward)), start, stop)
    end.copy_(work.outer(current))
    return y, end, held


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, documents: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _Work(q, v).results(v)


@torch.library.custom_op("armillary::decay_attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    grad_end: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    y: Tensor,
    held: Tensor,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay and the first state."""
    work = _Work(q, v)
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    rates = torch.empty(log_decay.shape, dtype=torch.float32, device=q.device)
    slope = work.inner(grad_end)  # of the state after the chunk at hand
    for i in reversed(range(len(work.bounds))):
        start, stop = work.bounds[i]
        by = work.decays(log_decay, documents, start, stop)
        qs, ks = work.segments.heads(q, start, stop), work.segments.heads(k, start, stop)
        vs, outer = work.take(v, start, stop), work.take(grad, start, stop)
        through = work.wide(by.through)
        entering = (vs * work.wide(by.outward)).flatten(4)
        added = product(ks.transpose(3, 4), entering).unflatten(-1, (work.each, -1))
        states = walk(added, through, held[i])
        leaving = (outer * work.wide(by.inward)).flatten(4)
        pulled = product(qs.transpose(3, 4), leaving).unflatten(-1, (work.each, -1))
        slopes = walk(pulled, through, slope, back=True)
        slope, slopes = slopes[:, 0], slopes[:, 1:]  # of the state before the segment, and after each chunk

        heads, pairs = work.by_head(outer), by.pairs
        scores = product(qs, ks.transpose(3, 4))
        inner = product(heads, work.by_head(vs).transpose(3, 4)).mul_(pairs)
        inner = inner.unflatten(2, (work.groups, -1)).sum(3)  # [B, n, G, C, C], of the scores
        work.weigh(pairs, scores)
        slope_v = product(ks, slopes.flatten(4)).unflatten(-1, (work.each, -1))
        slope_v = torch.addcmul(work.by_group(product(pairs.transpose(3, 4), heads)), slope_v, work.wide(by.outward))
        work.give(grad_v, slope_v, start, stop)
        past = product(leaving, states[:, :-1].flatten(4).transpose(3, 4))
        slope_q = past.flatten(0, 2).baddbmm_(inner.flatten(0, 2), ks.flatten(0, 2)).view_as(qs)
        work.segments.give(grad_q, slope_q, start, stop)
        past = product(entering, slopes.flatten(4).transpose(3, 4))
        back = inner.transpose(3, 4).flatten(0, 2)
        slope_k = past.flatten(0, 2).baddbmm_(back, qs.flatten(0, 2)).view_as(ks)
        work.segments.give(grad_k, slope_k, start, stop)

        # Everything that reaches token i has faded by exp(total_i − …), what leaves j by exp(… − total_j).
        total = dots(work.take(y, start, stop), outer).sub_(dots(vs, slope_v))  # [B, n, G, C, R]
        total[:, :, :, -1] += dots(states[:, 1:], slopes).sum(3)
        summed = total.flip(3).cumsum(3).flip(3)
        work.segments.give(rates.unflatten(2, (work.groups, -1)), summed, start, stop)
    return grad_q, grad_k, grad_v, rates, work.outer(slope)


@_attend_backward.register_fake
def _(
    grad: Tensor,
    grad_end: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    y: Tensor,
    held: Tensor,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    made = (torch.empty_like(x) for x in (q, k, v))
    rates = torch.empty(log_decay.shape, dtype=torch.float32, device=q.device)
    return (*made, rates, torch.empty_like(grad_end))  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_decay, state, documents = inputs
    ctx.started = state is not None
    y, _, held = output
    ctx.save_for_backward(q, k, v, log_decay, y, held, documents)


def _backward(ctx: Any, grad: Tensor, grad_end: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, y, held, documents = ctx.saved_tensors
    found = _attend_backward(grad, grad_end, q, k, v, log_decay, y, held, documents)
    return (*found[:3], found[3].to(log_decay.dtype), found[4] if ctx.started else None, None)


_attend.register_autograd(_backward, setup_context=_keep)


def _products(q: Any, v: Any, pairs: int, states: int) -> int:
    """FLOPs of so many products with a chunk's pairs and with states."""
    batch, length, groups, keys = q
    inside = groups * keys + v[2] * v[3]
    return int(2 * batch * length * (CHUNK * pairs * inside + states * keys * v[2] * v[3]))


@register_flop_formula(torch.ops.armillary.decay_attend)
def _flops(q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    return _products(q, v, 1, 2)


@register_flop_formula(torch.ops.armillary.decay_attend_backward)
def _flops_backward(
    grad: Any, grad_end: Any, q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **_: Any
) -> int:
    return _products(q, v, 2, 5)
