"""The iterative recursive attention head: a few looks at the text, each of which becomes a row of its own.

Tutek & Šnajder 2018, Iterative Recursive Attention Model for Interpretable Sequence Classification. A
control state attends to the tokens; what it finds, r, updates the state (a GRU), and a highway layer
makes of it a summary that later looks can attend to beside the tokens. The last state is classified.
This is a head, not a mixer: it reads one vector off a finished sequence, both ways. Its looks are the
explanation (`looks`). Left open by the abstract and chosen here: scores are divided by √D, summaries
are g ⊙ relu(W r) + (1 − g) ⊙ r, and no penalty drives looks apart.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary.nn.cost import linear_flops
from armillary.nn.example import Example
from armillary.nn.heads.base import heads
from armillary.nn.heads.classification import ClassifierSettings
from armillary.nn.mechanism import Place
from armillary.nn.ops.recurrent import gru_step


@heads.register
class IterativeHeadSettings(ClassifierSettings):
    """logits = c_S Wᵀ + b, c_s = GRU(r_s, c_{s−1}), r_s = attention of c_{s−1} over tokens and summaries."""

    kind: ClassVar[str] = "iterative"
    source: ClassVar[str] = (
        "Tutek & Šnajder 2018, Iterative Recursive Attention Model for Interpretable Sequence Classification"
    )
    oracle: ClassVar[str] = "tests/nn/heads/test_iterative.py: the steps written out, over PyTorch's GRU cell"
    steps: int = Field(3, gt=0, description="how many looks")
    recursive: bool = Field(True, description="whether looks also see the summaries of earlier ones")

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("published", cls(classes=3)),
            Example("tokens_only", cls(classes=3, recursive=False)),
            Example("one_look", cls(classes=3, steps=1)),
        ]

    def build(self, place: Place, vocabulary: int, embedding: nn.Module) -> IterativeHead:
        return IterativeHead(self, place)

    def flops(self, width: int, vocabulary: int, length: int) -> float:
        total = linear_flops(width, width, length) + linear_flops(width, self.classes, 1, True)
        for step in range(self.steps):
            rows = length + (step if self.recursive else 0)
            total += rows * (4.0 * width + 6)  # scores, their scale, softmax, sum
            total += 2 * linear_flops(width, 3 * width, 1, True) + 10 * width  # the GRU
        if self.recursive:
            total += (self.steps - 1) * (2 * linear_flops(width, width, 1, True) + linear_flops(width, width, 1))
            total += (self.steps - 1) * 5.0 * width  # the summary's gate
        return total


class IterativeHead(nn.Module):
    """h [B, T, D], padding [B, T] → [B, classes]."""

    def __init__(self, settings: IterativeHeadSettings, place: Place) -> None:
        super().__init__()
        width = place.width
        self.steps, self.recursive = settings.steps, settings.recursive
        self.start = nn.Parameter(torch.empty(width))
        self.k = place.product(width, width, "k")
        self.found = place.product(width, 3 * width, "cell", True)  # of r: reset, update, new
        self.held = place.product(width, 3 * width, "cell", True)  # of the state
        if settings.recursive and settings.steps > 1:
            self.gate = place.product(width, width, "gate", True)
            self.summary = place.product(width, width, "up", True)
        self.product = place.product(width, settings.classes, "head", True)

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.normal_(self.start, generator=generator)

    def forward(self, h: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.product(self._read(h, padding)[0])  # type: ignore[no-any-return]

    def looks(self, h: Tensor, padding: Tensor | None = None) -> list[Tensor]:
        """The weights of every step over the tokens and, behind them, the summaries there are: step s
        [B, T + s], or [B, T] when it sees tokens only."""
        return self._read(h, padding)[1]

    def _read(self, h: Tensor, padding: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The last control state [B, D], and the weights."""
        state = self.start.to(h.dtype).expand(h.shape[0], -1)
        rows, keys, looks = h, self.k(h), []
        for step in range(self.steps):
            scores = (keys @ state[..., None])[..., 0]
            scores = (scores if scores.dtype == torch.float64 else scores.float()) * h.shape[-1] ** -0.5
            if padding is not None:
                scores = scores.masked_fill(~padding, torch.finfo(scores.dtype).min)
            weights = torch.softmax(scores, -1)
            looks.append(weights)
            r = (weights.to(h.dtype)[:, None] @ rows)[:, 0]
            state = gru_step(self.found(r), self.held(state), state)
            if self.recursive and step + 1 < self.steps:
                z = r + torch.sigmoid(self.gate(r)) * (torch.relu(self.summary(r)) - r)
                rows, keys = torch.cat([rows, z[:, None]], 1), torch.cat([keys, self.k(z)[:, None]], 1)
                if padding is not None:
                    padding = torch.cat([padding, torch.ones_like(padding[:, :1])], 1)
        return state, looks
