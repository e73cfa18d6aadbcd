"""Parts that recurrent mixers share: a matrix for each head, the short convolution in front, and decays by steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.nn.context import Context, Memory
from armillary.nn.mechanism import Frozen, Mixer
from armillary.nn.ops.short_conv import next_tail, short_conv
from armillary.nn.state import FixedState, State
from armillary.nn.steps.recurrent import convolve, gates
from armillary.nn.tape import Buffer, Tape


class MatrixMixer(Mixer):
    """A causal mixer each head of which holds a matrix, a sum over all tokens: float32 at least.

    A class says what the matrices do (`mixed`); `values` and `freeze` also take the state of the chunk's
    rows, whose convolutions move on there. sized: names of the settings that the state's shapes follow from.
    """

    scaled = ()  # norms, lengths of 1 and features of a fixed number: no score grows with the width
    sized: ClassVar[str]

    def values(self, x: Tensor, ctx: Context, state: State | None = None) -> Tensor:
        raise NotImplementedError

    def freeze(self, x: Tensor, ctx: Context, state: State | None = None) -> Frozen:
        raise NotImplementedError

    def mixed(self, parts: Mapping[str, Any], values: Tensor, matrix: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the heads read, [B, T, H, V], and their matrices [B, H, K, V] after it."""
        raise NotImplementedError

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one row's state: "matrix", and the tails of convolutions."""
        raise NotImplementedError

    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        if frozen.weights is not None:
            return (frozen.weights.to(values.dtype) @ values.transpose(1, 2)).transpose(1, 2)
        return self.mixed(frozen.parts, values, None)[0]

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        return FixedState.zeros(self.shapes(), batch, dtype, device, wide=("matrix",))

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        assert isinstance(state, FixedState)
        state.expect(self.shapes(), len(x), self.path, self.sized)
        values = self.values(x, ctx, state)
        if ctx.taps is not None:
            values = self.tapped_values(values, ctx)
        mixed, end = self.mixed(self.freeze(x, ctx, state).parts, values, state.tensors["matrix"])
        state.put("matrix", end)
        if ctx.taps is not None:
            mixed = ctx.taps(f"{self.path}.mixed", mixed)
        return self.finish(mixed, x, ctx)


class ShortConvolution(nn.Module):
    """x [B, T, C] → [B, T, C], each channel of the last `taps` tokens, then silu if asked.

    Tokens that are not there are not read and get 0. Starts as `torch.nn.Conv1d` does: uniform in ±1/√taps.
    The state is `name` [B, taps − 1, C]; for the numbers see `nn.ops.short_conv`.
    """

    def __init__(self, channels: int, taps: int, name: str, *, bias: bool = False, silu: bool = True) -> None:
        super().__init__()
        self.name, self.taps, self.silu = name, taps, silu
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def reset(self, generator: torch.Generator | None) -> None:
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(self.taps**-0.5), self.taps**-0.5, generator=generator)

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> Tensor:
        """The convolution of a whole sequence, or of the chunk that follows `state`, which moves on."""
        if ctx.padding is not None:
            x = x * ctx.padding[..., None].to(x.dtype)
        tail = None if state is None else state.tensors[self.name]
        y = short_conv(x, self.weight, self.bias, silu=self.silu, tail=tail, documents=ctx.documents)
        if state is not None and tail is not None:
            state.put(self.name, next_tail(x, tail, ctx.lengths))
        real = ctx.present(x)
        return y if real is None else y * real[..., None].to(y.dtype)

    def record(self, tape: Tape, x: Buffer, state: State) -> Buffer:
        (tail,) = tape.hold(state, self.name)
        return convolve(tape, x, self.weight, self.bias, tail, silu=self.silu)

    def shape(self) -> tuple[int, int]:
        """Of one row's state."""
        return self.taps - 1, self.weight.shape[0]


class StepDecay(nn.Module):
    """Steps Δ = softplus(s + b) and log decays −exp(a)·Δ of s [B, T, H] (Gu & Dao 2023, Mamba).

    Both are sums and exponentials, so float32 at least, whatever s is. decays: exp(a) starts uniformly
    between these; steps: softplus(b) starts log-uniformly between these; limits: steps are kept between.
    """

    def __init__(
        self,
        heads: int,
        decays: tuple[float, float],
        steps: tuple[float, float],
        limits: tuple[float, float | None] | None = None,
    ) -> None:
        super().__init__()
        self.decays, self.steps, self.limits = decays, steps, limits
        self.log_rate = nn.Parameter(torch.empty(heads))
        self.bias = nn.Parameter(torch.empty(heads))

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.uniform_(self.log_rate, *self.decays, generator=generator).log_()
        low, high = (math.log(step) for step in self.steps)
        step = nn.init.uniform_(self.bias, low, high, generator=generator).exp_()
        step.add_((-torch.expm1(-step)).log())  # what softplus turns into the step

    def forward(self, s: Tensor) -> Tensor:
        """The steps [B, T, H]."""
        wide = torch.promote_types(s.dtype, torch.float32)
        step = F.softplus(s.to(wide) + self.bias.to(wide))
        return step if self.limits is None else step.clamp(*self.limits)

    def log_decays(self, step: Tensor) -> Tensor:
        return step * -self.log_rate.to(step.dtype).exp()

    def record(self, tape: Tape, s: Buffer, shares: Buffer | None = None) -> Buffer:
        """Decays and, without other shares, steps: pairs [rows, H, 2]."""
        heads = len(self.bias)
        return gates(tape, heads, s, shares, log_rate=self.log_rate, bias=self.bias, limits=self.limits)

    @staticmethod
    def flops(heads: int, tokens: float, limited: bool = False) -> float:
        return 2.0 * heads + tokens * heads * (4 if limited else 3)

    @staticmethod
    def check(decays: tuple[float, float], steps: tuple[float, float]) -> None:
        """Raise ValueError where they are no ranges of positive numbers."""
        for name, (low, high) in (("decays", decays), ("steps", steps)):
            if not 0 < low <= high:
                raise ValueError(f"{name} must be two positive numbers in order, not {low:g} and {high:g}")
