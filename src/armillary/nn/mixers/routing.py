"""Routing attention, causal by construction: a token sees the last tokens that are nearest to its centroid.

Roy, Saffar, Vaswani & Grangier 2021, Efficient Content-Based Sparse Attention with Routing Transformers.
As published: queries and keys are one product, normalised without scale; every head keeps centroids,
moved towards the mean of what is nearest to them in every update. Published, a centroid picks its
nearest tokens of the whole sequence, which a decoder cannot know; here each token goes to its nearest
centroid, whatever the others do, and sees the last `window` tokens there. So a centroid that holds
more than its share looks back less far, where the published one leaves tokens out.

Centroids move by λμ + (1 − λ)·mean in training updates only (the paper's halves for queries and keys
are one where both are the same) and stand still otherwise. The score is q·k / √K. Half of the paper's
heads are local: a branch of kind `window` `beside` this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from armillary.nn.context import Context
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import Place, mixers
from armillary.nn.mixers.banded import BandedSettings, BandMixer, full_shared

EPSILON = 1e-5


@mixers.register
class RoutingSettings(BandedSettings):
    """softmax(q kᵀ / √K) v over the last tokens of the same centroid."""

    kind: ClassVar[str] = "routing"
    source: ClassVar[str] = (
        "Roy, Saffar, Vaswani & Grangier 2021, Efficient Content-Based Sparse Attention with Routing Transformers"
    )
    oracle: ClassVar[str] = "tests/nn/mixers/test_routing.py: nearest centroids and their moves as loops over tokens"
    centroids: int = Field(16, gt=0, description="centroids of a head; about √T of the trained length")
    decay: float = Field(0.999, ge=0, lt=1, description="what a centroid keeps of itself in an update")

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("default", cls(centroids=3, window=3), compiled=True),
            Example("wide", cls(centroids=2, window=5, head_width=6)),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("one_centroid", Example("one", cls(centroids=1, window=64)), full_shared)]

    def orders(self) -> list[tuple[int, int]]:
        return [(self.centroids, self.window)]

    def grouping(self, width: int) -> float:
        return 5 * width + 2 + 2.0 * width * self.centroids  # a norm, products with the centroids

    def build(self, place: Place) -> Routing:
        return Routing(self, place)


class Routing(BandMixer):
    """x [B, T, D] → [B, T, D]; its state is a ring per centroid."""

    scaled = ("scale",)
    centroids: Tensor

    def __init__(self, settings: RoutingSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.decay, self.scale = settings.decay, self.width**-0.5
        shape = (self.heads, settings.centroids, self.width)
        self.register_buffer("centroids", torch.zeros(shape))
        # What was near to each since the last move, and how many: no part of the weights.
        self.near = torch.zeros(shape, device="cpu")
        self.count = torch.zeros(shape[:2], device="cpu")

    def reset(self, generator: torch.Generator | None) -> None:
        self.centroids.normal_(generator=generator)
        self.centroids.copy_(self._on_sphere(self.centroids))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Routing:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0)).device
        if device.type != "meta":
            self.near, self.count = self.near.to(device), self.count.to(device)
        return self

    def shaped(self, q: Tensor) -> tuple[Tensor, Tensor]:
        centred = q - q.mean(-1, keepdim=True)
        normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPSILON)
        return normed, normed

    def groups(self, q: Tensor, ctx: Context, real: Tensor | None) -> Tensor:
        # Summed in float64, so that no order of summation moves a token to another centroid.
        nearest = (q.transpose(1, 2).double() @ self.centroids.double().transpose(1, 2)).argmax(-1)  # [B, H, T]
        if ctx.training is not None:
            chosen = F.one_hot(nearest, self.centroids.shape[1]).to(torch.float32)
            if real is not None:
                chosen = chosen * real[:, None, :, None]
            self.near.add_(torch.einsum("bhtc,bthk->hck", chosen, q.float()))
            self.count.add_(chosen.sum((0, 2)))
        return nearest[:, :, None]

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        """Move the centroids that something was near to; blocks computed twice in an update count twice
        throughout, so means stay what they are."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for total in (self.near, self.count):
                torch.distributed.all_reduce(total)
        mean = self.near / self.count.clamp(min=1)[..., None]
        moved = self.decay * self.centroids + (1 - self.decay) * mean
        found = ((self.count > 0) & mean.isfinite().all(-1))[..., None]
        self.centroids.copy_(torch.where(found, self._on_sphere(moved), self.centroids))
        self.near.zero_()
        self.count.zero_()

    def _on_sphere(self, x: Tensor) -> Tensor:
        """At the length of the normalised queries, √K, so that the largest product is the least distance."""
        return F.normalize(x, dim=-1) * math.sqrt(self.width)
