"""Multi-view attention: every head has a field of its own, from a few neighbours to the whole sequence.

Wang et al. 2021, Multi-View Self-Attention Based Transformer for Speaker Recognition. The paper's set of
fields is not known to us: here the radii of the local heads grow as a geometric series from `narrowest`
towards `model.context`, and the last heads see everything. Causal heads look back only.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from armillary.nn.example import Example, Limit
from armillary.nn.mask import Causal, Mask, PerHead, Window
from armillary.nn.mechanism import Capabilities, Place, mixers
from armillary.nn.mixers.attention import Attention, AttentionSettings, Look
from armillary.nn.positions.rope import RopeSettings


@mixers.register
class MultiViewSettings(AttentionSettings):
    """softmax(q kᵀ / √K + position) v over as many neighbours as the head's view allows."""

    kind: ClassVar[str] = "multi_view"
    source: ClassVar[str] = "Wang et al. 2021, Multi-View Self-Attention Based Transformer for Speaker Recognition"
    oracle: ClassVar[str] = "tests/nn/mixers/test_multi_view.py: the formula under each head's band, written as loops"
    capabilities: ClassVar[Capabilities] = Capabilities(
        causal=True, bidirectional=True, mask=True, state="span", rollback="truncate"
    )
    narrowest: int = Field(4, gt=0, description="how many tokens away the first head looks")
    full: int = Field(1, gt=0, description="how many heads, the last ones, see everything")

    @model_validator(mode="after")
    def _views(self) -> MultiViewSettings:
        if self.full > self.heads:
            raise ValueError(f"full ({self.full}) is more than the heads ({self.heads})")
        return self

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("causal", cls(narrowest=2, kv_heads=2, position=RopeSettings()), {"length": 16}),
            Example("both_ways", cls(narrowest=1, full=2), {"order": "bidirectional", "length": 9}),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("all_full", Example("all_full", cls(full=4)), Example("dense", AttentionSettings()))]

    def radii(self, length: int) -> list[int | None]:
        """How far every head looks, None: without end; the series would next reach `length`."""
        local = self.heads - self.full
        growth = max(1.0, length / self.narrowest) ** (1 / max(1, local))
        return [round(self.narrowest * growth**head) for head in range(local)] + [None] * self.full

    def build(self, place: Place) -> MultiView:
        return MultiView(self, place)

    def pairs(self, place: Place, length: int) -> float:
        if self.sinks or (self.position is not None and "bias" in self.position.sites):
            return super().pairs(place, length)
        sides = 2 if place.order == "bidirectional" else 1
        seen = [
            length if radius is None else min(radius, length - 1) * sides + 1 for radius in self.radii(place.length)
        ]
        return float(sum(length * min(length, each) for each in seen))


class MultiView(Attention):
    """x [B, T, D] → [B, T, D]; heads that see everything need every token, so the state keeps them all."""

    def __init__(self, settings: MultiViewSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.radii = settings.radii(place.length)

    def narrow(self, mask: Mask | None, look: Look) -> Mask | None:
        both_ways = self.order == "bidirectional"
        everything = Window(None, None) if both_ways else Causal(look.before)
        own = {r: Window(r, r if both_ways else 0, 1, look.before) for r in self.radii if r is not None}
        views = [everything if radius is None else own[radius] for radius in self.radii]
        return super().narrow(PerHead(tuple(views)), look)
