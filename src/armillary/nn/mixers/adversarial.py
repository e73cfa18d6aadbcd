"""Attention with an adversary, which learns in training which pairs of tokens to hide.

Wu et al. 2023, Adversarial Self-Attention for Language Understanding. Outside of an
adversarial call this is dense attention, bit for bit; in one (objective `adversarial`) an adversary
with a single head of its own scores the pairs from the layer's input, through which it sends no
gradient. Pairs with a score of 0 or less lose PENALTY in every head. Its gradient is that of a soft
mask σ(score), reversed: it raises what the objective lowers, and pays for what it hides. A token
always sees itself. Two choices of ours: the price is taken per visible pair, so that it means the
same at every length, and the slope of the penalty is 1 for a unit of the mask instead of PENALTY,
which would leave the model nothing of a clipped gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from armillary.nn.context import Context
from armillary.nn.example import Example, Limit
from armillary.nn.mask import Mask
from armillary.nn.mechanism import Capabilities, Frozen, Place, mixers
from armillary.nn.mixers.attention import Attention, AttentionSettings
from armillary.nn.ops.attend import Modify
from armillary.nn.positions.rope import RopeSettings
from armillary.nn.training import attach

PENALTY = 1e4
BLOCK = 512  # query rows at a time


@mixers.register
class AdversarialSettings(AttentionSettings):
    """Dense attention that an adversary masks in the adversarial calls of training."""

    kind: ClassVar[str] = "adversarial"
    source: ClassVar[str] = "Wu et al. 2023, Adversarial Self-Attention for Language Understanding"
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_adversarial.py: dense attention bit for bit; the masked pass and its slopes written out"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(
        bidirectional=True, prefix=True, mask=True, state="span", rollback="truncate"
    )
    adversary: int = Field(64, gt=0, description="features of the adversary's head")
    keep: float = Field(0.25, ge=0, description="what the adversary pays for hiding all pairs, in nats")

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("causal", cls(adversary=4, position=RopeSettings()), compiled=True),
            Example("both_ways", cls(adversary=4, kv_heads=2), {"order": "bidirectional"}),
            Example("prefix", cls(adversary=4), {"order": "prefix"}),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("dense", Example("adversary", cls(adversary=4)), _dense)]

    def rows(self, place: Place, length: int) -> Mapping[str, float]:
        return {"adverse_q": 0, "adverse_k": 0}  # they act in adversarial calls alone

    def build(self, place: Place) -> AdversarialAttention:
        return AdversarialAttention(self, place)


@dataclass(frozen=True)
class Adversary:
    """The mask of one adversarial call, as a change of scores; q, k: [B, T, A]."""

    q: Tensor
    k: Tensor
    inner: Modify | None = None

    def __call__(self, scores: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """scores [B, H, q, S]."""
        scores = scores if self.inner is None else self.inner(scores, rows, columns)
        kept = self.kept(rows, columns)[:, None].to(scores.dtype)
        hard = kept.detach()
        return scores + (kept - hard) + PENALTY * (hard - 1)

    def kept(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The mask [B, q, S], 1 where the score is above 0 or a token sees itself; its slope is that of
        −σ(score)."""
        scores = self.q[:, rows] @ self.k[:, columns].transpose(1, 2)
        soft = torch.sigmoid((scores if scores.dtype == torch.float64 else scores.float()) * self.q.shape[-1] ** -0.5)
        mask = (scores > 0).to(soft.dtype)
        kept: Tensor = mask + (soft.detach() - soft)
        return kept.masked_fill(rows[:, None] == columns, 1.0)

    def density(self, mask: Mask | None) -> Tensor:
        """The share of the visible pairs that is kept, a scalar."""
        length = self.q.shape[1]
        columns = torch.arange(length, device=self.q.device)

        def block(q: Tensor, k: Tensor, start: int) -> tuple[Tensor, Tensor]:
            rows = columns[start : start + BLOCK]
            kept = Adversary(q, k).kept(rows, columns)
            seen = torch.ones_like(kept, dtype=torch.bool)
            if mask is not None:
                seen = seen & mask.rows(rows, columns).any(1)
            return (kept * seen).sum(), seen.sum()

        total, count = self.q.new_zeros((), dtype=torch.float32), self.q.new_zeros((), dtype=torch.int64)
        for start in range(0, length, BLOCK):
            kept, seen = checkpoint(block, self.q, self.k, start, use_reentrant=False)
            total, count = total + kept, count + seen
        return total / count.clamp(min=1)


class AdversarialAttention(Attention):
    """x [B, T, D] → [B, T, D]."""

    def __init__(self, settings: AdversarialSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.keep = settings.keep
        self.adverse_q = place.product(place.width, settings.adversary, "q")
        self.adverse_k = place.product(place.width, settings.adversary, "k")

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        frozen = super().freeze(x, ctx)
        if ctx.training is None or not ctx.training.adverse:
            return frozen
        scoring = frozen.parts["scoring"]
        h = x.detach()
        adversary = Adversary(self.adverse_q(h), self.adverse_k(h), scoring.modify)
        # The price of hiding travels with the queries, which the result depends on.
        q = attach(frozen.parts["q"], self.keep * adversary.density(scoring.mask), ctx)
        return Frozen({**frozen.parts, "q": q, "scoring": dataclasses.replace(scoring, modify=adversary)})


def _dense(mixer: AdversarialAttention, x: Tensor, ctx: Context) -> Tensor:
    """Dense attention of the same weights."""
    dense = AttentionSettings().build(Place(x.shape[-1]))
    dense.load_state_dict({name: value for name, value in mixer.state_dict().items() if "adverse" not in name})
    y: Tensor = dense(x, ctx)
    return y
