"""Performer: softmax attention estimated without bias by positive random features (FAVOR+, Choromanski et al. 2021).

φ(x) = exp(ω·x̃ − ‖x̃‖²/2) with x̃ = x / K^(1/4) and m directions ω, orthogonal in blocks of K, so that
E[φ(q)·φ(k)] = exp(q·k / √K). Hyperbolic: a pair exp(±ω·x̃) for each of m/2 directions. Generalised:
φ(x) = relu(ω·x̃) + ε, which estimates another kernel.

The published code divides keys by their largest feature of the whole sequence, which a causal model
must not see; here it is the largest so far, and the state is rescaled when that grows. It also adds
10⁻⁴ to exponential features; we do not, since that would bias them. Directions are drawn anew every
`redraw` updates by the trainer and by nobody else; the seed they come from and the number of draws
are buffers, stored with the weights.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from armillary.native.tape import Features
from armillary.nn.context import Context
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import Capabilities, Place, mixers
from armillary.nn.mixers.linear import TINY, KernelAttention, KernelSettings
from armillary.nn.steps.recurrent import features
from armillary.nn.tape import Buffer, Tape


@mixers.register
class PerformerSettings(KernelSettings):
    """φ(q) Σ φ(k)ᵀ v / φ(q) Σ φ(k) with random features φ."""

    kind: ClassVar[str] = "performer"
    source: ClassVar[str] = "Choromanski et al. 2021, Rethinking Attention with Performers"
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_performer.py: the explicit matrix of the features, outputs and gradients; softmax "
        "attention by Monte Carlo over draws"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(bidirectional=True, state="fixed", rollback="snapshot")
    features: int = Field(256, gt=0, description="random features; twice K·ln K or more for a close estimate")
    kernel: Literal["softmax", "relu"] = Field("softmax", description="what is estimated")
    hyperbolic: bool = Field(False, description="features in pairs exp(±ω·x), from half as many directions")
    orthogonal: bool = Field(True, description="directions orthogonal in blocks, which lowers the variance")
    redraw: int | None = Field(1000, gt=0, description="updates between draws of the directions; null keeps the first")
    seed: int | None = Field(None, ge=0, description="seed of the directions; by default drawn with the weights")
    eps: float = Field(1e-3, gt=0, description="added to every feature of the relu kernel")

    @model_validator(mode="after")
    def _coherent(self) -> PerformerSettings:
        if self.hyperbolic and self.kernel != "softmax":
            raise ValueError("hyperbolic features estimate softmax only: set kernel: softmax or hyperbolic: false")
        if self.hyperbolic and self.features % 2:
            raise ValueError(f"hyperbolic features come in pairs: {self.features} is odd")
        return self

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("default", cls(features=12)),
            Example("hyperbolic", cls(heads=2, features=10, hyperbolic=True)),
            Example("relu", cls(heads=2, features=7, kernel="relu", orthogonal=False)),
            Example("bidirectional", cls(heads=2, features=12), {"order": "bidirectional"}),
            Example("relu_bidirectional", cls(heads=2, features=8, kernel="relu"), {"order": "bidirectional"}),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("matrix", Example("one_head", cls(heads=1, features=24)), _matrix)]

    @property
    def directions(self) -> int:
        return self.features // 2 if self.hyperbolic else self.features

    def build(self, place: Place) -> Performer:
        return Performer(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        each, exponential = self.size(place.width), self.kernel == "softmax"
        rows = length * self.heads
        flops = self.products(place.width, length)
        flops += self.kernel_flops(place, length, self.features, exponential)
        flops += 2 * (linear_flops(each, self.directions, rows) + rows * each)  # scaled, projected
        if exponential:
            flops += 2 * rows * (2.0 * each + 1 + self.features + (self.directions if self.hyperbolic else 0))
            flops += rows * 3.0 * self.features  # the queries' largest feature, difference, exponential
        else:
            flops += 2 * rows * 2.0 * self.features
        return Cost(flops, self.state_bytes(place, self.features, exponential))


class Performer(KernelAttention):
    """Buffers: `directions` [m, K], and what they follow from, `origin` and `draws` (int64)."""

    scaled = ("scale",)
    directions: Tensor
    origin: Tensor
    draws: Tensor

    def __init__(self, settings: PerformerSettings, place: Place) -> None:
        self.logarithmic = settings.kernel == "softmax"
        super().__init__(settings, place, settings.features, TINY)
        self.scale = self.width**-0.5
        self.hyperbolic, self.orthogonal = settings.hyperbolic, settings.orthogonal
        self.redraw, self.seed, self.offset = settings.redraw, settings.seed, settings.eps
        self.layer = place.layer
        self.register_buffer("directions", torch.empty(settings.directions, self.width))
        self.register_buffer("origin", torch.zeros((), dtype=torch.int64))
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def reset(self, generator: torch.Generator | None) -> None:
        if self.seed is None:
            self.origin.random_(2**31, generator=generator)
        else:
            self.origin.fill_(self.seed)
        self.draws.zero_()
        self._draw()

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        """After an update: new directions when it is time."""
        if self.redraw is not None and step % self.redraw == 0:
            self.draws += 1
            self._draw()

    def _draw(self) -> None:
        seed = (int(self.origin) * 1_000_003 + self.layer) * 1_000_003 + int(self.draws)
        generator = torch.Generator().manual_seed(seed % 2**63)
        rows, width = self.directions.shape
        made = orthogonal_directions(rows, width, generator) if self.orthogonal else _normal(rows, width, generator)
        self.directions.copy_(made)

    def queries(self, q: Tensor) -> Tensor:
        features = self._project(q)
        if not self.logarithmic:
            return features
        return features.add_(-features.detach().amax(-1, keepdim=True)).exp_()

    def keys(self, k: Tensor) -> Tensor:
        return self._project(k)

    def recorded(self, tape: Tape, x: Buffer, so_far: Tensor | None = None) -> tuple[Buffer, Buffer | None]:
        return features(
            tape,
            x,
            self.heads,
            Features.EXP if self.logarithmic else Features.RELU,
            directions=self.directions.float(),
            paired=self.hyperbolic,
            factor=self.scale**0.5,
            offset=self.offset,
            so_far=so_far,
        )

    def _project(self, x: Tensor) -> Tensor:
        """Features, or their logarithms, in float32 at least: they are exponents."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide) * self.scale**0.5
        projected = F.linear(x, self.directions.to(wide))
        if not self.logarithmic:
            return F.relu(projected) + self.offset
        if self.hyperbolic:
            projected = torch.cat([projected, -projected], -1)
        return projected.add_(x.square().sum(-1, keepdim=True) * -0.5)  # in place: these are the large tensors


def orthogonal_directions(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """[rows, width]: blocks of `width` orthogonal rows, each uniform on the sphere, with the lengths
    of rows of normal numbers, so that each alone is a normal vector."""
    blocks = []
    for _ in range(-(-rows // width)):
        q, r = torch.linalg.qr(_normal(width, width, generator))
        blocks.append((q * r.diagonal().sign()).t())  # with the signs it is uniform over rotations (Mezzadri 2007)
    lengths = torch.linalg.vector_norm(_normal(rows, width, generator), dim=1, keepdim=True)
    made: Tensor = torch.cat(blocks)[:rows] * lengths
    return made


def _normal(rows: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, width, generator=generator, dtype=torch.float64, device="cpu")


def _matrix(mixer: Performer, x: Tensor, ctx: Context) -> Tensor:
    """One causal head with the estimate of every pair written out."""
    q, k, v = (x @ product.weight.t() for product in (mixer.q, mixer.k, mixer.v))
    q, k = (z * mixer.width**-0.25 for z in (q, k))
    q, k = ((z @ mixer.directions.t() - z.square().sum(-1, keepdim=True) / 2).double().exp() for z in (q, k))
    weights = (q @ k.transpose(1, 2)).tril()
    mixed = (weights / weights.sum(-1, keepdim=True)).to(v.dtype) @ v
    return mixed @ mixer.o.weight.t()  # type: ignore[no-any-return]
