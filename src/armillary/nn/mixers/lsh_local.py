"""Hashing and a local window in one softmax: content that is alike, wherever it is, and what is near.

The sparse part of the hybrids that join both (Chen et al. 2021, Scatterbrain: Unifying Sparse and
Low-rank Attention Approximation; Kitaev, Kaiser & Levskaya 2020, Reformer, alternates the two by
layer). Here a token sees the last `window` tokens of its bucket in every round and the last `local`
tokens whatever their bucket; a pair counts once, however often it is found.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from armillary.nn.context import Context
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import Place, mixers
from armillary.nn.mixers.banded import full_shared
from armillary.nn.mixers.lsh import LSH, HashSettings


@mixers.register
class LSHLocalSettings(HashSettings):
    """softmax(q kᵀ) v over the last tokens of the same bucket and the last tokens."""

    kind: ClassVar[str] = "lsh_local"
    source: ClassVar[str] = "Kitaev, Kaiser & Levskaya 2020, Reformer: The Efficient Transformer; with a local window"
    oracle: ClassVar[str] = "tests/nn/mixers/test_lsh.py: the union of buckets and window as loops over tokens"
    local: int = Field(64, gt=0, description="nearest tokens that a token sees besides those of its buckets")

    @classmethod
    def examples(cls) -> list[Example]:
        return [Example("both", cls(buckets=4, window=3, local=2)), Example("wide", cls(rounds=1, window=2, local=5))]

    @classmethod
    def limits(cls) -> list[Limit]:
        whole: dict[str, Any] = {"buckets": 4, "window": 2}
        return [Limit("all_near", Example("all_near", cls(local=64, **whole)), full_shared)]

    def orders(self) -> list[tuple[int, int]]:
        return [*super().orders(), (1, self.local)]

    def build(self, place: Place) -> LSHLocal:
        return LSHLocal(self, place)


class LSHLocal(LSH):
    """x [B, T, D] → [B, T, D]; its state is a ring per bucket and round and one of the last tokens."""

    def groups(self, q: Tensor, ctx: Context, real: Tensor | None) -> Tensor:
        buckets = super().groups(q, ctx, real)
        return torch.cat([buckets, torch.zeros_like(buckets[:, :, :1])], 2)
