"""Mixture of attention heads: every token picks some of many expert heads.

Zhang et al. 2022, Mixture of Attention Heads: Selecting Attention Heads Per Token. An expert has its
own query and output product; keys and values are shared by all. In training updates two losses keep
experts in use and scores small. With `kv_heads` an expert is a group of heads, with `weights:
stick_breaking`, gates that are not normalised and the information loss this is the attention of
Shen et al. 2023, ModuleFormer. Cost follows the experts that a token picks, not how many there are.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from armillary.base.errors import UnsupportedError
from armillary.nn.context import Context
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mask import Mask
from armillary.nn.mechanism import Capabilities, Frozen, MixerSettings, Place, PositionSettings, mixers
from armillary.nn.ops.attend import attend
from armillary.nn.ops.routing import Balance, balance_loss, row_scores, spread, top_gates, z_loss
from armillary.nn.ops.stick import stick_attend
from armillary.nn.positions.rope import RopeSettings
from armillary.nn.span import SpanMixer
from armillary.nn.state import State
from armillary.nn.steps.experts import experts_in, experts_out, pick, swap
from armillary.nn.steps.span import break_stick
from armillary.nn.tape import Buffer, Tape, record
from armillary.nn.training import attach


@mixers.register
class MixtureOfHeadsSettings(MixerSettings):
    """Σ_{e ∈ top-k} g_e · W_o^e Attention(W_q^e x, K, V)."""

    kind: ClassVar[str] = "moa"
    source: ClassVar[str] = "Zhang et al. 2022, Mixture of Attention Heads: Selecting Attention Heads Per Token"
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_moa.py: transformers' JetMoE attention; multi-query attention at k = E"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(
        bidirectional=True, mask=True, state="span", rollback="truncate"
    )
    experts: int = Field(8, gt=0, description="expert heads (or groups of heads)")
    top: int = Field(2, gt=0, description="how many a token picks")
    kv_heads: int = Field(1, gt=0, description="key/value heads; an expert has a query head for each")
    head_width: int = Field(64, gt=0, description="features per head")
    position: PositionSettings | None = Field(None, description="how q and k turn: rope or none")
    weights: Literal["softmax", "stick_breaking"] = Field("softmax", description="how a head weighs tokens")
    normalise: bool = Field(True, description="gates of the picked experts sum to 1")
    balance: Balance = Field("switch", description="the loss that spreads (or concentrates) experts")
    balance_weight: float = Field(0.01, ge=0, description="its weight")
    z_weight: float = Field(0.001, ge=0, description="weight of the mean squared log-sum of the router's scores")

    @model_validator(mode="after")
    def _coherent(self) -> MixtureOfHeadsSettings:
        if self.top > self.experts:
            raise ValueError(f"top ({self.top}) must be at most experts ({self.experts})")
        return self

    @classmethod
    def examples(cls) -> list[Example]:
        small: dict[str, Any] = {"experts": 5, "head_width": 4}
        return [
            Example("published", cls(position=RopeSettings(), **small), compiled=True),
            Example("groups", cls(top=3, kv_heads=2, **small), {"order": "bidirectional"}),
            Example(
                "moduleformer",
                cls(kv_heads=2, weights="stick_breaking", normalise=False, balance="mutual_information", **small),
            ),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("every_expert", Example("all", cls(experts=3, top=3, head_width=4)), _every_expert)]

    def build(self, place: Place) -> MixtureOfHeads:
        return MixtureOfHeads(self, place)

    def active(self, parameters: int) -> int:
        each, shared = 2 * self.kv_heads * self.head_width, 2 * self.kv_heads * self.head_width + self.experts
        return round(parameters * (self.top * each + shared) / (self.experts * each + shared))

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        width, key = place.width, self.kv_heads * self.head_width
        flops = 2 * self.top * linear_flops(width, key, length) + 2 * linear_flops(width, key, length)
        # router, softmax, sum and quotient of the picked gates, weighted sum of their outputs
        flops += linear_flops(width, self.experts, length) + 5.0 * length * self.experts
        flops += length * self.top * ((2 if self.normalise else 0) + 2.0 * width)
        pairs = float(self.top * self.kv_heads * length * length)
        flops += pairs * (4 * self.head_width + (6 if self.weights == "softmax" else 5))
        if self.position is not None:
            flops += self.position.cost(place, length, self.top * self.kv_heads, self.kv_heads, self.head_width).flops
        return Cost(flops, 0 if place.order == "bidirectional" else length * 2.0 * key * itemsize)


class MixtureOfHeads(SpanMixer):
    """x [B, T, D] → [B, T, D]; `heads` are the picks of a token: pick j of group g is head g·k + j."""

    def __init__(self, settings: MixtureOfHeadsSettings, place: Place) -> None:
        groups, width = settings.kv_heads, settings.head_width
        heads = settings.top * groups
        super().__init__(settings, place, heads=heads, groups=groups, width=width, position=settings.position)
        self.settings = settings
        self.sticks = settings.weights == "stick_breaking"
        if self.sticks and place.order != "causal":
            raise UnsupportedError("stick-breaking weights are causal", where=place.path, hint="use weights: softmax")
        self.router = place.product(place.width, settings.experts, "router")
        self.q = place.experts(settings.experts, place.width, groups * width, "q")
        self.o = place.experts(settings.experts, groups * width, place.width, "o")

    def route(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """experts [B, T, k], gates [B, T, k], probabilities and scores [B, T, E]."""
        scores = row_scores(self.router, x)
        updating = ctx.training is not None
        return (*top_gates(scores, self.settings.top, normalise=self.settings.normalise, updating=updating), scores)

    def queries(self, x: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        experts, gates, probabilities, scores = self.route(x, ctx)
        if ctx.taps is not None:
            experts, gates = self._tapped(experts, gates, ctx)
        q = self.q(x, experts).unflatten(-1, (self.groups, self.width))  # [B, T, k, G, K]
        made = {"experts": experts, "gates": gates}
        if ctx.training is not None:
            made["loss"] = self.loss(probabilities, experts, scores, ctx.padding)
        return q.transpose(2, 3).flatten(2, 3), made

    def loss(self, probabilities: Tensor, experts: Tensor, scores: Tensor, real: Tensor | None) -> Tensor:
        """Balance and z losses, weighted."""
        balance = balance_loss(probabilities, experts, self.settings.balance, real)
        return self.settings.balance_weight * balance + self.settings.z_weight * z_loss(scores, real)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, places: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        if self.sticks:
            return stick_attend(q, k, v, mask=mask, scale=self.scale)
        return attend(q, k, v, mask=mask, scale=self.scale)[0]

    def record(self, tape: Tape, x: Buffer, state: State) -> Buffer:
        k, v = self.appended(tape, x, state)
        top = self.settings.top
        picks = pick(tape, x, self.router, top, normalise=self.settings.normalise)
        q = experts_in(tape, x, picks, self.q, None, None)
        q = q if self.groups == 1 else swap(tape, q, top, self.groups)  # picks by group
        if self.position is not None:
            record(self.position, tape, q, self.heads)
        if self.sticks:
            mixed = break_stick(tape, q, k, v, self.heads, self.scale)
        else:
            mixed = tape.attend(q, k, v, self.heads, scale=self.scale)
        mixed = mixed if self.groups == 1 else swap(tape, mixed, self.groups, top)
        return experts_out(tape, mixed, picks, self.o)

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        experts, gates, _, _ = self.route(x, ctx)
        return self._gathered(mixed, experts, gates)

    def close(self, mixed: Tensor, frozen: Frozen, x: Tensor, ctx: Context) -> Tensor:
        y = self._gathered(mixed, frozen.parts["experts"], frozen.parts["gates"])
        return attach(y, frozen.parts["loss"], ctx) if ctx.training is not None else y

    def _gathered(self, mixed: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        """Each pick's heads [B, T, G·k, K] through its output product, weighted and summed."""
        picks = mixed.unflatten(2, (self.groups, -1)).transpose(2, 3).flatten(3)  # [B, T, k, G·K]
        return (self.o(picks, experts) * gates[..., None].to(picks.dtype)).sum(2)  # type: ignore[no-any-return]

    def _tapped(self, experts: Tensor, gates: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """The gates of all experts [B, T, E] can be watched, and an edit of them also picks."""
        assert ctx.taps is not None
        name = f"{self.path}.router"
        every = ctx.taps(name, spread(experts, gates, self.settings.experts))
        if not ctx.taps.edited(name):
            return experts, gates
        picked = every.topk(self.settings.top, -1)
        return picked.indices, picked.values


def _every_expert(mixer: MixtureOfHeads, x: Tensor, ctx: Context) -> Tensor:
    """All experts picked: multi-query attention whose heads are weighted by the router's softmax."""
    k, v = x @ mixer.k.weight.t(), x @ mixer.v.weight.t()
    gates = torch.softmax(x @ mixer.router.weight.t(), -1)
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    y = torch.zeros_like(x)
    for expert in range(mixer.settings.experts):
        scores = x @ mixer.q.weight[expert].t() @ k.transpose(1, 2) / mixer.width**0.5
        weights = torch.softmax(scores.masked_fill(later, -torch.inf), -1)
        y = y + gates[..., expert, None] * (weights @ v @ mixer.o.weight[expert].t())
    return y
