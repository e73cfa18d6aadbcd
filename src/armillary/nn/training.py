"""What a call is told of the update that it belongs to: a seed for its noise and its share of the loss.

Noise is a function of (the call's seed, the module's path, the name of the draw), never of a
generator's state: activation checkpointing draws the same numbers again, blocks do not disturb one
another, and a run goes on bit for bit. Auxiliary losses attach by an autograd pass-through, so that
no signature changes; their gradient is scaled by the call's share of the update's mean loss and
comes once, however often the forward pass is recomputed. Without an update there is neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from armillary.nn.context import Context


@dataclass(frozen=True)
class Training:
    """seed: of this call's noise, [] int64 on the CPU; share: of the update's mean loss that this call
    makes, [] float32 on the network's device (1 when one call is the whole update); adverse: this is the
    call in which mechanisms that hold an adversary let it act."""

    seed: Tensor
    share: Tensor
    adverse: bool = False

    @staticmethod
    def of(seed: int, share: float = 1.0, device: torch.device | str = "cpu") -> Training:
        return Training(torch.tensor(seed), torch.tensor(share, dtype=torch.float32, device=device))


def uniform(ctx: Context, path: str, name: str, shape: Sequence[int], like: Tensor) -> Tensor | None:
    """Uniform noise in (0, 1), float32 on like's device, for the draw `name` of the module at `path`;
    None outside an update, where a mechanism does what it does on average."""
    if ctx.training is None:
        return None
    return _uniform(ctx.training.seed, like.detach(), list(shape), _stream(path, name))  # type: ignore[no-any-return]


def gumbel(ctx: Context, path: str, name: str, shape: Sequence[int], like: Tensor) -> Tensor | None:
    """Standard Gumbel noise, as `uniform`."""
    drawn = uniform(ctx, path, name, shape, like)
    return None if drawn is None else -torch.log(-torch.log(drawn))


def attach(y: Tensor, loss: Tensor, ctx: Context) -> Tensor:
    """y unchanged; in an update, the gradient of `loss` (a scalar, in the units of the mean loss) flows too."""
    if ctx.training is None:
        return y
    return _Attach.apply(y, loss, ctx.training.share)  # type: ignore[no-any-return,no-untyped-call]


def _stream(path: str, name: str) -> int:
    """A number for the draw, by arithmetic that compilers fold into a constant."""
    value = 0
    for letter in f"{path}|{name}":
        value = (value * 1000003 + ord(letter)) & 0x7FFFFFFFFFFFFFFF
    return value


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, share: Tensor) -> Tensor:
        ctx.save_for_backward(share)
        ctx.kind = loss.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (share,) = ctx.saved_tensors
        return grad, share.to(ctx.kind), None


@torch.library.custom_op("armillary::uniform", mutates_args=())
def _uniform(seed: Tensor, like: Tensor, shape: list[int], stream: int) -> Tensor:
    # One opaque operator: compilers know no generators, and must not fold the noise into a constant.
    mixed = (int(seed) * 0x9E3779B97F4A7C15 + stream * 0xC2B2AE3D27D4EB4F) & 0x7FFFFFFFFFFFFFFF
    generator = torch.Generator(device=like.device).manual_seed(mixed)
    drawn = torch.rand(shape, generator=generator, device=like.device, dtype=torch.float32)
    return drawn.clamp_(1e-7, 1 - 1e-7)


@_uniform.register_fake
def _(seed: Tensor, like: Tensor, shape: list[int], stream: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)
