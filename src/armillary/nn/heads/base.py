"""The contract of heads, and how a sequence becomes one vector."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from armillary.base.registry import Registry
from armillary.nn.mechanism import MechanismSettings, Place

heads: Registry[HeadSettings] = Registry("head", "armillary.nn.heads", default="language_model")

Pool = Literal["mean", "first", "last"]


class HeadSettings(MechanismSettings):
    """What the network gives out."""

    choices: ClassVar[Registry[HeadSettings]] = heads

    def build(self, place: Place, vocabulary: int, embedding: nn.Module) -> nn.Module:
        raise NotImplementedError

    def flops(self, width: int, vocabulary: int, length: int) -> float:
        raise NotImplementedError


def pool_flops(width: int, length: int, how: str) -> float:
    """FLOPs of `pooled` for one row: a mean reads every token, a choice costs nothing."""
    return float(width * length) if how == "mean" else 0.0


def pooled(hidden: Tensor, padding: Tensor | None, how: str) -> Tensor:
    """hidden [B, T, D] → [B, D]: the mean, first or last of the real tokens."""
    if padding is None:
        return hidden.mean(1) if how == "mean" else hidden[:, 0 if how == "first" else -1]
    weights = padding.to(hidden.dtype)
    if how == "mean":
        return (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
    steps = torch.arange(hidden.shape[1], device=hidden.device)
    picked = torch.where(padding, steps, hidden.shape[1]).amin(1) if how == "first" else (steps * padding).amax(1)
    picked = picked.clamp(max=hidden.shape[1] - 1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), picked]
