"""Stick-breaking attention: the nearest keys take their share first, the rest gets what is left.

Shen et al. 2023, ModuleFormer: Modularity Emerges from Mixture-of-Experts. With β = σ(q·k/√K), a
token gives weight β_ij · Π_{j<m≤i} (1 − β_im) to token j, itself included; what is left of the stick
at the first token is dropped. The order of tokens is in the weights, so there are no positions.
Grouped queries (Ainslie et al. 2023, GQA) are as in dense attention.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from armillary.base.errors import UnsupportedError
from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mask import Causal, Documents, Keys, Mask, both
from armillary.nn.mechanism import Capabilities, Frozen, Mixer, MixerSettings, Place, mixers
from armillary.nn.ops.stick import stick_attend
from armillary.nn.state import SpanState, State


@mixers.register
class StickBreakingSettings(MixerSettings):
    """a_ij = β_ij Π_{j<m≤i} (1 − β_im), β = σ(q kᵀ / √K); y = a v."""

    kind: ClassVar[str] = "stick_breaking"
    source: ClassVar[str] = "Shen et al. 2023, ModuleFormer: Modularity Emerges from Mixture-of-Experts"
    oracle: ClassVar[str] = "tests/nn/mixers/test_stick_breaking.py: the products of the paper, as loops over pairs"
    capabilities: ClassVar[Capabilities] = Capabilities(mask=True, state="span", rollback="truncate")
    heads: int = Field(4, gt=0, description="query heads")
    kv_heads: int | None = Field(None, gt=0, description="key/value heads (divides heads); by default as many")
    head_width: int | None = Field(None, gt=0, description="features per head; by default width / heads")

    @model_validator(mode="after")
    def _coherent(self) -> StickBreakingSettings:
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads ({self.kv_heads}) must divide heads ({self.heads})")
        return self

    @classmethod
    def examples(cls) -> list[Example]:
        return [Example("published", cls()), Example("grouped", cls(kv_heads=2, head_width=6), compiled=True)]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("products", Example("one_head", cls(heads=1)), _products)]

    @property
    def groups(self) -> int:
        return self.kv_heads or self.heads

    def features(self, width: int) -> int:
        """Features per head."""
        if self.head_width is None and width % self.heads:
            raise UnsupportedError(
                f"a width of {width} does not divide into {self.heads} heads",
                hint="change width or heads, or set head_width",
            )
        return self.head_width or width // self.heads

    def build(self, place: Place) -> StickBreaking:
        return StickBreaking(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        width, each = place.width, self.features(place.width)
        query, key = self.heads * each, self.groups * each
        flops = 2 * linear_flops(width, query, length) + 2 * linear_flops(width, key, length)
        # two products; scale, softplus, running sum, difference, exponential
        flops += self.heads * float(length * length) * (4 * each + 5)
        return Cost(flops, length * 2.0 * key * itemsize)


class StickBreaking(Mixer):
    """x [B, T, D] → [B, T, D]; its state are the keys and values so far."""

    def __init__(self, settings: StickBreakingSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.heads, self.groups = settings.heads, settings.groups
        self.width = settings.features(place.width)
        self.value_groups = self.groups
        self.q = place.product(place.width, self.heads * self.width, "q")
        self.k = place.product(place.width, self.groups * self.width, "k")
        self.v = place.product(place.width, self.groups * self.width, "v")
        self.o = place.product(self.heads * self.width, place.width, "o")

    def values(self, x: Tensor, ctx: Context) -> Tensor:
        return self.v(x).unflatten(-1, (self.groups, self.width))  # type: ignore[no-any-return]

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        q, k = self._scored(x, ctx)
        mask = both(Causal(), ctx.mask)
        if ctx.documents is not None:
            mask = both(mask, Documents(ctx.documents, ctx.documents))
        if ctx.padding is not None:
            mask = both(mask, Keys(ctx.padding))
        return Frozen({"q": q, "k": k, "mask": mask})

    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        if frozen.weights is not None:
            each = values.repeat_interleave(self.heads // self.groups, 2).transpose(1, 2)
            return (frozen.weights.to(each.dtype) @ each).transpose(1, 2)
        q, k, mask = (frozen.parts[name] for name in ("q", "k", "mask"))
        return self._attend(q, k.transpose(1, 2), values.transpose(1, 2), mask)

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return self.o(mixed.flatten(2))  # type: ignore[no-any-return]

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        shape = (batch, self.groups, capacity, self.width)
        return SpanState({name: torch.zeros(shape, dtype=dtype, device=device) for name in ("k", "v")})

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        assert isinstance(state, SpanState)
        q, k = self._scored(x, ctx)
        values = self.values(x, ctx)
        if ctx.taps is not None:
            values = ctx.taps(f"{self.path}.v", values)
        start, uniform = state.lengths, state.uniform
        held = state.append({"k": k.transpose(1, 2), "v": values.transpose(1, 2)}, ctx.lengths)
        mask = Causal(start if uniform is None or state.uniform is None else uniform)
        if ctx.taps is None:
            return self.finish(self._attend(q, held["k"], held["v"], mask), x, ctx)
        values = held["v"].transpose(1, 2)
        frozen = Frozen({"q": q, "k": held["k"].transpose(1, 2), "mask": mask})
        mixed = self.mix(self._weights(frozen, values, ctx), values)
        return self.finish(ctx.taps(f"{self.path}.mixed", mixed), x, ctx)

    def _scored(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Queries [B, T, H, K] and keys [B, T, G, K]."""
        q = self.q(x).unflatten(-1, (self.heads, self.width))
        k = self.k(x).unflatten(-1, (self.groups, self.width))
        if ctx.taps is not None:
            q, k = ctx.taps(f"{self.path}.q", q), ctx.taps(f"{self.path}.k", k)
        return q, k

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        return stick_attend(q.transpose(1, 2), k, v, mask=mask, scale=self.width**-0.5).transpose(1, 2)


def _products(mixer: StickBreaking, x: Tensor, ctx: Context) -> Tensor:
    """One head, its shares broken off one after another."""
    q, k, v = (x @ product.weight.t() for product in (mixer.q, mixer.k, mixer.v))
    shares = torch.sigmoid(q @ k.transpose(1, 2) / mixer.width**0.5)
    rows = []
    for i in range(x.shape[1]):
        left, row = torch.ones(len(x), 1), torch.zeros_like(v[:, 0])
        for j in range(i, -1, -1):
            row = row + left * shares[:, i, j, None] * v[:, j]
            left = left * (1 - shares[:, i, j, None])
        rows.append(row)
    return torch.stack(rows, 1) @ mixer.o.weight.t()  # type: ignore[no-any-return]
