"""Native steps of mixtures of experts: routing, and products of which only the picked experts' weights are read.

They write down operations of native/experts.h on a tape (nn/tape.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from armillary.native.pack import Kind
from armillary.native.tape import TILE, Code, prepared_bytes
from armillary.nn.buffers import WHOLE, Buffer
from armillary.nn.linear import ExpertLinear, Linear
from armillary.nn.tape import NoStep, Tape, split


def pick(tape: Tape, x: Buffer, router: nn.Module, top: int, *, normalise: bool, **how: Any) -> Buffer:
    """Which experts a router picks for each row of x, and their gates (see `route`)."""
    if type(router) is not Linear:
        raise NoStep("a router that is no dense product")
    # picks are worth full precision, however experts are held
    scores = tape.product(x, router.weight, router.bias, weights="float32")
    return route(tape, scores, top, normalise=normalise, **how)


def route(
    tape: Tape,
    scores: Buffer,
    top: int,
    *,
    normalise: bool,
    sigmoid: bool = False,
    correction: Tensor | None = None,
    factor: float = 1.0,
) -> Buffer:
    """The `top` best of every row's scores and their gates (see ops.routing.top_gates), for every thread: [rows, 2 ·
    top], the experts and then the gates."""
    picks = tape.buffer(2 * top, own=True)
    tape.scratch = max(tape.scratch, 3 * scores.width)
    tape.write(
        Code.ROUTE,
        into=scores,
        out=picks,
        reads=[(scores, WHOLE)],
        writes=[(picks, WHOLE)],
        n=(scores.width, top, int(sigmoid), int(normalise)),
        f=(factor,),
        bias=tape.vector(correction),
    )
    return picks


def experts_in(
    tape: Tape,
    x: Buffer,
    picks: Buffer,
    up: ExpertLinear,
    gate: ExpertLinear | None,
    activation: Callable[[Tensor], Tensor] | None,
) -> Buffer:
    """activation(gate x) · up x, activation(up x), or without one up x, of every pick: [rows, top · hidden]."""
    top, hidden = picks.width // 2, up.outputs
    out = tape.buffer(top * hidden)
    kind, table = _table(tape, up)
    _reserve(tape, up)
    tape.write(
        Code.EXPERTS_IN,
        into=x,
        out=out,
        reads=[(x, WHOLE), (picks, WHOLE)],
        writes=[(out, WHOLE)],
        kind=kind,
        n=(
            up.inputs,
            hidden,
            split(hidden),
            up.experts,
            top,
            -1 if activation is None else tape.activation(activation),
        ),
        more=picks.at,
        rest=picks.stride,
        weight=table,
        bias=0 if gate is None else _table(tape, gate)[1],
    )
    return out


def experts_out(tape: Tape, hidden: Buffer, picks: Buffer, down: ExpertLinear) -> Buffer:
    """Σ gate · down(hidden) over the picks: [rows, top · hidden] → [rows, outputs]."""
    out = tape.buffer(down.outputs)
    kind, table = _table(tape, down)
    _reserve(tape, down)
    units = split(down.outputs)
    tape.write(
        Code.EXPERTS_OUT,
        into=hidden,
        out=out,
        reads=[(hidden, WHOLE), (picks, WHOLE)],
        writes=[(out, units)],
        kind=kind,
        n=(down.inputs, down.outputs, units, down.experts, picks.width // 2),
        more=picks.at,
        rest=picks.stride,
        weight=table,
    )
    return out


def swap(tape: Tape, x: Buffer, a: int, b: int) -> Buffer:
    """[rows, a, b, ·] → [rows, b, a, ·]."""
    out, heads = tape.buffer(x.width), a * b
    n = (heads, a, x.width // heads)
    tape.write(Code.SWAP, into=x, out=out, reads=[(x, WHOLE)], writes=[(out, heads)], n=n)
    return out


def add_gated(tape: Tape, y: Buffer, x: Buffer, gate: Buffer) -> None:
    """y + σ(gate) · x, in place; gate [rows, 1]."""
    units = tape.units_of(y)
    tape.write(
        Code.ADD_GATED,
        into=x,
        out=y,
        reads=[(x, units), (gate, WHOLE)],
        writes=[(y, units)],
        n=(y.width, units),
        more=gate.at,
    )


def _table(tape: Tape, product: ExpertLinear) -> tuple[Kind, int]:
    """Where the weights, scales and bias of each expert lie."""
    if type(product) is not ExpertLinear:
        raise NoStep(f"{type(product).__name__} has no native step")
    packed = [tape.pack(weight) for weight in product.weight]
    bias = tape.vector(product.bias)
    size = 4 * product.outputs if bias else 0
    lines = [[numbers, scales, bias + at * size] for at, (_, numbers, scales) in enumerate(packed)]
    return packed[0][0], tape.keep(torch.tensor(lines, dtype=torch.int64))


def _reserve(tape: Tape, product: ExpertLinear) -> None:
    """Memory for the rows of one expert, of every thread: owners, inputs as products take them, and results."""
    taken = max(4 * product.inputs, *(prepared_bytes(product.inputs, kind) for kind in (Kind.INT8, Kind.INT4)))
    tape.scratch = max(tape.scratch, tape.rows * (2 + 2 * product.outputs) + (tape.rows + TILE) * -(-taken // 4))
