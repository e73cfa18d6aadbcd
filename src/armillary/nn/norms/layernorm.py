"""LayerNorm (Ba, Kiros & Hinton 2016, Layer Normalization)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary.nn.example import Example
from armillary.nn.mechanism import NormSettings, norms
from armillary.nn.tape import Buffer, Tape


@norms.register
class LayerNormSettings(NormSettings):
    """(x − mean) / deviation · w + b; without w and b as in OLMo (Groeneveld et al. 2024)."""

    kind: ClassVar[str] = "layernorm"
    source: ClassVar[str] = "Ba, Kiros & Hinton 2016, Layer Normalization"
    oracle: ClassVar[str] = "tests/nn/test_block.py: PyTorch's Transformer layers; outputs and gradients"
    epsilon: float = Field(1e-5, gt=0, description="added to the variance")
    weight: bool = Field(True, description="whether w is there")
    bias: bool = Field(True, description="whether b is there")

    @classmethod
    def examples(cls) -> list[Example]:
        return [Example("biased", cls()), Example("bare", cls(weight=False, bias=False))]

    def build(self, width: int) -> LayerNorm:
        return LayerNorm(width, self.epsilon, self.weight, self.bias)

    def flops(self, width: int, tokens: float) -> float:
        return tokens * ((5 + int(self.weight) + int(self.bias)) * width + 2)


class LayerNorm(nn.Module):
    """[..., D] → [..., D]."""

    def __init__(self, width: int, epsilon: float, weight: bool, bias: bool) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(width)) if weight else None
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def reset(self, generator: torch.Generator | None) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        centred = wide - wide.mean(-1, keepdim=True)
        scale = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + self.epsilon)
        out = centred * scale
        if self.weight is not None:
            out = out * self.weight.to(wide.dtype)
        if self.bias is not None:
            out = out + self.bias.to(wide.dtype)
        return out.to(x.dtype)

    def record(self, tape: Tape, x: Buffer, *, over: tuple[int, int] | None = None, place: bool = False) -> Buffer:
        return tape.norm(x, self.weight, self.bias, centred=True, epsilon=self.epsilon, over=over, place=place)
