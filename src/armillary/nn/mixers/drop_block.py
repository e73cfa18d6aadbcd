"""Attention that hides what it looks at most, in training updates: drop-block guided by attention.

Yin et al. 2020, Dual-Attention Guided Dropblock Module for Weakly Supervised Object Localization, for
rows of text. In an update a row is taken with probability `rate`. In it every query loses the spans of
`size` tokens to which it gives most (the mean weight over heads; a span counts by its highest one), and
every token its `channels` most active features of the heads' joint result, so that the model learns
to use the rest. Weights and activities only choose, no gradient flows through the choice. Otherwise,
and outside of updates, this is dense attention, bit for bit. Chosen here: a query chooses from what it
sees itself, so that a causal row learns nothing of what comes later; it never loses itself; and rows
that are not taken stay as they are, where the paper weights them by the sigmoid of the map.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from armillary.nn.context import Context
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import Capabilities, Frozen, Place, mixers
from armillary.nn.mixers.attention import Attention, AttentionSettings, Scoring
from armillary.nn.positions.rope import RopeSettings
from armillary.nn.training import uniform


@mixers.register
class DropBlockSettings(AttentionSettings):
    """Dense attention that loses its strongest spans and features in training updates."""

    kind: ClassVar[str] = "drop_block"
    source: ClassVar[str] = (
        "Yin et al. 2020, Dual-Attention Guided Dropblock Module for Weakly Supervised Object Localization"
    )
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_drop_block.py: dense attention bit for bit; the spans found by a loop over queries"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(
        bidirectional=True, mask=True, state="span", rollback="truncate", noise=True
    )
    rate: float = Field(0.75, ge=0, le=1, description="chance that a row is taken in an update")
    spans: int = Field(1, ge=0, description="how many spans a query loses")
    size: int = Field(7, gt=0, description="tokens per span; spans begin at multiples of it")
    channels: int = Field(0, ge=0, description="how many of its most active features a token loses")

    @model_validator(mode="after")
    def _something(self) -> DropBlockSettings:
        if not self.spans and not self.channels:
            raise ValueError("with spans: 0 and channels: 0 nothing is dropped; use kind: attention")
        return self

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("spans", cls(rate=0.5, size=3, position=RopeSettings()), compiled=True),
            Example("both", cls(rate=0.5, spans=2, size=2, channels=3, kv_heads=2), {"order": "bidirectional"}),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("dense", Example("drops", cls()), Example("dense", AttentionSettings()))]

    def build(self, place: Place) -> DropBlockAttention:
        return DropBlockAttention(self, place)


@dataclass(frozen=True)
class Dropped:
    """A change of scores that hides each query's strongest spans in the rows that are taken [B]."""

    how: Scoring
    taken: Tensor
    spans: int
    size: int

    def __call__(self, scores: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """scores [B, H, q, S]."""
        scores = scores if self.how.modify is None else self.how.modify(scores, rows, columns)
        lost = self.lost(scores.detach(), rows, columns) & self.taken[:, None, None]
        return scores.masked_fill(lost[:, None], -torch.inf)

    def lost(self, scores: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The keys [B, q, S] in the strongest spans of each query, itself excepted."""
        if self.how.bias is not None:
            scores = scores + self.how.bias(rows, columns).detach().to(scores.dtype)
        if self.how.mask is not None:
            scores = scores.masked_fill(~self.how.mask.rows(rows, columns), torch.finfo(scores.dtype).min)
        own = rows[:, None] == columns
        weights = torch.softmax(scores, -1).mean(1).masked_fill(own, 0.0)
        span = columns // self.size - columns[0] // self.size  # of each key
        count = (columns.shape[0] + self.size - 1) // self.size + 1
        best = weights.new_zeros(*weights.shape[:2], count)
        best = best.scatter_reduce(2, span.expand_as(weights), weights, "amax")
        strongest = best.topk(min(self.spans, count), -1).indices
        chosen = torch.zeros_like(best, dtype=torch.bool).scatter(2, strongest, True)
        return chosen.gather(2, span.expand_as(weights)) & ~own


class DropBlockAttention(Attention):
    """x [B, T, D] → [B, T, D]."""

    def __init__(self, settings: DropBlockSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.rate, self.spans, self.size, self.channels = (
            settings.rate,
            settings.spans,
            settings.size,
            settings.channels,
        )

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        frozen = super().freeze(x, ctx)
        taken = self._taken(x, ctx)
        if taken is None or not self.spans:
            return frozen
        how = frozen.parts["scoring"]
        dropped = Dropped(how, taken, self.spans, self.size)
        return Frozen({**frozen.parts, "scoring": dataclasses.replace(how, modify=dropped)})

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        taken = self._taken(x, ctx)
        if taken is not None and self.channels:
            joined = mixed.flatten(2)
            strongest = joined.detach().abs().topk(min(self.channels, joined.shape[2]), -1).indices
            lost = torch.zeros_like(joined, dtype=torch.bool).scatter(2, strongest, True)
            mixed = joined.masked_fill(lost & taken[:, None, None], 0.0).view_as(mixed)
        return super().finish(mixed, x, ctx)

    def _taken(self, x: Tensor, ctx: Context) -> Tensor | None:
        """The rows that this update drops from, [B]."""
        drawn = uniform(ctx, self.path, "taken", (x.shape[0],), x)
        return None if drawn is None or not self.rate else drawn < self.rate
