"""Matrix state with decay and the delta rule: S ← g·S + kᵀ β (v − k g S), y = q S.

A token writes the difference between its value and what the state holds for its key. Inside a chunk
these differences depend on one another: with Γ the sum of log decays they are the solution u of the
triangular system (I + A) u = β (v − exp(Γ) k S), A_ij = β_i k_i·k_j exp(Γ_i − Γ_j) for j < i, after
which the chunk is like one of `decay` whose values are u (Yang et al. 2024, Parallelizing Linear
Transformers with the Delta Rule over Sequence Length; Yang, Kautz & Hatamizadeh 2024, Gated Delta
Networks). The inverses of a segment's chunks are made at once; segments and the backward pass are as
in `decay`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from armillary.nn.ops import plain
from armillary.nn.ops.matrix_state import Decays, Segments, product

CHUNK = 64  # tokens whose pairs are formed
SEGMENT = 512  # tokens at a time


def delta_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = q_t S_t, S_t = g_t S_{t-1} + k_tᵀ β_t (v_t − k_t g_t S_{t-1}) with g = exp(log_decay), per head.

    q, k: [B, T, H, K], keys of length at most 1; log_decay, beta: [B, T, H], at most 0, and from 0 to
    2 so that nothing grows; 0 and 0 leave the state as it is. The rest as for `decay_attend`.
    """
    if plain() or q.dtype == torch.float64 or q.shape[1] == 1:
        return delta_attend_plain(q, k, v, log_decay, beta, state=state, documents=documents)
    y, end, _ = _attend(q, k, v, log_decay, beta, state, documents)
    return y.to(v.dtype), end


def delta_attend_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence itself, token by token."""
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, length, heads, width = q.shape
    shape = (batch, heads, width, v.shape[-1])
    held = torch.zeros(shape, dtype=kind, device=q.device) if state is None else state.to(kind)
    q, k, values = (x.to(kind)[:, :, :, None] for x in (q, k, v))
    decay, beta = log_decay.to(kind).exp()[..., None, None], beta.to(kind)[..., None, None]
    outputs = []
    for t in range(length):
        factor = decay[:, t]
        if documents is not None and t > 0:
            factor = factor * (documents[:, t] == documents[:, t - 1]).to(kind)[:, None, None, None]
        held = factor * held
        written = beta[:, t] * (values[:, t] - k[:, t] @ held)
        held = held + k[:, t].transpose(2, 3) * written
        outputs.append((q[:, t] @ held).squeeze(2))
    return torch.stack(outputs, 1).to(v.dtype), held


@dataclass(frozen=True)
class _Part:
    """A segment, all but what depends on the state: [B, n, H, C, …] in float32.

    alone: k_i·k_j below the diagonal; inverse: of I + A; scores: q_i·k_j; weights: those, faded.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    by: Decays
    alone: Tensor
    inverse: Tensor
    scores: Tensor
    weights: Tensor

    @staticmethod
    def of(
        work: Segments,
        start: int,
        stop: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        beta: Tensor,
        documents: Tensor | None,
    ) -> _Part:
        qs, ks, vs = (work.heads(x, start, stop) for x in (q, k, v))
        rates = work.take(beta, start, stop).transpose(2, 3).float()[..., None]
        by = Decays.of(work.take(log_decay, start, stop), work.documents(documents, start, stop))
        alone = product(ks, ks.transpose(3, 4)).tril_(-1)
        system = alone * by.pairs * rates
        system.diagonal(dim1=3, dim2=4).fill_(1.0)
        unit = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
        inverse = torch.linalg.solve_triangular(system, unit.expand_as(system), upper=False, unitriangular=True)
        scores = product(qs, ks.transpose(3, 4))
        return _Part(qs, ks, vs, rates, by, alone, inverse, scores, scores * by.pairs)

    def walk(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """What is written u [B, n, H, C, V], and the states before, between and after the chunks [B, n + 1, H,
        K, V]."""
        entering, leaving = self.k * self.by.inward[..., None], self.k * self.by.outward[..., None]
        fixed = product(self.inverse, self.v * self.beta)
        seen = product(self.inverse, entering * self.beta)
        written = torch.empty_like(self.v)
        batch, count, heads, _, width = self.k.shape
        shape = (batch, count + 1, heads, width, self.v.shape[4])
        states = torch.empty(shape, dtype=torch.float32, device=self.k.device)
        states[:, 0] = state
        for i in range(count):
            torch.sub(fixed[:, i], seen[:, i] @ states[:, i], out=written[:, i])
            added = leaving[:, i].transpose(2, 3) @ written[:, i]
            torch.addcmul(added, states[:, i], self.by.through[:, i, :, :, None], out=states[:, i + 1])
        return written, states


def _results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, keys = q.shape
    shape = (batch, heads, keys, v.shape[-1])
    y = torch.empty(v.shape, dtype=torch.float32, device=v.device)
    end = torch.empty(shape, dtype=torch.float32, device=v.device)
    parts = len(Segments.of(length, CHUNK, SEGMENT).bounds)
    return y, end, torch.empty(parts, *shape, dtype=torch.float32, device=v.device)


@torch.library.custom_op("armillary::delta_attend", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor | None,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y in float32, the last state, and the state before each segment."""
    work = Segments.of(q.shape[1], CHUNK, SEGMENT)
    y, end, held = _results(q, v)
    current = torch.zeros_like(end) if state is None else state.float()
    for i, (start, stop) in enumerate(work.bounds):
        held[i] = current
        part = _Part.of(work, start, stop, q, k, v, log_decay, beta, documents)
        written, states = part.walk(current)
        current = states[:, -1]
        mixed = product(part.q * part.by.inward[..., None], states[:, :-1]).flatten(0, 2)
        mixed = mixed.baddbmm_(part.weights.flatten(0, 2), written.flatten(0, 2)).view_as(written)
        work.give(y, mixed, start, stop)
    end.copy_(current)
    return y, end, held


@_attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor | None,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _results(q, v)


@torch.library.custom_op("armillary::delta_attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    grad_end: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    held: Tensor,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay, beta and the first state."""
    work = Segments.of(q.shape[1], CHUNK, SEGMENT)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    rates = [torch.empty(x.shape, dtype=torch.float32, device=q.device) for x in (log_decay, beta)]
    slope = grad_end.float()  # of the state after the chunk at hand
    for i in reversed(range(len(work.bounds))):
        start, stop = work.bounds[i]
        part = _Part.of(work, start, stop, q, k, v, log_decay, beta, documents)
        by, ks, qs = part.by, part.k, part.q
        written, states = part.walk(held[i])
        states, after = states[:, :-1], states[:, 1:]
        outer = work.heads(grad, start, stop)
        inward, outward = by.inward[..., None], by.outward[..., None]
        entering, leaving = ks * inward, ks * outward
        seen = product(part.inverse, entering * part.beta)  # what a chunk's writing takes from the state before it
        pulled = product((qs * inward).transpose(3, 4), outer)
        near = product(part.weights.transpose(3, 4), outer)
        slopes = torch.empty_like(states)  # of the state after each chunk
        slope_u = torch.empty_like(written)
        for c in reversed(range(slopes.shape[1])):
            slopes[:, c] = slope
            torch.add(near[:, c], leaving[:, c] @ slope, out=slope_u[:, c])
            faded = slope * by.through[:, c, :, :, None]
            slope = faded.add_(pulled[:, c]).sub_(seen[:, c].transpose(2, 3) @ slope_u[:, c])

        slope_r = product(part.inverse.transpose(3, 4), slope_u)  # of β (v − exp(Γ) k S)
        slope_a = product(slope_r, written.transpose(3, 4)).neg_().tril_(-1)
        slope_s = product(outer, written.transpose(3, 4))
        remembered = product(entering, states)
        slope_v = slope_r * part.beta
        past = product(slope_v, states.transpose(3, 4)).mul_(inward)
        kept = product(written, slopes.transpose(3, 4)).mul_(outward)
        ahead = product(outer, states.transpose(3, 4)).mul_(inward)

        fading_a, fading_s = slope_a * by.pairs, slope_s * by.pairs
        system = fading_a * part.alone
        slope_beta = (slope_r * (part.v - remembered)).sum(-1) + system.sum(-1)
        both = fading_a.mul_(part.beta)
        slope_q = ahead.flatten(0, 2).baddbmm(fading_s.flatten(0, 2), ks.flatten(0, 2)).view_as(qs)
        slope_k = product(both, ks) + product(both.transpose(3, 4), ks) + product(fading_s.transpose(3, 4), qs)
        slope_k += kept - past

        # How each pair and each state's share would change with the sums of log decays between them.
        pairs = system.mul_(part.beta).add_(fading_s.mul_(part.scores))
        total = pairs.sum(-1) - pairs.sum(-2)
        total += (ahead * qs - past * ks - kept * ks).sum(-1)
        total[..., -1] += (after * slopes).sum((-2, -1))
        summed = total.flip(3).cumsum(3).flip(3)
        for target, found in zip(grads, (slope_q, slope_k, slope_v), strict=True):
            work.give(target, found, start, stop)
        for target, found in zip(rates, (summed, slope_beta), strict=True):
            work.give(target[..., None], found[..., None], start, stop)
    return grads[0], grads[1], grads[2], rates[0], rates[1], slope.clone()


@_attend_backward.register_fake
def _(
    grad: Tensor,
    grad_end: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    held: Tensor,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    made = [torch.empty_like(x) for x in (q, k, v, grad_end)]
    rates = [torch.empty(x.shape, dtype=torch.float32, device=q.device) for x in (log_decay, beta)]
    return made[0], made[1], made[2], rates[0], rates[1], made[3]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_decay, beta, state, documents = inputs
    ctx.started = state is not None
    ctx.save_for_backward(q, k, v, log_decay, beta, output[2], documents)


def _backward(ctx: Any, grad: Tensor, grad_end: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, beta, held, documents = ctx.saved_tensors
    found = _attend_backward(grad, grad_end, q, k, v, log_decay, beta, held, documents)
    rates = found[3].to(log_decay.dtype), found[4].to(beta.dtype)
    return (*found[:3], *rates, found[5] if ctx.started else None, None)


_attend.register_autograd(_backward, setup_context=_keep)


def _products(q: Any, v: Any, keys: int, values: int, states: int) -> int:
    """FLOPs of so many products of a chunk's pairs with keys and with values, and of products with states."""
    batch, length, heads, width = q
    inside = keys * width + values * v[3] + CHUNK / 3  # and the inverse
    return int(2 * batch * length * heads * (CHUNK * inside + states * width * v[3]))


@register_flop_formula(torch.ops.armillary.delta_attend)
def _flops(q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    return _products(q, v, 3, 2, 3)


@register_flop_formula(torch.ops.armillary.delta_attend_backward)
def _flops_backward(
    grad: Any, grad_end: Any, q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **_: Any
) -> int:
    return _products(q, v, 7, 5, 9)
