"""Attention with a fixed mask per head that does not depend on the input (Rugina et al. 2020).

Rugina, Dangovski, Jing, Nakov & Soljačić 2020, Data-Informed Global Sparseness in Attention
Mechanisms for Deep Neural Networks: what a trained model attends to, averaged over data, is large
in the same few places, so the rest is removed for every input. The mask is a buffer over pairs of
positions; `armillary compress --prune-attention` finds it and turns attention into this mixer with
the same weights. Positions from `length` on, which the calibration never saw, follow the average over
each distance between query and key (a Toeplitz mask), as the paper has it for relative positions.

`mask` is what stands in the buffer before a calibration: everything, or the controls that any
calibrated mask must beat, a window or random pairs of the same number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from armillary.nn.context import Context
from armillary.nn.example import Example, Limit
from armillary.nn.mask import Mask, both
from armillary.nn.mechanism import Capabilities, Place, mixers
from armillary.nn.mixers.attention import Attention, AttentionSettings, Look
from armillary.nn.positions.alibi import AlibiSettings
from armillary.nn.positions.rope import RopeSettings


@mixers.register
class PrunedSettings(AttentionSettings):
    """Attention whose heads keep a fixed set of pairs of positions."""

    kind: ClassVar[str] = "pruned"
    source: ClassVar[str] = (
        "Rugina et al. 2020, Data-Informed Global Sparseness in Attention Mechanisms for Deep Neural Networks"
    )
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_pruned.py: PyTorch's attention under the mask written out; outputs and gradients; "
        "tests/compress/test_pruning.py: calibration against every mask of the same size"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(
        bidirectional=True, mask=True, state="span", rollback="truncate"
    )
    tracked: ClassVar[bool] = True
    length: int = Field(512, gt=0, description="positions of the mask; later ones go by distance")
    mask: Literal["full", "window", "random"] = Field("full", description="the mask before any calibration")
    keep: float = Field(1.0, gt=0, le=1, description="share of the pairs that a window or a random mask keeps")
    seed: int = Field(0, description="of the random mask")

    @classmethod
    def examples(cls) -> list[Example]:
        rope = RopeSettings()
        return [
            Example("random", cls(heads=2, position=rope, length=12, mask="random", keep=0.6, seed=1), compiled=True),
            Example("window", cls(kv_heads=2, position=AlibiSettings(), length=32, mask="window", keep=0.3)),
            Example("sinks", cls(heads=2, sinks=True, softcap=3.0, length=7, mask="random", keep=0.5, seed=2)),
            Example(
                "bidirectional",
                cls(heads=2, position=rope, length=10, mask="random", keep=0.4),
                {"order": "bidirectional"},
            ),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("full", Example("full", cls(position=RopeSettings(), length=5)), _attention)]

    def build(self, place: Place) -> Pruned:
        return Pruned(self, place)


class Pruned(Attention):
    """x [B, T, D] → [B, T, D]. kept: bool [H, L, L] over (query, key); distances: bool [H, 2L + 1] over
    query − key from −L to L, whose ends stand for everything farther."""

    kept: Tensor
    distances: Tensor

    def __init__(self, settings: PrunedSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.length, self.start, self.layer = settings.length, settings, place.layer
        length = settings.length
        self.register_buffer("kept", torch.ones(self.heads, length, length, dtype=torch.bool))
        self.register_buffer("distances", torch.ones(self.heads, 2 * length + 1, dtype=torch.bool))

    def reset(self, generator: torch.Generator | None) -> None:
        super().reset(generator)
        kept, distances = first_mask(self.start, self.order == "causal", self.layer)
        self.kept.copy_(kept)
        self.distances.copy_(distances)

    def narrow(self, mask: Mask | None, look: Look) -> Mask | None:
        # In a whole sequence queries and keys are the same tokens.
        keys = look.queries if look.keys is None else look.keys
        return both(super().narrow(mask, look), _Fixed(self.kept, self.distances, look.queries, keys))


@dataclass(frozen=True, eq=False)
class _Fixed(Mask):
    """The pairs that a head keeps; queries and keys: positions [B or 1, T] and [B or 1, S]."""

    kept: Tensor
    distances: Tensor
    queries: Tensor
    keys: Tensor

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        i, j = self.queries[:, q, None], self.keys[:, None, k]
        length = self.kept.shape[1]
        inside = (i < length) & (j < length)
        near = self.kept[:, i.clamp(max=length - 1), j.clamp(max=length - 1)]
        far = self.distances[:, (i - j).clamp(-length, length) + length]
        return torch.where(inside, near, far).transpose(0, 1)


def first_mask(settings: PrunedSettings, causal: bool, layer: int) -> tuple[Tensor, Tensor]:
    """(kept, distances) of an uncalibrated mixer: everything, a window, or random pairs, always with a
    query's own position; `keep` is the share of the pairs that attention has."""
    heads, length = settings.heads, settings.length
    kept = torch.ones(heads, length, length, dtype=torch.bool)
    distances = torch.ones(heads, 2 * length + 1, dtype=torch.bool)
    if settings.mask == "full" or settings.keep == 1.0:
        return kept, distances
    steps = torch.arange(length)
    apart = (steps[:, None] - steps).abs()
    if settings.mask == "window":
        pairs = (apart if not causal else apart.tril()).flatten().bincount(minlength=length)
        pairs[0] = length  # above the diagonal stand zeros
        reach = int((pairs.cumsum(0) < settings.keep * pairs.sum()).sum())
        distances &= (torch.arange(-length, length + 1).abs() <= reach)[None]
        return kept & (apart <= reach), distances
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + layer)
    pairs_of_head = float(length * (length + 1) // 2 if causal else length * length)
    beside = max(0.0, (settings.keep * pairs_of_head - length) / max(1.0, pairs_of_head - length))
    kept = (torch.rand(kept.shape, generator=generator) < beside) | (apart == 0)
    distances = torch.rand(distances.shape, generator=generator) < settings.keep
    distances[:, length] = True
    return kept, distances


def _attention(mixer: Any, x: Tensor, ctx: Context) -> Tensor:
    """What dense attention of the same parameters gives."""
    plain = AttentionSettings(position=RopeSettings()).build(Place(x.shape[-1]))
    plain.load_state_dict(dict(mixer.named_parameters()))
    y: Tensor = plain(x, ctx)
    return y
