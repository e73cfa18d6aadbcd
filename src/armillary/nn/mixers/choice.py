"""A block that may be attention, a channel mixer or nothing, mixed while a search finds out which.

Mandava, Migacz & Florea 2020, Pay Attention when Required: the super-network whose blocks all are such
choices is trained once, weights and choices together; weights over the options are drawn by a
Gumbel-softmax (Jang, Gu & Poole 2017, Categorical Reparameterization with Gumbel-Softmax) whose
temperature falls, and what the options cost is added to the loss. The likeliest options then make an
ordinary model (`armillary.compress.found_recipe`).

The residual connection around the block is "nothing". Outside of updates the weights are the softmax
of their logits, without noise. Cost is counted in FLOPs at the model's context, the dearer option as
1, unless measured times are given. The paper leaves the schedule of the temperature open: here it
falls geometrically from `temperature` to `final`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from armillary.nn.channels.gated import GatedSettings
from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import Capabilities, ChannelSettings, Frozen, Mixer, MixerSettings, Place, mixers
from armillary.nn.mixers.attention import Attention, AttentionSettings
from armillary.nn.positions.rope import RopeSettings
from armillary.nn.state import State
from armillary.nn.training import attach, gumbel

OPTIONS = ("mixer", "channel", "nothing")


@mixers.register
class ChoiceSettings(MixerSettings):
    """w₁·attention + w₂·channel, with weights (w₁, w₂, w₃) that sum to 1 and become one-hot."""

    kind: ClassVar[str] = "choice"
    source: ClassVar[str] = "Mandava, Migacz & Florea 2020, Pay Attention when Required"
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_choice.py: each option alone, the mean of the draws, the penalty by differences; "
        "tests/compress/test_search.py: the ordinary Transformer"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(
        bidirectional=True, mask=True, state="span", rollback="truncate", noise=True
    )
    mixer: MixerSettings = Field(
        AttentionSettings(position=RopeSettings()), description="what looks at other tokens: attention"
    )
    channel: ChannelSettings = Field(GatedSettings(), description="what works within a token")
    penalty: float = Field(0.0, ge=0, description="loss added per expected cost of a block, in nats")
    costs: tuple[float, float] | None = Field(
        None, description="times of mixer and channel, in any unit; by default their FLOPs"
    )
    temperature: float = Field(1.0, gt=0, description="of the draws at the start of training")
    final: float = Field(0.1, gt=0, description="of the draws at its end")

    @model_validator(mode="after")
    def _coherent(self) -> ChoiceSettings:
        if type(self.mixer) is not AttentionSettings:
            raise ValueError(f"mixer must be attention, found {self.mixer.kind}")
        if self.costs is not None and min(self.costs) <= 0:
            raise ValueError("costs must be above 0")
        return self

    @classmethod
    def examples(cls) -> list[Example]:
        attention = AttentionSettings(heads=2, position=RopeSettings())
        return [
            Example("default", cls(mixer=attention, penalty=0.1), compiled=True),
            Example("bidirectional", cls(mixer=attention), {"order": "bidirectional"}),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("expected", Example("one_head", cls(mixer=AttentionSettings(heads=1))), _expected)]

    def build(self, place: Place) -> Choice:
        return Choice(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        both = self.mixer.cost(place, length, itemsize) + self.channel.cost(place, length, itemsize)
        return both + Cost(length * place.width * 3.0 + 5 * len(OPTIONS))

    def shares(self, place: Place) -> tuple[float, float]:
        """What mixer and channel cost, the dearer one 1."""
        each = (self.mixer, self.channel)
        a, b = self.costs or (each[0].cost(place, place.length).flops, each[1].cost(place, place.length).flops)
        return a / max(a, b), b / max(a, b)


class Choice(Mixer):
    """x [B, T, D] → [B, T, D]; its state is the attention's."""

    scaled = ()
    temperature: Tensor

    def __init__(self, settings: ChoiceSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.mixer = settings.mixer.build(place)
        assert isinstance(self.mixer, Attention)
        self.channel = settings.channel.build(place.at("channel"))
        self.value_groups = self.mixer.value_groups
        self.penalty, self.costs = settings.penalty, settings.shares(place)
        self.first, self.final = settings.temperature, settings.final
        self.logits = nn.Parameter(torch.empty(len(OPTIONS)))
        self.register_buffer("temperature", torch.full((), self.first))

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.logits)
        self.temperature.fill_(self.first)

    def after_step(self, step: int, steps: int) -> None:
        with torch.no_grad():
            self.temperature.fill_(self.first * (self.final / self.first) ** (step / steps))

    def found(self) -> str:
        """The likeliest option: mixer, channel or nothing."""
        return OPTIONS[int(self.logits.argmax())]

    def values(self, x: Tensor, ctx: Context) -> Tensor:
        return self.mixer.values(x, ctx)

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        return self.mixer.freeze(x, ctx)

    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        return self.mixer.mix(frozen, values)

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return self._joined(self.mixer.finish(mixed, x, ctx), x, ctx)

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        return self.mixer.init_state(batch, capacity, dtype, device, memory)

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        return self._joined(self.mixer.extend(x, state, ctx), x, ctx)

    def _joined(self, looked: Tensor, x: Tensor, ctx: Context) -> Tensor:
        weights = self._draw(x, ctx).to(looked.dtype)
        y: Tensor = weights[0] * looked + weights[1] * self.channel(x, ctx)
        if self.penalty and ctx.training is not None:
            expected = torch.softmax(self.logits.float(), 0)
            y = attach(y, self.penalty * (expected[0] * self.costs[0] + expected[1] * self.costs[1]), ctx)
        return y

    def _draw(self, x: Tensor, ctx: Context) -> Tensor:
        """The weights of the options, [3]; in updates drawn anew for each call."""
        logits = self.logits if self.logits.dtype == torch.float64 else self.logits.float()
        drawn = gumbel(ctx, self.path, "option", logits.shape, logits.detach())
        if drawn is None:
            return torch.softmax(logits, 0)
        return torch.softmax((logits + drawn.to(logits.dtype)) / self.temperature.to(logits.dtype), 0)


def _expected(choice: Choice, x: Tensor, ctx: Context) -> Tensor:
    """The two options, each as it is alone, by the softmax of the logits."""
    weights = torch.softmax(choice.logits, 0)
    y: Tensor = weights[0] * choice.mixer(x, ctx) + weights[1] * choice.channel(x, ctx)
    return y
