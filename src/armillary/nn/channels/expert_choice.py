"""Experts that pick their tokens: every expert takes the same number, so load is even without a loss.

Zhou et al. 2022, Mixture-of-Experts with Expert Choice Routing. A router's softmax over experts gives
every token a score for every expert; an expert takes the ⌈capacity · n / E⌉ tokens of a document of n that
score highest with it, weighted by those scores. A token may be taken by several experts or by none.

Whether a token is taken depends on every other token of its document, later ones too. So a causal model
that trains with it learns from its future and cannot be decoded, and it is refused there: encoders only.
The published choice goes over a whole batch; here it goes over each document of each row, so that a
result depends on nothing else in the batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor

from armillary.base.errors import UnsupportedError
from armillary.nn.activation import ACTIVATIONS
from armillary.nn.channels.moe import ExpertSettings
from armillary.nn.context import Context
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import WITHIN, Capabilities, ChannelMixer, Place, channels
from armillary.nn.ops.routing import row_scores, z_loss
from armillary.nn.training import attach


@channels.register
class ExpertChoiceSettings(ExpertSettings):
    """Σ_{e that took x} g_e(x) · expert_e(x)."""

    kind: ClassVar[str] = "expert_choice"
    source: ClassVar[str] = "Zhou et al. 2022, Mixture-of-Experts with Expert Choice Routing"
    oracle: ClassVar[str] = "tests/nn/channels/test_expert_choice.py: the paper's formula as loops over experts"
    mixes: ClassVar[bool] = True
    capacity: float = Field(2.0, gt=0, description="experts that a token has on average")
    z_weight: float = Field(0.0, ge=0, description="weight of the mean squared log-sum of the router's scores")

    @model_validator(mode="after")
    def _fits(self) -> ExpertChoiceSettings:
        if self.capacity > self.experts:
            raise ValueError(f"a capacity of {self.capacity:g} is more than the {self.experts} experts there are")
        return self

    @classmethod
    def examples(cls) -> list[Example]:
        both = {"order": "bidirectional"}
        return [
            Example("default", cls(experts=4, hidden=12), both),
            Example("plain", cls(experts=3, hidden=8, gated=False, bias=True, capacity=1.0), both),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        both = {"order": "bidirectional"}
        return [Limit("every_token", Example("all", cls(experts=3, hidden=8, capacity=3.0), both), _every_token)]

    def can(self) -> Capabilities:
        return dataclasses.replace(WITHIN, causal=False, prefix=False, mask=False, sight="jacobian")

    def room(self, tokens: int) -> int:
        """How many of a document's tokens an expert takes."""
        return min(tokens, math.ceil(self.capacity * tokens / self.experts))

    def active(self, parameters: int, width: int) -> int:
        return parameters - round((self.experts - self.capacity) * self.held(width))

    def build(self, place: Place) -> ExpertChoice:
        return ExpertChoice(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        width, hidden = place.width, self.features(place.width)
        picks = self.experts * self.room(length)
        flops = linear_flops(width, self.experts, length) + 5.0 * length * self.experts
        flops += (2 if self.gated else 1) * linear_flops(width, hidden, picks, self.bias)
        flops += linear_flops(hidden, width, picks, self.bias)
        return Cost(flops + picks * hidden * (2 if self.gated else 1) + picks * width)


class ExpertChoice(ChannelMixer):
    """x [B, T, D] → [B, T, D].

    Taps: `router`, the gates of all experts [B, T, E], where an edit also picks; `hidden` [B, E, C, H] of the
    tokens that each expert took. Not stored: `seen`, tokens of the update and how many of them no expert
    took, and `last`, of the one before.
    """

    def __init__(self, settings: ExpertChoiceSettings, place: Place) -> None:
        super().__init__()
        if place.order != "bidirectional":
            raise UnsupportedError(
                f"expert_choice cannot be {place.order}: whether an expert takes a token depends on later tokens",
                where=place.path,
                hint="use kind: moe, whose tokens pick their experts",
            )
        self.kind, self.path, self.settings = settings.kind, place.path, settings
        self.capabilities = settings.can()
        hidden, count = settings.features(place.width), settings.experts
        self.router = place.product(place.width, count, "router")
        self.gate = place.experts(count, place.width, hidden, "gate", settings.bias) if settings.gated else None
        self.up = place.experts(count, place.width, hidden, "up", settings.bias)
        self.down = place.experts(count, hidden, place.width, "down", settings.bias)
        self.activation = ACTIVATIONS[settings.activation]
        self.seen = torch.zeros(2, dtype=torch.int64, device="cpu")
        self.last = torch.zeros_like(self.seen)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertChoice:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0)).device
        if device.type != "meta":
            self.seen, self.last = self.seen.to(device), self.last.to(device)
        return self

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        self.accept(ctx)
        scores = row_scores(self.router, x)
        tokens, gates = self.choose(torch.softmax(scores, -1), ctx)  # [B, E, C]
        if ctx.taps is not None:
            tokens, gates = self._tapped(x, tokens, gates, ctx)
        batch, length, width = x.shape
        first = torch.arange(0, batch * length, length, device=x.device)[:, None, None]
        which = (tokens + first).transpose(0, 1).flatten()  # [E·B·C]
        rows = x.flatten(0, 1).index_select(0, which).view(self.settings.experts, -1, width)
        hidden = self.activation(self.up.stacked(rows) if self.gate is None else self.gate.stacked(rows))
        if self.gate is not None:
            hidden = hidden * self.up.stacked(rows)
        if ctx.taps is not None:
            shaped = hidden.unflatten(1, (batch, -1)).transpose(0, 1)
            hidden = ctx.taps(f"{self.path}.hidden", shaped).transpose(0, 1).flatten(1, 2)
        each = self.down.stacked(hidden).flatten(0, 1)
        each = each * gates.transpose(0, 1).flatten()[:, None].to(x.dtype)
        y = torch.zeros_like(x).flatten(0, 1).index_add(0, which, each).view_as(x)
        if ctx.training is None:
            return y
        self._count(x, tokens, gates, ctx)
        return attach(y, self.settings.z_weight * z_loss(scores, ctx.padding), ctx)

    def extend(self, x: Tensor, state: Any, ctx: Context) -> Tensor:
        raise UnsupportedError("'expert_choice' cannot be extended", where=self.path, hint="call whole sequences")

    def choose(self, scores: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Tokens [B, E, C] that each expert takes of every document, by scores [B, T, E], and their gates,
        0 at places that nothing fills."""
        every = scores.transpose(1, 2)
        length = every.shape[2]
        real = ctx.padding
        ranked = every.detach() if real is None else every.detach().masked_fill(~real[:, None], -1.0)
        order = ranked.sort(dim=-1, descending=True, stable=True).indices  # equal scores: the earlier token
        steps = torch.arange(length, device=scores.device)
        if ctx.documents is None:
            tokens = order[..., : self.settings.room(length)]
            if real is None:
                return tokens, every.gather(-1, tokens)
            room = self._rooms(real.sum(1))[:, None, None]
            return tokens, every.gather(-1, tokens).masked_fill(steps[: tokens.shape[2]] >= room, 0)
        new = torch.ones_like(ctx.documents, dtype=torch.bool)
        new[:, 1:] = ctx.documents[:, 1:] != ctx.documents[:, :-1]
        number = new.cumsum(1) - 1  # [B, T]: which document of the row
        sizes = torch.zeros_like(number).scatter_add_(1, number, torch.ones_like(number))
        real_sizes = sizes if real is None else torch.zeros_like(number).scatter_add_(1, number, real.long())
        # a stable sort by document leaves the order of scores inside each
        owner, inside = number[:, None].expand_as(order).gather(-1, order).sort(dim=-1, stable=True)
        tokens = order.gather(-1, inside)
        start = (sizes.cumsum(1) - sizes)[:, None].expand_as(order).gather(-1, owner)
        room = self._rooms(real_sizes)[:, None].expand_as(order).gather(-1, owner)
        return tokens, every.gather(-1, tokens).masked_fill(steps - start >= room, 0)

    def _rooms(self, tokens: Tensor) -> Tensor:
        """`room` of a tensor of lengths."""
        return torch.minimum(tokens, (self.settings.capacity * tokens.double() / self.settings.experts).ceil().long())

    def _tapped(self, x: Tensor, tokens: Tensor, gates: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        assert ctx.taps is not None
        name = f"{self.path}.router"
        blank = torch.zeros(x.shape[0], self.settings.experts, x.shape[1], dtype=gates.dtype, device=x.device)
        every = ctx.taps(name, blank.scatter(-1, tokens, gates).transpose(1, 2))
        return self.choose(every, ctx) if ctx.taps.edited(name) else (tokens, gates)

    @torch.no_grad()
    def _count(self, x: Tensor, tokens: Tensor, gates: Tensor, ctx: Context) -> None:
        taken = torch.zeros(x.shape[:2], device=x.device, dtype=torch.int64)
        taken.scatter_add_(1, tokens.flatten(1), (gates > 0).flatten(1).long())
        real = torch.ones_like(taken, dtype=torch.bool) if ctx.padding is None else ctx.padding
        self.seen += torch.stack([real.sum(), (real & (taken == 0)).sum()])

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.seen)
        self.last.copy_(self.seen)
        self.seen.zero_()

    def observe(self) -> dict[str, float]:
        """Of the last update: the share of tokens that no expert took."""
        tokens, missed = self.last.tolist()
        return {"untaken_tokens": missed / tokens} if tokens else {}


def _every_token(channel: ExpertChoice, x: Tensor, ctx: Context) -> Tensor:
    """With room for all, every expert takes every token: a dense sum under the router's softmax."""
    gates = torch.softmax(x @ channel.router.weight.t(), -1)
    y = torch.zeros_like(x)
    for e in range(channel.settings.experts):
        assert channel.gate is not None
        hidden = channel.activation(x @ channel.gate.weight[e].t()) * (x @ channel.up.weight[e].t())
        y = y + gates[..., e, None] * (hidden @ channel.down.weight[e].t())
    return y
