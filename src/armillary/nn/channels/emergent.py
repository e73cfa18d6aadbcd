"""Emergent experts: the hidden features of a dense feed-forward network in groups, of which a token picks some.

Qiu et al. 2023, Emergent Mixture-of-Experts: Can Dense Pre-trained Transformers Benefit from Emergent
Modular Structures? An expert is a group of the dense network's features with equal-sized shares of its
weights; its key is the mean of what its features look for, so that there are no new parameters and
nothing is trained for the router. A picked expert counts with weight 1. With all experts it is the
dense network. `armillary compress --experts` groups the features of a trained one.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from armillary.base.errors import UnsupportedError
from armillary.nn.channels.ffn import FFNSettings
from armillary.nn.channels.gated import GatedSettings
from armillary.nn.context import Context
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.linear import Linear
from armillary.nn.mechanism import ChannelMixer, ChannelSettings, Place, channels
from armillary.nn.ops.experts import expert_product
from armillary.nn.ops.routing import row_scores, spread


@channels.register
class EmergentSettings(ChannelSettings):
    """Σ over the top experts e by x · mean(K_e) of the features of e, where K are the rows of up (gated: of gate)."""

    kind: ClassVar[str] = "emergent"
    source: ClassVar[str] = (
        "Qiu et al. 2023, Emergent Mixture-of-Experts: Can Dense Pre-trained Transformers Benefit from Emergent "
        "Modular Structures?"
    )
    oracle: ClassVar[str] = (
        "tests/nn/channels/test_emergent.py: the dense network with all experts; loops over tokens with some"
    )
    experts: int = Field(8, gt=0, description="groups of hidden features, all of one size (divides them)")
    top: int = Field(4, gt=0, description="how many a token picks; all: the dense network")
    dense: ChannelSettings = Field(FFNSettings(), description="whose hidden features are grouped: ffn or gated")

    @model_validator(mode="after")
    def _coherent(self) -> EmergentSettings:
        if self.top > self.experts:
            raise ValueError(f"top ({self.top}) must be at most experts ({self.experts})")
        if not isinstance(self.dense, (FFNSettings, GatedSettings)):
            raise ValueError(f"the features of '{self.dense.kind}' cannot be grouped: dense is ffn or gated")
        if self.dense.chunk is not None:
            raise ValueError("experts hold few features at once as it is: leave dense.chunk out")
        return self

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("plain", cls(experts=6, top=2, dense=FFNSettings(hidden=24, activation="relu", bias=True))),
            Example("gated", cls(experts=4, top=3, dense=GatedSettings(hidden=24))),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        dense = GatedSettings(hidden=24, bias=True)
        return [Limit("every_expert", Example("all", cls(experts=6, top=6, dense=dense)), _dense)]

    def size(self, width: int) -> int:
        """Features of an expert."""
        assert isinstance(self.dense, (FFNSettings, GatedSettings))
        hidden = self.dense.features(width)
        if hidden % self.experts:
            raise UnsupportedError(
                f"{hidden} hidden features do not divide into {self.experts} experts",
                hint="change experts, or hidden of the dense network",
            )
        return hidden // self.experts

    def build(self, place: Place) -> Emergent:
        return Emergent(self, place)

    def active(self, parameters: int, width: int) -> int:
        return round(parameters * self.top / self.experts)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        whole = self.dense.cost(place, length, itemsize)
        if self.top == self.experts:
            return whole
        assert isinstance(self.dense, (FFNSettings, GatedSettings))
        width, features = place.width, self.size(place.width) * self.top
        into = 2 if isinstance(self.dense, GatedSettings) else 1
        flops = into * linear_flops(width, features, length, self.dense.bias) + into * length * features
        flops += linear_flops(features, width, length, self.dense.bias) + length * width * self.top  # their sum
        keys = self.size(width) * self.experts * width  # means of rows, once a call
        return Cost(flops + keys + linear_flops(width, self.experts, length))


class Emergent(ChannelMixer):
    """[B, T, D] → [B, T, D]; expert e has the features e·m … (e+1)·m − 1 of `dense`.

    order [F] int64: where each of them stood before a trained network's were grouped, so that they can
    go back.
    """

    order: Tensor

    def __init__(self, settings: EmergentSettings, place: Place) -> None:
        super().__init__()
        self.path, self.settings = place.path, settings
        self.top, self.size = settings.top, settings.size(place.width)
        self.dense: Any = settings.dense.build(place)
        self.gated = isinstance(settings.dense, GatedSettings)
        for part in self.dense.children():
            if type(part) is not Linear:
                raise UnsupportedError(
                    "experts can be picked from dense products only", where=place.path, hint="linear: {up: dense, …}"
                )
        self.register_buffer("order", torch.arange(self.size * settings.experts))

    def keys(self) -> Tensor:
        """What experts are picked by [E, D]: the mean of the rows that their features look for."""
        looked: Tensor = (self.dense.gate if self.gated else self.dense.up).weight
        return looked.detach().view(-1, self.size, looked.shape[1]).mean(1)  # picks have no slope in it

    def route(self, x: Tensor, ctx: Context) -> Tensor:
        """The picked experts of every token in ascending order, [B, T, k] int64."""
        keys = self.keys().double()
        scores = row_scores(lambda rows: rows @ keys.t(), x.detach())
        experts = scores.topk(self.top, -1).indices.sort(-1).values
        if ctx.lengths is None:
            return experts
        # What stands in the places of no token must not decide how many rows an expert multiplies at once.
        real = torch.arange(x.shape[1], device=x.device) < ctx.lengths[:, None]
        return torch.where(real[..., None], experts, torch.arange(self.top, device=x.device))

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """The tap `router` shows the weights [B, T, E] of all experts; an edit of it picks the largest ones."""
        every = self.top == self.settings.experts
        if ctx.taps is None:
            return self.dense(x, ctx) if every else self._picked(x, self.route(x, ctx))
        name = f"{self.path}.router"
        experts = self.route(x, ctx)
        weights = ctx.taps(name, spread(experts, torch.ones_like(experts, dtype=x.dtype), self.settings.experts))
        if not ctx.taps.edited(name):
            return self.dense(x, ctx) if every else self._picked(x, experts)
        if every:
            hidden = self.dense.inner(x) * weights.to(x.dtype).repeat_interleave(self.size, -1)
            return self.dense.down(hidden)  # type: ignore[no-any-return]
        experts = weights.topk(self.top, -1).indices.sort(-1).values
        return self._picked(x, experts, weights.gather(-1, experts))

    def _picked(self, x: Tensor, experts: Tensor, weights: Tensor | None = None) -> Tensor:
        rows, chosen = x.reshape(-1, x.shape[-1]), experts.reshape(-1, self.top)
        dense = self.dense
        hidden = dense.activation(self._into(dense.gate if self.gated else dense.up, rows, chosen))  # [N, k, m]
        if self.gated:
            hidden = hidden * self._into(dense.up, rows, chosen)
        if weights is not None:
            hidden = hidden * weights.reshape(-1, self.top, 1).to(hidden.dtype)
        out = dense.down.weight.view(x.shape[-1], -1, self.size).transpose(0, 1)  # [E, D, m]
        y = expert_product(hidden.flatten(0, 1), out, chosen.reshape(-1, 1)).view(*chosen.shape, -1).sum(1)
        if dense.down.bias is not None:
            y = y + dense.down.bias.to(y.dtype)
        return y.view(x.shape)

    def _into(self, product: Linear, rows: Tensor, chosen: Tensor) -> Tensor:
        """The features of the picked experts, [N, k, m]."""
        y = expert_product(rows, product.weight.view(-1, self.size, product.inputs), chosen)
        return y if product.bias is None else y + product.bias.to(y.dtype).view(-1, self.size)[chosen]

    def extra_repr(self) -> str:
        return f"{self.settings.experts} experts of {self.size}, top={self.top}"


def _dense(channel: Emergent, x: Tensor, ctx: Context) -> Tensor:
    """The gated feed-forward network from the same weights."""
    dense = channel.dense
    gate, up = (torch.nn.functional.linear(x, part.weight, part.bias) for part in (dense.gate, dense.up))
    return torch.nn.functional.linear(gate * torch.sigmoid(gate) * up, dense.down.weight, dense.down.bias)
