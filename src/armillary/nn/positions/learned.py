"""Learned absolute positions, added to the embedding (Gehring et al. 2017; Radford et al. 2018)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from armillary.base.errors import InputError
from armillary.nn.cost import Cost
from armillary.nn.linear import Embedding
from armillary.nn.mechanism import Place, Position, PositionSettings, positions
from armillary.nn.ops import readable


@positions.register
class LearnedPositionSettings(PositionSettings):
    """One trained vector per position up to model.context."""

    kind: ClassVar[str] = "learned"
    source: ClassVar[str] = "Gehring et al. 2017, Convolutional Sequence to Sequence Learning"
    oracle: ClassVar[str] = "tests/checkpoints/test_families.py: logits of transformers' GPT-2"
    sites: ClassVar[frozenset[str]] = frozenset({"embed"})
    deviation: float = Field(0.02, gt=0, description="standard deviation at the start")
    offset: int = Field(0, ge=0, description="unused rows before that of position 0 (RoBERTa has 2)")

    def build(self, place: Place, heads: int = 1, head_width: int = 0) -> LearnedPosition:
        return LearnedPosition(place.length, place.width, self.deviation, self.offset)

    def cost(self, place: Place, length: int, heads: int, kv_heads: int, head_width: int) -> Cost:
        return Cost(length * place.width)


class LearnedPosition(Position):
    """A table [offset + context, D]."""

    sites = LearnedPositionSettings.sites

    def __init__(self, length: int, width: int, deviation: float, offset: int = 0) -> None:
        super().__init__()
        self.length, self.offset = length, offset
        self.table = Embedding(offset + length, width, role="position", deviation=deviation)

    def embed(self, positions: Tensor) -> Tensor:
        if readable(positions):
            last = int(positions.max())
            if last >= self.length:
                raise InputError(
                    f"position {last} is beyond the {self.length} learned positions",
                    hint=f"shorten the input to {self.length} tokens, or train with a larger model.context",
                )
        return self.table(positions + self.offset if self.offset else positions)  # type: ignore[no-any-return]
