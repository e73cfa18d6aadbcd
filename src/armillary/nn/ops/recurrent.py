"""Recurrent cells over time: the loop over tokens beside forms that save most of its work.

h_t = cell(a_t, W h_{t−1} + b) with a_t the products of the inputs, made for all tokens at once. The
plain form is the loop as written down. `recur` runs the same loop as one operator with the backward
pass written out, so that the slope of W is one product over all tokens, not a sum of T; `fused_lstm`
is PyTorch's own, which knows neither documents nor rows of unequal length.

A token that is not there (`valid`) leaves the state as it is; one that begins a document (`start`)
finds it at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

CellKind = Literal["rnn_tanh", "rnn_relu", "lstm", "gru"]
State = tuple[Tensor, ...]  # h, and the cell c of an LSTM: [B, R] each

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
# Element-wise operations of a step for each of R features, the sum of both products included.
WORK = {"rnn_tanh": 2, "rnn_relu": 2, "lstm": 13, "gru": 10}


def rnn_step(gates: Tensor, relu: bool = False) -> Tensor:
    """h of a plain network (Elman 1990) from a + W h, [B, R]."""
    return torch.relu(gates) if relu else torch.tanh(gates)


def lstm_step(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """h and c of an LSTM from a + W h [B, 4R]: input, forget, new, output (Hochreiter & Schmidhuber
    1997, the forget gate of Gers et al. 2000)."""
    i, f, g, o = gates.chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru_step(found: Tensor, held: Tensor, h: Tensor) -> Tensor:
    """h of a GRU from a and W h + b [B, 3R]: reset, update, new (Cho et al. 2014; as in PyTorch the
    reset gate acts on the product, not on h)."""
    a, b, c = found.chunk(3, -1)
    d, e, f = held.chunk(3, -1)
    new = torch.tanh(c + torch.sigmoid(a + d) * f)
    return new + torch.sigmoid(b + e) * (h - new)


def step(cell: CellKind, found: Tensor, held: Tensor, state: State) -> State:
    """The state after one token: found [B, GR] its products, held [B, GR] those of h."""
    if cell == "lstm":
        return lstm_step(found + held, state[1])
    return (gru_step(found, held, state[0]) if cell == "gru" else rnn_step(found + held, cell == "rnn_relu"),)


def begins(documents: Tensor, padding: Tensor | None) -> Tensor:
    """[B, T]: the tokens whose document is not that of the last token that was there before them."""
    steps = torch.arange(documents.shape[1], device=documents.device)
    there = steps.expand(documents.shape[0], -1) if padding is None else torch.where(padding, steps, -1)
    last = torch.cat([torch.full_like(there[:, :1], -1), there.cummax(1).values[:, :-1]], 1)
    return documents.gather(1, last.clamp(min=0)) != documents


def where_rows(rows: Tensor, a: State, b: State) -> State:
    """Of every row [B] the state a where it is true, else b."""
    return tuple(torch.where(rows[:, None], one, other) for one, other in zip(a, b, strict=True))


def recur_plain(
    cell: CellKind,
    found: Tensor,
    product: Callable[[Tensor], Tensor],
    state: State,
    start: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, State]:
    """found [B, T, GR] → h after every token [B, T, R] and the last state; product: h → W h + b."""
    rows = []
    for t, here in enumerate(found.unbind(1)):
        if start is not None:
            state = where_rows(start[:, t], tuple(torch.zeros_like(part) for part in state), state)
        after = step(cell, here, product(state[0]), state)
        state = after if valid is None else where_rows(valid[:, t], after, state)
        rows.append(state[0])
    return torch.stack(rows, 1), state


def recur(
    cell: CellKind,
    found: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: State,
    start: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, State]:
    """As `recur_plain` with the product h Wᵀ + b, W [GR, R]; all of the dtype of the state."""
    there = [mask.t().contiguous() if mask is not None else None for mask in (start, valid)]
    c = state[1] if len(state) > 1 else None
    hs, cs, _ = _scan(found.transpose(0, 1), weight, bias, state[0], c, *there, cell)
    last = (hs[-1],) if c is None else (hs[-1], cs[-1])
    return hs.transpose(0, 1), last


def fused_lstm(x: Tensor, weights: Sequence[Tensor], state: State) -> tuple[Tensor, State]:
    """A whole LSTM over x [B, T, D]; weights: of the inputs [4R, D], of h [4R, R], and a bias of each [4R]."""
    held = [part[None] for part in state]
    y, h, c = torch.lstm(x, held, list(weights), True, 1, 0.0, torch.is_grad_enabled(), False, True)
    return y, (h[0], c[0])


def has_fused_lstm(x: Tensor) -> bool:
    """Whether PyTorch's LSTM is the quicker one: oneDNN's, on a CPU in float32. Compilers unroll it."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return x.numel() > 0 and torch.backends.mkldnn.is_available()


# -- the loop as one operator, time first


@torch.library.custom_op("armillary::scan", mutates_args=())
def _scan(
    found: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    c: Tensor | None,
    start: Tensor | None,
    valid: Tensor | None,
    cell: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """found [T, B, GR] → h [T, B, R], c [T, B, R] (empty without one) and the gates after their σ and
    tanh, behind which a GRU keeps W h + b of its new part: [T, B, GR or 4R]."""
    length, batch, size = found.shape[0], found.shape[1], weight.shape[1]
    hs = found.new_empty(length, batch, size)
    cs = found.new_empty(length if c is not None else 0, batch, size)
    gates = found.new_empty(length, batch, _kept(cell) * size)
    turned = weight.t().contiguous() if length > 8 else weight.t()
    for t in range(length):
        if start is not None:
            h = torch.where(start[t, :, None], 0, h)
            c = None if c is None else torch.where(start[t, :, None], 0, c)
        after, kept = hs[t], gates[t]
        if cell == "gru":
            _gru(found[t], h @ turned if bias is None else torch.addmm(bias, h, turned), h, after, kept)
        else:
            torch.addmm(found[t], h, turned, out=kept)
            if bias is not None:
                kept += bias
            if c is not None:
                _lstm(kept, c, after, cs[t])
            elif cell == "rnn_relu":
                after.copy_(kept.relu_())
            else:
                after.copy_(kept.tanh_())
        if valid is not None:
            here = valid[t, :, None]
            after.copy_(torch.where(here, after, h))
            if c is not None:
                cs[t].copy_(torch.where(here, cs[t], c))
        h, c = after, (None if c is None else cs[t])
    return hs, cs, gates


def _kept(cell: str) -> int:
    return 4 if cell == "gru" else GATES[cell]


def _lstm(gates: Tensor, c: Tensor, h_out: Tensor, c_out: Tensor) -> None:
    """Gates become their activations in place."""
    size = c.shape[-1]
    gates[:, : 2 * size].sigmoid_()
    gates[:, 2 * size : 3 * size].tanh_()
    gates[:, 3 * size :].sigmoid_()
    i, f, g, o = gates.chunk(4, -1)
    torch.mul(f, c, out=c_out)
    c_out.addcmul_(i, g)
    torch.tanh(c_out, out=h_out)
    h_out.mul_(o)


def _gru(found: Tensor, held: Tensor, h: Tensor, h_out: Tensor, kept: Tensor) -> None:
    size = h.shape[-1]
    both, new, kept_held = kept[:, : 2 * size], kept[:, 2 * size : 3 * size], kept[:, 3 * size :]
    torch.add(found[:, : 2 * size], held[:, : 2 * size], out=both)
    both.sigmoid_()
    kept_held.copy_(held[:, 2 * size :])
    torch.addcmul(found[:, 2 * size :], both[:, :size], kept_held, out=new)
    new.tanh_()
    torch.lerp(new, h, both[:, size:], out=h_out)


@_scan.register_fake
def _(
    found: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    c: Tensor | None,
    start: Tensor | None,
    valid: Tensor | None,
    cell: str,
) -> tuple[Tensor, Tensor, Tensor]:
    length, batch, size = found.shape[0], found.shape[1], weight.shape[1]
    hs = found.new_empty(length, batch, size)
    cs = found.new_empty(length if c is not None else 0, batch, size)
    return hs, cs, found.new_empty(length, batch, _kept(cell) * size)


@torch.library.custom_op("armillary::scan_back", mutates_args=())
def _scan_back(
    slope: Tensor,
    slope_c: Tensor,
    weight: Tensor,
    h: Tensor,
    c: Tensor | None,
    start: Tensor | None,
    valid: Tensor | None,
    hs: Tensor,
    cs: Tensor,
    gates: Tensor,
    cell: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Slopes by found, weight, bias, h and c (empty without one)."""
    length = len(hs)
    before = torch.cat([h[None], hs[:-1]])
    before_c = cs if c is None else torch.cat([c[None], cs[:-1]])
    if start is not None:
        before = torch.where(start[..., None], 0, before)
        before_c = before_c if c is None else torch.where(start[..., None], 0, before_c)
    factors = _factors(cell, before, before_c, cs, gates)
    by_found = gates.new_empty(length, gates.shape[1], weight.shape[0])
    by_held = torch.empty_like(by_found) if cell == "gru" else by_found
    dh, dc = torch.zeros_like(h), torch.zeros_like(h)
    for t in range(length - 1, -1, -1):
        dh = dh + slope[t]
        dc = dc if c is None else dc + slope_c[t]
        through, through_c = None, None
        if valid is not None:  # the state of a token that is not there is the one before it
            here = valid[t, :, None]
            through, through_c = torch.where(here, 0, dh), torch.where(here, 0, dc)
            dh, dc = torch.where(here, dh, 0), torch.where(here, dc, 0)
        around, dc = _step_back(cell, dh, dc, [part[t] for part in factors], by_found[t], by_held[t])
        dh = by_held[t] @ weight
        dh = dh if around is None else dh + around
        if through is not None and through_c is not None:
            dh, dc = dh + through, dc + through_c
        if start is not None:
            dh, dc = (torch.where(start[t, :, None], 0, part) for part in (dh, dc))
    by_weight = by_held.flatten(0, 1).t() @ before.flatten(0, 1)
    return by_found, by_weight, by_held.sum((0, 1)), dh, dc if c is not None else h.new_empty(0)


def _factors(cell: str, before: Tensor, before_c: Tensor, cs: Tensor, gates: Tensor) -> list[Tensor]:
    """What slopes of a step are multiplied by, for all tokens at once."""
    if cell == "rnn_tanh":
        return [1 - gates * gates]
    if cell == "rnn_relu":
        return [(gates > 0).to(gates.dtype)]
    if cell == "lstm":
        i, f, g, o = gates.chunk(4, -1)
        end = torch.tanh(cs)
        into = torch.cat([g * i * (1 - i), before_c * f * (1 - f), i * (1 - g * g)], -1)
        return [into, end * o * (1 - o), o * (1 - end * end), f]
    r, z, n, held = gates.chunk(4, -1)
    new = (1 - z) * (1 - n * n)
    return [new, (before - n) * z * (1 - z), new * held * r * (1 - r), r, z]


def _step_back(
    cell: str, dh: Tensor, dc: Tensor, factors: list[Tensor], by_found: Tensor, by_held: Tensor
) -> tuple[Tensor | None, Tensor]:
    """Writes the slopes by a and by W h + b; returns that by the h before, apart from W, and by the c before."""
    if cell == "lstm":
        into, output, end, forget = factors
        dc = torch.addcmul(dc, dh, end)
        rows, size = dh.shape
        torch.mul(dc[:, None], into.view(rows, 3, size), out=by_found.view(rows, 4, size)[:, :3])
        torch.mul(dh, output, out=by_found[:, 3 * size :])
        return None, dc * forget
    if cell == "gru":
        new, update, reset, r, z = factors
        size = dh.shape[-1]
        torch.mul(dh, reset, out=by_found[:, :size])
        torch.mul(dh, update, out=by_found[:, size : 2 * size])
        torch.mul(dh, new, out=by_found[:, 2 * size :])
        by_held.copy_(by_found)
        by_held[:, 2 * size :].mul_(r)
        return dh * z, dc
    torch.mul(dh, factors[0], out=by_found)
    return None, dc


@_scan_back.register_fake
def _(
    slope: Tensor,
    slope_c: Tensor,
    weight: Tensor,
    h: Tensor,
    c: Tensor | None,
    start: Tensor | None,
    valid: Tensor | None,
    hs: Tensor,
    cs: Tensor,
    gates: Tensor,
    cell: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    by_found = gates.new_empty(gates.shape[0], gates.shape[1], weight.shape[0])
    by_c = torch.empty_like(h) if c is not None else h.new_empty(0)
    return by_found, torch.empty_like(weight), weight.new_empty(len(weight)), torch.empty_like(h), by_c


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:  # type: ignore[type-arg]
    _, weight, bias, h, c, start, valid, cell = inputs
    ctx.save_for_backward(weight, h, c, start, valid, *output)
    ctx.cell, ctx.biased = cell, bias is not None  # type: ignore[attr-defined]


def _slopes(ctx: torch.autograd.function.FunctionCtx, slope: Tensor, slope_c: Tensor, _gates: Tensor):  # type: ignore[no-untyped-def]
    weight, h, c, start, valid, hs, cs, gates = ctx.saved_tensors  # type: ignore[attr-defined]
    cell: str = ctx.cell  # type: ignore[attr-defined]
    found, *rest = _scan_back(slope, slope_c, weight, h, c, start, valid, hs, cs, gates, cell)
    by_weight, by_bias, by_h, by_c = rest
    by_bias = by_bias if ctx.biased else None  # type: ignore[attr-defined]
    return found, by_weight, by_bias, by_h, None if c is None else by_c, None, None, None


_scan.register_autograd(_slopes, setup_context=_keep)
