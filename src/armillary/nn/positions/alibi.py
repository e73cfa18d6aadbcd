"""ALiBi: scores fall linearly with distance (Press, Smith & Lewis 2022, Train Short, Test Long)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from armillary.nn.cost import Cost
from armillary.nn.example import Example
from armillary.nn.mechanism import Place, Position, PositionSettings, positions


@positions.register
class AlibiSettings(PositionSettings):
    """Adds −slope·distance; slopes are a geometric series over heads, as the paper gives them."""

    kind: ClassVar[str] = "alibi"
    source: ClassVar[str] = "Press, Smith & Lewis 2022, Train Short, Test Long"
    oracle: ClassVar[str] = "tests/nn/positions/test_bias.py: slopes and scores of transformers' BLOOM"
    sites: ClassVar[frozenset[str]] = frozenset({"bias"})

    @classmethod
    def examples(cls) -> list[Example]:
        return [Example("causal", cls()), Example("both_sides", cls(), {"order": "bidirectional"})]

    def build(self, place: Place, heads: int = 1, head_width: int = 0) -> Alibi:
        return Alibi(heads)

    def cost(self, place: Place, length: int, heads: int, kv_heads: int, head_width: int) -> Cost:
        return Cost(2.0 * heads * length * length)


def slopes(heads: int) -> list[float]:
    """2^(−8i/n) for n heads when n is a power of two; else those of the power below, then every
    other one of the power above."""
    power = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    extra = [2 ** (-8 * (2 * i + 1) / (2 * power)) for i in range(heads - power)]
    return first + extra


class Alibi(Position):
    """Bias [B or 1, H, T, S] from the absolute distance (so it serves encoders too)."""

    sites = AlibiSettings.sites

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.slopes = slopes(heads)

    def bias(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        slope = torch.tensor(self.slopes, dtype=torch.float32, device=q_pos.device)
        distance = (q_pos[:, :, None] - k_pos[:, None, :]).abs().float()
        return -slope[None, :, None, None] * distance[:, None]
