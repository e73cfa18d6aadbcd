"""Attention as a marginal probability: which token an edge comes from is a latent variable with a prior.

Singh & Buckley 2023, Attention: Marginal Probability is All You Need? The result of a head is the
mean of the values under the posterior over edges, p(j | i) ∝ π_ij · exp(q_i·k_j / √K). With a uniform
prior that is softmax attention; a prior by relative offset is learned, a structural one (the edges of
a graph, an alignment) is given as the side tensor `prior`: logarithms [B, P, P] by the positions of
query and key, −inf where there is no edge. A prior need not sum to 1: the posterior does. Whole
alignments that move through the text are in `marginal_chain`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary.base.errors import InputError
from armillary.nn.context import Context
from armillary.nn.cost import Cost
from armillary.nn.example import Example, Limit
from armillary.nn.mask import Mask, both
from armillary.nn.mechanism import Capabilities, Frozen, Place, mixers
from armillary.nn.mixers.attention import Attention, AttentionSettings, Look, Scoring
from armillary.nn.ops import readable
from armillary.nn.ops.attend import Modify
from armillary.nn.positions.rope import RopeSettings


@mixers.register
class MarginalSettings(AttentionSettings):
    """Σ_j v_j · π_ij exp(q_i·k_j / √K) / Σ_j π_ij exp(q_i·k_j / √K)."""

    kind: ClassVar[str] = "marginal"
    source: ClassVar[str] = "Singh & Buckley 2023, Attention: Marginal Probability is All You Need?"
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_marginal.py: Bayes' rule edge by edge; dense attention when the prior is uniform"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(
        bidirectional=True, mask=True, state="span", rollback="truncate"
    )
    prior: Literal["uniform", "relative", "given"] = Field(
        "relative", description="of edges: uniform, learned by relative offset, or the side tensor `prior`"
    )
    reach: int = Field(64, gt=0, description="relative: offsets from here on share one prior")

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("relative", cls(reach=3, kv_heads=2, position=RopeSettings()), compiled=True),
            Example("relative_both_ways", cls(reach=3), {"order": "bidirectional"}),
            Example("uniform", cls(prior="uniform")),
            Example("given", cls(prior="given"), side=_some_prior),
            Example("given_both_ways", cls(prior="given", kv_heads=1), {"order": "bidirectional"}, _some_prior),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("uniform", Example("uniform", cls(prior="uniform")), Example("dense", AttentionSettings()))]

    def build(self, place: Place) -> Marginal:
        return Marginal(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        base = super().cost(place, length, itemsize)
        if self.prior == "uniform":
            return base
        tracked = self.position is not None and "bias" in self.position.sites
        kept = 0 if tracked or place.order == "bidirectional" else self.kept(length)
        return base + Cost(self.pairs(place, length), 8.0 * kept)


@dataclass(frozen=True)
class LogPrior:
    """Added to the scores of one call. table: [H, offsets] by offset of the query from the key, counted
    from −behind on; given: [B, P, P] by positions."""

    look: Look
    table: Tensor | None = None
    behind: int = 0
    given: Tensor | None = None

    def __call__(self, scores: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """scores [B, H, q, S]."""
        if self.table is not None:
            queries, keys = self._places(rows, columns)
            offset = (queries[:, :, None] - keys[:, None] + self.behind).clamp(0, self.table.shape[1] - 1)
            return scores + self.table.to(scores.dtype)[:, offset].transpose(0, 1)
        edges = self._edges(rows, columns).to(scores.dtype)
        return scores + edges.masked_fill(edges == -torch.inf, 0.0)  # where there is no edge, the mask says so

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        """Which edges are there at all."""
        return self._edges(q, k) > -torch.inf

    def _places(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        assert self.look.keys is not None
        return self.look.queries[:, rows], self.look.keys[:, columns]

    def _edges(self, rows: Tensor, columns: Tensor) -> Tensor:
        assert self.given is not None
        queries, keys = (places.clamp(max=self.given.shape[1] - 1) for places in self._places(rows, columns))
        batch = torch.arange(self.given.shape[0], device=rows.device)
        return self.given[batch[:, None, None], queries[:, :, None], keys[:, None]][:, None]


@dataclass(frozen=True)
class Edges(Mask):
    """A query sees the keys to which its prior has an edge."""

    prior: LogPrior

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        return self.prior.rows(q, k)


class Marginal(Attention):
    """x [B, T, D] → [B, T, D]."""

    def __init__(self, settings: MarginalSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.prior = settings.prior
        self.tracks = self.tracks or settings.prior != "uniform"
        self.behind = settings.reach if place.order == "bidirectional" else 0
        offsets = settings.reach + 1 + self.behind
        self.table = nn.Parameter(torch.empty(self.heads, offsets)) if settings.prior == "relative" else None
        if settings.prior == "given":
            self.capabilities = dataclasses.replace(self.capabilities, side=("prior",))

    def reset(self, generator: torch.Generator | None) -> None:
        super().reset(generator)
        if self.table is not None:
            nn.init.zeros_(self.table)

    def blank(self, name: str, batch: int, length: int, device: torch.device | str) -> Tensor:
        return torch.zeros(batch, length, length, device=device)

    def modify(self, look: Look) -> Modify | None:
        return None if self.prior == "uniform" else LogPrior(look, self.table, self.behind)

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        frozen = super().freeze(x, ctx)
        return Frozen({**frozen.parts, "scoring": self._informed(frozen.parts["scoring"], x, ctx)})

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, how: Scoring, x: Tensor, ctx: Context) -> Tensor:
        return super()._mixed(q, k, v, self._informed(how, x, ctx), x, ctx)

    def _informed(self, how: Scoring, x: Tensor, ctx: Context) -> Scoring:
        """The scoring with the prior that the call gives."""
        if self.prior != "given":
            return how
        assert isinstance(how.modify, LogPrior)
        given = ctx.side["prior"]
        if given.dim() != 3 or given.shape[0] != x.shape[0] or given.shape[1] != given.shape[2]:
            raise InputError(
                f"the prior over edges has shape {tuple(given.shape)}",
                where=self.path,
                hint="pass logarithms [batch, positions, positions]",
            )
        places = ctx.where(x)
        if readable(places):
            if ctx.lengths is not None:
                places = places[(torch.arange(x.shape[1]) < ctx.lengths[:, None]).expand(len(x), -1)]
            if places.numel() and int(places.max()) >= given.shape[1]:
                raise InputError(
                    f"the prior ends before position {int(places.max())}",
                    where=self.path,
                    hint=f"it has {given.shape[1]} positions",
                )
        informed = dataclasses.replace(how.modify, given=given)
        return dataclasses.replace(how, mask=both(how.mask, Edges(informed)), modify=informed)


def _some_prior(batch: int, length: int) -> dict[str, Tensor]:
    """A prior that leaves every third offset out, for trials."""
    generator = torch.Generator().manual_seed(4)
    prior = torch.randn(batch, length, length, generator=generator)
    steps = torch.arange(length)
    return {"prior": prior.masked_fill((steps[:, None] - steps).abs() % 3 == 2, -torch.inf)}
