"""Relative positions in buckets (Raffel et al. 2020, Exploring the Limits of Transfer Learning, T5)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from armillary.nn.cost import Cost
from armillary.nn.example import Example
from armillary.nn.linear import Embedding
from armillary.nn.mechanism import Place, Position, PositionSettings, positions


@positions.register
class T5PositionSettings(PositionSettings):
    """A trained score per head and bucket of relative distance; buckets widen logarithmically."""

    kind: ClassVar[str] = "t5"
    source: ClassVar[str] = "Raffel et al. 2020, Exploring the Limits of Transfer Learning with T5"
    oracle: ClassVar[str] = (
        "tests/nn/positions/test_bias.py: buckets of transformers' T5, whose layer is matched in "
        "tests/nn/mixers/test_attention.py"
    )
    sites: ClassVar[frozenset[str]] = frozenset({"bias"})
    buckets: int = Field(32, ge=4, description="how many buckets; half of them serve each side of an encoder")
    farthest: int = Field(128, gt=0, description="distances from here on share the last bucket")

    @model_validator(mode="after")
    def _coherent(self) -> T5PositionSettings:
        if self.buckets % 4:
            raise ValueError("buckets must be a multiple of 4")
        if self.farthest <= self.buckets // 2:
            raise ValueError("farthest must be above buckets/2, where logarithmic buckets begin")
        return self

    @classmethod
    def examples(cls) -> list[Example]:
        near = cls(buckets=8, farthest=12)
        return [Example("causal", near), Example("both_sides", near, {"order": "bidirectional"})]

    def build(self, place: Place, heads: int = 1, head_width: int = 0) -> T5Position:
        return T5Position(self, heads, both_sides=place.order != "causal")

    def cost(self, place: Place, length: int, heads: int, kv_heads: int, head_width: int) -> Cost:
        pairs = float(length * length)
        # One addition per head to the scores; the bucket of a pair takes a logarithm and its scaling.
        return Cost(pairs * (heads + 3))


class T5Position(Position):
    """Bias [B or 1, H, T, S] from a table [buckets, H]."""

    sites = T5PositionSettings.sites

    def __init__(self, settings: T5PositionSettings, heads: int, both_sides: bool) -> None:
        super().__init__()
        self.buckets, self.farthest, self.both_sides = settings.buckets, settings.farthest, both_sides
        self.table = Embedding(settings.buckets, heads, role="position", deviation=0.1)

    def bias(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        relative = k_pos[:, None, :] - q_pos[:, :, None]
        scores = self.table(self.bucket(relative))  # [B, T, S, H]
        return scores.permute(0, 3, 1, 2)  # type: ignore[no-any-return]

    def bucket(self, relative: Tensor) -> Tensor:
        """Bucket of each key position minus query position."""
        count, start = self.buckets, torch.zeros_like(relative)
        if self.both_sides:
            count //= 2
            start = (relative > 0).long() * count
            distance = relative.abs()
        else:
            distance = (-relative).clamp(min=0)
        exact = count // 2
        wide = torch.log(distance.clamp(min=exact).float() / exact) / math.log(self.farthest / exact)
        far = (exact + (wide * (count - exact)).long()).clamp(max=count - 1)
        return start + torch.where(distance < exact, distance, far)
