"""Attention by locality-sensitive hashing as it was published, for both directions.

Kitaev, Kaiser & Levskaya 2020, Reformer: The Efficient Transformer, in the form of `transformers`:
tokens are sorted by bucket, rounds one behind the other, and cut into chunks of equal length; each
chunk attends to itself and its neighbours in the order, whatever their buckets, and the rounds are
averaged by their normalisers (a pair found twice counts twice). A sequence of one chunk attends to
all. What fills the last chunk goes to a bucket of its own and is seen by nobody.

Whom a token meets depends on how all others sort. A later token would move earlier outputs, and a
padded or packed neighbour a row, so none of the three is taken; causal models use `lsh`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from armillary.nn.context import Context
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example
from armillary.nn.mechanism import Capabilities, Frozen, Mixer, MixerSettings, Place, head_width, mixers
from armillary.nn.mixers.banded import NORM_EPSILON
from armillary.nn.mixers.lsh import Rotations, check_buckets

ITSELF = -1e5  # the score of a token with itself: less than any other, more than a masked one
MASKED = -1e9


@mixers.register
class LSHPublishedSettings(MixerSettings):
    """softmax(q kᵀ) v over the chunks of the order by buckets."""

    kind: ClassVar[str] = "lsh_published"
    source: ClassVar[str] = "Kitaev, Kaiser & Levskaya 2020, Reformer: The Efficient Transformer"
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_lsh_published.py: transformers' Reformer layer from the same seed; outputs and gradients"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(causal=False, bidirectional=True, packed=False, padding=False)
    heads: int = Field(4, gt=0, description="heads, each with its own buckets")
    head_width: int | None = Field(None, gt=0, description="features per head; by default width / heads")
    rounds: int = Field(2, gt=0, description="rounds of hashing; more find more of the attention")
    buckets: int | tuple[int, ...] = Field(
        64, description="buckets of a round, an even number; a list multiplies, for many at less work"
    )
    chunk: int = Field(64, gt=0, description="tokens of a chunk")
    before: int = Field(1, ge=0, description="chunks before its own that a token sees")
    after: int = Field(0, ge=0, description="chunks after its own that a token sees")
    seed: int = Field(0, description="seed of the random directions; the layer's number is added to it")

    @model_validator(mode="after")
    def _even(self) -> Self:
        check_buckets(self.buckets)
        return self

    @classmethod
    def examples(cls) -> list[Example]:
        both = {"order": "bidirectional"}
        return [
            Example("rounds", cls(buckets=4, chunk=4), both),
            Example("factors", cls(heads=2, rounds=1, buckets=(2, 4), chunk=3, after=1, head_width=6), both),
            Example("one_chunk", cls(), both),
        ]

    def features(self, width: int) -> int:
        """Features per head."""
        return head_width(width, self.heads, self.head_width)

    def build(self, place: Place) -> LSHPublished:
        return LSHPublished(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        each = self.features(place.width)
        inner = self.heads * each
        flops = 2 * linear_flops(place.width, inner, length) + linear_flops(inner, place.width, length)
        flops += self.heads * length * (3.0 * each + 2)
        if length <= self.chunk:
            return Cost(flops + self.heads * length * length * (4.0 * each + 2))
        factors = self.buckets if isinstance(self.buckets, tuple) else (self.buckets,)
        flops += self.heads * length * self.rounds * sum(one // 2 for one in factors) * (2.0 * each + 1)
        rows = self.heads * self.rounds * -(-length // self.chunk) * self.chunk
        flops += rows * ((1 + self.before + self.after) * self.chunk * (4.0 * each + 2))
        return Cost(flops + rows * (2.0 * each + 2))


class LSHPublished(Mixer):
    """x [B, T, D] → [B, T, D]."""

    def __init__(self, settings: LSHPublishedSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.heads = self.value_groups = settings.heads
        self.width = settings.features(place.width)
        self.rounds, self.chunk = settings.rounds, settings.chunk
        self.before, self.after = settings.before, settings.after
        factors = settings.buckets if isinstance(settings.buckets, tuple) else (settings.buckets,)
        self.buckets = math.prod(factors)
        inner = self.heads * self.width
        self.q = place.product(place.width, inner, "q")
        self.v = place.product(place.width, inner, "v")
        self.o = place.product(inner, place.width, "o")
        self.rotations = Rotations(self.rounds, factors, self.heads, self.width, settings.seed + place.layer)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LSHPublished:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0)).device
        if device.type != "meta":
            self.rotations.directions = self.rotations.directions.to(device)
        return self

    def values(self, x: Tensor, ctx: Context) -> Tensor:
        return self.v(x).unflatten(-1, (self.heads, self.width))  # type: ignore[no-any-return]

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        wide = torch.promote_types(x.dtype, torch.float32)  # buckets are chosen in float32
        q = self.q(x.to(wide)).unflatten(-1, (self.heads, self.width))
        if ctx.taps is not None:
            q = ctx.taps(f"{self.path}.q", q)
        k = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + self.width * NORM_EPSILON)
        if ctx.taps is not None:
            k = ctx.taps(f"{self.path}.k", k)
        length = x.shape[1]
        asked, keys = q.to(x.dtype).transpose(1, 2), k.to(x.dtype).transpose(1, 2)
        if length <= self.chunk:
            scores = (asked @ keys.transpose(2, 3)).to(wide)
            own = torch.eye(length, dtype=torch.bool, device=x.device)
            weights, _ = _normalised(scores.masked_fill(own, ITSELF))
            return Frozen({"weights": weights})
        with torch.no_grad():
            order = self._order(q)
        places = order % self._filled(length)  # [B, H, chunks, chunk]: which token stands where
        seen = self._around(places)
        scores = (_picked(asked, places) @ _picked(keys, seen).transpose(3, 4)).to(wide)
        scores = scores.masked_fill((seen >= length)[..., None, :], MASKED)
        weights, sums = _normalised(scores.masked_fill(places[..., None] == seen[..., None, :], ITSELF))
        back = torch.argsort(order.flatten(2), dim=-1)
        sums = sums.flatten(2).gather(2, back).unflatten(2, (self.rounds, -1))
        share = (sums - sums.logsumexp(2, keepdim=True)).exp()[..., None]
        return Frozen({"weights": weights, "seen": seen, "back": back, "share": share, "length": length})

    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        v, parts = values.transpose(1, 2), frozen.parts
        if frozen.weights is not None:
            return (frozen.weights.to(v.dtype) @ v).transpose(1, 2)
        weights = parts["weights"].to(v.dtype)
        if "seen" not in parts:
            dense: Tensor = weights @ v
            return dense.transpose(1, 2)
        y: Tensor = (weights @ _picked(v, parts["seen"])).flatten(2, 3)
        y = y.gather(2, parts["back"][..., None].expand(-1, -1, -1, y.shape[3]))
        y = (y.unflatten(2, (self.rounds, -1)) * parts["share"].to(v.dtype)).sum(2)
        return y[:, :, : parts["length"]].transpose(1, 2)

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return self.o(mixed.flatten(2))  # type: ignore[no-any-return]

    def _filled(self, length: int) -> int:
        return -(-length // self.chunk) * self.chunk

    def _order(self, q: Tensor) -> Tensor:
        """Which token of which round (round · length + token) stands where: [B, H, chunks, chunk]."""
        more = self._filled(q.shape[1]) - q.shape[1]
        buckets = F.pad(self.rotations.hash(q.detach()), (0, more), value=self.buckets)
        rounds = torch.arange(self.rounds, device=q.device)[:, None] * (self.buckets + 1)
        order = torch.argsort((buckets + rounds).flatten(2), dim=-1, stable=True)
        return order.view(*order.shape[:2], -1, self.chunk)

    def _around(self, x: Tensor) -> Tensor:
        """Each chunk [B, H, chunks, chunk] with its neighbours; the first follows on the last."""
        return torch.cat([x.roll(shift, 2) for shift in range(self.before, -self.after - 1, -1)], 3)


def _picked(x: Tensor, places: Tensor) -> Tensor:
    """x [B, H, T, K] at places [B, H, chunks, n]; what fills up is the last token, which its mask hides."""
    at = places.clamp(max=x.shape[2] - 1).flatten(2)[..., None].expand(-1, -1, -1, x.shape[3])
    return x.gather(2, at).view(*x.shape[:2], *places.shape[2:], x.shape[3])


def _normalised(scores: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(scores), and the logarithm of the sums."""
    sums = scores.logsumexp(-1, keepdim=True)
    return (scores - sums).exp(), sums[..., 0]
