"""What one call tells every mechanism: a single frozen object, so that signatures never grow.

A mechanism that cannot honour a field raises; see `Mixer.accept`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from armillary.nn.mask import Mask
    from armillary.nn.taps import Taps
    from armillary.nn.training import Training


@dataclass(frozen=True)
class Memory:
    """What cross mixers look at: hidden [B, S, D], and padding [B, S] (True = a real token) or None."""

    hidden: Tensor
    padding: Tensor | None = None


@dataclass(frozen=True)
class Context:
    """positions: [B, T] or [1, T] int64, None = 0 … T-1; lengths: [B] valid tokens of each row of
    this chunk (extend only), None = all; documents: [B, T] ids of packed documents; padding:
    [B, T] True for real tokens; mask: the objective's predicate; memory: the encoder's output for
    cross mixers; ids: [B, T] token ids; side: named tensors; training: the update that this call belongs
    to, None outside of one: noise and auxiliary losses come from it; taps: watches and edits."""

    positions: Tensor | None = None
    lengths: Tensor | None = None
    documents: Tensor | None = None
    padding: Tensor | None = None
    mask: Mask | None = None
    memory: Memory | None = None
    ids: Tensor | None = None
    side: Mapping[str, Tensor] = field(default_factory=dict)
    training: Training | None = None
    taps: Taps | None = None

    def where(self, x: Tensor) -> Tensor:
        """Positions [1 or B, T] of the tokens of x [B, T, …]."""
        if self.positions is not None:
            return self.positions
        return torch.arange(x.shape[1], device=x.device)[None]

    def present(self, x: Tensor) -> Tensor | None:
        """Which tokens of x [B, T, …] are there, [B, T] bool; None: all."""
        if self.lengths is not None:
            return torch.arange(x.shape[1], device=x.device)[None] < self.lengths[:, None]
        return self.padding

    def replace(self, **changes: object) -> Context:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
