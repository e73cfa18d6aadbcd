"""No positions at all: with a causal mask order can still be learned.

Haviv et al. 2022, Transformer Language Models without Positional Encodings Still Learn Positional
Information.
"""

from __future__ import annotations

from typing import ClassVar

from armillary.nn.mechanism import Place, Position, PositionSettings, positions


@positions.register
class NoPositionSettings(PositionSettings):
    """Nothing is added anywhere."""

    kind: ClassVar[str] = "none"
    source: ClassVar[str] = "Haviv et al. 2022, Transformer Language Models without Positional Encodings"
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_attention.py: transformers' GPT-2 layer, which knows no positions itself"
    )

    def build(self, place: Place, heads: int = 1, head_width: int = 0) -> NoPosition:
        return NoPosition()


class NoPosition(Position):
    """Acts nowhere."""
