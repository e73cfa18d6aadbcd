"""Linear attention by projection along time: keys and values of T tokens become `rank` rows.

Wang et al. 2020, Linformer: Self-Attention with Linear Complexity. K′ = E K and V′ = F V with learned
E, F [rank, length], then softmax attention over the rows: O(T·rank). Every row mixes all tokens, so
no causal form exists. The projections have a column per position up to the longest sequence
(`model.context`); a shorter one takes the first columns, padded tokens are left out before they are
projected and real ones counted from the first of them. Sharing as in the paper: a pair of projections
for every head, one pair for all heads (headwise), or one projection for keys and values alike; one
for all layers is `share: {along: ["blocks.*.mixer.inner.along"]}` of the model.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary.base.errors import InputError, UnsupportedError
from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example
from armillary.nn.mechanism import Capabilities, Frozen, Mixer, MixerSettings, Place, head_width, mixers
from armillary.nn.ops.attend import attend
from armillary.nn.state import FixedState, State


@mixers.register
class LinformerSettings(MixerSettings):
    """softmax(q (E k)ᵀ / √K) (F v)."""

    kind: ClassVar[str] = "linformer"
    source: ClassVar[str] = "Wang et al. 2020, Linformer: Self-Attention with Linear Complexity"
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_linformer.py: equation 7 of the paper head by head, softmax attention at full rank"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(
        causal=False, bidirectional=True, cross=True, packed=False, state="fixed", rollback="snapshot"
    )
    heads: int = Field(4, gt=0, description="heads")
    rank: int = Field(128, gt=0, description="rows that keys and values are projected to (the paper's k)")
    sharing: Literal["none", "headwise", "key_value"] = Field(
        "headwise",
        description="projections: E and F for each head (none), for all heads (headwise), or one E = F (key_value)",
    )

    @classmethod
    def examples(cls) -> list[Example]:
        both, cross = {"order": "bidirectional"}, {"cross": True}
        return [
            Example("headwise", cls(heads=2, rank=5), both, compiled=True),
            Example("unshared", cls(heads=2, rank=3, sharing="none"), both),
            Example("key_value", cls(heads=2, rank=4, sharing="key_value"), both),
            Example("cross", cls(heads=2, rank=5), cross),
        ]

    def features(self, width: int) -> int:
        """Features per head."""
        return head_width(width, self.heads, settable=False)

    def build(self, place: Place) -> Linformer:
        if not place.cross and place.order != "bidirectional":
            raise UnsupportedError(
                f"'{self.kind}' cannot be {place.order}: each of its rows mixes all tokens, later ones too",
                where=place.path,
                hint="use it in an encoder, or to look at one (cross)",
            )
        return Linformer(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        width, each = place.width, self.features(place.width)
        flops = 4 * linear_flops(width, width, length)
        flops += 4.0 * self.rank * length * width  # E k and F v
        flops += self.heads * length * self.rank * (4.0 * each + 6)
        kept = 2 * width * self.rank * itemsize if place.cross else 0
        return Cost(flops, kept)


class Along(nn.Module):
    """The projections along time: keys and values [heads or 1, rank, length]; a module of its own, so that
    layers can share it."""

    def __init__(self, groups: int, rank: int, length: int, *, alike: bool) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.empty(groups, rank, length))
        self.values = None if alike else nn.Parameter(torch.empty(groups, rank, length))

    def reset(self, generator: torch.Generator | None) -> None:
        """Normal of variance 1/rank, as the lemma that the paper rests on draws it (Johnson & Lindenstrauss 1984)."""
        for part in self.parameters():
            nn.init.normal_(part, std=part.shape[1] ** -0.5, generator=generator)

    def of_values(self) -> Tensor:
        return self.keys if self.values is None else self.values


class Linformer(Mixer):
    """x [B, T, D] → [B, T, D]; with cross, keys and values come from ctx.memory [B, S, D]."""

    scaled = ("scale",)

    def __init__(self, settings: LinformerSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.heads = self.value_groups = settings.heads
        self.width = settings.features(place.width)
        self.scale = self.width**-0.5
        self.rank, self.length = settings.rank, place.length
        self.q = place.product(place.width, place.width, "q")
        self.k = place.product(place.width, place.width, "k")
        self.v = place.product(place.width, place.width, "v")
        self.o = place.product(place.width, place.width, "o")
        groups = self.heads if settings.sharing == "none" else 1
        self.along = Along(groups, self.rank, self.length, alike=settings.sharing == "key_value")

    def values(self, x: Tensor, ctx: Context) -> Tensor:
        source = self._memory(ctx).hidden.to(x.dtype) if self.cross else x
        return self.v(source).unflatten(-1, (self.heads, self.width))  # type: ignore[no-any-return]

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        source, padding = x, ctx.padding
        if self.cross:
            memory = self._memory(ctx)
            source, padding = memory.hidden.to(x.dtype), memory.padding
        q = self.q(x).unflatten(-1, (self.heads, self.width))
        k = self.k(source).unflatten(-1, (self.heads, self.width))
        if ctx.taps is not None:
            q, k = ctx.taps(f"{self.path}.q", q), ctx.taps(f"{self.path}.k", k)
        return Frozen({"q": q, "k": self._project(k, self.along.keys, padding), "padding": padding})

    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        if frozen.weights is not None:
            return (frozen.weights.to(values.dtype) @ values.transpose(1, 2)).transpose(1, 2)
        parts = frozen.parts
        v = self._project(values, self.along.of_values(), parts["padding"])
        y, _ = attend(parts["q"].transpose(1, 2), parts["k"], v, scale=self.scale)
        return y.transpose(1, 2)

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return self.o(mixed.flatten(2))  # type: ignore[no-any-return]

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        if not self.cross:
            raise UnsupportedError("a bidirectional mixer cannot be extended", where=self.path)
        if memory is None:
            raise UnsupportedError("cross attention needs a memory", where=self.path, hint="pass source=…")
        k = self.k(memory.hidden).unflatten(-1, (self.heads, self.width))
        v = self.v(memory.hidden).unflatten(-1, (self.heads, self.width))
        return FixedState(
            {
                "k": self._project(k, self.along.keys, memory.padding),
                "v": self._project(v, self.along.of_values(), memory.padding),
            }
        )

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        assert isinstance(state, FixedState)
        q = self.q(x).unflatten(-1, (self.heads, self.width))
        k, v = state.tensors["k"], state.tensors["v"]
        if ctx.taps is not None:
            q = ctx.taps(f"{self.path}.q", q)
            v = self.tapped_values(v.transpose(1, 2), ctx).transpose(1, 2)
        y, _ = attend(q.transpose(1, 2), k.to(q.dtype), v.to(q.dtype), scale=self.scale)
        mixed = y.transpose(1, 2)
        if ctx.taps is not None:
            mixed = ctx.taps(f"{self.path}.mixed", mixed)
        return self.finish(mixed, x, ctx)

    def _project(self, x: Tensor, along: Tensor, padding: Tensor | None) -> Tensor:
        """x [B, S, H, K] → [B, H, rank, K]: real tokens, counted from the first, meet their columns."""
        length = x.shape[1]
        if length > self.length:
            raise InputError(
                f"'{self.kind}' has columns for {self.length} tokens, not for {length}",
                where=self.path,
                hint="set model.context to the longest sequence",
            )
        if padding is not None:
            order = torch.sort((~padding).to(torch.uint8), dim=1, stable=True).indices  # real tokens first
            x = (x * padding[..., None, None]).gather(1, order[..., None, None].expand_as(x))
        return along[:, :, :length].to(x.dtype) @ x.transpose(1, 2)

    def _memory(self, ctx: Context) -> Memory:
        if ctx.memory is None:
            raise UnsupportedError("cross attention needs a memory", where=self.path, hint="pass source=…")
        return ctx.memory
