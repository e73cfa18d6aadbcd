"""Numerics that several mechanisms share: the plain form, which is the oracle, beside the fast form.

Inside `with plain_ops():` every op takes its plain form; tests and FLOP counts run there.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from armillary.native import available

_plain = False


def plain() -> bool:
    """Whether ops take their plain form now."""
    return _plain


def readable(x: Tensor) -> bool:
    """Whether values can be looked at now without waiting or breaking a trace: a plain tensor on the
    CPU, outside compilers and function transforms."""
    if type(x) is not Tensor or x.device.type != "cpu" or x.numel() == 0 or torch.compiler.is_compiling():
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def native_here(x: Tensor) -> bool:
    """Whether operators in C take tensors like x; they say so once where there is no compiler."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and _native()


def _native() -> bool:
    return available()


# What torch.compiler.assume_constant_result does, without importing the whole compiler for it: two seconds
# of every command. A version of PyTorch that asks for something else fails the law of graphs.
_native._dynamo_marked_constant = True  # type: ignore[attr-defined]


def product_dtype(x: Tensor) -> torch.dtype:
    """In what to multiply tensors like x: a CPU without instructions for bf16 imitates them, many times
    slower than it multiplies float32."""
    slow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not computes_bf16()
    return torch.float32 if slow else x.dtype


@functools.cache
def computes_bf16() -> bool:
    """Whether this processor has bf16 products, and PyTorch uses them; false where that cannot be told."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@contextlib.contextmanager
def plain_ops() -> Iterator[None]:
    """Take the plain forms inside the block."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before
