"""The classification head: one score per class for a whole sequence."""

from __future__ import annotations

from typing import ClassVar, get_args

from pydantic import Field
from torch import Tensor, nn

from armillary.nn.example import Example
from armillary.nn.heads.base import HeadSettings, Pool, heads, pool_flops, pooled
from armillary.nn.mechanism import Place


class ClassifierSettings(HeadSettings):
    """What every head for classes has: how many and their names; its module gives h, padding → [B, classes]."""

    classes: int = Field(2, gt=1, description="how many classes")
    labels: tuple[str, ...] | None = Field(None, description="their names")


@heads.register
class ClassificationHeadSettings(ClassifierSettings):
    """logits = pool(h) Wᵀ + b (Devlin et al. 2019, BERT)."""

    kind: ClassVar[str] = "classification"
    source: ClassVar[str] = "Devlin et al. 2019, BERT"
    oracle: ClassVar[str] = "tests/nn/heads/test_pooled.py: NumPy, row by row over the real tokens"
    pool: Pool = Field("mean", description="mean, first or last token")

    @classmethod
    def examples(cls) -> list[Example]:
        return [Example(pool, cls(classes=3, pool=pool)) for pool in get_args(Pool)]

    def build(self, place: Place, vocabulary: int, embedding: nn.Module) -> ClassificationHead:
        return ClassificationHead(self, place)

    def flops(self, width: int, vocabulary: int, length: int) -> float:
        return 2.0 * width * self.classes + self.classes + pool_flops(width, length, self.pool)


class ClassificationHead(nn.Module):
    """h [B, T, D], padding [B, T] → [B, classes]."""

    def __init__(self, settings: ClassificationHeadSettings, place: Place) -> None:
        super().__init__()
        self.pool = settings.pool
        self.product = place.product(place.width, settings.classes, "head", True)

    def forward(self, h: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.product(pooled(h, padding, self.pool))  # type: ignore[no-any-return]
