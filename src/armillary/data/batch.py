"""A batch of token windows, as the loader yields it and an objective takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Batch:
    """ids: [B, T] int64 token ids; documents: [B, T] int64 ids of the packed documents, or None
    when neighbours in a window may see each other; side: named tensors that mechanisms look at (edges,
    coordinates), a row for each row, as the network takes them; tasks: [B] or [B, T] int64, what each row
    or token is for (−1: unknown), or None when nobody says."""

    ids: torch.Tensor
    documents: torch.Tensor | None = None
    side: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tasks: torch.Tensor | None = None
