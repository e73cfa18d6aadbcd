"""Long short-term memory: a cell that gates write to, clear and read (Hochreiter & Schmidhuber 1997).

With the forget gate of Gers, Schmidhuber & Cummins 2000, to whose bias 1 is added, so that the
cell holds at first what it reads (Jozefowicz, Zaremba & Sutskever 2015, An Empirical Exploration of Recurrent
Network Architectures); no peepholes.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from armillary.nn.mechanism import Place, mixers
from armillary.nn.mixers.recurrent import Recurrent, RecurrentSettings
from armillary.nn.ops.recurrent import CellKind


@mixers.register
class LSTMSettings(RecurrentSettings):
    """c_t = σ(f) c_{t−1} + σ(i) tanh(g), h_t = σ(o) tanh(c_t); i, f, g, o from W x_t + U h_{t−1} + b."""

    kind: ClassVar[str] = "lstm"
    source: ClassVar[str] = "Hochreiter & Schmidhuber 1997, Long Short-Term Memory"
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_recurrent.py: PyTorch's LSTM from the same weights; outputs, gradients"
    )
    forget: float = Field(1.0, description="added to the bias of the forget gate, which starts at 0")

    @property
    def cell(self) -> CellKind:
        return "lstm"

    def build(self, place: Place) -> Recurrent:
        return Recurrent(self, place, self.forget)
