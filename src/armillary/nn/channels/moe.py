"""A sparse mixture of experts: every token goes through the few feed-forward networks that a router picks.

Shazeer et al. 2017, Outrageously Large Neural Networks; Fedus et al. 2021, Switch Transformers; with the
defaults that of Jiang et al. 2024, Mixtral of Experts. `shared` adds an expert that every token goes
through (Dai et al. 2024, DeepSeekMoE; with `shared_gate` that of Qwen2-MoE), `scores: sigmoid` with
`bias_rate` is the routing of DeepSeek-V3. No pick is dropped unless `capacity` says so, and then in
training updates only: picks beyond it add nothing to their token, and the training log says how many.

The softmax over all experts, normalised over the picked ones, is the softmax over the picked ones; so
`normalise` also chooses between a softmax before and after the pick. As in Switch Transformers jitter
multiplies what the router reads and not what experts read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor, nn

from armillary.base.errors import UnsupportedError
from armillary.nn.activation import ACTIVATIONS, Activation
from armillary.nn.channels.ffn import FFNSettings
from armillary.nn.channels.gated import GatedSettings
from armillary.nn.context import Context
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import WITHIN, Capabilities, ChannelMixer, ChannelSettings, Place, channels
from armillary.nn.ops import plain
from armillary.nn.ops.experts import FEW, grouped, reads_once
from armillary.nn.ops.routing import (
    Balance,
    Scores,
    balance_loss,
    row_scores,
    spread,
    top_gates,
    within_capacity,
    z_loss,
)
from armillary.nn.state import State
from armillary.nn.steps.experts import add_gated, experts_in, experts_out, pick
from armillary.nn.tape import Buffer, Tape, record
from armillary.nn.training import attach, uniform


class ExpertSettings(ChannelSettings):
    """What every channel mixer of experts says about them."""

    experts: int = Field(8, gt=0, description="how many there are")
    hidden: int | None = Field(
        None, gt=0, description="hidden features of each; by default as many as a dense channel of the form has"
    )
    gated: bool = Field(True, description="gated feed-forward networks; or those of two products")
    activation: Activation = Field("silu", description="relu, gelu, gelu_tanh or silu")
    bias: bool = Field(False, description="whether the products of experts have biases")

    def dense(self, hidden: int | None = None) -> GatedSettings | FFNSettings:
        """One expert, as a channel of its own."""
        form = GatedSettings if self.gated else FFNSettings
        return form(hidden=hidden or self.hidden, activation=self.activation, bias=self.bias)

    def features(self, width: int) -> int:
        return self.dense().features(width)

    def held(self, width: int) -> int:
        """Parameters of one expert."""
        hidden, into = self.features(width), 2 if self.gated else 1
        return (into + 1) * hidden * width + (into * hidden + width if self.bias else 0)


class MoESettings(ExpertSettings):
    """Σ_{e ∈ top-k} g_e(x) · expert_e(x), and the fields of the router."""

    top: int = Field(2, gt=0, description="how many a token picks")
    scores: Scores = Field("softmax", description="gates: softmax over all experts, or a sigmoid each")
    normalise: bool = Field(True, description="gates of the picked experts sum to 1")
    scale: float = Field(1.0, gt=0, description="factor on the gates")
    shared: int | None = Field(None, gt=0, description="hidden features of an expert that every token goes through")
    shared_gate: bool = Field(False, description="weigh that expert by a sigmoid of the token")
    balance: Balance = Field("switch", description="the loss that spreads (or concentrates) experts")
    balance_weight: float = Field(0.01, ge=0, description="its weight")
    z_weight: float = Field(0.001, ge=0, description="weight of the mean squared log-sum of the router's scores")
    bias_rate: float = Field(
        0.0, ge=0, description="how far an update moves what is added to an expert's score where experts are picked"
    )
    capacity: float | None = Field(
        None, gt=0, description="picks that an expert takes in training, relative to its even share of a document"
    )
    jitter: float = Field(0.0, ge=0, lt=1, description="in training the router reads x times 1 ± this")

    @model_validator(mode="after")
    def _routed(self) -> MoESettings:
        if self.top > self.experts:
            raise ValueError(f"top ({self.top}) must be at most experts ({self.experts})")
        if self.top == 1 and self.normalise and self.experts > 1:
            raise ValueError("a single gate that is normalised is 1, and teaches no router: set normalise: false")
        if self.shared_gate and self.shared is None:
            raise ValueError("shared_gate weighs a shared expert: set shared, its hidden features")
        return self

    def can(self) -> Capabilities:
        free = self.capacity is None  # else a pick may find no room, for tokens that a mask hides from it
        return dataclasses.replace(WITHIN, chunking=free, mask=free, noise=self.jitter > 0)

    def active(self, parameters: int, width: int) -> int:
        return parameters - (self.experts - self.top) * self.held(width)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        width, hidden = place.width, self.features(place.width)
        flops = linear_flops(width, self.experts, length)
        flops += length * self.experts * ((5 if self.scores == "softmax" else 1) + (1 if self.bias_rate else 0))
        if self.scores == "sigmoid":  # their shares
            flops += 2 * length * self.experts
        flops += length * self.top * ((2 if self.normalise else 0) + (1 if self.scale != 1.0 else 0))
        picks = length * self.top
        products = (2 if self.gated else 1) * linear_flops(width, hidden, picks, self.bias)
        products += linear_flops(hidden, width, picks, self.bias)
        flops += products + picks * hidden * (2 if self.gated else 1) + 2.0 * picks * width
        if self.shared is not None:
            flops += self.dense(self.shared).cost(place, length).flops + length * width
            flops += (linear_flops(width, 1, length) + length * (1 + width)) if self.shared_gate else 0
        return Cost(flops)


@channels.register
class MixtureSettings(MoESettings):
    """Experts that a router picks by the token alone."""

    kind: ClassVar[str] = "moe"
    source: ClassVar[str] = "Shazeer et al. 2017, Outrageously Large Neural Networks: The Sparsely-Gated MoE Layer"
    oracle: ClassVar[str] = (
        "tests/nn/channels/test_moe.py: transformers' Mixtral, Qwen2-MoE and DeepSeek-V3 blocks; outputs and gradients"
    )

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("mixtral", cls(experts=5, hidden=12), compiled=True),
            Example(
                "deepseek",
                cls(experts=6, top=3, hidden=8, scores="sigmoid", scale=1.5, bias_rate=0.01, shared=12, jitter=0.1),
            ),
            Example("plain", cls(experts=4, top=1, hidden=12, gated=False, bias=True, normalise=False)),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("one_expert", Example("one", cls(experts=1, top=1, hidden=12)), _dense)]

    def build(self, place: Place) -> MoE:
        return MoE(self, place)


class Experts(nn.Module):
    """Feed-forward networks of one form, of which every row picks some."""

    def __init__(self, settings: ExpertSettings, place: Place) -> None:
        super().__init__()
        self.path, self.count = place.path, settings.experts
        hidden = settings.features(place.width)
        build, bias = place.experts, settings.bias
        self.gate = build(self.count, place.width, hidden, "gate", bias) if settings.gated else None
        self.up = build(self.count, place.width, hidden, "up", bias)
        self.down = build(self.count, hidden, place.width, "down", bias)
        self.activation = ACTIVATIONS[settings.activation]

    def forward(self, x: Tensor, experts: Tensor, gates: Tensor, kept: Tensor | None, ctx: Context) -> Tensor:
        """Σ_k gates · expert(x): x [B, T, D]; experts, gates and kept (False: not computed) [B, T, k]."""
        flat, picked = x.flatten(0, 1), experts.flatten(0, 1)
        if kept is not None:
            gates = gates.masked_fill(~kept, 0)
        if plain():
            each = self._inner(lambda product: product(flat, picked))  # [N, k, H]
            if ctx.taps is not None:
                each = self._tapped(each, x, ctx)
            each = self.down(each, picked)
        elif kept is None and ctx.taps is None and self._few(flat, picked):
            each = self._singles(flat, picked)
        else:
            groups = grouped(picked, self.count, None if kept is None else kept.flatten(0, 1))
            rows = groups.rows(flat)
            each = self._inner(lambda product: product.grouped(rows, groups))  # [N·k, H]
            if ctx.taps is not None:
                each = groups.sort(self._tapped(groups.unsort(each), x, ctx).reshape(each.shape))
            each = groups.unsort(self.down.grouped(each, groups)).view(*picked.shape, -1)
        return torch.bmm(gates.flatten(0, 1)[:, None].to(x.dtype), each).view_as(x)

    def record(self, tape: Tape, x: Buffer, picks: Buffer) -> Buffer:
        return experts_out(tape, experts_in(tape, x, picks, self.up, self.gate, self.activation), picks, self.down)

    def _few(self, x: Tensor, picked: Tensor) -> bool:
        """Decoding: so few picks that reading their weights is all the work, and sorting them much of the rest."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or picked.numel() > FEW:
            return False
        return all(reads_once(x, part.weight) for part in (self.gate, self.up, self.down) if part is not None)

    def _singles(self, x: Tensor, picked: Tensor) -> Tensor:
        """[N, k, D], one pick after another; the numbers are those of the sorted picks."""
        chosen = picked.flatten().tolist()
        order = sorted(range(len(chosen)), key=chosen.__getitem__)  # as `grouped` sorts, so that bits are the same

        def through(product: Any) -> Tensor:
            return torch.cat([product.single(x[place // picked.shape[1]][None], chosen[place]) for place in order])

        hidden = self._inner(through)
        made = {place: self.down.single(row, chosen[place]) for place, row in zip(order, hidden.split(1), strict=True)}
        return torch.cat([made[place] for place in range(len(order))]).view(*picked.shape, -1)

    def _inner(self, through: Callable[[Any], Tensor]) -> Tensor:
        if self.gate is None:
            return self.activation(through(self.up))
        return self.activation(through(self.gate)) * through(self.up)

    def _tapped(self, hidden: Tensor, x: Tensor, ctx: Context) -> Tensor:
        """The tap `hidden` [B, T, k, H] of every pick, where the picks' order is that of their gates."""
        assert ctx.taps is not None
        shaped = hidden.reshape(*x.shape[:2], -1, hidden.shape[-1])
        return ctx.taps(f"{self.path}.hidden", shaped).reshape(hidden.shape)


class MoE(ChannelMixer):
    """x [B, T, D] → [B, T, D].

    Taps: `router`, the gates of all experts [B, T, E], where an edit also picks; `hidden` of the picks; in
    training updates with a capacity `dropped` [B, T, k]. Buffer: `correction`, what is added to the
    experts' scores to pick, with `bias_rate`. Not stored: `counts` [groups, E + 1] of the update's picks by
    expert, then those dropped, and `last`, those of the update before.
    """

    correction: Tensor | None
    groups = 1  # rows of `counts`

    def __init__(self, settings: MoESettings, place: Place) -> None:
        super().__init__()
        self.kind, self.path, self.settings = settings.kind, place.path, settings
        self.capabilities = settings.can()
        self.router = place.product(place.width, settings.experts, "router")
        self.experts = Experts(settings, place)
        self.shared = settings.dense(settings.shared).build(place.at("shared")) if settings.shared else None
        self.shared_gate = place.product(place.width, 1, "router") if settings.shared_gate else None
        self.register_buffer("correction", torch.zeros(settings.experts) if settings.bias_rate else None)
        self.count_groups(1)

    def count_groups(self, groups: int) -> None:
        self.groups = groups
        self.counts = torch.zeros(groups, self.settings.experts + 1, dtype=torch.int64, device="cpu")
        self.last = torch.zeros_like(self.counts)

    def reset(self, generator: torch.Generator | None) -> None:
        if self.correction is not None:
            self.correction.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoE:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0)).device
        if device.type != "meta":
            self.counts, self.last = self.counts.to(device), self.last.to(device)
        return self

    # -- what happens to tokens

    def accept(self, ctx: Context) -> None:
        if ctx.mask is not None and not self.capabilities.mask:
            raise UnsupportedError(
                f"'{self.kind}' with a capacity cannot take a mask from the objective: tokens that are hidden from "
                "one another would compete for an expert's places",
                where=self.path,
                hint="leave capacity out",
            )
        super().accept(ctx)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        self.accept(ctx)
        settings, real = self.settings, ctx.present(x)
        scores = self.scores(x, ctx)
        experts, gates, probabilities = top_gates(
            scores,
            settings.top,
            normalise=settings.normalise,
            kind=settings.scores,
            correction=self.correction,
        )
        if settings.scale != 1.0:
            gates = gates * settings.scale
        if ctx.taps is not None:
            experts, gates = self._tapped(experts, gates, ctx)
        kept = None if real is None else real[..., None].expand_as(experts)
        if settings.capacity is not None and ctx.training is not None:
            kept = within_capacity(experts, settings.experts, settings.capacity, ctx.documents, real)
            if ctx.taps is not None:
                dropped = ~kept if real is None else real[..., None] & ~kept
                ctx.taps.lazy(f"{self.path}.dropped", lambda: dropped)
        y: Tensor = self.experts(x, experts, gates, kept, ctx)
        if self.shared is not None:
            always = self.shared(x, ctx)
            y = y + (always if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * always)
        if ctx.training is None:
            return y
        self.count(experts, kept, real, ctx)
        return attach(y, self.loss(probabilities, experts, scores, real, ctx), ctx)

    def record(self, tape: Tape, x: Buffer, state: State | None) -> Buffer:
        settings = self.settings
        picks = pick(
            tape,
            x,
            self.router,
            settings.top,
            normalise=settings.normalise,
            sigmoid=settings.scores == "sigmoid",
            correction=self.correction,
            factor=settings.scale,
        )
        y = self.experts.record(tape, x, picks)
        if self.shared is not None:
            always = record(self.shared, tape, x, None)
            if self.shared_gate is None:
                tape.add(y, always)
            else:
                add_gated(tape, y, always, record(self.shared_gate, tape, x))
        return y

    def scores(self, x: Tensor, ctx: Context) -> Tensor:
        """What the router says of every expert, [B, T, E]."""
        if self.settings.jitter:
            drawn = uniform(ctx, self.path, "jitter", x.shape, x)
            if drawn is not None:
                x = x * (1 + self.settings.jitter * (2 * drawn - 1)).to(x.dtype)
        return row_scores(self.router, x)

    def loss(self, probabilities: Tensor, experts: Tensor, scores: Tensor, real: Tensor | None, ctx: Context) -> Tensor:
        """Balance and z losses, weighted."""
        settings = self.settings
        balance = balance_loss(probabilities, experts, settings.balance, real)
        return settings.balance_weight * balance + settings.z_weight * z_loss(scores, real)

    def _tapped(self, experts: Tensor, gates: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        assert ctx.taps is not None
        name = f"{self.path}.router"
        every = ctx.taps(name, spread(experts, gates, self.settings.experts))
        if not ctx.taps.edited(name):
            return experts, gates
        picked = every.topk(self.settings.top, -1)
        return picked.indices, picked.values

    # -- load

    @torch.no_grad()
    def count(self, experts: Tensor, kept: Tensor | None, real: Tensor | None, ctx: Context) -> None:
        """Add the picks of one call to `counts`, dropped ones too; blocks computed twice in an update count
        twice throughout."""
        weight = torch.ones_like(experts) if real is None else real[..., None].expand_as(experts).long()
        lost = torch.zeros_like(weight) if kept is None else weight * ~kept
        groups = self.owners(experts, ctx)
        width = self.settings.experts + 1
        flat = self.counts.view(-1)
        flat.scatter_add_(0, (groups * width + experts).flatten(), weight.flatten())
        flat.scatter_add_(0, (groups * width + self.settings.experts).flatten(), lost.flatten())

    def owners(self, experts: Tensor, ctx: Context) -> Tensor:
        """The row of `counts` that each pick [B, T, k] belongs to."""
        return torch.zeros_like(experts)

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        """After an update: experts that were picked too often are picked less, and the log hears of it."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.counts)
        if self.correction is not None:
            load = self.counts[:, :-1].sum(0).to(self.correction.dtype)
            self.correction += self.settings.bias_rate * torch.sign(load.mean() - load)
        self.last.copy_(self.counts)
        self.counts.zero_()

    def observe(self) -> dict[str, float]:
        """Of the last update: `expert_load`, the picks of the busiest expert over the mean of all, and
        `dropped_picks`, the share beyond the capacity."""
        picks, lost = self.last[:, :-1], self.last[:, -1]
        total = int(picks.sum())
        if not total:
            return {}
        found = {"expert_load": float(picks.sum(0).max()) * self.settings.experts / total}
        if self.settings.capacity is not None:
            found["dropped_picks"] = int(lost.sum()) / total
        return found | self.observe_groups(picks)

    def observe_groups(self, picks: Tensor) -> dict[str, float]:
        """What there is to say of picks [groups, E]."""
        return {}


def _dense(channel: MoE, x: Tensor, ctx: Context) -> Tensor:
    """One expert: a gated feed-forward network."""
    experts = channel.experts
    assert experts.gate is not None
    gate, up, down = experts.gate.weight[0], experts.up.weight[0], experts.down.weight[0]
    y: Tensor = (nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()
    return y
