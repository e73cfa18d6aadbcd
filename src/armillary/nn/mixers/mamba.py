"""Mamba: a recurrence whose steps, inputs and outputs are chosen by the token (Gu & Dao 2023, Mamba).

x is widened to u and a gate z; u passes a short causal convolution and SiLU; from it come, per token, a
step δ of every channel and what its N states take in (b) and give out (c):

    h ← exp(δ·a)·h + δ·u·b,   y = c·h + d·u,   result = W (y · SiLU(z))

The mix is linear in u, so there is an exact matrix per channel. As published, a block is this mixer and
nothing else. The steps start at softplus(bias) log-uniform between 0.001 and 0.1, a at −1 … −N (the real
part of S4D's start); products start as all of them do here, so that of the steps is normal where the
paper draws from a uniform distribution.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import Capabilities, Frozen, Mixer, MixerSettings, Place, mixers
from armillary.nn.ops.scan import selective_scan, selective_scan_flops
from armillary.nn.ops.short_conv import next_tail, short_conv, short_conv_flops
from armillary.nn.state import FixedState, State
from armillary.nn.steps.recurrent import convolve, cut, select, sums
from armillary.nn.tape import Buffer, Tape, record

STEPS = (1e-3, 1e-1)  # where the steps start, log-uniform


@mixers.register
class MambaSettings(MixerSettings):
    """h ← exp(δ·a)·h + δ·u·b, y = c·h + d·u, with δ, b and c from the token."""

    kind: ClassVar[str] = "mamba"
    source: ClassVar[str] = "Gu & Dao 2023, Mamba: Linear-Time Sequence Modeling with Selective State Spaces"
    oracle: ClassVar[str] = "tests/nn/mixers/test_mamba.py: MambaMixer of transformers, outputs and gradients"
    capabilities: ClassVar[Capabilities] = Capabilities(state="fixed", rollback="snapshot")
    expand: float = Field(2.0, gt=0, description="channels relative to the model's width")
    states: int = Field(16, gt=0, description="states of each channel")
    kernel: int = Field(4, gt=0, description="taps of the convolution, the token's own among them")
    rank: int | None = Field(None, gt=0, description="features that the steps are made from; default width / 16")
    bias: bool = Field(False, description="biases of the products into and out of the mixer")
    conv_bias: bool = Field(True, description="bias of the convolution")

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("published", cls(states=4), compiled=True),
            Example("biased", cls(expand=1.5, states=3, kernel=2, rank=3, bias=True, conv_bias=False)),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("average", Example("one_state", cls(states=1, kernel=1)), _average)]

    def channels(self, width: int) -> int:
        return max(1, int(width * self.expand))

    def features(self, width: int) -> int:
        """From how many features the steps are made."""
        return self.rank or math.ceil(width / 16)

    def build(self, place: Place) -> Mamba:
        return Mamba(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        width, channels, rank = place.width, self.channels(place.width), self.features(place.width)
        flops = 2 * linear_flops(width, channels, length, self.bias) + linear_flops(channels, width, length, self.bias)
        flops += linear_flops(channels, rank + 2 * self.states, length) + linear_flops(rank, channels, length)
        flops += short_conv_flops(channels, self.kernel, length, bias=self.conv_bias)
        flops += selective_scan_flops(channels, self.states, length) + 2.0 * channels * self.states
        flops += 2.0 * channels * length
        return Cost(flops, channels * (4.0 * self.states + itemsize * (self.kernel - 1)))


class Mamba(Mixer):
    """x [B, T, D] → [B, T, D]; its state is a float32 matrix [B, N, E] and the last inputs of the convolution,
    [B, W − 1, E]."""

    scaled = ()
    undrawn = ("log_decay",)

    def __init__(self, settings: MambaSettings, place: Place) -> None:
        super().__init__(settings, place)
        width, channels = place.width, settings.channels(place.width)
        self.channels = self.value_groups = channels
        self.states, self.kernel, self.rank = settings.states, settings.kernel, settings.features(width)
        self.v = place.product(width, channels, "v", bias=settings.bias)
        self.gate = place.product(width, channels, "gate", bias=settings.bias)
        self.choose = place.product(channels, self.rank + 2 * self.states, "choose")
        self.step = place.product(self.rank, channels, "step")
        self.o = place.product(channels, width, "o", bias=settings.bias)
        self.conv = nn.Parameter(torch.empty(channels, self.kernel))
        self.conv_bias = nn.Parameter(torch.empty(channels)) if settings.conv_bias else None
        self.step_bias = nn.Parameter(torch.empty(channels))
        self.log_decay = nn.Parameter(torch.empty(channels, self.states))
        self.skip = nn.Parameter(torch.empty(channels))

    def reset(self, generator: torch.Generator | None) -> None:
        bound = self.kernel**-0.5
        nn.init.uniform_(self.conv, -bound, bound, generator=generator)
        if self.conv_bias is not None:
            nn.init.uniform_(self.conv_bias, -bound, bound, generator=generator)
        low, high = (math.log(step) for step in STEPS)
        steps = nn.init.uniform_(self.step_bias, low, high, generator=generator).exp()
        self.step_bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # what softplus makes the steps of
        self.log_decay.copy_(
            torch.arange(1, self.states + 1, device=self.log_decay.device).log().expand_as(self.log_decay)
        )
        nn.init.ones_(self.skip)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        if ctx.taps is not None:
            return super().forward(x, ctx)
        self.accept(ctx)
        u = self._inner(x, ctx)  # once, for the values and for what is chosen by them
        return self.finish(self.mix(self._chosen(u, ctx), u[..., None]), x, ctx)

    def values(self, x: Tensor, ctx: Context) -> Tensor:
        return self._inner(x, ctx)[..., None]

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        return self._chosen(self._inner(x, ctx), ctx)

    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        if frozen.weights is not None:
            mixed: Tensor = frozen.weights.to(values.dtype) @ values.transpose(1, 2)
            return mixed.transpose(1, 2)
        if values.shape[-1] == 1:
            y, _ = self._scan(frozen, values[..., 0])
            return y[..., None]
        # several values per channel, as when the matrix is asked for: each is a row of its own
        count = values.shape[-1]
        rows = {
            name: part.repeat_interleave(count, 0) if isinstance(part, Tensor) else part
            for name, part in frozen.parts.items()
        }
        y, _ = self._scan(Frozen(rows), values.movedim(-1, 1).flatten(0, 1))
        return y.unflatten(0, (-1, count)).movedim(1, -1)  # type: ignore[no-any-return]

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return self.o(mixed[..., 0] * F.silu(self.gate(x)))  # type: ignore[no-any-return]

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        wide = torch.promote_types(dtype, torch.float32)
        return FixedState(
            {
                "matrix": torch.zeros(batch, self.states, self.channels, dtype=wide, device=device),
                "tail": torch.zeros(batch, self.kernel - 1, self.channels, dtype=dtype, device=device),
            }
        )

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        assert isinstance(state, FixedState)
        inner = self.v(x)
        u = values = self._convolved(inner, ctx, state.tensors["tail"])
        if ctx.taps is not None:
            values = self.tapped_values(values[..., None], ctx)[..., 0]
        mixed, held = self._scan(self._chosen(u, ctx), values, state.tensors["matrix"])
        state.put("matrix", held)
        state.put("tail", next_tail(inner, state.tensors["tail"], ctx.lengths))
        mixed = mixed[..., None]
        if ctx.taps is not None:
            mixed = ctx.taps(f"{self.path}.mixed", mixed)
        return self.finish(mixed, x, ctx)

    def record(self, tape: Tape, x: Buffer, state: State) -> Buffer:
        (held,), (tail,) = sums(tape, state, "matrix"), tape.hold(state, "tail")
        u = convolve(tape, record(self.v, tape, x), self.conv, self.conv_bias, tail)
        chosen = record(self.choose, tape, u)
        steps = record(self.step, tape, cut(tape, chosen, 0, self.rank))
        gate = record(self.gate, tape, x)
        mixed = select(
            tape,
            u,
            steps,
            chosen,
            held,
            first=self.rank,
            log_decay=self.log_decay,
            skip=self.skip,
            bias=self.step_bias,
        )
        return record(self.o, tape, tape.activate(gate, F.silu, mixed))  # type: ignore[no-any-return]

    def _inner(self, x: Tensor, ctx: Context) -> Tensor:
        """u [B, T, E]."""
        inner = self.v(x)
        if ctx.padding is not None:
            inner = inner.masked_fill(~ctx.padding[..., None], 0)
        return self._convolved(inner, ctx, None)

    def _convolved(self, inner: Tensor, ctx: Context, tail: Tensor | None) -> Tensor:
        return short_conv(inner, self.conv, self.conv_bias, tail=tail, documents=ctx.documents)

    def _chosen(self, u: Tensor, ctx: Context) -> Frozen:
        """The steps [B, T, E] before bias and softplus, b and c [B, T, N]."""
        features, b, c = self.choose(u).split([self.rank, self.states, self.states], -1)
        steps = self.step(features)
        valid = ctx.present(u)
        if valid is not None:
            # A token that is not there takes no step: the state neither decays nor takes it in.
            steps = steps.masked_fill(~valid[..., None], -torch.inf)
        return Frozen({"steps": steps, "b": b, "c": c, "documents": ctx.documents})

    def _scan(self, frozen: Frozen, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        parts = frozen.parts
        wide = torch.promote_types(u.dtype, torch.float32)
        a = -self.log_decay.to(wide).exp()
        return selective_scan(
            u,
            parts["steps"],
            a,
            parts["b"],
            parts["c"],
            self.skip,
            self.step_bias,
            state=state,
            documents=parts["documents"],
        )


def _average(mixer: Mamba, x: Tensor, ctx: Context) -> Tensor:
    """With one state, y_t = c_t Σ_s exp(a Σ_{s<r≤t} δ_r) δ_s b_s u_s + d u_t: an average that moves at its own pace."""
    assert mixer.conv_bias is not None
    u = F.silu(x @ mixer.v.weight.t() * mixer.conv[:, 0] + mixer.conv_bias)
    features, b, c = (u @ mixer.choose.weight.t()).split([mixer.rank, 1, 1], -1)
    delta = F.softplus(features @ mixer.step.weight.t() + mixer.step_bias)
    until = delta.cumsum(1)
    decay = (-mixer.log_decay[:, 0].exp() * (until[:, :, None] - until[:, None])).movedim(-1, 1).tril().exp().tril()
    y = c * torch.einsum("bets,bse->bte", decay, delta * b * u) + mixer.skip * u
    z = x @ mixer.gate.weight.t()
    return (y * z * torch.sigmoid(z)) @ mixer.o.weight.t()  # type: ignore[no-any-return]
