"""Gaussian-weighted attention: scores fade with distance before the softmax.

Kim, El-Khamy & Lee 2020, T-GSA: Transformer with Gaussian-Weighted Self-Attention for Speech Enhancement.
Scores are multiplied by G = exp(−(i−j)²/σ²) and, as published, enter the softmax by their absolute value;
since exp(0) = 1, far tokens keep a share: the weighting is relative, not a mask. Whether the paper
writes σ² or 2σ² is open; we take σ², one σ per head, trained by its logarithm so that it stays positive
and moves by factors. A causal row drops later tokens after the absolute value. `form: added` is our
named alternative, softmax(s − (i−j)²/σ²), which does fade to nothing.
"""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary.nn.context import Context
from armillary.nn.cost import Cost
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import Capabilities, Place, mixers
from armillary.nn.mixers.attention import Attention, AttentionSettings, Look
from armillary.nn.ops.attend import Modify


@mixers.register
class GaussianSettings(AttentionSettings):
    """softmax(|G ⊙ q kᵀ / √K|) v with G = exp(−(i−j)²/σ²)."""

    kind: ClassVar[str] = "gaussian"
    source: ClassVar[str] = "Kim, El-Khamy & Lee 2020, T-GSA: Transformer with Gaussian-Weighted Self-Attention"
    oracle: ClassVar[str] = "tests/nn/mixers/test_gaussian.py: the formula, as loops over heads and pairs of tokens"
    capabilities: ClassVar[Capabilities] = Capabilities(
        causal=True, bidirectional=True, prefix=True, mask=True, state="span", rollback="truncate"
    )
    tracked: ClassVar[bool] = True
    sigma: float = Field(10.0, gt=0, description="σ of every head at the start, in tokens")
    form: Literal["absolute", "signed", "added"] = Field(
        "absolute", description="absolute: |G ⊙ scores|, the paper's; signed: G ⊙ scores; added: scores − (i−j)²/σ²"
    )

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("published", cls(sigma=3.0), compiled=True),
            Example("signed", cls(sigma=2.0, form="signed", kv_heads=2)),
            Example("added", cls(sigma=4.0, form="added")),
            Example("both_ways", cls(sigma=3.0), {"order": "bidirectional"}),
            Example("prefix", cls(sigma=3.0, form="added"), {"order": "prefix"}),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("no_decay", Example("wide", cls(heads=1, sigma=1e6, form="signed")), _dense)]

    def build(self, place: Place) -> Gaussian:
        return Gaussian(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        steps = {"added": 2, "signed": 3, "absolute": 4}[self.form]  # weigh, (exponential,) apply(, absolute)
        return super().cost(place, length, itemsize) + Cost(float(steps) * self.heads * length**2)


class Gaussian(Attention):
    """x [B, T, D] → [B, T, D]; log_sigma [H]."""

    def __init__(self, settings: GaussianSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.sigma, self.form = settings.sigma, settings.form
        self.log_sigma = nn.Parameter(torch.empty(self.heads))

    def reset(self, generator: torch.Generator | None) -> None:
        super().reset(generator)
        nn.init.constant_(self.log_sigma, math.log(self.sigma))

    def modify(self, look: Look) -> Modify | None:
        return partial(self._weighted, look)

    def _weighted(self, look: Look, scores: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        assert look.keys is not None
        distance = look.queries[:, rows, None] - look.keys[:, None, columns]
        rate = torch.exp(-2 * self.log_sigma.to(scores.dtype))[:, None, None]
        fall = distance.square().to(scores.dtype)[:, None] * -rate
        if self.form == "added":
            return scores + fall
        scores = scores * torch.exp(fall)
        return scores.abs() if self.form == "absolute" else scores


def _dense(mixer: Gaussian, x: Tensor, ctx: Context) -> Tensor:
    """Attention without any weighting, of one causal head."""
    q, k, v = (x @ product.weight.t() for product in (mixer.q, mixer.k, mixer.v))
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    y: Tensor = torch.softmax((q @ k.transpose(1, 2) * mixer.scale).masked_fill(later, -torch.inf), -1) @ v
    return y @ mixer.o.weight.t()  # type: ignore[no-any-return]
