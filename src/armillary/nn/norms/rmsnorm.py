"""RMSNorm (Zhang & Sennrich 2019, Root Mean Square Layer Normalization)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary.native.rows import few_rows_rmsnorm, fits
from armillary.nn.mechanism import NormSettings, norms
from armillary.nn.ops import plain

FEW = 1 << 14  # elements up to which one thread is quicker than several operations


@norms.register
class RMSNormSettings(NormSettings):
    """x / rms(x) · w."""

    kind: ClassVar[str] = "rmsnorm"
    source: ClassVar[str] = "Zhang & Sennrich 2019, Root Mean Square Layer Normalization"
    oracle: ClassVar[str] = (
        "tests/nn/test_block.py: transformers' Llama and Gemma 2 layers; tests/native/test_rows.py: PyTorch's rms_norm"
    )
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
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and self._few(x):
            return few_rows_rmsnorm(x, self.weight, self.epsilon)
        wide = x.float() if x.dtype != torch.float64 else x
        scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + self.epsilon)
        return (wide * scale * self.weight.to(wide.dtype)).to(x.dtype)

    def _few(self, x: Tensor) -> bool:
        """Decoding: one pass over a few rows costs less than the calls of the form below."""
        return not plain() and x.numel() <= FEW and x.dtype == self.weight.dtype and fits(x)
