"""Heads that look where their position says, whatever the tokens are: no queries, no keys.

Raganato, Scherrer & Tiedemann 2020, Fixed Encoder Self-Attention Patterns in Transformer-Based Machine
Translation. Each head has one pattern: the current token, the previous, the next, everything to the left or
to the right, the start or the end of the document. In the paper one learned head stands beside seven fixed
ones: that is an `attention` branch with `beside: true` after this one.

Details that we chose: weights to the left grow with (position + 1)³ over all earlier tokens, those to the
right mirror them; start and end are the first and the last token alone; a head that finds nobody (before
the first token, after the last) looks at its own token, so that rows sum to 1. Causal models take current,
previous, left and start. Time is linear: shifts and running means.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from armillary.base.errors import UnsupportedError
from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import Capabilities, Frozen, Mixer, MixerSettings, Place, mixers
from armillary.nn.ops.running import running_mean
from armillary.nn.state import FixedState, State

Pattern = Literal["current", "previous", "next", "left", "right", "start", "end"]
AHEAD = ("next", "right", "end")


@mixers.register
class FixedSettings(MixerSettings):
    """A v with a constant A for each head."""

    kind: ClassVar[str] = "fixed"
    source: ClassVar[str] = (
        "Raganato, Scherrer & Tiedemann 2020, Fixed Encoder Self-Attention Patterns in Transformer-Based "
        "Machine Translation"
    )
    oracle: ClassVar[str] = "tests/nn/mixers/test_fixed.py: every pattern's matrix, written as loops over tokens"
    capabilities: ClassVar[Capabilities] = Capabilities(
        causal=True, bidirectional=True, state="fixed", rollback="snapshot"
    )
    patterns: tuple[Pattern, ...] = Field(
        ("current", "previous", "left", "start"), min_length=1, description="what each head looks at"
    )
    head_width: int | None = Field(None, gt=0, description="features per head; by default width / heads")
    power: int = Field(3, ge=0, description="left and right: weights grow with this power of the position")

    @classmethod
    def examples(cls) -> list[Example]:
        everything: tuple[Pattern, ...] = ("start", "left", "current", "previous", "next", "right", "end")
        return [
            Example("causal", cls(), compiled=True),
            Example("left_twice", cls(patterns=("left", "current", "left"), head_width=6, power=1)),
            Example("both_ways", cls(patterns=everything, head_width=4), {"order": "bidirectional"}),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("one_head", Example("current", cls(patterns=("current",))), _product)]

    def features(self, width: int) -> int:
        """Features per head."""
        if self.head_width is None and width % len(self.patterns):
            raise UnsupportedError(
                f"a width of {width} does not divide into {len(self.patterns)} heads",
                hint="change width or patterns, or set head_width",
            )
        return self.head_width or width // len(self.patterns)

    def build(self, place: Place) -> Fixed:
        return Fixed(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        each = self.features(place.width)
        inner = len(self.patterns) * each
        flops = linear_flops(place.width, inner, length) + linear_flops(inner, place.width, length)
        for name in ("left", "right"):
            if name in self.patterns:  # weights, and the recurrence of the mean
                flops += length * (3.0 + 3 * each * self.patterns.count(name))
        if place.order == "bidirectional":
            return Cost(flops)
        counts = {name: self.patterns.count(name) for name in ("previous", "start", "left")}
        state = 1 + (counts["previous"] + counts["start"]) * each * itemsize
        return Cost(flops, state + (4 * counts["left"] * each + 4 if counts["left"] else 0))


class Fixed(Mixer):
    """x [B, T, D] → [B, T, D]; its state is the previous value, the first one, and the mean of all."""

    scaled = ()

    def __init__(self, settings: FixedSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.patterns, self.power = settings.patterns, settings.power
        for name in self.patterns:
            if self.order == "causal" and name in AHEAD:
                raise UnsupportedError(
                    f"a causal head cannot look at '{name}'", where=place.path, hint="current, previous, left or start"
                )
        self.width = settings.features(place.width)
        self.heads = self.value_groups = len(self.patterns)
        self.v = place.product(place.width, self.heads * self.width, "v")
        self.o = place.product(self.heads * self.width, place.width, "o")

    def values(self, x: Tensor, ctx: Context) -> Tensor:
        return self.v(x).unflatten(-1, (self.heads, self.width))  # type: ignore[no-any-return]

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if ctx.padding is None else ctx.padding
        return Frozen(self._places(real, ctx.where(x), ctx.documents, None))

    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        if frozen.weights is not None:
            return (frozen.weights.to(values.dtype) @ values.transpose(1, 2)).transpose(1, 2)
        return self._mixed(frozen.parts, values)[0]

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return self.o(mixed.flatten(2))  # type: ignore[no-any-return]

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        if self.order == "bidirectional":
            raise UnsupportedError("a bidirectional mixer cannot be extended", where=self.path)
        wide = torch.promote_types(dtype, torch.float32)
        tensors = {"begun": torch.zeros(batch, dtype=torch.bool, device=device)}
        for name in dict.fromkeys(self.patterns):
            if name != "current":
                shape = (batch, self.patterns.count(name), self.width)
                tensors[name] = torch.zeros(shape, dtype=wide if name == "left" else dtype, device=device)
        if "left" in self.patterns:
            tensors["mass"] = torch.zeros(batch, dtype=wide, device=device)
        return FixedState(tensors)

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        values = self.values(x, ctx)
        if ctx.taps is not None:
            values = self.tapped_values(values, ctx)
        real = ctx.present(x)
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if real is None else real
        # What is held stands before the chunk like one more token.
        parts = self._places(torch.cat([state.tensors["begun"][:, None], real], 1), ctx.where(x), None, state.tensors)
        mixed, kept = self._mixed(parts, values)
        some = real.any(1)
        kept["begun"] = state.tensors["begun"] | some
        for name, value in kept.items():
            old = state.tensors[name]
            state.put(name, torch.where(some.view(-1, *[1] * (old.dim() - 1)), value.to(old.dtype), old))
        if ctx.taps is not None:
            mixed = ctx.taps(f"{self.path}.mixed", mixed)
        return self.finish(mixed, x, ctx)

    def _places(
        self, real: Tensor, positions: Tensor, documents: Tensor | None, held: Mapping[str, Tensor] | None
    ) -> dict[str, Any]:
        """Where each pattern looks, [B, T] (−1: nowhere), among the tokens that are real [B, T (+ 1 held)]."""
        previous, start, fresh, last = _behind(real, documents)
        ahead = [each.flip(1) for each in _behind(real.flip(1), None if documents is None else documents.flip(1))[:3]]
        after, end = (torch.where(each < 0, each, real.shape[1] - 1 - each) for each in ahead[:2])
        wide = positions.to(torch.float64 if next(self.parameters()).dtype == torch.float64 else torch.float32)
        skip = 0 if held is None else 1
        weights = (wide + 1) ** self.power
        parts = {"previous": previous, "left": previous, "start": start, "next": after, "right": after, "end": end}
        parts |= {"real": real, "fresh": fresh, "final": ahead[2]}
        found: dict[str, Any] = {name: each[:, skip:] for name, each in parts.items()}
        found["weights"] = weights.masked_fill(~found["real"], 0)
        if "right" in self.patterns:
            rest = wide.expand(len(real), -1).gather(1, end.clamp(min=0)) - wide
            found["rest"] = ((rest + 1) ** self.power).masked_fill(~real, 0)
        return found | {"held": held, "last": last}

    def _mixed(self, parts: Mapping[str, Any], values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mix [B, T, H, K], and what to hold after the last token."""
        held, last = parts["held"], parts["last"]
        kept: dict[str, Tensor] = {}
        outputs, order = [], []
        for name in dict.fromkeys(self.patterns):
            heads = [head for head, each in enumerate(self.patterns) if each == name]
            order += heads
            own = values[:, :, heads]
            if name == "current":
                outputs.append(own)
                continue
            seen = own
            if name == "left":
                before = {} if held is None else {"mean": held["left"], "mass": held["mass"]}
                seen, kept["left"], kept["mass"] = running_mean(own, parts["weights"], parts["fresh"], **before)
            elif name == "right":
                back = [each.flip(1) for each in (own, parts["rest"], parts["final"])]
                seen = running_mean(back[0], back[1], back[2])[0].flip(1)
            if held is not None:
                seen = torch.cat([held[name][:, None].to(seen.dtype), seen], 1)
            if name in ("previous", "start"):
                final = last if name == "previous" else parts["start"][:, -1].clamp(min=0)
                kept[name] = seen.take_along_dim(final[:, None, None, None], 1)[:, 0]
            places = parts[name][..., None, None]
            picked = seen.take_along_dim(places.clamp(min=0), 1).to(own.dtype)
            outputs.append(torch.where(places < 0, own, picked))
        back_to = sorted(range(self.heads), key=order.__getitem__)
        return torch.cat(outputs, 2)[:, :, back_to], kept


def _behind(real: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For every token of a row the place of the one before it and of the first of its document, [B, T] (−1:
    there is none), whether it is that first one, and the row's last token [B]; only real ones count."""
    steps = torch.arange(real.shape[1], device=real.device).expand_as(real)
    newest = torch.where(real, steps, -1).cummax(1).values
    previous = torch.cat([torch.full_like(newest[:, :1], -1), newest[:, :-1]], 1)
    if documents is not None:
        other = documents.gather(1, previous.clamp(min=0)) != documents
        previous = previous.masked_fill(other, -1)
    fresh = real & (previous < 0)
    first = torch.where(fresh, steps, -1).cummax(1).values
    return previous, first, fresh, newest[:, -1].clamp(min=0)


def _product(mixer: Fixed, x: Tensor, ctx: Context) -> Tensor:
    """A head that looks at its own token is a product of two matrices."""
    return x @ mixer.v.weight.t() @ mixer.o.weight.t()  # type: ignore[no-any-return]
