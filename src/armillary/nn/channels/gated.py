"""The gated feed-forward network (Shazeer 2020, GLU Variants Improve Transformer)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from armillary.nn.activation import ACTIVATIONS, Activation
from armillary.nn.chunks import in_chunks
from armillary.nn.context import Context
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example
from armillary.nn.mechanism import ChannelMixer, ChannelSettings, Place, channels
from armillary.nn.state import State
from armillary.nn.tape import Buffer, Tape, record


@channels.register
class GatedSettings(ChannelSettings):
    """down(activation(gate(x)) · up(x))."""

    kind: ClassVar[str] = "gated"
    source: ClassVar[str] = "Shazeer 2020, GLU Variants Improve Transformer"
    oracle: ClassVar[str] = "tests/nn/test_block.py: transformers' Llama and Gemma 2 layers; outputs and gradients"
    hidden: int | None = Field(
        None, gt=0, description="hidden features; by default 8/3 × width, rounded up to a multiple of 32"
    )
    activation: Activation = Field("silu", description="relu, gelu, gelu_tanh or silu")
    bias: bool = Field(False, description="whether the three products have biases")
    chunk: int | None = Field(
        None, gt=0, description="tokens at a time, so that the hidden features of no more exist at once; by default all"
    )

    def features(self, width: int) -> int:
        return self.hidden or -(-8 * width // (3 * 32)) * 32

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("default", cls()),
            Example("biased", cls(hidden=24, activation="gelu_tanh", bias=True)),
            Example("in_chunks", cls(chunk=4)),
        ]

    def build(self, place: Place) -> Gated:
        return Gated(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        hidden = self.features(place.width)
        products = 2 * linear_flops(place.width, hidden, length, self.bias) + linear_flops(
            hidden, place.width, length, self.bias
        )
        return Cost(products + 2 * length * hidden)


class Gated(ChannelMixer):
    """[B, T, D] → [B, T, D]."""

    def __init__(self, settings: GatedSettings, place: Place) -> None:
        super().__init__()
        self.path = place.path
        hidden = settings.features(place.width)
        self.gate = place.product(place.width, hidden, "gate", settings.bias)
        self.up = place.product(place.width, hidden, "up", settings.bias)
        self.down = place.product(hidden, place.width, "down", settings.bias)
        self.activation = ACTIVATIONS[settings.activation]
        self.chunk = settings.chunk

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        if self.chunk is None and ctx.taps is None:
            return self.down(self.inner(x))  # type: ignore[no-any-return]
        return in_chunks(self, x, ctx)

    def inner(self, x: Tensor) -> Tensor:
        return self.activation(self.gate(x)) * self.up(x)  # type: ignore[no-any-return]

    def record(self, tape: Tape, x: Buffer, state: State | None) -> Buffer:
        gate, up = record(self.gate, tape, x), record(self.up, tape, x)
        return record(self.down, tape, tape.activate(gate, self.activation, up))  # type: ignore[no-any-return]
