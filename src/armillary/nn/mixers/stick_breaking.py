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

from armillary.nn.context import Context
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mask import Mask
from armillary.nn.mechanism import Capabilities, MixerSettings, Place, head_width, mixers
from armillary.nn.ops.stick import stick_attend
from armillary.nn.span import SpanMixer
from armillary.nn.state import State
from armillary.nn.steps.span import break_stick
from armillary.nn.tape import Buffer, Tape, record


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

    def build(self, place: Place) -> StickBreaking:
        return StickBreaking(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        width, each = place.width, head_width(place.width, self.heads, self.head_width)
        query, key = self.heads * each, self.groups * each
        flops = 2 * linear_flops(width, query, length) + 2 * linear_flops(width, key, length)
        # two products; scale, softplus, running sum, difference, exponential
        flops += self.heads * float(length * length) * (4 * each + 5)
        return Cost(flops, length * 2.0 * key * itemsize)


class StickBreaking(SpanMixer):
    """x [B, T, D] → [B, T, D]; its state are the keys and values so far."""

    def __init__(self, settings: StickBreakingSettings, place: Place) -> None:
        width = head_width(place.width, settings.heads, settings.head_width)
        super().__init__(settings, place, heads=settings.heads, groups=settings.groups, width=width)
        self.q = place.product(place.width, self.heads * self.width, "q")
        self.o = place.product(self.heads * self.width, place.width, "o")

    def queries(self, x: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return self.q(x).unflatten(-1, (self.heads, self.width)), {}

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, places: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        return stick_attend(q, k, v, mask=mask, scale=self.scale)

    def record(self, tape: Tape, x: Buffer, state: State) -> Buffer:
        k, v = self.appended(tape, x, state)
        q = record(self.q, tape, x, unit=self.width)
        mixed = break_stick(tape, q, k, v, self.heads, self.scale)
        return record(self.o, tape, mixed)  # type: ignore[no-any-return]

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return self.o(mixed.flatten(2))  # type: ignore[no-any-return]


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
