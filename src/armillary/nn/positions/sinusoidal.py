"""Sinusoidal absolute positions, added to the embedding (Vaswani et al. 2017, Attention Is All You Need)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from armillary.base.errors import UnsupportedError
from armillary.nn.cost import Cost
from armillary.nn.mechanism import Place, Position, PositionSettings, positions


@positions.register
class SinusoidalPositionSettings(PositionSettings):
    """Feature 2i is sin(p / base^(2i/D)), feature 2i+1 the cosine."""

    kind: ClassVar[str] = "sinusoidal"
    source: ClassVar[str] = "Vaswani et al. 2017, Attention Is All You Need"
    oracle: ClassVar[str] = "tests/nn/positions/test_absolute.py: the formula of section 3.5 of the paper"
    sites: ClassVar[frozenset[str]] = frozenset({"embed"})
    base: float = Field(10000.0, gt=0, description="wavelengths grow geometrically up to 2π·base")

    def build(self, place: Place, heads: int = 1, head_width: int = 0) -> SinusoidalPosition:
        if place.width % 2:
            raise UnsupportedError("sinusoidal positions need an even model.width", where=place.path)
        return SinusoidalPosition(place.width, self.base)

    def cost(self, place: Place, length: int, heads: int, kv_heads: int, head_width: int) -> Cost:
        return Cost(length * place.width * 2.5)


class SinusoidalPosition(Position):
    """Formed in float32 from the positions of the call, so any length works."""

    sites = SinusoidalPositionSettings.sites

    def __init__(self, width: int, base: float) -> None:
        super().__init__()
        self._speed = [base ** (-feature / width) for feature in range(0, width, 2)]

    def embed(self, positions: Tensor) -> Tensor:
        angles = positions[..., None].float() * torch.tensor(self._speed, device=positions.device)
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)
