"""Attention without queries: keys are compared with keys.

Borji 2023, Key-Value Transformer: A = softmax(K Kᵀ / √K), symmetric before its rows are normalised, with
a product fewer. The variant KV+Pos adds a two-dimensional encoding of the pair (i, j), projected to a
scalar. What is projected is open to us: an encoding of i beside one of j would, after a linear
projection, give a term of i that the softmax cancels, so the encoding of a pair is here the outer
product of two sinusoidal ones of `pair_width` features, and its projection a matrix per head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from armillary.nn.context import Context
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mask import Mask
from armillary.nn.mechanism import Capabilities, Place, mixers
from armillary.nn.mixers.attention import Attention, AttentionSettings, Look, Scoring
from armillary.nn.positions.rope import RopeSettings


@mixers.register
class KeyValueSettings(AttentionSettings):
    """softmax(k kᵀ / √K + e(i, j)) v."""

    kind: ClassVar[str] = "key_value"
    source: ClassVar[str] = "Borji 2023, Key-Value Transformer"
    oracle: ClassVar[str] = "tests/nn/mixers/test_key_value.py: attention whose query and key weights are one"
    capabilities: ClassVar[Capabilities] = Capabilities(
        causal=True, bidirectional=True, prefix=True, mask=True, state="span", rollback="truncate"
    )
    pair_width: int = Field(
        0, ge=0, multiple_of=2, description="features of the encoding of each of a pair's two positions; 0: none (KV)"
    )

    @model_validator(mode="after")
    def _own_keys(self) -> KeyValueSettings:
        if self.groups != self.heads:
            raise ValueError(
                f"kv_heads ({self.kv_heads}) must be heads ({self.heads}): heads that share keys would agree"
            )
        if self.pair_width and self.position is not None and "bias" in self.position.sites:
            raise ValueError("pair_width adds scores by position, and so does the position: give one of them")
        return self

    @classmethod
    def examples(cls) -> list[Example]:
        both_ways = {"order": "bidirectional"}
        return [
            Example("plain", cls(), compiled=True),
            Example("rotated", cls(position=RopeSettings())),
            Example("paired", cls(pair_width=4)),
            Example("both_ways", cls(), both_ways),
            Example("paired_both_ways", cls(heads=2, pair_width=6), both_ways),
            Example("prefix", cls(), {"order": "prefix"}),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("tied", Example("one_head", cls(heads=1)), _tied)]

    def build(self, place: Place) -> KeyValue:
        return KeyValue(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        each, width = self.features(place.width), self.pair_width
        flops = -linear_flops(place.width, self.heads * each, length, self.bias)
        flops -= self.headed_flops(self.heads, each, length, True)
        if width:
            flops += width * length * 2.5  # angles, sines, cosines; then two products and a sum
            flops += self.heads * length * width * (2.0 * width) + self.heads * length**2 * (2.0 * width + 1)
        positions = 8 * length if width and place.order != "bidirectional" else 0
        return super().cost(place, length, itemsize) + Cost(flops, positions)


class KeyValue(Attention):
    """x [B, T, D] → [B, T, D]; pair [H, m, m] where pairs are encoded."""

    def __init__(self, settings: KeyValueSettings, place: Place) -> None:
        super().__init__(settings, place)
        del self.q
        if settings.norm is not None:
            del self.q_norm
        width = settings.pair_width
        self._speed = [10000.0 ** (-feature / width) for feature in range(0, width, 2)] if width else []
        self.pair = nn.Parameter(torch.empty(self.heads, width, width)) if width else None
        self.tracks = self.tracks or width > 0

    def reset(self, generator: torch.Generator | None) -> None:
        super().reset(generator)
        if self.pair is not None:
            nn.init.normal_(self.pair, std=1 / self.pair.shape[1], generator=generator)

    def _turned(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        k = self._keys(x, ctx)
        return self.position.rotate(k, k, ctx.where(x)) if self.position is not None and self.rotates else (k, k)

    def _scoring(self, mask: Mask | None, look: Look) -> Scoring:
        how = super()._scoring(mask, look)
        if self.pair is None:
            return how
        assert look.keys is not None
        wide = torch.promote_types(self.pair.dtype, torch.float32)
        queries = self._encoded(look.queries, wide)[:, None] @ self.pair.to(wide)
        pairs: Callable[[Tensor, Tensor], Tensor] = partial(_pairs, queries, self._encoded(look.keys, wide))
        return Scoring(mask, pairs, how.modify)

    def _encoded(self, positions: Tensor, kind: torch.dtype) -> Tensor:
        """[B or 1, T] → [B or 1, T, m]."""
        angles = positions[..., None].to(kind) * torch.tensor(self._speed, dtype=kind, device=positions.device)
        return torch.cat([angles.sin(), angles.cos()], -1)


def _pairs(queries: Tensor, keys: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[B or 1, H, q, S] from the projected queries' [B or 1, H, T, m] and the keys' encodings [B or 1, S, m]."""
    return queries[:, :, rows] @ keys[:, None, columns].transpose(2, 3)


def _tied(mixer: KeyValue, x: Tensor, ctx: Context) -> Tensor:
    """softmax(k kᵀ / √K) v Wᵒ of one causal head."""
    k, v = x @ mixer.k.weight.t(), x @ mixer.v.weight.t()
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    scores = (k @ k.transpose(1, 2) / mixer.width**0.5).masked_fill(later, -torch.inf)
    return torch.softmax(scores, -1) @ v @ mixer.o.weight.t()  # type: ignore[no-any-return]
