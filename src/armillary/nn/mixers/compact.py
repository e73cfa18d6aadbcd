"""Compact self-attention: one product makes queries and keys, windows bound what is seen, and a convolution
carries across them.

For Meng 2021, Armour: Generalizable Compact Self-Attention for Vision Transformers. Of it only the claim
was at hand (attention with less redundancy that drops in for the usual one), not the computation, so
what is here is our reading of it and bears no more of its name than this: queries and keys are the
same projection (Kitaev et al. 2020, Reformer), which leaves three products of width² in place of four; a
token sees a window of tokens; to each head's result a convolution over neighbouring tokens, one kernel
per head, adds what it makes of it, at first nothing. Causal, window and convolution reach back only. In a
`grid` the window is a square around the token, or causal its lines above and its own up to the token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary.base.errors import UnsupportedError
from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mask import Mask, Window, both
from armillary.nn.mechanism import (
    Capabilities,
    Frozen,
    Mixer,
    MixerSettings,
    Place,
    PositionSettings,
    head_width,
    mixers,
)
from armillary.nn.ops.attend import attend
from armillary.nn.ops.neighbours import Grid, Neighbourhood
from armillary.nn.ops.short_conv import next_tail
from armillary.nn.positions.rope import RopeSettings
from armillary.nn.span import visible
from armillary.nn.state import State, WindowState


@mixers.register
class CompactSettings(MixerSettings):
    """y + conv(y) with y = softmax(q qᵀ / √K) v over the nearest tokens."""

    kind: ClassVar[str] = "compact"
    source: ClassVar[str] = (
        "after Meng 2021, Armour: Generalizable Compact Self-Attention for Vision Transformers (the claim; "
        "the computation is ours)"
    )
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_compact.py: PyTorch's attention under the window written out and its depthwise "
        "convolutions (1-D and 2-D); the window mixer with tied products; outputs and gradients"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(bidirectional=True, state="window")
    heads: int = Field(4, gt=0, description="heads (divides width)")
    window: int = Field(
        64,
        gt=0,
        description="tokens that a query sees on its left, itself included (both ways: as many on its right); in a "
        "grid, lines and columns",
    )
    kernel: int = Field(3, gt=0, description="tokens of the convolution; the side of a square in a grid")
    position: PositionSettings | None = Field(None, description="how q and k turn: rope or none")
    grid: Grid | None = Field(None, description="lines and columns of an image given row by row; none: a sequence")

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("causal", cls(window=4, position=RopeSettings())),
            Example("image", cls(heads=2, window=2, grid=(16, 4)), {"order": "bidirectional"}),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("tied", Example("wide", cls(window=64, kernel=1)), _tied)]

    def build(self, place: Place) -> Compact:
        return Compact(self, place)

    def around(self, order: str, where: str = "") -> Around:
        """How far a query sees."""
        far = self.window - 1
        if self.grid is None:
            return Around(far, 0 if order == "causal" else far)
        square = Neighbourhood.of(2 * far + 1, order, self.grid, where)
        return Around(square.before, square.after, square)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        width, each = place.width, head_width(place.width, self.heads, settable=False)
        hood, around = Neighbourhood.of(self.kernel, place.order, self.grid), self.around(place.order)
        flops = 3 * linear_flops(width, width, length) + hood.flops(width, length) + float(length * width)
        if around.square is not None:
            candidates = around.square.size
        else:
            candidates = 1 + sum(Window(around.back, around.ahead).spans(length))
        flops += float(self.heads * length * min(length, candidates)) * (4 * each + 6)
        if self.position is not None:
            flops += self.position.cost(place, length, self.heads, self.heads, each).flops
        if place.order == "bidirectional":
            return Cost(flops)
        held = (2 * width * itemsize + (8 if self.grid is not None else 0)) * (around.back + 1)
        return Cost(flops, held + hood.before * width * itemsize)


@dataclass(frozen=True)
class Around:
    """back, ahead: how many tokens along the row a query sees; square: which of them, in a grid."""

    back: int
    ahead: int
    square: Neighbourhood | None = None


@dataclass(frozen=True, eq=False)
class Columns(Mask):
    """Of what a window along the row lets see, the keys that also stand near the query in the grid of the
    square, whose shifts are all that a query sees. positions: [B or 1, T] and [B or 1, S], counted from 0."""

    square: Neighbourhood
    queries: Tensor
    keys: Tensor

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        assert self.square.grid is not None
        width, far = self.square.grid[1], max(map(abs, self.square.columns))
        lines, columns = self.queries[:, q, None], self.keys[:, None, k]
        near = ((lines % width) - (columns % width)).abs() <= far
        return (near & ((lines // width) - (columns // width)).abs().le(far))[:, None]

    def candidates(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        return torch.arange(queries, device=device)[:, None] + torch.tensor(self.square.shifts, device=device)


class Compact(Mixer):
    """x [B, T, D] → [B, T, D]; its state is a ring of keys and values, and the last heads' results."""

    scaled = ("scale",)

    def __init__(self, settings: CompactSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.heads = self.value_groups = settings.heads
        self.width = head_width(place.width, settings.heads, settable=False)
        self.scale = self.width**-0.5
        self.hood = Neighbourhood.of(settings.kernel, place.order, settings.grid, place.path)
        self.around = settings.around(place.order, place.path)
        self.qk = place.product(place.width, place.width, "q")
        self.v = place.product(place.width, place.width, "v")
        self.o = place.product(place.width, place.width, "o")
        self.kernel = nn.Parameter(torch.empty(self.heads, self.hood.size))
        sites = settings.position.sites if settings.position is not None else frozenset()
        if sites - {"rotate"}:
            raise UnsupportedError(
                f"'{self.kind}' takes rotations only", where=place.path, hint="position: rope or none"
            )
        self.position = (
            settings.position.build(place.at("position"), self.heads, self.width)
            if settings.position is not None and sites
            else None
        )

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.kernel)

    def values(self, x: Tensor, ctx: Context) -> Tensor:
        return self.v(x).unflatten(-1, (self.heads, self.width))  # type: ignore[no-any-return]

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        where = ctx.where(x)
        q = self._turned(x, ctx)
        if ctx.documents is None and ctx.padding is None:
            self.hood.fits(x.shape[1], self.path)
        mask: Mask | None = Window(self.around.back, self.around.ahead)
        if self.around.square is not None:
            mask = both(mask, Columns(self.around.square, where, where))
        if ctx.documents is not None or ctx.padding is not None:
            mask = both(mask, visible(self.order, ctx))
        return Frozen({"q": q, "k": q, "mask": mask, "where": where, "ctx": ctx})

    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        if frozen.weights is not None:
            return (frozen.weights.to(values.dtype) @ values.transpose(1, 2)).transpose(1, 2)
        parts = frozen.parts
        looked = self._looked(parts["q"], parts["k"].transpose(1, 2), values.transpose(1, 2), parts["mask"])
        return self._carried(looked, parts["where"], parts["ctx"])

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return self.o(mixed.flatten(2))  # type: ignore[no-any-return]

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        if self.order == "bidirectional":
            raise UnsupportedError("a bidirectional mixer cannot be extended", where=self.path)
        window, shape = self.around.back + 1, (batch, self.heads, self.around.back + 1, self.width)
        tensors = {name: torch.zeros(shape, dtype=dtype, device=device) for name in ("k", "v")}
        if self.around.square is not None:
            tensors["positions"] = torch.zeros(batch, 1, window, dtype=torch.int64, device=device)
        tail = (batch, self.hood.before, self.heads * self.width)
        return WindowState({**tensors, "tail": torch.zeros(tail, dtype=dtype, device=device)})

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        assert isinstance(state, WindowState)
        values = self.values(x, ctx)
        if ctx.taps is not None:
            values = self.tapped_values(values, ctx)
        q, where = self._turned(x, ctx), ctx.where(x)
        parts: dict[str, Any] = {"k": q.transpose(1, 2), "v": values.transpose(1, 2)}
        if self.around.square is not None:
            parts["positions"] = where.expand(x.shape[0], -1)[:, None]
        start, uniform = state.lengths, state.uniform
        held, index = state.append(parts, ctx.lengths)
        before: int | Tensor = start if uniform is None or state.uniform is None else uniform
        mask: Mask | None = Window(self.around.back, 0, 1, before, keys=index)
        if self.around.square is not None:
            mask = both(mask, Columns(self.around.square, where, held["positions"][:, 0]))
        looked = self._looked(q, held["k"], held["v"], mask)
        mixed = self._carried(looked, where, ctx, state.tensors["tail"])
        state.put("tail", next_tail(looked.flatten(2), state.tensors["tail"], ctx.lengths))
        if ctx.taps is not None:
            mixed = ctx.taps(f"{self.path}.mixed", mixed)
        return self.finish(mixed, x, ctx)

    def _turned(self, x: Tensor, ctx: Context) -> Tensor:
        """Queries, which are the keys too, [B, T, H, K]."""
        q: Tensor = self.qk(x).unflatten(-1, (self.heads, self.width))
        if self.position is not None:
            q, _ = self.position.rotate(q, q, ctx.where(x))
        return q if ctx.taps is None else ctx.taps(f"{self.path}.q", q)

    def _looked(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
        """q [B, T, H, K], k and v [B, H, S, K] → [B, T, H, K]."""
        return attend(q.transpose(1, 2), k, v, mask=mask, scale=self.scale)[0].transpose(1, 2)

    def _carried(self, looked: Tensor, where: Tensor, ctx: Context, tail: Tensor | None = None) -> Tensor:
        """Each head's result [B, T, H, K] and what the convolution makes of it."""
        kernel = self.kernel.repeat_interleave(looked.shape[3], 0)
        known = {"documents": ctx.documents, "padding": ctx.padding}
        return looked + self.hood.convolved(looked.flatten(2), kernel, where, tail=tail, **known).view_as(looked)


def _tied(mixer: Compact, x: Tensor, ctx: Context) -> Tensor:
    """Dense attention whose queries are its keys; a kernel of one token scales it."""
    q, v = ((x @ each.weight.t()).unflatten(-1, (mixer.heads, -1)).transpose(1, 2) for each in (mixer.qk, mixer.v))
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    scores = (q @ q.transpose(2, 3) / mixer.width**0.5).masked_fill(later, -torch.inf)
    mixed = torch.softmax(scores, -1) @ v * (1 + mixer.kernel[None, :, :, None])
    return mixed.transpose(1, 2).flatten(2) @ mixer.o.weight.t()  # type: ignore[no-any-return]
