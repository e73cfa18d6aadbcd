"""Attention by locality-sensitive hashing, causal by construction.

Kitaev, Kaiser & Levskaya 2020, Reformer: The Efficient Transformer. As published: queries and keys
are one product, keys have length 1, hashes are argmax [xR; −xR] with random R, several rounds are
joined in one softmax in which a pair counts once (rounds weighted by their normalisers, with scores
less log c for pairs found c times, come to the same), and a token sees itself only where there is no
other. Published chunks make what a token sees depend on how later tokens sort; here each token sees
the last `window` tokens of its bucket, in every round, so chunks of any size give the same numbers.
The published form is `lsh_published`. The score is q·k without 1/√K, as in the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from armillary.nn.context import Context
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import Place, mixers
from armillary.nn.mixers.banded import BandedSettings, BandMixer, full_shared


def check_buckets(buckets: int | tuple[int, ...]) -> None:
    """Raises ValueError for numbers of buckets that directions cannot give."""
    factors = buckets if isinstance(buckets, tuple) else (buckets,)
    if buckets != 1 and (not factors or any(one < 2 or one % 2 for one in factors)):
        raise ValueError(f"buckets ({buckets}) must be even, since each direction gives two")


class HashSettings(BandedSettings):
    """Settings of mixers that hash."""

    rounds: int = Field(2, gt=0, description="rounds of hashing; more find more of the attention")
    buckets: int | tuple[int, ...] = Field(
        64, description="buckets of a round, an even number (1: all in one); a list multiplies, for many at less work"
    )
    seed: int = Field(0, description="seed of the random directions; the layer's number is added to it")

    @model_validator(mode="after")
    def _even(self) -> Self:
        check_buckets(self.buckets)
        return self

    @property
    def factors(self) -> tuple[int, ...]:
        return self.buckets if isinstance(self.buckets, tuple) else (self.buckets,)

    def orders(self) -> list[tuple[int, int]]:
        return [(math.prod(self.factors), self.window)] * self.rounds

    def grouping(self, width: int) -> float:
        columns = self.rounds * sum(one // 2 for one in self.factors)
        return columns * (2 * width + 1) + 3 * width + 2


@mixers.register
class LSHSettings(HashSettings):
    """softmax(q kᵀ) v over the last tokens of the same bucket, in any round."""

    kind: ClassVar[str] = "lsh"
    source: ClassVar[str] = "Kitaev, Kaiser & Levskaya 2020, Reformer: The Efficient Transformer"
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_lsh.py: the paper's rounds, normalisers and counts as loops over tokens"
    )

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("rounds", cls(buckets=4, window=3), compiled=True),
            Example("factors", cls(heads=2, rounds=3, buckets=(2, 4), window=2, head_width=6)),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        whole = {"rounds": 1, "buckets": 1, "window": 64}
        return [
            Limit("one_bucket", Example("one_bucket", cls(**whole)), full_shared),
            Limit("counted_once", Example("again", cls(**{**whole, "rounds": 3})), Example("one", cls(**whole))),
        ]

    def build(self, place: Place) -> LSH:
        return LSH(self, place)


class Rotations:
    """Random directions, drawn from a recorded seed: [H, K, rounds · Σ factors / 2], float32.

    No buffer: casting the weights to bf16, or building on the meta device, must leave them alone.
    """

    def __init__(self, rounds: int, factors: tuple[int, ...], heads: int, width: int, seed: int) -> None:
        self.rounds, self.factors = rounds, factors
        generator = torch.Generator(device="cpu").manual_seed(seed)
        shape = (heads, width, rounds * sum(one // 2 for one in factors))
        self.directions = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    def hash(self, q: Tensor) -> Tensor:
        """q [B, T, H, K] → buckets [B, H, rounds, T]."""
        batch, length, heads, _ = q.shape
        if self.factors == (1,):
            return torch.zeros(batch, heads, self.rounds, length, dtype=torch.int64, device=q.device)
        # Products of float32 numbers summed in float64: no order of summation, so no neighbouring row
        # and no chunking, moves a token to another bucket.
        turned = q.transpose(1, 2).double() @ self.directions.to(q.device).double()
        turned = turned.unflatten(-1, (self.rounds, -1)).permute(0, 1, 3, 2, 4)
        bucket: Tensor | None = None
        radix = 1
        for part, factor in zip(turned.split([one // 2 for one in self.factors], -1), self.factors, strict=True):
            nearest = part.abs().argmax(-1)  # the largest of [part, −part], without forming it
            opposite = part.gather(-1, nearest[..., None])[..., 0] < 0
            found = (nearest + opposite * (factor // 2)) * radix
            bucket, radix = found if bucket is None else bucket + found, radix * factor
        assert bucket is not None
        return bucket


class LSH(BandMixer):
    """x [B, T, D] → [B, T, D]; its state is a ring per bucket and round."""

    def __init__(self, settings: HashSettings, place: Place) -> None:
        super().__init__(settings, place)
        seed = settings.seed * 1_000_003 + place.layer
        self.rotations = Rotations(settings.rounds, settings.factors, self.heads, self.width, seed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LSH:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0)).device
        if device.type != "meta":
            self.rotations.directions = self.rotations.directions.to(device)
        return self

    def groups(self, q: Tensor, ctx: Context, real: Tensor | None) -> Tensor:
        return self.rotations.hash(q)
