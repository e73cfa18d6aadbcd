"""The diagonal selective scan: per channel a few states that decay, take in and are read as the input says.

    δ = softplus(dt + bias),  h[n] ← exp(δ·a[n])·h[n] + δ·u·b[n],  y = Σ_n c[n]·h[n] + d·u

(Gu & Dao 2023, Mamba: Linear-Time Sequence Modeling with Selective State Spaces). The plain form is the
loop over tokens. The fast form is a kernel in C that never holds [B, T, N, E]: it keeps a state every few
tokens and makes the others again in the backward pass. Without a compiler, and on other devices, the
plain form runs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from armillary.native import scan as native
from armillary.nn.ops import native_here, plain

CHUNK = 16  # tokens whose states the backward pass makes again at once, so that they stay in the cache
GROUPS = 16  # parts in which sums over channels are taken, at most: what threads share a row by


def selective_scan(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    bias: Tensor,
    *,
    state: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """u [B, T, E], dt [B, T, E] (before the bias and softplus, −∞ where a token is not there: it leaves the
    state as it is), a [E, N] at most 0, b and c [B, T, N], d and bias [E] → y [B, T, E] in u's dtype and
    the state [B, N, E] after the last token, in float32 (float64 for float64).

    state: [B, N, E] before the first token, None = zeros; documents: [B, T] ids, a new id starts from zeros.
    Whatever u's dtype, steps, states and sums are float32.
    """
    if plain() or not native_here(u):
        return selective_scan_plain(u, dt, a, b, c, d, bias, state=state, documents=documents)
    dt, b, c = (x.to(u.dtype) for x in (dt, b, c))
    a, d, bias = a.float().t(), d.float(), bias.float()
    state = None if state is None else state.float()
    documents = None if documents is None else documents.long()
    y, end, _ = _scan(u, dt, a, b, c, d, bias, state, documents, torch.is_grad_enabled())
    return y, end


def selective_scan_plain(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    bias: Tensor,
    *,
    state: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence itself, token by token."""
    kind = torch.promote_types(u.dtype, torch.float32)
    wide = u.to(kind)
    a, b, c = a.to(kind).t(), b.to(kind), c.to(kind)
    held = u.new_zeros(u.shape[0], *a.shape, dtype=kind) if state is None else state.to(kind)
    delta = F.softplus(dt.to(kind) + bias.to(kind))
    entering = delta * wide
    outputs = []
    # unbind, not indices: the backward pass of an index fills a tensor of the whole length
    for t, (step, enter, into, out) in enumerate(zip(*(x.unbind(1) for x in (delta, entering, b, c)), strict=True)):
        if documents is not None and t > 0:
            held = held.masked_fill((documents[:, t] != documents[:, t - 1])[:, None, None], 0)
        held = torch.exp(step[:, None] * a) * held + enter[:, None] * into[..., None]
        outputs.append((out[:, None] @ held)[:, 0])
    return (torch.stack(outputs, 1) + d.to(kind) * wide).to(u.dtype), held


def selective_scan_flops(channels: int, states: int, tokens: float) -> float:
    """FLOPs of the plain form over `tokens` tokens."""
    return tokens * channels * (7.0 * states + 5)


@torch.library.custom_op("armillary::selective_scan", mutates_args=())
def _scan(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    bias: Tensor,
    state: Tensor | None,
    documents: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return native.scan(u, dt, a, b, c, d, bias, state, documents, CHUNK, keep)


@_scan.register_fake
def _(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    bias: Tensor,
    state: Tensor | None,
    documents: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    chunks = -(-u.shape[1] // CHUNK) if keep else 0
    return u.new_empty(u.shape), a.new_empty(u.shape[0], *a.shape), a.new_empty(u.shape[0], chunks, *a.shape)


@torch.library.custom_op("armillary::selective_scan_backward", mutates_args=())
def _scan_backward(
    grad: Tensor,
    grad_end: Tensor,
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    bias: Tensor,
    kept: Tensor,
    documents: Tensor | None,
) -> native.Slopes:
    return native.scan_backward(grad, grad_end, u, dt, a, b, c, d, bias, kept, documents, CHUNK, GROUPS)


@_scan_backward.register_fake
def _(
    grad: Tensor,
    grad_end: Tensor,
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    bias: Tensor,
    kept: Tensor,
    documents: Tensor | None,
) -> native.Slopes:
    return tuple(x.new_empty(x.shape) for x in (u, dt, a, b, c, d, bias, grad_end))  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, dt, a, b, c, d, bias, state, documents, _ = inputs
    ctx.started = state is not None
    ctx.set_materialize_grads(False)  # the kept states are as large as u
    ctx.save_for_backward(u, dt, a, b, c, d, bias, output[2], documents)


def _backward(ctx: Any, grad: Tensor | None, grad_end: Tensor | None, _: Tensor) -> tuple[Tensor | None, ...]:
    u, dt, a, b, c, d, bias, kept, documents = ctx.saved_tensors
    grad = torch.zeros_like(u) if grad is None else grad
    grad_end = a.new_zeros(u.shape[0], *a.shape) if grad_end is None else grad_end
    slopes = _scan_backward(grad, grad_end, u, dt, a, b, c, d, bias, kept, documents)
    return (*slopes[:7], slopes[7] if ctx.started else None, None, None)


_scan.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.armillary.selective_scan)
def _flops(u: Any, dt: Any, a: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    return int(u[0] * selective_scan_flops(u[2], a[0], u[1]))


@register_flop_formula(torch.ops.armillary.selective_scan_backward)
def _flops_backward(grad: Any, grad_end: Any, u: Any, dt: Any, a: Any, *rest: Any, **_: Any) -> int:
    # the states once more, and about two operations for each one of the forward pass
    return int(3 * u[0] * selective_scan_flops(u[2], a[0], u[1]))
