"""Factorised attention patterns, strided and fixed, in which two steps connect any two tokens.

Child et al. 2019, Generating Long Sequences with Sparse Transformers. With stride l, a query i sees
  strided: the l tokens before it (A); every l-th token before it (B);
  fixed: its own block of l tokens (A); the last c tokens of every block, the block's summary (B).
A and B go to different heads, into one set per head, or to alternating layers. Blocks are counted from
the start of each document. With `distinct`, heads take other stretches of c tokens of each block as
summaries, as the paper advises; the first keeps the last stretch, which makes two steps enough.

Choices where the paper is silent: in (B) of `fixed` a token also sees itself, or the first tokens would
see nothing; both ways, "before" becomes "on either side". Work on the fast path falls with the pattern,
but for the union of the strided parts, which is worked out like dense attention under a mask. Inside
compiled blocks (B) of `strided` with packed documents is too. Every token is kept in the state: later ones
need all residues.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from armillary.nn.cost import Cost
from armillary.nn.example import Example, Limit
from armillary.nn.mask import Causal, Marked, Mask, PerHead, Spans, Window
from armillary.nn.mechanism import Capabilities, Place, mixers
from armillary.nn.mixers.attention import Attention, AttentionSettings, Look
from armillary.nn.positions.rope import RopeSettings

Pattern = Literal["fixed", "strided"]
PATTERNS: tuple[Pattern, Pattern] = ("fixed", "strided")
Part = tuple[bool, int | None]  # whether a head has part A; which stretch of a block (for `strided` 0) is its B


@mixers.register
class SparseTransformerSettings(AttentionSettings):
    """softmax(q kᵀ / √K + position) v over a strided or fixed pattern."""

    kind: ClassVar[str] = "sparse_transformer"
    source: ClassVar[str] = "Child et al. 2019, Generating Long Sequences with Sparse Transformers"
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_sparse_transformer.py: the paper's index sets, written as loops, and dense attention "
        "over them"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(
        causal=True, bidirectional=True, mask=True, state="span", rollback="truncate"
    )
    pattern: Pattern = Field("fixed", description="fixed suits text, strided images and music")
    stride: int = Field(128, gt=0, description="l: how far a query looks by itself; about √T")
    summary: int = Field(8, gt=0, description="c: tokens of every block that later blocks see (fixed)")
    distinct: bool = Field(True, description="whether heads take different tokens of a block as its summary (fixed)")
    combine: Literal["heads", "union", "layers"] = Field(
        "heads", description="heads: A in even heads, B in odd; union: both in one softmax; layers: A in even, B in odd"
    )

    @model_validator(mode="after")
    def _parts(self) -> SparseTransformerSettings:
        if self.pattern == "fixed" and self.summary > self.stride:
            raise ValueError(f"summary ({self.summary}) must be at most stride ({self.stride})")
        if self.combine == "heads" and self.heads == 1:
            raise ValueError("combine: heads needs two heads, one for each part")
        return self

    @classmethod
    def examples(cls) -> list[Example]:
        fixed, strided, rope = cls(stride=4, summary=1), cls(pattern="strided", stride=3), RopeSettings()
        layers, both_ways = {"layer": 1}, {"order": "bidirectional"}
        return [
            Example("fixed", fixed.derive(position=rope, kv_heads=2), compiled=True),
            Example("strided", strided.derive(position=rope), compiled=True),
            Example("fixed_union", cls(stride=5, summary=2, combine="union")),
            Example("strided_union", strided.derive(combine="union")),
            Example("fixed_layers", cls(stride=2, summary=1, combine="layers", distinct=False), layers),
            Example("strided_layers", strided.derive(combine="layers"), layers),
            Example("sinks", fixed.derive(sinks=True)),
            Example("fixed_both_ways", fixed, both_ways),
            Example("strided_both_ways", strided, both_ways),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        dense = Example("dense", AttentionSettings())
        fixed, strided = (cls(stride=64, combine="union", pattern=pattern) for pattern in PATTERNS)
        return [Limit("fixed", Example("wide", fixed), dense), Limit("strided", Example("wide", strided), dense)]

    def parts(self, layer: int) -> list[Part]:
        """What every head of a layer sees."""
        stretches = self.stride // self.summary if self.distinct and self.pattern == "fixed" else 1
        if self.combine == "heads":
            return [(True, None) if head % 2 == 0 else (False, head // 2 % stretches) for head in range(self.heads)]
        if self.combine == "layers" and layer % 2 == 0:
            return [(True, None)] * self.heads
        return [(self.combine == "union", head % stretches) for head in range(self.heads)]

    def build(self, place: Place) -> SparseTransformer:
        return SparseTransformer(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        biased = self.position is not None and "bias" in self.position.sites
        tracked = self.pattern == "fixed" and not biased and place.order != "bidirectional"
        return super().cost(place, length, itemsize) + Cost(0.0, 8 * length if tracked else 0)

    def pairs(self, place: Place, length: int) -> float:
        if self.sinks or (self.position is not None and "bias" in self.position.sites):
            return super().pairs(place, length)
        sides = 2 if place.order == "bidirectional" else 1
        total = 0.0
        for near, stretch in self.parts(place.layer):
            seen = 0
            if near:
                seen += 1 + sides * min(length - 1, self.stride if self.pattern == "strided" else self.stride - 1)
            if stretch is not None and self.pattern == "strided":
                seen += 1 + sides * ((length - 1) // self.stride)
            elif stretch is not None:
                first = self.stride - self.summary * (stretch + 1)
                seen += (not near) + sum(first <= t % self.stride < first + self.summary for t in range(length))
            total += length * min(length, seen)
        return total


class SparseTransformer(Attention):
    """x [B, T, D] → [B, T, D]."""

    def __init__(self, settings: SparseTransformerSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.parts = settings.parts(place.layer)
        self.fixed = settings.pattern == "fixed"
        self.stride, self.summary = settings.stride, settings.summary
        self.tracks = self.tracks or self.fixed

    def narrow(self, mask: Mask | None, look: Look) -> Mask | None:
        own = {part: self._seen(*part, look) for part in dict.fromkeys(self.parts)}
        seen = PerHead(tuple(own[part] for part in self.parts)) if len(own) > 1 else own[self.parts[0]]
        return super().narrow(seen, look)

    def _seen(self, near: bool, stretch: int | None, look: Look) -> Mask:
        both_ways = self.order == "bidirectional"
        parts: list[Mask] = []
        if near:
            parts.append(self._near(both_ways, look))
        if stretch is not None and self.fixed:
            assert look.keys is not None
            if not near:
                parts.append(Window(0, 0, 1, look.before))
            marked = self._marked(look.keys, stretch)
            parts.append(marked if both_ways else Causal(look.before) & marked)
        elif stretch is not None:
            parts.append(Window(None, None if both_ways else 0, self.stride, look.before))
        return parts[0] if len(parts) == 1 else parts[0] | parts[1]

    def _near(self, both_ways: bool, look: Look) -> Mask:
        far = self.stride - 1 if self.fixed else self.stride
        window = Window(far, far if both_ways else 0, 1, look.before)
        if not self.fixed:
            return window
        assert look.keys is not None
        return window & Spans(look.queries, look.keys, self.stride)

    def _marked(self, positions: Tensor, stretch: int) -> Marked:
        """The summary of every block; in positions counted from 0, n tokens hold at most n·c/(end of the stretch)."""
        stop = self.stride - self.summary * stretch
        place = positions % self.stride
        bound = positions.shape[1] * self.summary // stop
        return Marked((place >= stop - self.summary) & (place < stop), bound)
