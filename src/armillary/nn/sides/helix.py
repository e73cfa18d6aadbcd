"""Coordinates of a text wound around a drum: tokens of a line side by side, the next line above it."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from armillary.nn.side import SideSettings, sides


@sides.register
class HelixSettings(SideSettings):
    """coordinates [B, T, 3] float32 by the number of each token, like a text of `period` tokens a line."""

    kind: ClassVar[str] = "helix"
    oracle: ClassVar[str] = "tests/nn/mixers/test_self_positioning.py: distances on a cylinder"
    period: int = Field(64, gt=0, description="tokens in one turn")
    radius: float = Field(0.2, gt=0, description="of the drum")
    rise: float = Field(0.1, gt=0, description="height of one turn")

    def make(self, ids: Tensor, padding: Tensor | None) -> Tensor:
        turns = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32) / self.period
        angle = 2 * torch.pi * (turns % 1)
        found = torch.stack([self.radius * angle.cos(), self.radius * angle.sin(), self.rise * turns], -1)
        return found.expand(len(ids), -1, -1)
