"""Weights in 8 and 4 bits, each packing beside its plain form and what undoes it."""

from __future__ import annotations

from ctypes import c_int32, c_int64, c_void_p
from enum import IntEnum

import torch
from torch import Tensor

from armillary.native.library import available, function

GROUP = 32  # numbers of int4 that share a scale


class Kind(IntEnum):
    """In what numbers are kept; the order is that of numbers.h."""

    F32 = 0
    BF16 = 1
    INT8 = 2
    INT4 = 3
    INT64 = 4
    F16 = 5


KINDS = {  # of numbers that operations read and write
    torch.float32: Kind.F32,
    torch.bfloat16: Kind.BF16,
    torch.float16: Kind.F16,
}


def pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W [N, K] → numbers [N, K up to whole groups] int8 and scales [N]: W ≈ numbers · scale, each within
    half a scale, which is the row's largest size / 127."""
    held = _readable(weight)
    if held is None:
        return pack_int8_plain(weight)
    rows, width = held.shape
    numbers = torch.empty(rows, -(-width // GROUP) * GROUP, dtype=torch.int8)
    scales = torch.empty(rows)
    call = function("pack_int8_rows", [c_void_p, c_int32, c_int64, c_int64, c_int64, c_void_p, c_void_p])
    given = (rows, width, numbers.shape[1], numbers.data_ptr(), scales.data_ptr())
    call(held.data_ptr(), KINDS[held.dtype], *given)
    return numbers, scales


def pack_int8_plain(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The plain form of `pack_int8`."""
    wide = weight.detach().float()
    scales = wide.abs().amax(1) * (1 / 127)
    numbers = (wide * scales.clamp(min=1e-30).reciprocal()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return torch.nn.functional.pad(numbers, (0, -wide.shape[1] % GROUP)).contiguous(), scales


def unpack_int8(packed: tuple[Tensor, Tensor], width: int) -> Tensor:
    """W [N, K] float64, exactly as the product takes it."""
    numbers, scales = packed
    return numbers[:, :width].double() * scales.double()[:, None]


def pack_int4(weight: Tensor) -> Tensor:
    """W [N, K] → [N, groups, 18] bytes: a bf16 scale, then numbers −8 … 7, i in the low and i + 16 in the
    high half of byte i. The scale takes the number of largest size to −8, so that all 16 are used;
    of two such the positive one."""
    held = _readable(weight)
    if held is None:
        return pack_int4_plain(weight)
    rows, width = held.shape
    packed = torch.empty(rows, -(-width // GROUP), 2 + GROUP // 2, dtype=torch.uint8)
    call = function("pack_int4_rows", [c_void_p, c_int32, c_int64, c_int64, c_void_p])
    call(held.data_ptr(), KINDS[held.dtype], rows, width, packed.data_ptr())
    return packed


def pack_int4_plain(weight: Tensor) -> Tensor:
    """The plain form of `pack_int4`."""
    wide = torch.nn.functional.pad(weight.detach().float(), (0, -weight.shape[1] % GROUP))
    groups = wide.unflatten(1, (-1, GROUP))
    most, least = groups.amax(2, keepdim=True), groups.amin(2, keepdim=True)
    scales = (torch.where(most < -least, least, most) * -0.125).to(torch.bfloat16)
    scales = torch.where(scales == 0, 0, scales)  # a zero has no sign
    each = torch.where(scales.abs() > 1e-30, scales.float().reciprocal(), 0)
    numbers = (groups * each).round().clamp(-8, 7).to(torch.int16) + 8
    halves = (numbers[..., : GROUP // 2] | (numbers[..., GROUP // 2 :] << 4)).to(torch.uint8)
    return torch.cat([scales.contiguous().view(torch.uint8), halves], 2).contiguous()


def unpack_int4(packed: Tensor, width: int) -> Tensor:
    """W [N, K] float64, exactly as the product takes it."""
    scales = packed[..., :2].contiguous().view(torch.bfloat16).double()
    halves = packed[..., 2:].to(torch.int16)
    numbers = torch.cat([halves & 15, halves >> 4], 2).double() - 8
    return (numbers * scales).flatten(1)[:, :width]


def _readable(weight: Tensor) -> Tensor | None:
    """As the C library reads it; None where it cannot."""
    held = weight.detach()
    return held.contiguous() if held.is_cpu and held.dtype in KINDS and available() else None
