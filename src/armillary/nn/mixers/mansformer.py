"""Mixed attention: four kinds of self-attention of linear cost over one set of queries, keys and values.

Kuo et al. 2024, Mansformer: Efficient Transformer of Mixed Attention for Image Deblurring and Beyond.
Of the paper its abstract was at hand: four self-attentions by reshaping tensors, merged in the manner
of squeeze-and-excitation. Which four is our choice: among the tokens of a window; among tokens a
regular distance apart, one of each of `cells` (squared in a grid); among features, over the whole input
and over each window. Features attend as in Zamir et al. 2022, Restormer: rows of queries and keys have
length 1 over the tokens, and a factor per head is learned. The merge gives every feature of every kind a
weight in (0, 1), from the mean over the tokens of all kinds' sum (Hu et al. 2018, Squeeze-and-Excitation
Networks). Its third part, a gated convolutional network beside attention, is the mixer `gated_conv`.

It looks both ways: attention among features, and tokens spread over the whole, have no causal form.
In a grid, padded rows count as images without their last lines; else as shorter sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from armillary.nn.context import Context
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example
from armillary.nn.mask import Keys
from armillary.nn.mechanism import Capabilities, Mixer, MixerSettings, Place, head_width, mixers
from armillary.nn.ops.attend import attend
from armillary.nn.ops.neighbours import Front, Grid, fits_in

KINDS = 4
TINY = 1e-12


@mixers.register
class MansformerSettings(MixerSettings):
    """Σ_i s_i ⊙ attention_i(q, k, v): in windows, spread out, among features, among features in windows."""

    kind: ClassVar[str] = "mansformer"
    source: ClassVar[str] = (
        "Kuo et al. 2024, Mansformer: Efficient Transformer of Mixed Attention for Image Deblurring and Beyond"
    )
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_mansformer.py: each attention by loops over groups of tokens; dense attention where one "
        "window covers the image; outputs and gradients"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(
        causal=False, bidirectional=True, packed=False, sight="jacobian"
    )
    heads: int = Field(4, gt=0, description="heads (divides width)")
    window: int = Field(8, gt=0, description="tokens of a window; in a grid, the side of its square")
    cells: int = Field(8, gt=0, description="tokens that look at one another from afar; in a grid, along either side")
    squeeze: int | None = Field(None, gt=0, description="hidden features of the merge; by default width/4")
    grid: Grid | None = Field(None, description="lines and columns of an image given row by row; none: a sequence")

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("sequence", cls(heads=2, window=3, cells=4), {"order": "bidirectional"}),
            Example("image", cls(heads=2, window=3, cells=2, grid=(8, 4)), {"order": "bidirectional"}),
        ]

    def hidden(self, width: int) -> int:
        """Hidden features of the merge."""
        return self.squeeze or max(1, width // 4)

    def rows(self, place: Place, length: int) -> Mapping[str, float]:
        return {"squeeze": 1, "excite": 1}

    def build(self, place: Place) -> Mansformer:
        return Mansformer(self, place)

    def sizes(self, length: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(groups, tokens of a group) of windows, and of tokens that are spread out."""
        if self.grid is None:
            return (-(-length // self.window), self.window), (-(-length // self.cells), self.cells)
        (down, across), (lines, columns) = (
            [-(-side // size) for side in self.grid] for size in (self.window, self.cells)
        )
        return (down * across, self.window**2), (lines * columns, self.cells**2)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        width, each, hidden = place.width, head_width(place.width, self.heads, settable=False), self.hidden(place.width)
        near, far = self.sizes(length)
        flops = 4 * linear_flops(width, width, length)
        flops += sum(float(self.heads * groups * size * size) for groups, size in (near, far)) * (4 * each + 6)
        for groups, size in (near, (1, length)):
            # lengths of queries and keys, quotients, products with keys and values, factor, softmax
            flops += groups * (2.0 * width * (3 * size + 1) + width * each * (4 * size + 6))
        flops += length * width * (3.0 * KINDS + 1) + linear_flops(width, hidden, 1, bias=True) + hidden
        return Cost(flops + linear_flops(hidden, KINDS * width, 1, bias=True) + KINDS * width)


class Mansformer(Mixer):
    """x [B, T, D] → [B, T, D]."""

    scaled = ("scale",)

    def __init__(self, settings: MansformerSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.settings, self.heads = settings, settings.heads
        self.width = head_width(place.width, settings.heads, settable=False)
        self.scale = self.width**-0.5
        hidden = settings.hidden(place.width)
        self.q = place.product(place.width, place.width, "q")
        self.k = place.product(place.width, place.width, "k")
        self.v = place.product(place.width, place.width, "v")
        self.o = place.product(place.width, place.width, "o")
        self.factors = nn.Parameter(torch.empty(2, self.heads))  # of the whole, of windows
        self.squeeze = place.product(place.width, hidden, "up", True)
        self.excite = place.product(hidden, KINDS * place.width, "gate", True)

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.ones_(self.factors)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        self.accept(ctx)
        front = Front.of(x, ctx.padding)
        fits_in(self.settings.grid, x.shape[1], self.path)
        q, k, v = (each(front.x).unflatten(-1, (self.heads, self.width)) for each in (self.q, self.k, self.v))
        if ctx.taps is not None:
            q, k, v = (ctx.taps(f"{self.path}.{name}", part) for name, part in (("q", q), ("k", k), ("v", v)))
        near, far = self._groups(front)
        windows = [near.take(each) for each in (q, k, v)]
        parts = [
            near.give(self._tokens(windows, near)),
            far.give(self._tokens([far.take(each) for each in (q, k, v)], far)),
            self._features([each[:, None] for each in (q, k, v)], self.factors[0])[:, 0],
            near.give(self._features(windows, self.factors[1])),
        ]
        kinds = torch.stack([part.flatten(2) for part in parts], 2)  # [B, T, kinds, D]
        if ctx.taps is not None:
            kinds = ctx.taps(f"{self.path}.kinds", kinds)
        weights = self._merged(kinds, front)
        if ctx.taps is not None:
            weights = ctx.taps(f"{self.path}.merge", weights)
        mixed = (kinds * weights[:, None]).sum(2)
        if ctx.taps is not None:
            mixed = ctx.taps(f"{self.path}.mixed", mixed)
        return self.o(front.back(mixed))  # type: ignore[no-any-return]

    def _merged(self, kinds: Tensor, front: Front) -> Tensor:
        """The weight [B, kinds, D] of every kind's features."""
        total = kinds.sum(2)
        if front.real is None or front.count is None:
            told = total.mean(1)
        else:
            told = total.masked_fill(~front.real[..., None], 0).sum(1) / front.count.clamp(min=1)[:, None]
        weights: Tensor = self.excite(F.relu(self.squeeze(told))).unflatten(-1, (KINDS, -1))
        return torch.sigmoid(weights)

    def _tokens(self, parts: list[Tensor], groups: Groups) -> Tensor:
        """Softmax attention inside each group: [B, G, S, H, K] of queries, keys, values → the same."""
        q, k, v = (each.flatten(0, 1).transpose(1, 2) for each in parts)
        here = (groups.places >= 0).expand(len(parts[0]), -1, -1).flatten(0, 1)
        y, _ = attend(q, k, v, mask=Keys(here), scale=self.scale)
        return y.transpose(1, 2).view_as(parts[2])

    def _features(self, parts: list[Tensor], factor: Tensor) -> Tensor:
        """Features attend to features over the tokens of a group: [B, G, S, H, K] → the same."""
        q, k, v = (each.transpose(2, 3) for each in parts)  # [B, G, H, S, K]
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = (each / each.norm(dim=3, keepdim=True).clamp(min=TINY) for each in (q.to(wide), k.to(wide)))
        weights = torch.softmax(q.transpose(3, 4) @ k * factor.to(wide)[:, None, None], -1)
        return (v @ weights.transpose(3, 4).to(v.dtype)).transpose(2, 3)

    def _groups(self, front: Front) -> tuple[Groups, Groups]:
        """Windows, and tokens a regular distance apart."""
        length, device = front.x.shape[1], front.x.device
        places = torch.arange(length, device=device)[None]
        (near, size), (far, cells) = self.settings.sizes(length)
        window, wide = self.settings.window, self.settings.cells
        if self.settings.grid is None:
            apart = torch.tensor(far, device=device)[None] if front.count is None else -(-front.count // wide)
            apart = apart.clamp(min=1)[:, None]
            return (
                Groups.of(places // window, places % window, near, size, front.real),
                Groups.of(places % apart, places // apart, far, cells, front.real),
            )
        lines, columns = self.settings.grid
        line, column = places // columns, places % columns
        across, down, beside = -(-columns // window), -(-lines // wide), -(-columns // wide)
        return (
            Groups.of(
                line // window * across + column // window,
                line % window * window + column % window,
                near,
                size,
                front.real,
            ),
            Groups.of(
                line % down * beside + column % beside,
                line // down * wide + column // beside,
                far,
                cells,
                front.real,
            ),
        )


@dataclass(frozen=True)
class Groups:
    """Tokens in groups of at most so many. places: [B or 1, G, S] which token, −1 for none; slots: [B or 1,
    T] where each token is, in the groups one after another."""

    places: Tensor
    slots: Tensor

    @staticmethod
    def of(group: Tensor, slot: Tensor, groups: int, size: int, real: Tensor | None) -> Groups:
        """group and slot: of each token, [B or 1, T]; real: [B, T], those that are there."""
        slots = group * size + slot
        if real is not None:
            slots = torch.where(real, slots, groups * size)
        steps = torch.arange(slots.shape[1], device=slots.device).expand_as(slots)
        empty = torch.full((len(slots), groups * size + 1), -1, device=slots.device)
        places = empty.scatter(1, slots, steps)[:, :-1]
        return Groups(places.unflatten(1, (groups, size)), slots.clamp(max=groups * size - 1))

    def take(self, x: Tensor) -> Tensor:
        """x [B, T, H, K] → [B, G, S, H, K], zeros where there is no token."""
        index = self.places.flatten(1)[..., None, None]
        taken = x.take_along_dim(index.clamp(min=0), 1).masked_fill(index < 0, 0)
        return taken.unflatten(1, self.places.shape[1:])  # type: ignore[no-any-return]

    def give(self, y: Tensor) -> Tensor:
        """y [B, G, S, H, K] → [B, T, H, K]."""
        return y.flatten(1, 2).take_along_dim(self.slots[..., None, None], 1)
