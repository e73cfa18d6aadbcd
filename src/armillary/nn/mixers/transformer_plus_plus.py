"""Heads that look at words and heads that look at their context, side by side.

Thapak & Hore 2020, Transformer++. Half of the heads are ordinary self-attention. The others relate a
token to the contexts of the tokens rather than to these themselves: a convolution along the sequence,
one kernel per feature with weights that a softmax makes sum to 1, goes over their keys and values
before they are attended to; heads are joined and mapped back. The paper's abstract says no more than that
dependencies are learned "through a context in multi-head using convolution"; that keys and values both
pass, and the softmax over a kernel (Wu et al. 2019, Pay Less Attention with Lightweight and Dynamic
Convolutions), is our choice. A causal kernel covers the token and those before it. Positions turn keys
after the convolution. The paper's second part, tags of words and names as further targets of the
encoder, is no matter of a mixer.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mask import Causal, Mask
from armillary.nn.mechanism import Capabilities, Frozen, MixerSettings, Place, PositionSettings, head_width, mixers
from armillary.nn.ops.attend import attend
from armillary.nn.ops.neighbours import Grid, Neighbourhood
from armillary.nn.ops.short_conv import next_tail
from armillary.nn.positions.rope import RopeSettings
from armillary.nn.span import SpanMixer
from armillary.nn.state import SpanState, State


@mixers.register
class TransformerPlusPlusSettings(MixerSettings):
    """softmax(q kᵀ / √K) v, where k and v of some heads are contexts: Σ_n softmax(w)_n (neighbour n)."""

    kind: ClassVar[str] = "transformer_plus_plus"
    source: ClassVar[str] = "Thapak & Hore 2020, Transformer++"
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_transformer_plus_plus.py: PyTorch's depthwise convolutions (1-D and 2-D) before "
        "softmax attention written out; dense attention where kernels pick the token itself; outputs and gradients"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(bidirectional=True, state="span")
    heads: int = Field(4, gt=0, description="heads (divides width)")
    context_heads: int | None = Field(None, ge=0, description="heads that look at contexts; by default half of them")
    kernel: int = Field(3, gt=0, description="tokens of a context, itself included; the side of a square in a grid")
    position: PositionSettings | None = Field(None, description="how q and k turn: rope or none")
    grid: Grid | None = Field(None, description="lines and columns of an image given row by row; none: a sequence")

    @model_validator(mode="after")
    def _coherent(self) -> TransformerPlusPlusSettings:
        if self.contexts > self.heads:
            raise ValueError(f"context_heads ({self.contexts}) must be at most heads ({self.heads})")
        return self

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("causal", cls(position=RopeSettings())),
            Example("image", cls(heads=2, grid=(16, 4)), {"order": "bidirectional"}),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("one_token", Example("one_token", cls(kernel=1)), _dense)]

    @property
    def contexts(self) -> int:
        """Heads that look at contexts: the last ones."""
        return self.heads // 2 if self.context_heads is None else self.context_heads

    def build(self, place: Place) -> TransformerPlusPlus:
        return TransformerPlusPlus(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        width, each = place.width, head_width(place.width, self.heads, settable=False)
        hood, channels = Neighbourhood.of(self.kernel, place.order, self.grid), self.contexts * each
        flops = 4 * linear_flops(width, width, length) + float(self.heads * length * length) * (4 * each + 6)
        flops += 2 * (hood.flops(channels, length) + 5.0 * hood.size * channels)
        if self.position is not None:
            flops += self.position.cost(place, length, self.heads, self.heads, each).flops
        if place.order == "bidirectional":
            return Cost(flops)
        return Cost(flops, 2.0 * itemsize * (length * width + hood.before * channels))


class TailedState(SpanState):
    """A span, and tensors "…_tail" [B, n, C] of constant size, which no truncation can bring back."""

    divisible: ClassVar[bool] = False

    def truncate(self, lengths: Tensor) -> None:
        State.truncate(self, lengths)

    def _reserve(self, capacity: int) -> None:
        tails = {name: t for name, t in self.tensors.items() if name.endswith("_tail")}
        self.tensors = {name: t for name, t in self.tensors.items() if name not in tails}
        super()._reserve(capacity)
        self.tensors |= tails


class TransformerPlusPlus(SpanMixer):
    """x [B, T, D] → [B, T, D]; its state are keys and values, those of contexts among them, and the last
    tokens' own keys and values of the heads that look at contexts."""

    def __init__(self, settings: TransformerPlusPlusSettings, place: Place) -> None:
        heads, width = settings.heads, head_width(place.width, settings.heads, settable=False)
        super().__init__(settings, place, heads=heads, groups=heads, width=width, position=settings.position)
        self.q = place.product(place.width, heads * width, "q")
        self.o = place.product(heads * width, place.width, "o")
        self.contexts = settings.contexts
        self.hood = Neighbourhood.of(settings.kernel, place.order, settings.grid, place.path)
        shape = (self.contexts, width, self.hood.size)
        self.k_kernel, self.v_kernel = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))

    def reset(self, generator: torch.Generator | None) -> None:
        for kernel in (self.k_kernel, self.v_kernel):
            nn.init.normal_(kernel, generator=generator)

    def queries(self, x: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return self.q(x).unflatten(-1, (self.heads, self.width)), {}

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, places: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        return attend(q, k, v, mask=mask, scale=self.scale)[0]

    def values(self, x: Tensor, ctx: Context) -> Tensor:
        own: Tensor = self.v(x).unflatten(-1, (self.heads, self.width))
        return self._contextual(own, self.v_kernel, ctx, x)

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return self.o(mixed.flatten(2))  # type: ignore[no-any-return]

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        if ctx.documents is None and ctx.padding is None:
            self.hood.fits(x.shape[1], self.path)
        return super().forward(x, ctx)

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        tensors = super().init_state(batch, capacity, dtype, device, memory).tensors
        shape = (batch, self.hood.before, self.contexts * self.width)
        tails = {name: torch.zeros(shape, dtype=dtype, device=device) for name in ("k_tail", "v_tail")}
        return TailedState({**tensors, **tails})

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        assert isinstance(state, TailedState)
        valid = ctx.present(x)
        if valid is not None:  # what stands in other places must not decide how the products of valid ones are grouped
            x = x.masked_fill(~valid[..., None], 0.0)
        own = {name: getattr(self, name)(x).unflatten(-1, (self.heads, self.width)) for name in ("k", "v")}
        tails = {name: state.tensors[f"{name}_tail"] for name in own}
        values = self._contextual(own["v"], self.v_kernel, ctx, x, tails["v"])
        if ctx.taps is not None:
            values = ctx.taps(f"{self.path}.v", values)
        made = self._turned(self._contextual(own["k"], self.k_kernel, ctx, x, tails["k"]), x, ctx)
        for name, each in own.items():
            rows = each[:, :, self.heads - self.contexts :].flatten(2)
            state.put(f"{name}_tail", next_tail(rows, tails[name], ctx.lengths))
        start, uniform = state.lengths, state.uniform
        held = state.append({"k": made["k"].transpose(1, 2), "v": values.transpose(1, 2)}, ctx.lengths)
        mask = Causal(start if uniform is None or state.uniform is None else uniform)
        frozen = Frozen({**made, "k": held["k"].transpose(1, 2), "mask": mask, "places": None})
        return self._closed(frozen, held["v"].transpose(1, 2), x, ctx)

    def _scored(self, x: Tensor, ctx: Context) -> dict[str, Tensor]:
        own = self.k(x).unflatten(-1, (self.heads, self.width))
        return self._turned(self._contextual(own, self.k_kernel, ctx, x), x, ctx)

    def _turned(self, k: Tensor, x: Tensor, ctx: Context) -> dict[str, Tensor]:
        q, _ = self.queries(x, ctx)
        if self.position is not None:
            q, k = self.position.rotate(q, k, ctx.where(x))
        if ctx.taps is not None:
            q, k = ctx.taps(f"{self.path}.q", q), ctx.taps(f"{self.path}.k", k)
        return {"q": q, "k": k}

    def _contextual(self, own: Tensor, kernel: Tensor, ctx: Context, x: Tensor, tail: Tensor | None = None) -> Tensor:
        """own [B, T, H, K] with the contexts of the last heads in place of their own; tail: [B, before, …]."""
        if self.contexts == 0:
            return own
        plain, words = own.split([self.heads - self.contexts, self.contexts], 2)
        weights = torch.softmax(kernel.flatten(0, 1), -1)
        known = {"documents": ctx.documents, "padding": ctx.padding}
        mixed = self.hood.convolved(words.flatten(2), weights, ctx.where(x), tail=tail, **known).view_as(words)
        return torch.cat([plain, mixed], 2)


def _dense(mixer: TransformerPlusPlus, x: Tensor, ctx: Context) -> Tensor:
    """A context of one token is the token: multi-head attention."""
    q, k, v = (
        (x @ each.weight.t()).unflatten(-1, (mixer.heads, -1)).transpose(1, 2) for each in (mixer.q, mixer.k, mixer.v)
    )
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(2, 3) / mixer.width**0.5).masked_fill(later, -torch.inf)
    mixed = (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)
    return mixed @ mixer.o.weight.t()  # type: ignore[no-any-return]
