"""The graph of a text: every token tied to the next ones and to where the same token stood last."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from armillary.nn.ops.graph import hop_distances, numbers
from armillary.nn.side import SideSettings, sides


@sides.register
class TextGraphSettings(SideSettings):
    """edges [B, E, 2], or [B, E, 3] with types (0: neighbours, 1: the same token), or shortest paths [B, T, T].

    Of a masked model's hidden tokens all are the same: which they were is not given away.
    """

    kind: ClassVar[str] = "text_graph"
    oracle: ClassVar[str] = "tests/nn/test_side.py: edges and paths listed by hand"
    neighbours: int = Field(1, ge=0, description="how many tokens ahead a token is tied to")
    same: bool = Field(True, description="whether a token is tied to the last one with the same id")
    typed: bool = Field(False, description="edges come with their types")
    hops: int | None = Field(None, gt=0, description="give shortest paths of up to so many edges, not the edges")

    @model_validator(mode="after")
    def _coherent(self) -> TextGraphSettings:
        if self.typed and self.hops is not None:
            raise ValueError("shortest paths have no types: give typed or hops")
        if not self.neighbours and not self.same:
            raise ValueError("a graph without neighbours and same tokens has no edges")
        return self

    def make(self, ids: Tensor, padding: Tensor | None) -> Tensor:
        count = ids.shape[1]
        number = torch.arange(count, device=ids.device).expand_as(ids) if padding is None else numbers(padding)
        reach = range(1, min(self.neighbours, count - 1) + 1)  # none for a token alone, which has no edges
        parts = [self._edge(number[:, :0], number[:, :0], 0)]
        parts += [self._edge(number[:, :-n], number[:, n:], 0) for n in reach]
        if self.same:
            if padding is not None:
                ids = torch.where(padding, ids, -1)
            order = ids.argsort(dim=1, stable=True)
            found, placed = ids.gather(1, order), number.gather(1, order)
            alike = found[:, 1:] == found[:, :-1]
            parts.append(self._edge(placed[:, :-1].masked_fill(~alike, -1), placed[:, 1:], 1))
        edges = torch.cat(parts, 1)
        return edges if self.hops is None else hop_distances(edges, count, self.hops)

    def _edge(self, first: Tensor, second: Tensor, kind: int) -> Tensor:
        columns = [first, second, torch.full_like(first, kind)]
        return torch.stack(columns if self.typed else columns[:2], -1)
