"""Local multi-head channel self-attention: features attend to features, one head for every region of the input.

Pecoraro et al. 2022, Local Multi-Head Channel Self-Attention for Facial Expression Recognition. Queries
are averages over neighbouring tokens, keys their maxima; a head takes the tokens of its region as the
description of a feature, and maps queries and keys to `embed` numbers by one and the same product.
Scores are divided by embed^(norm + s), where s in (0, 1) is what a product over all features makes of the
mean scores of a feature. Values are a convolution of the input, averaged over three tokens (or a
square of three). There is no product behind it; the block adds the input.

Every region's features see all tokens of the region: it looks both ways only. A region has a fixed number
of tokens, so the place's length (or the grid) says how many tokens fit; of a shorter input the last
regions stay empty. A head has a width by itself, so `heads` need not divide the width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from armillary.base.errors import InputError, UnsupportedError
from armillary.nn.context import Context
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example
from armillary.nn.mechanism import Capabilities, Mixer, MixerSettings, Place, mixers
from armillary.nn.ops.neighbours import Front, Grid, Neighbourhood, fits_in

SMOOTH = 3  # tokens over which values are averaged


@mixers.register
class LhcSettings(MixerSettings):
    """softmax(Q Kᵀ / e^(c + s)) V with the features of a region for tokens."""

    kind: ClassVar[str] = "lhc"
    source: ClassVar[str] = (
        "Pecoraro et al. 2022, Local Multi-Head Channel Self-Attention for Facial Expression Recognition"
    )
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_lhc.py: the paper's formula with PyTorch's pooling and convolution (2-D), a loop over "
        "heads; scaled channel attention at identity products; outputs and gradients"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(
        causal=False, bidirectional=True, packed=False, sight="jacobian"
    )
    heads: int = Field(8, gt=0, description="regions, each with a head")
    embed: int = Field(64, gt=1, description="numbers that a head compares features by")
    pool: int = Field(3, gt=0, description="odd: tokens that queries and keys pool; the side of a square in a grid")
    kernel: int = Field(3, gt=0, description="odd: tokens of the values' convolution; a square's side in a grid")
    norm: float = Field(0.5, ge=0, description="constant part of the exponent that divides scores")
    grid: Grid | None = Field(None, description="lines and columns of an image given row by row; none: a sequence")

    @model_validator(mode="after")
    def _coherent(self) -> LhcSettings:
        for name in ("pool", "kernel"):
            if getattr(self, name) % 2 == 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be odd, so that it has a middle")
        return self

    @classmethod
    def examples(cls) -> list[Example]:
        both = {"order": "bidirectional"}
        return [
            Example("sequence", cls(embed=4), both),
            Example("image", cls(heads=3, embed=4, kernel=1, grid=(8, 4)), both),
        ]

    def length(self, place: Place) -> int:
        """Tokens of the longest input."""
        return place.length if self.grid is None else self.grid[0] * self.grid[1]

    def region(self, place: Place) -> int:
        """Tokens of a region."""
        return -(-self.length(place) // self.heads)

    def rows(self, place: Place, length: int) -> Mapping[str, float]:
        used = -(-length // self.region(place))
        heads = {f"qk.{head}": 2.0 * place.width if head < used else 0.0 for head in range(self.heads)}
        return {**heads, "scale": used}

    def build(self, place: Place) -> Lhc:
        return Lhc(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        width, region = place.width, self.region(place)
        pools, conv, smooth = (
            Neighbourhood.of(size, "bidirectional", self.grid).size for size in (self.pool, self.kernel, SMOOTH)
        )
        used = -(-length // region)
        flops = linear_flops(conv * width, width, length, bias=True)
        flops += length * width * (2.0 * pools + smooth + 2)  # sums, maxima, quotients
        flops += used * 2 * linear_flops(region, self.embed, width, bias=True)
        flops += used * width * width * (2.0 * self.embed + 1 + 1 + 5 + 2 * region)  # mean, factor, softmax, values
        flops += used * (linear_flops(width, width, 1, bias=True) + 4 * width)  # logistic, sum, product, exponential
        return Cost(flops)


class Lhc(Mixer):
    """x [B, T, D] → [B, T, D]."""

    def __init__(self, settings: LhcSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.grid, self.norm, self.embed = settings.grid, settings.norm, settings.embed
        self.region, self.length = settings.region(place), settings.heads * settings.region(place)
        longest = settings.length(place)
        used = -(-longest // self.region)
        if used < settings.heads:
            raise UnsupportedError(
                f"{longest} tokens in regions of {self.region} are for {used} heads: the other "
                f"{settings.heads - used} would never see one and learn nothing",
                where=place.path,
                hint=f"set heads: {used}, or change " + ("model.context" if settings.grid is None else "grid"),
            )
        self.pools, self.conv, self.smooth = (
            Neighbourhood.of(size, "bidirectional", settings.grid, place.path)
            for size in (settings.pool, settings.kernel, SMOOTH)
        )
        self.qk = nn.ModuleList(place.product(self.region, self.embed, "q", True) for _ in range(settings.heads))
        self.scale = place.product(place.width, place.width, "gate", True)
        self.v = place.product(self.conv.size * place.width, place.width, "v", True)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        self.accept(ctx)
        front = Front.of(x, ctx.padding)
        x = front.x
        fits_in(self.grid, x.shape[1], self.path)
        if x.shape[1] > self.length:
            raise InputError(
                f"{x.shape[1]} tokens, but the heads' regions hold {self.length}",
                where=self.path,
                hint="raise model.context, or set grid",
            )
        places = torch.arange(x.shape[1], device=x.device)[None]
        q, k = (self._pooled(x, self.pools, places, front.real, mean) for mean in (True, False))
        seen = self.conv.seen(places, padding=front.real)
        v = self.v(self.conv.stacked(self.conv.line(x), seen).flatten(2))
        v = self._pooled(v, self.smooth, places, front.real, True)
        if ctx.taps is not None:
            q, k, v = (ctx.taps(f"{self.path}.{name}", part) for name, part in (("q", q), ("k", k), ("v", v)))
        mixed = self._mixed(q, k, v, ctx).transpose(2, 3).flatten(1, 2)[:, : x.shape[1]]
        if ctx.taps is not None:
            mixed = ctx.taps(f"{self.path}.mixed", mixed)
        return front.back(mixed)

    def _pooled(self, x: Tensor, hood: Neighbourhood, places: Tensor, real: Tensor | None, mean: bool) -> Tensor:
        """The mean or the maximum over the neighbours that are there; 0 for what is not there itself."""
        seen = hood.seen(places, padding=real, ends=True)
        assert seen is not None
        around = hood.stacked(hood.line(x), seen)
        count = seen.sum(2)[..., None]
        if mean:
            pooled = around.sum(2) / count.clamp(min=1)
        else:
            pooled = around.masked_fill(~seen[..., None], -torch.inf).amax(2).masked_fill(count == 0, 0)
        return pooled if real is None else pooled.masked_fill(~real[..., None], 0)

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        """[B, T, D] each → [B, heads used, D, region]."""
        short = -q.shape[1] % self.region
        q, k, v = (F.pad(each, (0, 0, 0, short)).unflatten(1, (-1, self.region)).transpose(2, 3) for each in (q, k, v))
        used = list(self.qk)[: q.shape[1]]
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = (torch.stack([head(each[:, n]) for n, head in enumerate(used)], 1).to(wide) for each in (q, k))
        scores = q @ k.transpose(2, 3)  # [B, heads, D, D]
        own = torch.sigmoid(self.scale(scores.mean(-1).to(v.dtype)))
        factor = torch.exp((own.to(wide) + self.norm) * -math.log(self.embed))
        weights = torch.softmax(scores * factor[..., None], -1)
        if ctx.taps is not None:
            weights = ctx.taps(f"{self.path}.channels", weights)
        return weights.to(v.dtype) @ v
