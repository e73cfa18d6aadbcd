"""Linear attention by the first-order Taylor expansion of the exponential on unit vectors (Li et al. 2020).

The weight of a pair is 1 + q̂·k̂ with q̂ = q/‖q‖ and k̂ = k/‖k‖: never negative, and linear in both, so
the features are a unit vector and a one. Open in the paper: where ε stands. Here it is added to the
squared length, so that a vector of zeros has a direction of zeros and the weight 1; a small one in
the normaliser keeps a token whose every key points the other way finite.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from armillary.native.tape import Features
from armillary.nn.context import Context
from armillary.nn.cost import Cost
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import Capabilities, Place, mixers
from armillary.nn.mixers.linear import KernelAttention, KernelSettings
from armillary.nn.steps.recurrent import features
from armillary.nn.tape import Buffer, Tape


@mixers.register
class TaylorSettings(KernelSettings):
    """Σ (1 + q̂·k̂) v / Σ (1 + q̂·k̂)."""

    kind: ClassVar[str] = "taylor"
    source: ClassVar[str] = (
        "Li et al. 2020, Linear Attention Mechanism: An Efficient Attention for Semantic Segmentation"
    )
    oracle: ClassVar[str] = "tests/nn/mixers/test_taylor.py: the explicit matrix 1 + q̂·k̂, outputs and gradients"
    capabilities: ClassVar[Capabilities] = Capabilities(bidirectional=True, state="fixed", rollback="snapshot")
    eps: float = Field(1e-6, gt=0, description="added to squared lengths and to the normaliser")

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("default", cls()),
            Example("bidirectional", cls(heads=2), {"order": "bidirectional"}),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("matrix", Example("one_head", cls(heads=1)), _matrix)]

    def build(self, place: Place) -> TaylorAttention:
        return TaylorAttention(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        each = self.size(place.width)
        flops = self.products(place.width, length) + self.kernel_flops(place, length, each + 1)
        flops += 2.0 * length * self.heads * (3 * each + 2)  # squares, sum, product; ε, root
        return Cost(flops, self.state_bytes(place, each + 1))


class TaylorAttention(KernelAttention):
    """Features [x̂, 1]."""

    scaled = ()

    def __init__(self, settings: TaylorSettings, place: Place) -> None:
        super().__init__(settings, place, settings.size(place.width) + 1, settings.eps)

    def queries(self, q: Tensor) -> Tensor:
        return self._unit(q)

    def keys(self, k: Tensor) -> Tensor:
        return self._unit(k)

    def recorded(self, tape: Tape, x: Buffer, so_far: Tensor | None = None) -> tuple[Buffer, Buffer | None]:
        return features(tape, x, self.heads, Features.UNIT, offset=self.eps)

    def _unit(self, x: Tensor) -> Tensor:
        # In float32: 1 + q̂·k̂ loses most digits between opposite vectors.
        x = x if x.dtype == torch.float64 else x.float()
        unit = x * (x.square().sum(-1, keepdim=True) + self.eps).rsqrt()
        return F.pad(unit, (0, 1), value=1.0)


def _matrix(mixer: TaylorAttention, x: Tensor, ctx: Context) -> Tensor:
    """One causal head with every pair written out."""
    q, k, v = (x @ product.weight.t() for product in (mixer.q, mixer.k, mixer.v))
    weights = (1 + torch.cosine_similarity(q[:, :, None], k[:, None], dim=-1)).tril()
    return (weights / weights.sum(-1, keepdim=True)) @ v @ mixer.o.weight.t()  # type: ignore[no-any-return]
