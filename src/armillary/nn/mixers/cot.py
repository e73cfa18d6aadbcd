"""The contextual transformer block: neighbours are weighed by what a convolution saw of all of them.

Li et al. 2022, Contextual Transformer Networks for Visual Recognition. A grouped convolution gives the
static context of a token; it and the token itself yield, for every few channels, one weight per neighbour,
which need not be positive nor sum to 1; the neighbours' values so weighed are the dynamic context. A gate
per channel, from the mean of both contexts over the image, chooses between the two.

The paper's form is an image's (`grid`), normalised by batch and over space. Here every token is
normalised by itself, so that it depends on no other row and, causal, on no later token; channels that
share weights lie side by side (in the authors' code they alternate, which only orders channels
otherwise). Causal, which the paper does not have: the neighbours are the last tokens, and the gate takes
the mean over the tokens so far, or (`gate: token`) none. An output product stands for the last one of the
bottleneck in which the paper puts the block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from armillary.base.errors import UnsupportedError
from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import Capabilities, Frozen, Mixer, MixerSettings, NormSettings, Place, mixers
from armillary.nn.norms.layernorm import LayerNormSettings
from armillary.nn.ops.neighbours import Grid, Neighbourhood
from armillary.nn.ops.running import running_mean
from armillary.nn.ops.short_conv import next_tail
from armillary.nn.state import FixedState, State


@mixers.register
class CotSettings(MixerSettings):
    """a · silu(norm(Σ_n w_n v_n)) + (1 − a) · relu(norm(conv(x)))."""

    kind: ClassVar[str] = "cot"
    source: ClassVar[str] = "Li et al. 2022, Contextual Transformer Networks for Visual Recognition"
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_cot.py: the paper's formula with PyTorch's grouped convolutions (1-D and 2-D) and "
        "unfolding; outputs and gradients"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(bidirectional=True, state="fixed")
    kernel: int = Field(3, gt=0, description="neighbours, itself included; the side of a square in a grid")
    groups: int = Field(4, gt=0, description="groups of the convolution (divides width)")
    share: int = Field(8, gt=0, description="channels that share their weights (divides width)")
    squeeze: int | None = Field(None, gt=0, description="hidden features of the gate; by default width/2, at least 32")
    gate: Literal["mean", "token"] = Field(
        "mean", description="what chooses between the contexts: their mean over the tokens (causal: so far), or each"
    )
    norm: NormSettings = Field(LayerNormSettings(), description="norm of both contexts, the values and hidden features")
    grid: Grid | None = Field(None, description="lines and columns of an image given row by row; none: a sequence")

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("causal", cls(groups=2, squeeze=8)),
            Example("image", cls(groups=2, squeeze=8, grid=(16, 4)), {"order": "bidirectional"}),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("alone", Example("alone", cls(kernel=1, squeeze=8, gate="token")), _alone)]

    def hidden(self, width: int) -> int:
        """Hidden features of the gate."""
        return self.squeeze or max(width // 2, 32)

    def rows(self, place: Place, length: int) -> Mapping[str, float]:
        whole = self.gate == "mean" and place.order != "causal"
        return {"squeeze": 1, "gate": 1} if whole else {}

    def build(self, place: Place) -> Cot:
        return Cot(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        width, hidden, half = place.width, self.hidden(place.width), place.width // 2
        hood = Neighbourhood.of(self.kernel, place.order, self.grid)
        weights = width // self.share * hood.size
        flops = self.groups * linear_flops(hood.size * width // self.groups, width // self.groups, length)
        flops += linear_flops(2 * width, half, length) + linear_flops(half, weights, length, bias=True)
        flops += 2 * linear_flops(width, width, length) + hood.flops(width, length)
        flops += 3 * self.norm.flops(width, length) + self.norm.flops(half, length)
        # relu, silu, sum of the contexts and their weighting; of the weights: relu, norm, scale and shift
        flops += length * (6 * width + half + 6 * weights + 2 * weights / hood.size)
        causal = place.order == "causal"
        whole = self.gate == "mean" and not causal
        gated = 1 if whole else length
        if self.gate == "mean":
            flops += length * width + width if whole else length * (3 * width + 2)
        flops += linear_flops(width, hidden, gated, bias=True) + linear_flops(hidden, 2 * width, gated, bias=True)
        flops += self.norm.flops(hidden, gated) + gated * (hidden + 10 * width)
        held = 2 * hood.before * width * itemsize + (4 * (width + 1) if self.gate == "mean" else 0)
        return Cost(flops, held if causal else 0)


class Cot(Mixer):
    """x [B, T, D] → [B, T, D]; its state are the last inputs and values, and the mean of the contexts so far."""

    scaled = ()

    def __init__(self, settings: CotSettings, place: Place) -> None:
        super().__init__(settings, place)
        width = place.width
        for name in ("groups", "share"):
            if width % getattr(settings, name):
                raise UnsupportedError(
                    f"a width of {width} does not divide by {name} ({getattr(settings, name)})",
                    where=place.path,
                    hint=f"change width or {name}",
                )
        self.width, self.groups, self.share, self.gate_by = width, settings.groups, settings.share, settings.gate
        self.hood = Neighbourhood.of(settings.kernel, place.order, settings.grid, place.path)
        self.value_groups = width // settings.share
        each, hidden, half = width // self.groups, settings.hidden(width), width // 2
        self.convs = nn.ModuleList(place.product(self.hood.size * each, each, "conv") for _ in range(self.groups))
        self.static_norm = settings.norm.build(width)
        self.embed = place.product(2 * width, half, "up")
        self.embed_norm = settings.norm.build(half)
        self.weigh = place.product(half, self.value_groups * self.hood.size, "weights", True)
        self.gain = nn.Parameter(torch.empty(self.value_groups, self.hood.size))
        self.shift = nn.Parameter(torch.empty(self.value_groups, self.hood.size))
        self.v = place.product(width, width, "v")
        self.v_norm = settings.norm.build(width)
        self.mixed_norm = settings.norm.build(width)
        self.squeeze = place.product(width, hidden, "up", True)
        self.squeeze_norm = settings.norm.build(hidden)
        self.gate = place.product(hidden, 2 * width, "gate", True)
        self.o = place.product(width, width, "o")

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.ones_(self.gain)
        nn.init.zeros_(self.shift)

    def values(self, x: Tensor, ctx: Context) -> Tensor:
        return self.v_norm(self.v(x)).unflatten(-1, (self.value_groups, self.share))  # type: ignore[no-any-return]

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        return self._frozen(x, ctx, None)

    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        if frozen.weights is not None:
            return (frozen.weights.to(values.dtype) @ values.transpose(1, 2)).transpose(1, 2)
        line = self.hood.line(values)
        return self.hood.weighted(line, frozen.parts["weights"], frozen.parts["seen"])

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return self._finished(mixed, self.freeze(x, ctx), ctx)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        self.accept(ctx)
        if ctx.documents is None and ctx.padding is None:
            self.hood.fits(x.shape[1], self.path)
        values = self.values(x, ctx)
        if ctx.taps is not None:
            values = ctx.taps(f"{self.path}.v", values)
        frozen = self.freeze(x, ctx)
        if ctx.taps is not None:
            frozen = self._weights(frozen, values, ctx)
        mixed = self.mix(frozen, values)
        if ctx.taps is not None:
            mixed = ctx.taps(f"{self.path}.mixed", mixed)
        return self._finished(mixed, frozen, ctx)

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        if self.order == "bidirectional":
            raise UnsupportedError("a bidirectional mixer cannot be extended", where=self.path)
        wide = torch.promote_types(dtype, torch.float32)
        tails = (batch, self.hood.before, self.width)
        tensors = {name: torch.zeros(tails, dtype=dtype, device=device) for name in ("x", "v")}
        if self.gate_by == "mean":
            tensors["mean"] = torch.zeros(batch, self.width, dtype=wide, device=device)
            tensors["mass"] = torch.zeros(batch, dtype=wide, device=device)
        return FixedState(tensors)

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        values = self.values(x, ctx)
        if ctx.taps is not None:
            values = self.tapped_values(values, ctx)
        frozen = self._frozen(x, ctx, state.tensors["x"])
        past = state.tensors["v"].unflatten(-1, (self.value_groups, self.share))
        mixed = self.hood.weighted(self.hood.line(values, past), frozen.parts["weights"], frozen.parts["seen"])
        state.put("x", next_tail(x, state.tensors["x"], ctx.lengths))
        state.put("v", next_tail(values.flatten(2), state.tensors["v"], ctx.lengths))
        if ctx.taps is not None:
            mixed = ctx.taps(f"{self.path}.mixed", mixed)
        return self._finished(mixed, frozen, ctx, state)

    def _frozen(self, x: Tensor, ctx: Context, tail: Tensor | None) -> Frozen:
        """The static context [B, T, D] and the weights [B, T, G, size] that it gives the neighbours."""
        seen = self.hood.seen(ctx.where(x), documents=ctx.documents, padding=ctx.padding)
        around = self.hood.stacked(self.hood.line(x, tail), seen).unflatten(-1, (self.groups, -1))
        parts = [conv(around[:, :, :, group].flatten(2)) for group, conv in enumerate(self.convs)]
        static = F.relu(self.static_norm(torch.cat(parts, -1)))
        hidden = F.relu(self.embed_norm(self.embed(torch.cat([x, static], -1))))
        weights = self._normed(self.weigh(hidden).unflatten(-1, (self.value_groups, self.hood.size)))
        if ctx.taps is not None:
            static = ctx.taps(f"{self.path}.static", static)
        return Frozen({"static": static, "weights": weights, "seen": seen})

    def _normed(self, weights: Tensor) -> Tensor:
        """Over the neighbours of a group."""
        wide = torch.promote_types(weights.dtype, torch.float32)
        centred = weights.to(wide) - weights.to(wide).mean(-1, keepdim=True)
        scale = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + 1e-5)
        return centred * scale * self.gain.to(wide) + self.shift.to(wide)

    def _finished(self, mixed: Tensor, frozen: Frozen, ctx: Context, state: State | None = None) -> Tensor:
        static = frozen.parts["static"]
        dynamic = F.silu(self.mixed_norm(mixed.flatten(2)))
        told = self._told(static + dynamic, ctx, state)
        scores = self.gate(F.relu(self.squeeze_norm(self.squeeze(told)))).unflatten(-1, (2, self.width))
        share = torch.softmax(scores, 2)
        if ctx.taps is not None:
            share = ctx.taps(f"{self.path}.gate", share)
        return self.o(share[:, :, 0] * dynamic + share[:, :, 1] * static)  # type: ignore[no-any-return]

    def _told(self, both: Tensor, ctx: Context, state: State | None) -> Tensor:
        """What the gate reads of the contexts' sum [B, T, D]: itself, or a mean of it, [B, T or 1, D]."""
        if self.gate_by == "token":
            return both
        real = ctx.present(both)
        if real is None:
            real = torch.ones(both.shape[:2], dtype=torch.bool, device=both.device)
        documents = ctx.documents
        if self.order == "bidirectional" and documents is None:
            if ctx.padding is None:
                return both.mean(1, keepdim=True)
            total = both.masked_fill(~real[..., None], 0).sum(1, keepdim=True)
            return total / real.sum(1).clamp(min=1)[:, None, None]
        fresh = torch.zeros_like(real)
        if documents is not None:
            fresh[:, 1:] = documents[:, 1:] != documents[:, :-1]
        held = {} if state is None else {"mean": state.tensors["mean"][:, None], "mass": state.tensors["mass"]}
        means, mean, mass = running_mean(both[:, :, None], real, fresh, **held)
        if state is not None:
            state.put("mean", mean[:, 0])
            state.put("mass", mass)
        if self.order == "bidirectional":
            # the running mean at a document's end is the mean of it all
            steps = torch.arange(real.shape[1], device=real.device)
            ends = torch.cat([fresh[:, 1:], torch.ones_like(fresh[:, :1])], 1)
            last = torch.where(ends, steps, real.shape[1]).flip(1).cummin(1).values.flip(1)
            means = means.take_along_dim(last[..., None, None], 1)
        return means[:, :, 0].to(both.dtype)


def _alone(mixer: Cot, x: Tensor, ctx: Context) -> Tensor:
    """A token that is its only neighbour has a constant weight, and nothing else moves."""
    groups = x.unflatten(-1, (mixer.groups, -1)).unbind(2)
    convs: list[Tensor] = [conv.weight for conv in mixer.convs]  # type: ignore[misc]
    parts = [each @ weight.t() for each, weight in zip(groups, convs, strict=True)]
    static = F.relu(mixer.static_norm(torch.cat(parts, -1)))
    scaled = mixer.v_norm(x @ mixer.v.weight.t()) * mixer.shift.flatten().repeat_interleave(mixer.share)
    dynamic = F.silu(mixer.mixed_norm(scaled))
    hidden = F.relu(mixer.squeeze_norm((static + dynamic) @ mixer.squeeze.weight.t() + mixer.squeeze.bias))
    share = torch.softmax((hidden @ mixer.gate.weight.t() + mixer.gate.bias).unflatten(-1, (2, -1)), 2)
    return (share[:, :, 0] * dynamic + share[:, :, 1] * static) @ mixer.o.weight.t()  # type: ignore[no-any-return]
