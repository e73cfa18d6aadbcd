"""The simple recurrent network: one state, one product (Elman 1990, Finding Structure in Time)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from armillary.nn.example import Example
from armillary.nn.mechanism import mixers
from armillary.nn.mixers.recurrent import RecurrentSettings
from armillary.nn.ops.recurrent import CellKind


@mixers.register
class RNNSettings(RecurrentSettings):
    """h_t = tanh(W x_t + U h_{t−1} + b)."""

    kind: ClassVar[str] = "rnn"
    source: ClassVar[str] = "Elman 1990, Finding Structure in Time"
    oracle: ClassVar[str] = "tests/nn/mixers/test_recurrent.py: PyTorch's RNN from the same weights; outputs, gradients"
    activation: Literal["tanh", "relu"] = Field("tanh", description="what the sum passes")

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("forward", cls(hidden=12)),
            Example("both_ways", cls(hidden=6, activation="relu"), {"order": "bidirectional"}),
        ]

    @property
    def cell(self) -> CellKind:
        return "rnn_tanh" if self.activation == "tanh" else "rnn_relu"
