"""A gated feed-forward network whose two halves pass a depthwise convolution, so that neighbours meet.

Zamir et al. 2022, Restormer: Efficient Transformer for High-Resolution Image Restoration (its gated-dconv
network); Kuo et al. 2024, Mansformer, puts it beside attention in one stage, where a Transformer has
two: `parallel: true` in a block. Causal, which the papers do not have: the convolution covers the last
tokens, or in a grid the lines above and the own one up to the token.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary.base.errors import UnsupportedError
from armillary.nn.activation import ACTIVATIONS, Activation
from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import Capabilities, Mixer, MixerSettings, Place, mixers
from armillary.nn.ops.neighbours import Grid, Neighbourhood
from armillary.nn.ops.short_conv import next_tail
from armillary.nn.state import FixedState, State
from armillary.nn.steps.recurrent import convolve
from armillary.nn.tape import Buffer, NoStep, Tape, record


@mixers.register
class GatedConvSettings(MixerSettings):
    """W_3 (conv(W_1 x) ⊙ gelu(conv(W_2 x)))."""

    kind: ClassVar[str] = "gated_conv"
    source: ClassVar[str] = "Zamir et al. 2022, Restormer: Efficient Transformer for High-Resolution Image Restoration"
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_gated_conv.py: PyTorch's depthwise convolutions, 1-D and 2-D; outputs and gradients"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(bidirectional=True, state="fixed", sight="jacobian")
    hidden: int | None = Field(None, gt=0, description="features of each half; by default 8/3 of the width")
    kernel: int = Field(3, gt=0, description="tokens of the convolution; the side of a square in a grid")
    activation: Activation = Field("gelu", description="relu, gelu, gelu_tanh or silu")
    grid: Grid | None = Field(None, description="lines and columns of an image given row by row; none: a sequence")

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("causal", cls(hidden=24)),
            Example("image", cls(hidden=24, grid=(16, 4)), {"order": "bidirectional"}),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("one_token", Example("one_token", cls(hidden=24, kernel=1)), _one_token)]

    def features(self, width: int) -> int:
        """Features of each half."""
        return self.hidden or max(1, 8 * width // 3)

    def build(self, place: Place) -> GatedConv:
        return GatedConv(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        width, hidden = place.width, self.features(place.width)
        hood = Neighbourhood.of(self.kernel, place.order, self.grid)
        flops = linear_flops(width, 2 * hidden, length) + linear_flops(hidden, width, length)
        flops += hood.flops(2 * hidden, length) + 2.0 * length * hidden
        return Cost(flops, 0 if place.order == "bidirectional" else 2.0 * hood.before * hidden * itemsize)


class GatedConv(Mixer):
    """x [B, T, D] → [B, T, D]; its state are the last tokens' features."""

    scaled = ()

    def __init__(self, settings: GatedConvSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.hidden = settings.features(place.width)
        self.hood = Neighbourhood.of(settings.kernel, place.order, settings.grid, place.path)
        self.up = place.product(place.width, self.hidden, "up")
        self.gate = place.product(place.width, self.hidden, "gate")
        self.down = place.product(self.hidden, place.width, "down")
        self.kernel = nn.Parameter(torch.empty(2 * self.hidden, self.hood.size))
        self.activation = ACTIVATIONS[settings.activation]

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.normal_(self.kernel, std=self.hood.size**-0.5, generator=generator)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        self.accept(ctx)
        if ctx.documents is None and ctx.padding is None:
            self.hood.fits(x.shape[1], self.path)
        return self._mixed(self._features(x, ctx), None, ctx)

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        if self.order == "bidirectional":
            raise UnsupportedError("a bidirectional mixer cannot be extended", where=self.path)
        shape = (batch, self.hood.before, 2 * self.hidden)
        return FixedState({"tail": torch.zeros(shape, dtype=dtype, device=device)})

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        rows, tail = self._features(x, ctx), state.tensors["tail"]
        y = self._mixed(rows, tail, ctx)
        state.put("tail", next_tail(rows, tail, ctx.lengths))
        return y

    def record(self, tape: Tape, x: Buffer, state: State) -> Buffer:
        if self.hood.grid is not None:
            raise NoStep("neighbours in a grid")
        (tail,) = tape.hold(state, "tail")
        up, gate = record(self.up, tape, x), record(self.gate, tape, x)
        convolve(tape, up, self.kernel[: self.hidden], None, tail, silu=False)
        convolve(tape, gate, self.kernel[self.hidden :], None, tail, silu=False, first=self.hidden)
        return record(self.down, tape, tape.activate(gate, self.activation, up))  # type: ignore[no-any-return]

    def _features(self, x: Tensor, ctx: Context) -> Tensor:
        """Both halves [B, T, 2·hidden]."""
        rows = torch.cat([self.up(x), self.gate(x)], -1)
        return rows if ctx.taps is None else ctx.taps(f"{self.path}.v", rows)

    def _mixed(self, rows: Tensor, tail: Tensor | None, ctx: Context) -> Tensor:
        known = {"documents": ctx.documents, "padding": ctx.padding}
        up, gate = self.hood.convolved(rows, self.kernel, ctx.where(rows), tail=tail, **known).chunk(2, -1)
        mixed = up * self.activation(gate)
        if ctx.taps is not None:
            mixed = ctx.taps(f"{self.path}.mixed", mixed)
        return self.down(mixed)  # type: ignore[no-any-return]


def _one_token(mixer: GatedConv, x: Tensor, ctx: Context) -> Tensor:
    """With a kernel of one token it is a gated feed-forward network, its halves scaled."""
    up, gate = x @ mixer.up.weight.t(), x @ mixer.gate.weight.t()
    first, second = mixer.kernel[:, 0].chunk(2)
    return (up * first * mixer.activation(gate * second)) @ mixer.down.weight.t()  # type: ignore[no-any-return]
