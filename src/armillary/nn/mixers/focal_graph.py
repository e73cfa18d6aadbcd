"""Graph attention with focal and full-range heads in one layer (FFGT).

Zhu et al. 2023, Hybrid Focal and Full-Range Attention Based Graph Transformers. The first heads are
focal: a node looks at those within `hops` of it along the edges of the graph, itself included (its
ego network); the others look at everyone. Edges may have types, each with a learned vector that
queries and one that keys meet: score = (q·k + q·e_q + k·e_k) / √K.

The graph is a side tensor. `edges` [B, E, 2] names both ends of each edge (a third column is its type,
and rows of −1 fill up); ego networks are worked out in every layer, in a few products of [T, T]
matrices. `distances` [B, N, N], shortest paths with −1 for none, are worked out once by the caller
(`nn.ops.graph.hop_distances`, or `model.side`) and only compared here. Nodes are the row's real tokens,
numbered from 0 whatever side is padded. A graph has no order, so neither has the mixer: it is for
encoders, whose positions are up to the model.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from armillary.base.errors import InputError, UnsupportedError
from armillary.nn.context import Context
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mask import Mask, PerHead, Window, both
from armillary.nn.mechanism import Capabilities, Frozen, Place, mixers
from armillary.nn.mixers.attention import Attention, AttentionSettings, Look, Scoring
from armillary.nn.ops import readable
from armillary.nn.ops.attend import Bias
from armillary.nn.ops.graph import at_places, edge_types, within, within_flops


@mixers.register
class FocalGraphSettings(AttentionSettings):
    """softmax over the tokens at most `hops` edges away in focal heads, over all in the others."""

    kind: ClassVar[str] = "focal_graph"
    source: ClassVar[str] = "Zhu et al. 2023, Hybrid Focal and Full-Range Attention Based Graph Transformers"
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_focal_graph.py: the formula edge by edge over a breadth-first search; dense attention "
        "when every node is within reach"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(causal=False, bidirectional=True, packed=False, mask=True)
    focal: int | None = Field(None, ge=0, description="how many heads are focal; by default half of them")
    hops: int = Field(2, ge=0, description="edges that a focal head looks across (the paper's focal length)")
    graph: Literal["edges", "distances"] = Field(
        "edges", description="the side tensor that is the graph: edges, or shortest paths worked out once"
    )
    types: int = Field(0, ge=0, description="types of edges with learned vectors (0: edges are all alike)")
    directed: bool = Field(False, description="an edge is crossed from its first end to its second only")

    @model_validator(mode="after")
    def _graphical(self) -> FocalGraphSettings:
        if self.focal is not None and self.focal > self.heads:
            raise ValueError(f"focal ({self.focal}) must be at most heads ({self.heads})")
        if self.graph == "distances" and (self.types or self.directed):
            raise ValueError("shortest paths know neither types nor directions of edges: use graph: edges")
        return self

    @classmethod
    def examples(cls) -> list[Example]:
        both_ways = {"order": "bidirectional"}
        return [
            Example("edges", cls(hops=3), both_ways, _some_edges),
            Example("typed", cls(hops=1, types=2, kv_heads=2, directed=True), both_ways, _typed_edges),
            Example("distances", cls(focal=1, hops=1, graph="distances"), both_ways, _some_distances),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        place = {"order": "bidirectional"}
        near = Example("everyone", cls(hops=40), place, _chain)
        return [Limit("diameter", near, Example("dense", AttentionSettings(), place))]

    @property
    def near(self) -> int:
        """Focal heads."""
        return self.heads // 2 if self.focal is None else self.focal

    def build(self, place: Place) -> FocalGraph:
        if place.cross or place.order != "bidirectional":
            what = "look at a memory" if place.cross else f"be {place.order}"
            raise UnsupportedError(
                f"'{self.kind}' cannot {what}: a graph is given whole and has no order",
                where=place.path,
                hint="use it in an encoder",
            )
        return FocalGraph(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        flops = super().cost(place, length, itemsize).flops
        if self.graph == "edges" and self.near:
            flops += within_flops(length, self.hops)
        if self.types:
            each = self.features(place.width)
            flops += (self.heads + self.groups) * linear_flops(each, self.types, length) + 3 * self.pairs(place, length)
        return Cost(flops)


@dataclass(frozen=True, eq=False)
class Near(Mask):
    """Who is near whom, seen [B, T, S] bool."""

    seen: Tensor

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        return self.seen[:, q[:, None], k][:, None]


class FocalGraph(Attention):
    """x [B, T, D] → [B, T, D]; the first heads are focal."""

    def __init__(self, settings: FocalGraphSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.near, self.hops, self.graph = settings.near, settings.hops, settings.graph
        self.directed, self.types = settings.directed, settings.types
        self.capabilities = dataclasses.replace(self.capabilities, side=(settings.graph,))
        shape = (settings.types, self.width)
        self.edge_q = nn.Parameter(torch.empty(self.heads, *shape)) if settings.types else None
        self.edge_k = nn.Parameter(torch.empty(self.groups, *shape)) if settings.types else None

    def reset(self, generator: torch.Generator | None) -> None:
        """Types of edges make no difference at the start."""
        super().reset(generator)
        for vectors in (self.edge_q, self.edge_k):
            if vectors is not None:
                nn.init.zeros_(vectors)

    def blank(self, name: str, batch: int, length: int, device: torch.device | str) -> Tensor:
        shape = (batch, 0, 2 + bool(self.types)) if name == "edges" else (batch, length, length)
        return torch.zeros(shape, dtype=torch.int64, device=device)

    def narrow(self, mask: Mask | None, look: Look) -> Mask | None:
        mask = super().narrow(mask, look)
        if not self.near:
            return mask
        seen = Near(self._near(look.ctx, look.queries.shape[1]))
        if self.near == self.heads:
            return both(mask, seen)
        everyone = mask or Window(None, None)
        return PerHead((both(mask, seen) or seen,) * self.near + (everyone,) * (self.heads - self.near))

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        self._check(ctx, x)
        frozen = super().freeze(x, ctx)
        if self.edge_q is None or self.edge_k is None:
            return frozen
        edges = edge_types(ctx.side["edges"], x.shape[1], directed=self.directed, padding=ctx.padding)
        types = at_places(edges, ctx.padding, x.shape[1], 0)
        q, k, how = frozen.parts["q"], frozen.parts["k"], frozen.parts["scoring"]
        with_q = torch.einsum("bthk,hek->bhte", q, self.edge_q.to(q.dtype))
        with_k = torch.einsum("bsgk,gek->bges", k, self.edge_k.to(k.dtype))
        with_k = with_k.repeat_interleave(self.heads // self.groups, 1)
        scores = partial(_typed, types, _beside_nothing(with_q, 3), _beside_nothing(with_k, 2), self.scale, how.bias)
        scoring = Scoring(how.mask, scores, how.modify)
        return Frozen({**frozen.parts, "scoring": scoring})

    def _near(self, ctx: Context, tokens: int) -> Tensor:
        """[B, T, T] bool: who is within reach of whom."""
        if self.graph == "edges":
            edges = edge_types(ctx.side["edges"], tokens, directed=self.directed, padding=ctx.padding)
            return at_places(within(edges > 0, self.hops), ctx.padding, tokens, False)
        given = ctx.side["distances"]
        own = torch.eye(given.shape[1], dtype=torch.bool, device=given.device)
        return at_places(((given >= 0) & (given <= self.hops)) | own, ctx.padding, tokens, False)

    def _check(self, ctx: Context, x: Tensor) -> None:
        """Raises InputError for a graph of another shape or type."""
        given, batch, tokens = ctx.side[self.graph], *x.shape[:2]
        hint: str | None = None
        if given.dtype.is_floating_point or given.dtype == torch.bool:
            hint = "pass int64"
        elif self.graph == "edges":
            columns = (3,) if self.types else (2, 3)
            if given.dim() != 3 or given.shape[0] != batch or given.shape[2] not in columns:
                named = "both ends and the type" if self.types else "both ends"
                hint = f"pass {named} of each edge, [{batch}, edges, {columns[0]}]"
            elif self.types and readable(given) and int(given[..., 2].max()) >= self.types:
                hint = f"the mixer has {self.types} types of edges, counted from 0"
        else:
            most = tokens
            if ctx.padding is not None and readable(ctx.padding):
                most = int(ctx.padding.sum(1).max())
            square = given.dim() == 3 and given.shape[0] == batch and given.shape[1] == given.shape[2]
            if not square or (given.shape[1] < most and (ctx.padding is None or readable(ctx.padding))):
                hint = f"pass shortest paths [{batch}, nodes, nodes] of at least {most} nodes"
        if hint is not None:
            what = f"the side tensor '{self.graph}' is {given.dtype} of shape {tuple(given.shape)}"
            raise InputError(what, where=self.path, hint=hint)


def _beside_nothing(scores: Tensor, axis: int) -> Tensor:
    """A score of 0 before those of the types: that of no edge."""
    return torch.cat([torch.zeros_like(scores.narrow(axis, 0, 1)), scores], axis)


def _typed(
    types: Tensor, with_q: Tensor, with_k: Tensor, scale: float, bias: Bias | None, rows: Tensor, columns: Tensor
) -> Tensor:
    """What the types of edges [B, T, S] add to the scores: [B, H, q, S]."""
    index = types[:, rows[:, None], columns][:, None].expand(-1, with_q.shape[1], -1, -1)
    added = (with_q[:, :, rows].gather(3, index) + with_k[..., columns].gather(2, index)) * scale
    return added if bias is None else added + bias(rows, columns)


def _some_edges(batch: int, length: int) -> dict[str, Tensor]:
    """Random edges for trials, some of them nowhere."""
    generator = torch.Generator().manual_seed(4)
    return {"edges": torch.randint(-1, length + 2, (batch, length, 2), generator=generator)}


def _typed_edges(batch: int, length: int) -> dict[str, Tensor]:
    kinds = torch.randint(0, 2, (batch, length, 1), generator=torch.Generator().manual_seed(5))
    return {"edges": torch.cat([_some_edges(batch, length)["edges"], kinds], -1)}


def _some_distances(batch: int, length: int) -> dict[str, Tensor]:
    given = torch.randint(-1, 4, (batch, length, length), generator=torch.Generator().manual_seed(4))
    return {"distances": torch.maximum(given, given.transpose(1, 2))}


def _chain(batch: int, length: int) -> dict[str, Tensor]:
    steps = torch.arange(length - 1)
    return {"edges": torch.stack([steps, steps + 1], -1).expand(batch, -1, -1)}
