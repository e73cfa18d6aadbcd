"""RMSNorm (Zhang & Sennrich 2019, Root Mean Square Layer Normalization)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary.native.rows import few_rows_rmsnorm, fits
from armillary.nn.example import Example
from armillary.nn.mechanism import NormSettings, norms
from armillary.nn.ops import plain
from armillary.nn.tape import Buffer, Tape

FEW = 1 << 14  # elements up to which one thread is quicker than several operations


@norms.register
class RMSNormSettings(NormSettings):
    """x / rms(x) · w; with `unit_offset` · (1 + w), as Gemma Team 2024, Gemma, stores it."""

    kind: ClassVar[str] = "rmsnorm"
    source: ClassVar[str] = "Zhang & Sennrich 2019, Root Mean Square Layer Normalization"
    oracle: ClassVar[str] = (
        "tests/nn/test_block.py: transformers' Llama and Gemma 2 layers; tests/native/test_rows.py: PyTorch's rms_norm"
    )
    epsilon: float = Field(1e-5, gt=0, description="added to the mean square")
    unit_offset: bool = Field(False, description="whether the gain is 1 + w, so that w starts at 0")

    @classmethod
    def examples(cls) -> list[Example]:
        return [Example("default", cls()), Example("unit_offset", cls(unit_offset=True))]

    def build(self, width: int) -> RMSNorm:
        return RMSNorm(width, self.epsilon, self.unit_offset)

    def flops(self, width: int, tokens: float) -> float:
        return tokens * (4 * width + 2) + (width if self.unit_offset else 0)


class RMSNorm(nn.Module):
    """[..., D] → [..., D]."""

    def __init__(self, width: int, epsilon: float, unit_offset: bool = False) -> None:
        super().__init__()
        self.epsilon, self.offset = epsilon, 1.0 if unit_offset else 0.0
        self.weight = nn.Parameter(torch.empty(width))

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and self._few(x):
            return few_rows_rmsnorm(x, self.weight, self.epsilon, self.offset)
        wide = x.float() if x.dtype != torch.float64 else x
        scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + self.epsilon)
        gain = self.weight.to(wide.dtype)
        return (wide * scale * (gain + self.offset if self.offset else gain)).to(x.dtype)

    def record(self, tape: Tape, x: Buffer, *, over: tuple[int, int] | None = None, place: bool = False) -> Buffer:
        return tape.norm(
            x, self.weight, None, centred=False, epsilon=self.epsilon, offset=self.offset, over=over, place=place
        )

    def _few(self, x: Tensor) -> bool:
        """Decoding: one pass over a few rows costs less than the calls of the form below."""
        return not plain() and x.numel() <= FEW and x.dtype == self.weight.dtype and fits(x)
