"""The feed-forward network of two products (Vaswani et al. 2017, Attention Is All You Need)."""

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
class FFNSettings(ChannelSettings):
    """down(activation(up(x)))."""

    kind: ClassVar[str] = "ffn"
    source: ClassVar[str] = "Vaswani et al. 2017, Attention Is All You Need"
    oracle: ClassVar[str] = (
        "tests/nn/test_block.py: PyTorch's Transformer layers; tests/checkpoints/test_families.py: logits of "
        "transformers' GPT-2"
    )
    hidden: int | None = Field(None, gt=0, description="hidden features; by default 4 × width")
    activation: Activation = Field("gelu", description="relu, gelu, gelu_tanh or silu")
    bias: bool = Field(False, description="whether both products have biases")
    chunk: int | None = Field(
        None, gt=0, description="tokens at a time, so that the hidden features of no more exist at once; by default all"
    )

    def features(self, width: int) -> int:
        return self.hidden or 4 * width

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("default", cls()),
            Example("biased", cls(hidden=24, activation="relu", bias=True)),
            Example("in_chunks", cls(chunk=4)),
        ]

    def build(self, place: Place) -> FFN:
        return FFN(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        hidden = self.features(place.width)
        products = linear_flops(place.width, hidden, length, self.bias) + linear_flops(
            hidden, place.width, length, self.bias
        )
        return Cost(products + length * hidden)


class FFN(ChannelMixer):
    """[B, T, D] → [B, T, D]."""

    def __init__(self, settings: FFNSettings, place: Place) -> None:
        super().__init__()
        self.path = place.path
        hidden = settings.features(place.width)
        self.up = place.product(place.width, hidden, "up", settings.bias)
        self.down = place.product(hidden, place.width, "down", settings.bias)
        self.activation = ACTIVATIONS[settings.activation]
        self.chunk = settings.chunk

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        if self.chunk is None and ctx.taps is None:
            return self.down(self.inner(x))  # type: ignore[no-any-return]
        return in_chunks(self, x, ctx)

    def inner(self, x: Tensor) -> Tensor:
        return self.activation(self.up(x))

    def record(self, tape: Tape, x: Buffer, state: State | None) -> Buffer:
        hidden = tape.activate(record(self.up, tape, x), self.activation)
        return record(self.down, tape, hidden)  # type: ignore[no-any-return]
