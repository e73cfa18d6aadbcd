"""Linear attention: y_t = q_t Σ k_sᵀ v_s / q_t Σ k_s over features q and k, shared by the kernel mixers.

The plain form is the loop over tokens of `decay`, with a column of ones beside the values for the
normaliser. The fast form takes segments of a sequence in turn and all the chunks of a segment at
once: pairs inside a chunk are a masked product, everything before it goes through the state. The
backward pass makes both again and carries the gradient of the state the other way, so that no
intermediate result outlives a segment (Katharopoulos et al. 2020, Transformers are RNNs; Yang et
al. 2023, Gated Linear Attention Transformers with Hardware-Efficient Training). It is one opaque
operator, so that compiled blocks neither unroll nor specialise it.

Features that are exponentials come divided by a running maximum, which is causal, and the state is
rescaled as it grows: see `running_max`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from armillary.nn.ops import plain
from armillary.nn.ops.decay import decay_attend_plain

CHUNK = 64  # tokens whose pairs are formed
SEGMENT = 512  # tokens at a time, a multiple of CHUNK: what is made of them stays in the cache
STEP = 4.0  # of a running maximum, in nats
LOWEST = -1e30  # the logarithm of nothing: finite, because −∞ − (−∞) is not a number


def linear_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    eps: float | None = 1e-6,
    scale: Tensor | None = None,
    state: Tensor | None = None,
    before: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Σ_s w_ts v_s / (Σ_s w_ts + eps) with w_ts = q_t·k_s, over s ≤ t or, not causal, over all s.

    q, k: features [B, T, H, K], k = 0 for a token that is not there; v: [B, S, H, V]; eps: None gives
    the numerator alone. scale: [B, T, H], causal only, never falling within a document: k_s stands
    for exp(scale_s)·k_s, and w_ts = exp(scale_s − scale_t)·q_t·k_s. state: [B, H, K, V + 1] (V without
    the normaliser) of earlier tokens, divided by exp(before), [B, H]. documents: [B, T] ids; tokens
    of different ids do not meet.

    Returns y [B, T, H, V] in v's dtype and, if causal, the state after the last token, in float32
    (float64 for float64), divided by exp(scale) of that token.
    """
    if not causal:
        return _both_ways(q, k, v, eps, documents), None
    if plain() or q.dtype == torch.float64:
        return linear_attend_plain(q, k, v, eps=eps, scale=scale, state=state, before=before, documents=documents)
    if q.shape[1] == 1:
        return _step(q, k, v, eps, scale, state, before)
    y, end, _, _ = _attend(q, k, v, scale, state, before, documents, eps or 0.0, eps is not None)
    return y, end


def linear_attend_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    eps: float | None = 1e-6,
    scale: Tensor | None = None,
    state: Tensor | None = None,
    before: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The causal recurrence itself, token by token."""
    kind = _wide(q)
    log_decay = torch.zeros(1, q.shape[1], q.shape[2], dtype=kind, device=q.device)
    if scale is not None:
        first = torch.full_like(scale[:, 0], LOWEST) if before is None else before
        log_decay = torch.cat([first[:, None], scale[:, :-1]], 1) - scale
    values = v.to(kind) if eps is None else _with_ones(v.to(kind))
    mixed, end = decay_attend_plain(q, k, values, log_decay, state=state, documents=documents)
    return _normalised(mixed, eps, v.dtype), end


def running_max(x: Tensor, before: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
    """The largest x so far, of the same document, rounded up to a multiple of STEP: x [B, T, H] → [B, T,
    H]; `before` [B, H]: of earlier chunks. In steps, it soon stands still, and then nothing has to be
    rescaled. It is a scale, which cancels, so no gradient flows through it."""
    x = ((x.detach() * (1 / STEP)).ceil() * STEP).clamp(min=LOWEST)
    if documents is None:
        top = x.cummax(1).values
    else:
        top, step = x, 1
        while step < x.shape[1]:  # twice as far each time, as long as it is the same document
            same = (documents[:, step:] == documents[:, :-step])[..., None]
            earlier = top[:, :-step].masked_fill(~same, LOWEST)
            top = torch.cat([top[:, :step], torch.maximum(top[:, step:], earlier)], 1)
            step *= 2
    return top if before is None else torch.maximum(top, before[:, None])


def whole_max(x: Tensor, documents: Tensor | None = None) -> Tensor:
    """As `running_max`, of the whole row or document: [B, 1 or T, H]."""
    if documents is None:
        return x.detach().amax(1, keepdim=True).clamp(min=LOWEST)
    return torch.maximum(running_max(x, None, documents), running_max(x.flip(1), None, documents.flip(1)).flip(1))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _with_ones(v: Tensor) -> Tensor:
    return F.pad(v, (0, 1), value=1.0)


def _normalised(mixed: Tensor, eps: float | None, dtype: torch.dtype) -> Tensor:
    return mixed.to(dtype) if eps is None else (mixed[..., :-1] / (mixed[..., -1:] + eps)).to(dtype)


def _both_ways(q: Tensor, k: Tensor, v: Tensor, eps: float | None, documents: Tensor | None) -> Tensor:
    """Every token sees every other of its document."""
    kind = _wide(q)
    wide = v.to(kind) if eps is None else _with_ones(v.to(kind))
    q, k = q.to(kind), k.to(kind)
    if documents is None:
        state = torch.einsum("bshk,bshv->bhkv", k, wide)
        mixed = torch.einsum("bthk,bhkv->bthv", q, state)
    elif plain() or kind == torch.float64:
        same = documents[:, None, :, None] == documents[:, None, None, :]
        weights = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).masked_fill(~same, 0)
        mixed = (weights @ wide.transpose(1, 2)).transpose(1, 2)
    else:
        ahead, _ = linear_attend(q, k, wide, eps=None, documents=documents)
        back, _ = linear_attend(*(x.flip(1) for x in (q, k, wide)), eps=None, documents=documents.flip(1))
        mixed = ahead + back.flip(1) - (q * k).sum(-1, keepdim=True) * wide  # the token itself came twice
    return _normalised(mixed, eps, v.dtype)


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eps: float | None,
    scale: Tensor | None,
    state: Tensor | None,
    before: Tensor | None,
) -> tuple[Tensor, Tensor]:
    values = v[:, 0].float() if eps is None else _with_ones(v[:, 0].float())
    held = k[:, 0, :, :, None].float() * values[:, :, None]
    if state is not None:
        if scale is not None and before is not None:
            state = state * (before - scale[:, 0]).exp()[..., None, None]
        held = held + state
    mixed = q[:, 0, :, None].float() @ held
    return _normalised(mixed.transpose(1, 2), eps, v.dtype), held


# -- the fast form


@dataclass(frozen=True)
class _Factors:
    """What pairs and states of a segment are multiplied by, for scales and documents; None: by 1.

    pairs [B, n, H or 1, C, C], 0 above the diagonal; inward and outward [B, n, H or 1, C, 1]: of the
    state before a chunk as its tokens see it, of its tokens as they enter the state after it;
    through [B, n, H or 1, 1, 1]: of the state across a chunk.
    """

    pairs: Tensor | None = None
    inward: Tensor | None = None
    outward: Tensor | None = None
    through: Tensor | None = None

    def mask_(self, scores: Tensor) -> Tensor:
        return scores.tril_() if self.pairs is None else scores.mul_(self.pairs)


def _factors(
    start: int, chunks: int, chunk: int, scale: Tensor | None, before: Tensor | None, documents: Tensor | None
) -> _Factors:
    scale = _moving(start, chunks * chunk, scale, before)
    if scale is None and documents is None:
        return _Factors()
    length = (scale if scale is not None else documents).shape[1]  # type: ignore[union-attr]
    where = torch.arange(start, start + chunks * chunk).clamp(max=length - 1)  # behind the end, the last token again
    allowed = torch.ones(chunk, chunk, dtype=torch.bool).tril()[None, None, None]
    inward = outward = through = None
    if documents is not None:
        ids = documents[:, where].unflatten(1, (chunks, chunk))[:, :, None]  # [B, n, 1, C]
        held = documents[:, max(0, start - 1)][:, None, None, None]
        held = torch.cat([held, ids[:, :-1, :, -1:]], 1)
        allowed = allowed & (ids[..., :, None] == ids[..., None, :])
        inward, outward, through = ids == held, ids == ids[..., -1:], ids[..., -1:] == held
    if scale is None:
        assert inward is not None and outward is not None and through is not None
        return _Factors(
            allowed.float(), inward.float()[..., None], outward.float()[..., None], through.float()[..., None]
        )
    top = scale[:, where].unflatten(1, (chunks, chunk)).permute(0, 1, 3, 2).float()  # [B, n, H, C]
    if start:
        first = scale[:, start - 1].float()
    else:
        first = torch.full_like(scale[:, 0], LOWEST, dtype=torch.float32) if before is None else before.float()
    last = top[..., -1:]
    former = torch.cat([first[:, None, :, None], last[:, :-1]], 1)
    # Forbidden pairs are set before the exponential: above the diagonal it would overflow.
    pairs = (top[..., None, :] - top[..., :, None]).masked_fill_(~allowed, -torch.inf).exp_()
    enter, leave, pass_by = former - top, top - last, former - last
    if inward is not None and outward is not None and through is not None:
        enter, leave = enter.masked_fill(~inward, -torch.inf), leave.masked_fill(~outward, -torch.inf)
        pass_by = pass_by.masked_fill(~through, -torch.inf)
    return _Factors(pairs, enter.exp()[..., None], leave.exp()[..., None], pass_by.exp()[..., None])


def _moving(start: int, length: int, scale: Tensor | None, before: Tensor | None) -> Tensor | None:
    """The scale, or None where it stands still and all factors are 1: a maximum soon does."""
    if scale is None or scale.device.type != "cpu" or (start == 0 and before is None):
        return scale
    first = scale[:, start - 1] if start else before
    assert first is not None
    # all of them: the maximum of a new document may fall and come back
    return None if bool((scale[:, start : start + length] == first[:, None]).all()) else scale


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


class _Segments:
    """The chunks of one call, a segment at a time, as contiguous [B, n, H, C, …] in float32."""

    def __init__(self, q: Tensor, v: Tensor, normal: bool) -> None:
        self.batch, self.length, self.heads, self.keys = q.shape
        self.values, self.normal = v.shape[-1], normal
        self.columns = self.values + normal
        self.chunk = min(CHUNK, self.length)
        step = max(self.chunk, SEGMENT // self.chunk * self.chunk)
        self.bounds = [(start, min(self.length, start + step)) for start in range(0, self.length, step)]

    def chunks(self, start: int, stop: int) -> int:
        return -(-(stop - start) // self.chunk)

    def take(self, x: Tensor, start: int, stop: int, ones: bool = False) -> Tensor:
        """[B, T, H, W] → [B, n, H, C, W], zeros behind the end, and with a last column of ones if asked."""
        count, width = self.chunks(start, stop), x.shape[-1]
        made = torch.empty(
            self.batch, count, self.heads, self.chunk, width + ones, dtype=torch.float32, device=x.device
        )
        part = x[:, start:stop]
        if stop - start < count * self.chunk:
            part = F.pad(part, (0, 0, 0, 0, 0, count * self.chunk - (stop - start)))
        made[..., :width].copy_(part.unflatten(1, (count, self.chunk)).transpose(2, 3))
        if ones:
            made[..., width] = 1.0
        return made

    def give(self, target: Tensor, x: Tensor, start: int, stop: int) -> None:
        """[B, n, H, C, W] into [B, T, H, W]."""
        count = x.shape[1]
        if stop - start == count * self.chunk:
            target[:, start:stop].unflatten(1, (count, self.chunk)).copy_(x.transpose(2, 3))
        else:
            target[:, start:stop] = x.transpose(2, 3).flatten(1, 2)[:, : stop - start]

    def states(self, k: Tensor, v: Tensor, by: _Factors, state: Tensor) -> tuple[Tensor, Tensor]:
        """The state before each chunk [B, n, H, K, V], and the one after the last [B, H, K, V]."""
        added = _product(_times(k, by.outward).transpose(3, 4), v)
        return _scan(added, by.through, state)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """[B, n, H, i, j] by [B, n, H, j, k], as one product of three axes."""
    made: Tensor = torch.bmm(a.flatten(0, 2), b.flatten(0, 2)).unflatten(0, a.shape[:3])
    return made


def _scan(added: Tensor, through: Tensor | None, state: Tensor, back: bool = False) -> tuple[Tensor, Tensor]:
    """state ← through·state + added, chunk by chunk: the one before each chunk, and the last."""
    order = list(range(added.shape[1]))
    order = order[::-1] if back else order
    held = torch.empty_like(added)
    held[:, order[0]] = state
    last = torch.empty_like(state)
    for i, following in zip(order, [*order[1:], None], strict=True):
        out = last if following is None else held[:, following]
        if through is None:
            torch.add(held[:, i], added[:, i], out=out)
        else:
            torch.addcmul(added[:, i], held[:, i], through[:, i], out=out)
    return held, last


@torch.library.custom_op("armillary::linear_attend", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    state: Tensor | None,
    before: Tensor | None,
    documents: Tensor | None,
    eps: float,
    normal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the last state, the normalisers [B, T, H] and the state before each segment."""
    work = _Segments(q, v, normal)
    y, end, norm, held = _results(q, v, normal, work)
    current = torch.zeros_like(end) if state is None else state.float()
    for i, (start, stop) in enumerate(work.bounds):
        held[i] = current
        by = _factors(start, work.chunks(start, stop), work.chunk, scale, before, documents)
        qs, ks, vs = work.take(q, start, stop), work.take(k, start, stop), work.take(v, start, stop, normal)
        scores = by.mask_(_product(qs, ks.transpose(3, 4)))
        states, current = work.states(ks, vs, by, current)
        earlier = qs if by.inward is None else qs.mul_(by.inward)
        mixed = torch.baddbmm(
            _product(earlier, states).flatten(0, 2), scores.flatten(0, 2), vs.flatten(0, 2)
        ).unflatten(0, qs.shape[:3])
        if normal:
            total = mixed[..., -1:] + eps
            work.give(norm[..., None], total, start, stop)
            mixed = mixed[..., :-1].div_(total)
        work.give(y, mixed, start, stop)
    end.copy_(current)
    return y, end, norm, held


def _results(q: Tensor, v: Tensor, normal: bool, work: _Segments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (work.batch, work.heads, work.keys, work.columns)
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    end = torch.empty(shape, dtype=torch.float32, device=q.device)
    norm = torch.empty(q.shape[:3] if normal else (0,), dtype=torch.float32, device=q.device)
    held = torch.empty(len(work.bounds), *shape, dtype=torch.float32, device=q.device)
    return y, end, norm, held


@_attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    state: Tensor | None,
    before: Tensor | None,
    documents: Tensor | None,
    eps: float,
    normal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _results(q, v, normal, _Segments(q, v, normal))


@torch.library.custom_op("armillary::linear_attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    grad_end: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    norm: Tensor,
    held: Tensor,
    scale: Tensor | None,
    before: Tensor | None,
    documents: Tensor | None,
    normal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    work = _Segments(q, v, normal)
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    slope = grad_end.float()  # of the state after the chunk at hand
    for i in reversed(range(len(work.bounds))):
        start, stop = work.bounds[i]
        by = _factors(start, work.chunks(start, stop), work.chunk, scale, before, documents)
        qs, ks, vs = work.take(q, start, stop), work.take(k, start, stop), work.take(v, start, stop, normal)
        outer = work.take(grad, start, stop, normal)
        if normal:  # y = n / d: the slopes of n, and of d in the last column
            total = work.take(norm[..., None], start, stop)
            total = total.masked_fill_(total == 0, 1)  # behind the end
            inner = outer[..., :-1]
            outer[..., -1] = -(inner * work.take(y, start, stop)).sum(-1)
            outer.div_(total)
        states, _ = work.states(ks, vs, by, held[i])
        slopes, slope = _scan(_product(_times(qs, by.inward).transpose(3, 4), outer), by.through, slope, back=True)
        scores = by.mask_(_product(qs, ks.transpose(3, 4)))
        inner_v = _product(scores.transpose(3, 4), outer[..., : work.values])
        past = _product(ks, slopes[..., : work.values])
        work.give(grad_v, inner_v.add_(past if by.outward is None else past.mul_(by.outward)), start, stop)
        del scores, inner_v, past
        pairs = by.mask_(_product(outer, vs.transpose(3, 4)))
        past = _product(outer, states.transpose(3, 4))
        past = past if by.inward is None else past.mul_(by.inward)
        work.give(grad_q, past.flatten(0, 2).baddbmm_(pairs.flatten(0, 2), ks.flatten(0, 2)).view_as(qs), start, stop)
        past = _product(vs, slopes.transpose(3, 4))
        past = past if by.outward is None else past.mul_(by.outward)
        back = pairs.transpose(3, 4).flatten(0, 2)
        work.give(grad_k, past.flatten(0, 2).baddbmm_(back, qs.flatten(0, 2)).view_as(ks), start, stop)
    return grad_q, grad_k, grad_v, slope.clone()


@_attend_backward.register_fake
def _(
    grad: Tensor,
    grad_end: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    norm: Tensor,
    held: Tensor,
    scale: Tensor | None,
    before: Tensor | None,
    documents: Tensor | None,
    normal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(grad_end)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, scale, state, before, documents, _, ctx.normal = inputs
    ctx.started = state is not None
    y, _, norm, held = output
    ctx.save_for_backward(q, k, v, y, norm, held, scale, before, documents)


def _backward(ctx: Any, grad: Tensor, grad_end: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, y, norm, held, scale, before, documents = ctx.saved_tensors
    slopes = _attend_backward(grad, grad_end, q, k, v, y, norm, held, scale, before, documents, ctx.normal)
    return (*slopes[:3], None, slopes[3] if ctx.started else None, None, None, None, None)


_attend.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.armillary.linear_attend)
def _flops(q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    batch, length, heads, keys = q
    return int(2 * batch * length * heads * (CHUNK * (keys + v[-1]) + 2 * keys * v[-1]))


@register_flop_formula(torch.ops.armillary.linear_attend_backward)
def _flops_backward(
    grad: Any, grad_end: Any, q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **_: Any
) -> int:
    batch, length, heads, keys = q
    return int(2 * batch * length * heads * (CHUNK * (3 * keys + 2 * v[-1]) + 5 * keys * v[-1]))
