"""Side tensors made from text, for mechanisms that look at more than tokens: a graph, coordinates, channels.

`model.side` names what makes a tensor when a call gives none; one that the call gives is taken instead.
They are made from the ids that the network sees, so a hidden token lends its place and nothing else.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from armillary.base.registry import Registry
from armillary.base.settings import Choice

sides: Registry[SideSettings] = Registry("side", "armillary.nn.sides")


class SideSettings(Choice):
    """How one side tensor is made."""

    choices: ClassVar[Registry[SideSettings]] = sides

    def make(self, ids: Tensor, padding: Tensor | None) -> Tensor:
        """ids [B, T] int64, padding [B, T] True for real tokens or None → the tensor, on the device of the
        ids. What belongs to tokens goes by their number among the row's real ones."""
        raise NotImplementedError
