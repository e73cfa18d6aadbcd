"""The gated recurrent unit: the state is a running mean whose weights gates decide (Cho et al. 2014).

As in PyTorch and cuDNN the reset gate acts on the product with the state; the paper has it act on the
state before the product.
"""

from __future__ import annotations

from typing import ClassVar

from armillary.nn.example import Example
from armillary.nn.mechanism import mixers
from armillary.nn.mixers.recurrent import RecurrentSettings
from armillary.nn.ops.recurrent import CellKind


@mixers.register
class GRUSettings(RecurrentSettings):
    """h_t = z h_{t−1} + (1 − z) tanh(W x_t + r (U h_{t−1})), r and z gates of x_t and h_{t−1}."""

    kind: ClassVar[str] = "gru"
    source: ClassVar[str] = "Cho et al. 2014, Learning Phrase Representations using RNN Encoder-Decoder"
    oracle: ClassVar[str] = "tests/nn/mixers/test_recurrent.py: PyTorch's GRU from the same weights; outputs, gradients"

    @classmethod
    def examples(cls) -> list[Example]:
        return [Example("forward", cls(hidden=12))]

    @property
    def cell(self) -> CellKind:
        return "gru"
