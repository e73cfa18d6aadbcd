"""Matrix state with a decay for each key feature: S ← Diag(g)·S + kᵀv, y = q S.

A pair's weight is Σ_f q_if k_jf exp(G_if − G_jf) with G the sum of log decays, which is a product of
factors exp(G_i) and exp(−G_j) only as long as neither overflows. So a chunk is halved again and again
(Yang et al. 2024, Gated Linear Attention Transformers with Hardware-Efficient Training, halve it once):
the pairs between two neighbouring halves are a product of factors that are counted from the border
between them, exp(G_i − G_border) and exp(G_border − G_j), both at most 1. What is smaller than
float32 can hold is 0 and nothing overflows. Segments and the backward pass are as in `decay`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from armillary.nn.ops import plain
from armillary.nn.ops.decay import decay_attend_plain
from armillary.nn.ops.matrix_state import Borders, Segments, product, walk

CHUNK = 64  # tokens whose pairs are formed, a power of two
SEGMENT = 512  # tokens at a time


def channel_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    state: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = q_t S_t with S_t = Diag(exp(log_decay_t))·S_{t-1} + k_tᵀ v_t, per head.

    q, k, log_decay: [B, T, H, K], the last at most 0; the rest as for `decay_attend`.
    """
    if plain() or q.dtype == torch.float64:
        return decay_attend_plain(q, k, v, log_decay, state=state, documents=documents)
    if q.shape[1] == 1:
        held = k[:, 0, :, :, None].float() * v[:, 0, :, None].float()
        if state is not None:
            held = torch.addcmul(held, log_decay[:, 0, :, :, None].float().exp(), state)
        return (q[:, 0, :, None].float() @ held).transpose(1, 2).to(v.dtype), held
    y, end, _ = _attend(q, k, v, log_decay, state, documents)
    return y.to(v.dtype), end


@dataclass(frozen=True)
class _Fades:
    """What is multiplied with a chunk's keys and queries, all at most 1.

    total: the sums of log decays in a chunk [B, n, H, C, K], float64; inward, outward [B, n, H, C, K];
    through [B, n, H, K, 1]; pairs: bool [B, n, 1, C, C], or None.
    """

    total: Tensor
    inward: Tensor
    outward: Tensor
    through: Tensor
    pairs: Tensor | None

    @staticmethod
    def of(log_decay: Tensor, borders: Borders | None) -> _Fades:
        """log_decay [B, n, H, C, K]."""
        total = log_decay.double().cumsum(3)  # differences of large sums are taken
        last = total[..., -1:, :]
        inward, outward = total.float().exp_(), (last - total).float().exp_()
        through = last.float().exp_().transpose(3, 4)
        if borders is None:
            return _Fades(total, inward, outward, through, None)
        inward = inward.mul_(borders.inward[:, :, None, :, None])
        outward = outward.mul_(borders.outward[:, :, None, :, None])
        return _Fades(total, inward, outward, through * borders.through[:, :, None, :, None], borders.pairs[:, :, None])

    def halves(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Sizes s = 1, 2, 4 … and the factors of queries in second halves and of keys in first halves of
        every 2s tokens, [B, n, H, m, s, K]."""
        size = 1
        while 2 * size <= self.total.shape[3]:
            first, second = self.total.unflatten(3, (-1, 2, size)).unbind(4)
            border = first[..., -1:, :]
            yield size, (second - border).float().exp_(), (border - first).float().exp_()
            size *= 2

    def weigh(self, q: Tensor, k: Tensor) -> Tensor:
        """The weights of a chunk's pairs [B, n, H, C, C]."""
        weights = torch.zeros(*q.shape[:4], q.shape[3], dtype=q.dtype, device=q.device)
        weights.diagonal(dim1=3, dim2=4).copy_((q * k).sum(-1))
        for size, ahead, back in self.halves():
            made = product(_half(q, size, 1) * ahead, (_half(k, size, 0) * back).transpose(4, 5))
            _corners(weights, size).copy_(made)
        return weights if self.pairs is None else weights.mul_(self.pairs)

    def weigh_backward(self, grad: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """From the gradient of the weights those of q and k."""
        if self.pairs is not None:
            grad = grad.mul_(self.pairs)
        own = grad.diagonal(dim1=3, dim2=4)[..., None]
        grad_q, grad_k = own * k, own * q
        for size, ahead, back in self.halves():
            corner = _corners(grad, size).contiguous()
            _half(grad_q, size, 1).add_(product(corner, _half(k, size, 0) * back).mul_(ahead))
            _half(grad_k, size, 0).add_(product(corner.transpose(4, 5), _half(q, size, 1) * ahead).mul_(back))
        return grad_q, grad_k


def _half(x: Tensor, size: int, which: int) -> Tensor:
    """The first or second half of every 2·size tokens, [B, n, H, m, size, W], as a view."""
    return x.unflatten(3, (-1, 2, size)).select(4, which)  # type: ignore[no-any-return]


def _corners(pairs: Tensor, size: int) -> Tensor:
    """Of pairs [B, n, H, C, C] those of second halves with first halves, [B, n, H, m, size, size], as a view."""
    cut = pairs.unflatten(4, (-1, 2, size)).unflatten(3, (-1, 2, size))  # [B, n, H, m, 2, s, m, 2, s]
    return cut[:, :, :, :, 1, :, :, 0].diagonal(dim1=3, dim2=5).movedim(-1, 3)  # type: ignore[no-any-return]


def _segments(length: int) -> Segments:
    chunk = min(CHUNK, 1 << max(0, length - 1).bit_length())
    return Segments(length, chunk, max(chunk, SEGMENT // chunk * chunk))


def _results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, keys = q.shape
    shape = (batch, heads, keys, v.shape[-1])
    y = torch.empty(v.shape, dtype=torch.float32, device=v.device)
    end = torch.empty(shape, dtype=torch.float32, device=v.device)
    held = torch.empty(len(_segments(length).bounds), *shape, dtype=torch.float32, device=v.device)
    return y, end, held


@torch.library.custom_op("armillary::channel_attend", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, documents: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y in float32, the last state, and the state before each segment."""
    work = _segments(q.shape[1])
    y, end, held = _results(q, v)
    current = torch.zeros_like(end) if state is None else state.float()
    for i, (start, stop) in enumerate(work.bounds):
        held[i] = current
        qs, ks, vs, gs = (work.heads(x, start, stop) for x in (q, k, v, log_decay))
        by = _Fades.of(gs, work.documents(documents, start, stop))
        inside = product(by.weigh(qs, ks), vs)
        added = product((ks * by.outward).transpose(3, 4), vs)
        states = walk(added, by.through, current)
        current = states[:, -1]
        mixed = inside.flatten(0, 2).baddbmm_((qs * by.inward).flatten(0, 2), states[:, :-1].flatten(0, 2))
        work.give(y, mixed.view_as(vs), start, stop)
    end.copy_(current)
    return y, end, held


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, documents: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _results(q, v)


@torch.library.custom_op("armillary::channel_attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    grad_end: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    held: Tensor,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay and the first state."""
    work = _segments(q.shape[1])
    grads = [torch.empty_like(x) for x in (q, k, v, log_decay)]
    slope = grad_end.float()  # of the state after the chunk at hand
    for i in reversed(range(len(work.bounds))):
        start, stop = work.bounds[i]
        qs, ks, vs, gs, outer = (work.heads(x, start, stop) for x in (q, k, v, log_decay, grad))
        by = _Fades.of(gs, work.documents(documents, start, stop))
        entering, leaving = ks * by.outward, qs * by.inward
        states = walk(product(entering.transpose(3, 4), vs), by.through, held[i])
        slopes = walk(product(leaving.transpose(3, 4), outer), by.through, slope, back=True)
        slope, slopes = slopes[:, 0], slopes[:, 1:]  # of the state before the segment, and after each chunk
        slope_v = product(by.weigh(qs, ks).transpose(3, 4), outer)
        slope_v = slope_v.flatten(0, 2).baddbmm_(entering.flatten(0, 2), slopes.flatten(0, 2)).view_as(vs)
        slope_q, slope_k = by.weigh_backward(product(outer, vs.transpose(3, 4)), qs, ks)
        slope_q.addcmul_(product(outer, states[:, :-1].transpose(3, 4)), by.inward)
        slope_k.addcmul_(product(vs, slopes.transpose(3, 4)), by.outward)
        # Everything that reaches token i has faded by exp(total_i − …), what leaves j by exp(… − total_j).
        total = qs * slope_q - ks * slope_k
        total[:, :, :, -1] += (states[:, 1:] * slopes).sum(-1)
        summed = total.flip(3).cumsum(3).flip(3)
        for target, found in zip(grads, (slope_q, slope_k, slope_v, summed), strict=True):
            work.give(target, found, start, stop)
    return grads[0], grads[1], grads[2], grads[3], slope.clone()


@_attend_backward.register_fake
def _(
    grad: Tensor,
    grad_end: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    held: Tensor,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    made = [torch.empty_like(x) for x in (q, k, v, log_decay, grad_end)]
    return made[0], made[1], made[2], made[3], made[4]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_decay, state, documents = inputs
    ctx.started = state is not None
    ctx.save_for_backward(q, k, v, log_decay, output[2], documents)


def _backward(ctx: Any, grad: Tensor, grad_end: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, held, documents = ctx.saved_tensors
    found = _attend_backward(grad, grad_end, q, k, v, log_decay, held, documents)
    return (*found[:4], found[4] if ctx.started else None, None)


_attend.register_autograd(_backward, setup_context=_keep)


def _products(q: Any, v: Any, keys: int, values: int, states: int) -> int:
    """FLOPs of so many products of a chunk's pairs with keys and with values, and of products with states."""
    batch, length, heads, width = q
    return int(2 * batch * length * heads * (CHUNK * (keys * width + values * v[3]) + states * width * v[3]))


@register_flop_formula(torch.ops.armillary.channel_attend)
def _flops(q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    return _products(q, v, 1, 1, 2)


@register_flop_formula(torch.ops.armillary.channel_attend_backward)
def _flops_backward(
    grad: Any, grad_end: Any, q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **_: Any
) -> int:
    return _products(q, v, 3, 2, 5)
