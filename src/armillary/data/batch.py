"""A batch of token windows, as the loader yields it and an objective takes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """ids: [B, T] int64 token ids; documents: [B, T] int64 ids of the packed documents, or None
    when neighbours in a window may see each other."""

    ids: torch.Tensor
    documents: torch.Tensor | None = None
