"""Native steps of states that a token changes as a whole: what recurrent mixers write on a tape (nn/tape.py).

Each function writes down one operation of native/recurrence.h, or of tape.c itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from armillary.native.tape import CELLS, Code, Fading, Features, Map
from armillary.nn.buffers import WHOLE, Buffer, Use
from armillary.nn.state import State
from armillary.nn.tape import NoStep, Tape, kind_of


def sums(tape: Tape, state: State, *names: str) -> list[Tensor]:
    """Tensors of a state that sum over all tokens, for the tape to read and write: float32."""
    held = tape.hold(state, *names)
    for tensor in held:
        if tensor.dtype != torch.float32:
            raise NoStep(f"a state of {tensor.dtype} that sums over all tokens")
    return held


def convolve(
    tape: Tape,
    x: Buffer,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor,
    *,
    silu: bool = True,
    first: int = 0,
) -> Buffer:
    """The short convolution of every channel, in place: weight [C, taps], tail [slots, taps − 1, all], of which
    x's channels are those from `first` on."""
    taps, units = weight.shape[1], tape.units_of(x)
    tape.write(
        Code.CONVOLVE,
        out=x,
        writes=[(x, units), (tail.data_ptr() + first * tail.element_size(), units)],
        kind=kind_of(tail),
        n=(x.width, units, taps, first, tail.shape[2], int(silu)),
        weight=tape.keep(weight.detach().float().t().contiguous()),
        bias=tape.vector(bias),
        rest=tail.data_ptr(),
    )
    return x


def gates(
    tape: Tape,
    heads: int,
    steps: Buffer | None,
    shares: Buffer | None,
    *,
    log_rate: Tensor | None = None,
    bias: Tensor | None = None,
    limits: tuple[float, float | None] | None = None,
) -> Buffer:
    """Pairs [rows, heads, 2] of how far a head fades, exp(−Δ exp(log_rate)) with Δ = softplus(steps + bias) within
    the limits, and of the share that it takes in: σ(shares), or without any Δ. Without steps nothing fades."""
    out = tape.buffer(2 * heads)
    low, high = (0.0, None) if limits is None else limits
    tape.write(
        Code.GATES,
        into=steps,
        out=out,
        reads=[(each, heads) for each in (steps, shares) if each is not None],
        writes=[(out, heads)],
        n=(heads,),
        f=(low, math.inf if high is None else high),
        more=0 if shares is None else shares.at,
        bias=tape.vector(bias),
        weight=tape.vector(None if log_rate is None else log_rate.detach().float().exp()),
    )
    return out


def scaled(tape: Tape, y: Buffer, weight: Tensor, x: Buffer | None = None) -> None:
    """y · weight, or y + x · weight, in place; a weight for each column, or for each of some groups of them."""
    units = tape.units_of(y)
    tape.write(
        Code.SCALED,
        into=x,
        out=y,
        reads=[] if x is None else [(x, units)],
        writes=[(y, units)],
        n=(y.width, units),
        weight=tape.vector(weight.detach().repeat_interleave(y.width // len(weight))),
    )


def mapped(tape: Tape, x: Buffer, kind: Map, factor: float = 1.0) -> Buffer:
    """σ(x)^factor or elu(x) + 1, in place."""
    units = tape.units_of(x)
    tape.write(Code.MAP, out=x, writes=[(x, units)], kind=kind, n=(x.width, units), f=(factor,))
    return x


def features(
    tape: Tape,
    x: Buffer,
    heads: int,
    kind: Features,
    *,
    directions: Tensor | None = None,
    paired: bool = False,
    factor: float = 1.0,
    offset: float = 0.0,
    so_far: Tensor | None = None,
) -> tuple[Buffer, Buffer | None]:
    """Of every head of x [rows, heads · K], with x̃ = factor · x: relu(d·x̃) + offset for the directions d [m, K];
    exp(d·x̃ − ‖x̃‖²/2), if paired also of −d, relative to the largest; or x̃ / √(‖x̃‖² + offset) and a 1.

    so_far [slots, heads]: of keys, relative to the largest that there was, which moves on (see
    ops.linear.running_max); then the fades that the sums so far need come, too.
    """
    width = x.width // heads
    many = 0 if directions is None else len(directions)
    size = width + 1 if kind == Features.UNIT else many * (2 if paired else 1)
    out = tape.buffer(heads * size)
    fades = None if so_far is None else tape.buffer(2 * heads)
    tape.scratch = max(tape.scratch, heads * (width + many))
    moved: list[Use] = [] if so_far is None or fades is None else [(so_far.data_ptr(), heads), (fades, heads)]
    tape.write(
        Code.FEATURES,
        into=x,
        out=out,
        reads=[(x, heads)],
        writes=[(out, heads), *moved],
        n=(heads, width, many, size, kind, int(paired)),
        f=(factor, offset),
        weight=0 if directions is None else tape.pack(directions, "float32")[1],
        more=0 if fades is None else fades.at,
        rest=0 if so_far is None else so_far.data_ptr(),
    )
    return out, fades


def matrix(
    tape: Tape,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    state: Tensor,
    *,
    groups: int | None = None,
    fades: Buffer | None = None,
    by_key: bool = False,
    delta: bool = False,
    epsilon: float | None = None,
) -> Buffer:
    """y = q S with S ← fade·S + share·kᵀv over states [slots, heads, K, V] → [rows, heads · V].

    groups: heads of q and k, each of which serves as many of v (all by default). fades: pairs of a fade and a
    share (see `gates`) or, by key, a fade for each key feature [rows, heads · K]; without, nothing fades. delta: kᵀ(v −
    what the faded S holds for k) in place of kᵀv. epsilon: the state has one column more, the sums of the
    keys, and y is divided by q times them, plus this.
    """
    heads, keys = state.shape[1:3]
    values = v.width // heads
    groups = groups or heads
    assert q.width == k.width == groups * keys and state.shape[3] == values + (epsilon is not None)
    fading = Fading.STILL if fades is None else Fading.BY_KEY if by_key else Fading.BY_HEAD
    assert fades is None or fades.width == heads * (keys if by_key else 2)
    assert not (delta and fading != Fading.BY_HEAD)
    out = tape.buffer(v.width)
    part = heads if groups == heads else WHOLE
    gated = [] if fades is None else [(fades, heads)]
    tape.write(
        Code.MATRIX,
        into=q,
        out=out,
        reads=[(q, part), (k, part), (v, heads), *gated],
        writes=[(out, heads), (state.data_ptr(), heads)],
        n=(heads, groups, keys, values, fading, 1 if delta else 2 if epsilon is not None else 0),
        f=(epsilon or 0.0,),
        more=k.at,
        weight=v.at,
        bias=0 if fades is None else fades.at,
        rest=state.data_ptr(),
    )
    return out


def select(
    tape: Tape,
    u: Buffer,
    steps: Buffer,
    chosen: Buffer,
    state: Tensor,
    *,
    first: int,
    log_decay: Tensor,
    skip: Tensor,
    bias: Tensor,
) -> Buffer:
    """The diagonal selective scan over states [slots, N, C]: h ← exp(Δ a) h + Δ u b, y = c h + skip u with Δ =
    softplus(steps + bias) and a = −exp(log_decay) [C, N]; b and c stand in `chosen` from column `first` on."""
    states, units = state.shape[1], tape.units_of(u)
    rates = log_decay.detach().float().exp().t() * -math.log2(math.e)
    table = torch.cat([rates, skip.detach().float()[None], bias.detach().float()[None]]).contiguous()
    out = tape.buffer(u.width)
    tape.write(
        Code.SELECT,
        into=u,
        out=out,
        reads=[(u, units), (steps, units), (chosen, WHOLE)],
        writes=[(out, units), (state.data_ptr(), units)],
        n=(u.width, units, states, chosen.width, first),
        more=steps.at,
        bias=chosen.at,
        weight=tape.keep(table),
        rest=state.data_ptr(),
    )
    return out


def cut(tape: Tape, x: Buffer, first: int, width: int) -> Buffer:
    """Columns of x, a copy for every thread."""
    out = tape.buffer(width, own=True)
    tape.write(Code.CUT, into=x, out=out, reads=[(x, WHOLE)], writes=[(out, WHOLE)], n=(x.width, first, width))
    return out


def take(tape: Tape, state: Tensor) -> Buffer:
    """The rows of a state [slots, width] that take a step, a copy for every thread."""
    out, at = tape.buffer(state.shape[1], own=True), state.data_ptr()
    tape.write(Code.TAKE, out=out, reads=[(at, WHOLE)], writes=[(out, WHOLE)], n=(out.width,), rest=at)
    return out


def cell(tape: Tape, kind: str, found: Buffer, held: Buffer, bias: Tensor, h: Tensor, c: Tensor | None) -> Buffer:
    """The step of an RNN, LSTM or GRU from the products of inputs and state; h and c are states [slots, R]. A
    sequence can take one token in a call only, since `held` is made for all rows at once."""
    tape.single = True
    out = tape.buffer(h.shape[1])
    units = tape.units_of(out)
    tape.write(
        Code.CELL,
        into=found,
        out=out,
        reads=[(found, WHOLE), (held, WHOLE)],
        writes=[(out, units), *[(state.data_ptr(), units) for state in (h, c) if state is not None]],
        n=(out.width, units, CELLS[kind]),
        more=held.at,
        bias=tape.vector(bias),
        rest=h.data_ptr(),
        weight=0 if c is None else c.data_ptr(),
    )
    return out
