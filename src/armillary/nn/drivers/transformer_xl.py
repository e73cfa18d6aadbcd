"""Transformer-XL: a token sees its own segment and the M tokens before it, layer by layer (Dai et al. 2019).

What a layer keeps of earlier segments is what its mixer read of them, as keys and values; no gradient
flows to it, while that of the products' weights counts it, as published (where the paper norms after
each branch and this stack before it, the norm's gain is left out like the hidden state). Memory
lengths may differ by layer: few long memories do (Rae & Razavi 2020, Do Transformers Need Deep
Long-Range Memory?). Published with the position `transformer_xl`; any relative position serves.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from armillary.base.errors import SettingsError
from armillary.nn.block import BlockState
from armillary.nn.context import Context
from armillary.nn.cost import Cost
from armillary.nn.driver import DriverSettings, Segmented, Turn, Window, driven, drivers, pair_flops, slide
from armillary.nn.example import Example
from armillary.nn.mechanism import Capabilities, Place
from armillary.nn.stack import Stack, StackSettings
from armillary.nn.state import SlideState


@drivers.register
class TransformerXLSettings(DriverSettings):
    """Segments of a row, and how many tokens before its segment a token still sees in each layer."""

    kind: ClassVar[str] = "transformer_xl"
    source: ClassVar[str] = "Dai et al. 2019, Transformer-XL: Attentive Language Models beyond a Fixed-Length Context"
    oracle: ClassVar[str] = (
        "tests/nn/drivers/test_transformer_xl.py: the paper's recurrence over cached hidden states as loops, outputs "
        "and gradients; one long forward pass"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(packed=False, state="window", sight="jacobian")
    segment: int = Field(128, gt=0, description="tokens of a segment")
    memory: int | tuple[int, ...] = Field(128, description="tokens kept before it: one number, or one for each layer")
    through: bool = Field(False, description="gradients flow through the memory, too (within a training window)")

    @model_validator(mode="after")
    def _coherent(self) -> TransformerXLSettings:
        if any(count < 0 for count in self.lengths(1)):
            raise ValueError("memory must not be negative")
        return self

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("published", cls(segment=4, memory=3)),
            Example("by_layer", cls(segment=3, memory=(0, 5), through=True)),
        ]

    @property
    def detached(self) -> bool:
        """Whether the gradient ends at the memory."""
        return not self.through

    def lengths(self, depth: int) -> tuple[int, ...]:
        """Tokens kept in each layer."""
        return self.memory if isinstance(self.memory, tuple) else (self.memory,) * depth

    def build(self, place: Place, settings: StackSettings) -> TransformerXL:
        return TransformerXL(self, place, settings)

    def cost(self, stack: StackSettings, place: Place, length: int, itemsize: int = 2) -> Cost:
        flops = 0.0
        for begin in range(0, length, self.segment):
            count = min(self.segment, length - begin)
            for block, memory in zip(stack.layers(), self.lengths(stack.depth), strict=True):
                flops += pair_flops(block, place, count, max(1, memory) + count)
        return Cost(flops, self.state_bytes(stack, place, itemsize))


class TransformerXL(Segmented):
    """No parameters of its own; per layer a window of memory + segment − 1 tokens."""

    def __init__(self, settings: TransformerXLSettings, place: Place, stack: StackSettings) -> None:
        super().__init__(settings, place)
        self.segment, self.detached = settings.segment, settings.detached
        self.memory = settings.lengths(stack.depth)
        if len(self.memory) != stack.depth:
            raise SettingsError(
                f"memory lists {len(self.memory)} layers, but the stack has {stack.depth}",
                path=("model", "driver", "memory"),
                hint="give one number for all layers, or one for each",
            )

    def init_state(
        self, stack: Stack, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str
    ) -> list[BlockState]:
        return self._states(stack, batch, dtype, device, self.segment - 1)

    def begun(self, stack: Stack, batch: int, x: Tensor) -> list[BlockState]:
        states = self._states(stack, batch, x.dtype, x.device, 0)
        if self.detached and torch.is_grad_enabled():
            for state in (held for block in states for held in block.values()):
                if isinstance(state, SlideState):
                    state.tensors |= {f"kept_{name}": state.tensors[name] for name in ("k", "v")}
        return states

    def piece(self, stack: Stack, x: Tensor, states: list[BlockState], ctx: Context) -> Tensor:
        return stack.extend(x, states[:-1], ctx)

    def _states(
        self, stack: Stack, batch: int, dtype: torch.dtype, device: torch.device | str, more: int
    ) -> list[BlockState]:
        driven(stack, self.kind)
        states: list[BlockState] = []
        for block, memory in zip(stack, self.memory, strict=True):
            rows = max(1, memory + more)
            window = Window(rows, self.segment, memory, self.detached)
            states.append(slide(block.init_state(batch, rows, dtype, device), window))
        return [*states, {"driver": Turn(batch, device)}]
