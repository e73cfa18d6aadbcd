"""Native steps over keys and values so far, where they are not softmax's (native/stick.h)."""

from __future__ import annotations

from torch import Tensor

from armillary.native.tape import KINDS, Code
from armillary.nn.buffers import WHOLE, Buffer
from armillary.nn.tape import Tape


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
        kind=KINDS[k.dtype],
        n=(heads, groups, width, room),
        f=(scale,),
        more=k.data_ptr(),
        weight=v.data_ptr(),
    )
    return out
