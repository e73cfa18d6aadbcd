"""RMSNorm (Zhang & Sennrich 2019, Root Mean Square Layer Normalization)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary.nn.mechanism import NormSettings, norms


@norms.register
class RMSNormSettings(NormSettings):
    """x / rms(x) · w."""

    kind: ClassVar[str] = "rmsnorm"
    source: ClassVar[str] = "Zhang & Sennrich 2019, Root Mean Square Layer Normalization"
    epsilon: float = Field(1e-5, gt=0, description="added to the mean square")

    def build(self, width: int) -> RMSNorm:
        return RMSNorm(width, self.epsilon)

    def flops(self, width: int, tokens: float) -> float:
        return tokens * (4 * width + 2)


class RMSNorm(nn.Module):
    """[..., D] → [..., D]."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(width))

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + self.epsilon)
        return (wide * scale * self.weight.to(wide.dtype)).to(x.dtype)
