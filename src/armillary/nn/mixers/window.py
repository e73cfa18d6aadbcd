"""Sliding-window attention: each head looks at the nearest tokens only, and the state is a ring of them.

Beltagy, Peters & Cohan 2020, Longformer: The Long-Document Transformer (its local part, with dilation).
Windows may differ between heads; `multi_view` spreads them up to the whole sequence, `longformer` adds
global tokens. Alternating blocks of local and global attention (Song et al. 2023, Zebra) is a pattern in
the recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from pydantic import Field, model_validator

from armillary.nn.example import Example, Limit
from armillary.nn.mask import Mask, PerHead, Window
from armillary.nn.mechanism import Capabilities, Place, mixers
from armillary.nn.mixers.attention import Attention, AttentionSettings, Look
from armillary.nn.positions.alibi import AlibiSettings
from armillary.nn.positions.rope import RopeSettings
from armillary.nn.state import State, WindowState
from armillary.nn.tape import Buffer, NoStep, Tape


@mixers.register
class WindowSettings(AttentionSettings):
    """softmax(q kᵀ / √K + position) v over the nearest tokens."""

    kind: ClassVar[str] = "window"
    source: ClassVar[str] = "Beltagy, Peters & Cohan 2020, Longformer: The Long-Document Transformer"
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_window.py: transformers' Mistral layer (causal) and Longformer layer (both ways), "
        "dense attention under the mask written out"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(
        causal=True, bidirectional=True, mask=True, state="window", rollback="snapshot"
    )
    window: int | tuple[int, ...] = Field(
        256,
        description="tokens that a query sees on its left, itself included (both ways: as many on its right)"
        "; a list gives each head its own",
    )
    dilation: int | tuple[int, ...] = Field(
        1, description="a query sees every n-th token only, so that its window reaches n times as far; a list for heads"
    )

    @model_validator(mode="after")
    def _windows(self) -> WindowSettings:
        for name, value in (("window", self.window), ("dilation", self.dilation)):
            each = value if isinstance(value, tuple) else (value,)
            if any(one < 1 for one in each):
                raise ValueError(f"{name} must be at least 1")
            if isinstance(value, tuple) and len(value) != self.heads:
                raise ValueError(f"{name} lists {len(value)} heads, but there are {self.heads}")
        return self

    @classmethod
    def examples(cls) -> list[Example]:
        rope, both_ways = RopeSettings(), {"order": "bidirectional"}
        return [
            Example("narrow", cls(window=3, kv_heads=2, position=rope), compiled=True),
            Example("per_head", cls(window=(1, 2, 5, 40), kv_heads=2)),
            Example("dilated", cls(window=3, dilation=(1, 1, 2, 3), position=rope)),
            Example("biased", cls(window=4, position=AlibiSettings())),
            Example("sinks", cls(window=3, sinks=True)),
            Example("others", cls(window=3, diagonal=False)),
            Example("both_ways", cls(window=3, position=rope), both_ways),
            Example("both_ways_dilated", cls(window=2, dilation=(1, 2, 3, 4)), both_ways),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        dense = Example("dense", AttentionSettings(position=RopeSettings()))
        return [Limit("wide", Example("wide", cls(window=64, position=RopeSettings())), dense)]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(tokens back, dilation) of every head."""
        windows = self.window if isinstance(self.window, tuple) else (self.window,) * self.heads
        gaps = self.dilation if isinstance(self.dilation, tuple) else (self.dilation,) * self.heads
        return [((window - 1) * gap, gap) for window, gap in zip(windows, gaps, strict=True)]

    def build(self, place: Place) -> WindowAttention:
        return WindowAttention(self, place)

    def pairs(self, place: Place, length: int) -> float:
        if self.sinks or (self.position is not None and "bias" in self.position.sites):
            return float(self.heads * length * length)
        total = 0.0
        for back, gap in self.spans:
            ahead = back if place.order == "bidirectional" else 0
            total += length * min(length, 1 + sum(Window(back, ahead, gap).spans(length)))
        return total

    def kept(self, length: int) -> int:
        return max(back for back, _ in self.spans) + 1


class WindowAttention(Attention):
    """x [B, T, D] → [B, T, D]; its state is a ring of the widest head's tokens."""

    def __init__(self, settings: WindowSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.spans = settings.spans
        self.window = settings.kept(0)

    def record(self, tape: Tape, x: Buffer, state: State) -> Buffer:
        spans = set(self.spans)
        back, gap = spans.pop()
        if type(self) is not WindowAttention or spans or gap != 1:
            raise NoStep("windows with gaps or of several widths")
        assert isinstance(state, WindowState)
        if not tape.dry:  # all tokens of a step are there before the first looks back
            state.widen(back + tape.rows)
        return self.recorded(tape, x, state, back)

    def narrow(self, mask: Mask | None, look: Look) -> Mask | None:
        return super().narrow(self._windows(look), look)

    def _windows(self, look: Look, joined: Callable[[Mask], Mask] | None = None) -> Mask:
        """Every head's window, `joined` with what else there is."""
        own: dict[tuple[int, int], Mask] = {}
        for back, gap in self.spans:
            ahead = back if self.order == "bidirectional" else 0
            window = Window(back, ahead, gap, look.before, keys=look.index)
            own[back, gap] = window if joined is None else joined(window)
        return PerHead(tuple(own[span] for span in self.spans)) if len(own) > 1 else next(iter(own.values()))
