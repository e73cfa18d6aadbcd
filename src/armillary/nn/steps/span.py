"""Native steps over keys and values so far: stick-breaking (native/stick.h), and softmax's over 8 bits
(native/attention_int8.h)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from armillary.native.tape import Code
from armillary.nn.buffers import WHOLE, Buffer
from armillary.nn.cache import Int8State
from armillary.nn.tape import Tape, kind_of


def break_stick(tape: Tape, q: Buffer, k: Tensor, v: Tensor, heads: int, scale: float) -> Buffer:
    """Stick-breaking attention of every token over the keys and values so far, [slots, groups, room, width]."""
    groups, room, width = k.shape[1:]
    out = tape.buffer(q.width)
    tape.write(
        Code.STICK,
        into=q,
        out=out,
        reads=[(q, WHOLE), (k.data_ptr(), WHOLE), (v.data_ptr(), WHOLE)],
        writes=[(out, WHOLE)],
        kind=kind_of(k),
        n=(heads, groups, width, room),
        f=(scale,),
        more=k.data_ptr(),
        weight=v.data_ptr(),
    )
    return out


def attend_int8(
    tape: Tape,
    state: Int8State,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    heads: int,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    slopes: Sequence[float] | None = None,
) -> Buffer:
    """The tokens' keys and values to a state in 8 bits, and attention over those so far."""
    keys, values, key_scales, value_scales = tape.hold(state, "k", "v", "k.scale", "v.scale")
    groups, room, width = keys.shape[1:]
    for held, scales, x in ((keys, key_scales, k), (values, value_scales, v)):
        tape.write(
            Code.APPEND_INT8,
            into=x,
            reads=[(x, groups)],
            writes=[(held.data_ptr(), groups)],
            n=(groups, width, room),
            target=held.data_ptr(),
            more=scales.data_ptr(),
        )
    out = tape.buffer(q.width)
    tape.scratch = max(tape.scratch, 4 * room)
    bent = 0 if slopes is None else tape.keep(torch.tensor(slopes, dtype=torch.float32))
    places = [key_scales.data_ptr(), value_scales.data_ptr(), tape.vector(sinks), bent]
    tape.write(
        Code.ATTEND_INT8,
        into=q,
        out=out,
        reads=[(q, WHOLE), (keys.data_ptr(), WHOLE), (values.data_ptr(), WHOLE)],
        writes=[(out, WHOLE)],
        n=(heads, groups, width, room),
        f=(scale, softcap or 0.0),
        more=keys.data_ptr(),
        weight=values.data_ptr(),
        rest=tape.keep(torch.tensor(places, dtype=torch.int64)),
    )
    return out
