"""The embedding head: one vector for a whole sequence (Reimers & Gurevych 2019, Sentence-BERT)."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from armillary.nn.example import Example
from armillary.nn.heads.base import HeadSettings, Pool, heads, pool_flops, pooled
from armillary.nn.mechanism import Place


@heads.register
class EmbeddingHeadSettings(HeadSettings):
    """pool(h), of unit length when asked."""

    kind: ClassVar[str] = "embedding"
    source: ClassVar[str] = "Reimers & Gurevych 2019, Sentence-BERT"
    oracle: ClassVar[str] = "tests/nn/heads/test_pooled.py: NumPy, row by row over the real tokens"
    pool: Pool = Field("mean", description="mean, first or last token")
    normalise: bool = Field(True, description="scale to unit length")
    longest: int | None = Field(None, gt=0, description="tokens of a text that are read, the rest is cut; None: all")
    prompt: str = Field("", description="what is put before every text that is embedded")

    @classmethod
    def examples(cls) -> list[Example]:
        return [Example("unit", cls()), Example("last", cls(pool="last", normalise=False))]

    def build(self, place: Place, vocabulary: int, embedding: nn.Module) -> EmbeddingHead:
        return EmbeddingHead(self)

    def flops(self, width: int, vocabulary: int, length: int) -> float:
        return pool_flops(width, length, self.pool) + (3 * width + 1 if self.normalise else 0)


class EmbeddingHead(nn.Module):
    """h [B, T, D], padding [B, T] → [B, D]."""

    def __init__(self, settings: EmbeddingHeadSettings) -> None:
        super().__init__()
        self.pool, self.normalise = settings.pool, settings.normalise

    def forward(self, h: Tensor, padding: Tensor | None = None) -> Tensor:
        vector = pooled(h, padding, self.pool)
        return F.normalize(vector, dim=-1) if self.normalise else vector
