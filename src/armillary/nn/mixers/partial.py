"""Partial attention: every head has a small feed-forward network of its own width, and there is no large one.

Zheng et al. 2023, PartialFormer: Modeling Part Instead of Whole for Machine Translation. What a head
gathered goes through one feed-forward network that all heads of the layer share, and is gated by
the token. So that heads can be many and small, few of them are scored (`score_heads`): a network
over heads, the same for every pair of tokens, makes the scores of all heads out of theirs. It looks at
one pair at a time, so that it is causal where attention is, as in the released code (a convolution along
the keys would not be). The map that the paper computes once for all layers and adds to their
scores is left out: blocks do not know of each other; the released code has that as an option.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from armillary.base.errors import UnsupportedError
from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import Capabilities, Place, mixers
from armillary.nn.mixers.attention import Attention, AttentionSettings, Scoring
from armillary.nn.state import SpanState, State


@mixers.register
class PartialSettings(AttentionSettings):
    """o (relu(u(x)) · (a + down(relu(up(a))))) for every head's a = softmax(mix(q kᵀ / √K)) v."""

    kind: ClassVar[str] = "partial"
    source: ClassVar[str] = "Zheng et al. 2023, PartialFormer: Modeling Part Instead of Whole for Machine Translation"
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_partial.py: the released formula as loops over heads and pairs; multi-head attention "
        "where the small networks do nothing"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(
        bidirectional=True, prefix=True, cross=True, mask=True, state="span", rollback="truncate"
    )
    score_heads: int | None = Field(
        None, gt=0, description="heads that are scored, from which those of all heads are made; by default all, as is"
    )
    ratio: float = Field(4.0, gt=0, description="hidden features of a head's network, in units of its width")

    @model_validator(mode="after")
    def _partial(self) -> PartialSettings:
        if self.kv_heads is not None:
            raise ValueError("every head has its own values: score_heads, not kv_heads, makes queries and keys fewer")
        return self

    @classmethod
    def examples(cls) -> list[Example]:
        few: dict[str, Any] = {"heads": 5, "head_width": 6, "score_heads": 2, "ratio": 2.0}
        return [
            Example("published", cls(bias=True, **few)),
            Example("cross", cls(**few), {"cross": True}),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("plain", Example("one_head", cls(heads=1)), _plain)]

    def build(self, place: Place) -> Partial:
        return Partial(self, place)

    def hidden(self, width: int) -> int:
        """Features inside a head's network."""
        return max(1, round(self.ratio * self.features(width)))

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        width, each = place.width, self.features(place.width)
        scored, heads = self.score_heads or self.heads, self.heads
        out_bias = self.bias if self.out_bias is None else self.out_bias
        flops = 2 * linear_flops(width, scored * each, length, self.bias)
        flops += 2 * linear_flops(width, heads * each, length, self.bias)
        flops += linear_flops(heads * each, width, length, out_bias)
        around = 2.0 * each + 1 + (3 if self.softcap is not None else 0)  # product, scale
        mixing = 2.0 * scored + 3 + 2.0 * heads if self.score_heads is not None else 0.0
        flops += float(length * length) * (scored * around + heads * (mixing + 5 + 2.0 * each))
        hidden = self.hidden(width)
        rows = length * heads
        flops += linear_flops(each, hidden, rows, self.bias) + linear_flops(hidden, each, rows, self.bias)
        flops += rows * (hidden + 3.0 * each)  # two relus, the sum and the gate
        if self.sinks:
            flops += 5.0 * heads * length
        if self.norm is not None:
            flops += self.norm.flops(each, 2.0 * length * scored)
        tracked = False
        if self.position is not None:
            tracked = "bias" in self.position.sites
            turned = heads if tracked else scored
            flops += self.position.cost(place, length, turned, turned, each).flops
        kept = 0 if place.order == "bidirectional" and not place.cross else length
        return Cost(flops, kept * ((scored + heads) * each * itemsize + (8 if tracked else 0)))


class Partial(Attention):
    """x [B, T, D] → [B, T, D]; queries and keys have G heads, values and what follows H.

    mix_in [H, G], mix_out [H, H] and their biases [H]: from the scores of G heads to those of H. The bias of
    mix_out is there as published; without sinks the softmax takes it out again.
    """

    def __init__(self, settings: PartialSettings, place: Place) -> None:
        super().__init__(settings, place)
        if self.relates:
            raise UnsupportedError(
                "'partial' takes rotations and biases only", where=place.path, hint="position: rope, alibi, t5 or none"
            )
        self.scored, self.mixes = settings.score_heads or self.heads, settings.score_heads is not None
        self.q = place.product(place.width, self.scored * self.width, "q", settings.bias)
        self.k = place.product(place.width, self.scored * self.width, "k", settings.bias)
        self.u = place.product(place.width, self.heads * self.width, "gate", settings.bias)
        hidden = settings.hidden(place.width)
        self.up = place.product(self.width, hidden, "part", settings.bias)
        self.down = place.product(hidden, self.width, "part", settings.bias)
        if self.mixes:
            self.mix_in = nn.Parameter(torch.empty(self.heads, self.scored))
            self.mix_in_bias = nn.Parameter(torch.empty(self.heads))
            self.mix_out = nn.Parameter(torch.empty(self.heads, self.heads))
            self.mix_out_bias = nn.Parameter(torch.empty(self.heads))

    def reset(self, generator: torch.Generator | None) -> None:
        super().reset(generator)
        if self.mixes:  # scores keep their size: half of the hidden ones are 0
            nn.init.normal_(self.mix_in, std=self.scored**-0.5, generator=generator)
            nn.init.normal_(self.mix_out, std=(2 / self.heads) ** 0.5, generator=generator)
            nn.init.zeros_(self.mix_in_bias)
            nn.init.zeros_(self.mix_out_bias)

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        made = mixed + self.down(F.relu(self.up(mixed)))
        return self.o(F.relu(self.u(x)) * made.flatten(2))  # type: ignore[no-any-return]

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        state = super().init_state(batch, capacity, dtype, device, memory)
        if isinstance(state, SpanState):
            shape = (batch, self.scored, capacity, self.width)
            return SpanState(state.tensors | {"k": torch.zeros(shape, dtype=dtype, device=device)})
        return state

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, how: Scoring) -> Tensor:
        return super()._attend(q, k, v, replace(how, modify=self._heads) if self.mixes else how)

    def _queries(self, x: Tensor, ctx: Context) -> Tensor:
        q: Tensor = self.q(x).unflatten(-1, (self.scored, self.width))
        return q if self.q_norm is None else self.q_norm(q)

    def _keys(self, x: Tensor, ctx: Context) -> Tensor:
        k: Tensor = self.k(x).unflatten(-1, (self.scored, self.width))
        return k if self.k_norm is None else self.k_norm(k)

    def _heads(self, scores: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """[B, G, q, S] → [B, H, q, S]."""
        batch, _, queries, keys = scores.shape
        parts = (self.mix_in, self.mix_in_bias, self.mix_out, self.mix_out_bias)
        mix_in, bias_in, mix_out, bias_out = (part.to(scores.dtype) for part in parts)
        hidden = F.relu(mix_in @ scores.flatten(2) + bias_in[:, None])
        return (mix_out @ hidden + bias_out[:, None]).view(batch, self.heads, queries, keys)


def _plain(mixer: Partial, x: Tensor, ctx: Context) -> Tensor:
    """One causal head as it is scored, written out."""
    q, k, v, u = (x @ product.weight.t() for product in (mixer.q, mixer.k, mixer.v, mixer.u))
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    a = torch.softmax((q @ k.transpose(1, 2) / mixer.width**0.5).masked_fill(later, -torch.inf), -1) @ v
    a = a + F.relu(a @ mixer.up.weight.t()) @ mixer.down.weight.t()
    return (F.relu(u) * a) @ mixer.o.weight.t()  # type: ignore[no-any-return]
