"""Additive attention that stops after the global query: the block of LadaGAN (Morales-Juarez & Fuentes-Pineda 2024).

α = softmax over positions of w·q / √K, one logit per head from the queries of all heads, gives the
global query g = Σ α q of each head, and out = W (g ⊙ k ⊙ v): tokens meet in g alone.

As published it looks both ways. Causal, which the paper does not have: the softmax runs over the
tokens so far, with a running maximum.

Sight: the values are the queries, the weights α.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import Capabilities, Frozen, Place, mixers
from armillary.nn.mixers.additive import Pooling, PoolSettings
from armillary.nn.state import State


@mixers.register
class LadaSettings(PoolSettings):
    """W (g ⊙ k ⊙ v), g = Σ α q."""

    kind: ClassVar[str] = "lada"
    source: ClassVar[str] = (
        "Morales-Juarez & Fuentes-Pineda 2024, Efficient Generative Adversarial Networks using Linear "
        "Additive-attention Transformers"
    )
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_additive.py: the paper's equations, for every prefix when causal; outputs and gradients"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(bidirectional=True, state="fixed", rollback="snapshot")

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("causal", cls(heads=2)),
            Example("bidirectional", cls(), {"order": "bidirectional"}),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("prefixes", Example("one_head", cls(heads=1)), _prefixes)]

    def build(self, place: Place) -> Lada:
        return Lada(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        flops = 4 * linear_flops(place.width, place.width, length) + self.pool_flops(place, length)
        return Cost(flops + 2.0 * length * place.width, self.pool_bytes(place))


class Lada(Pooling):
    """x [B, T, D] → [B, T, D]. State: the sums [B, H, 1, K + 1] of the average and their scale [B, H]."""

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        self.accept(ctx)
        q, k = self.pairs(x, ctx)
        return self._finish(self.mixed(self.weigh(self.alpha, q, x, ctx), q, ctx), k, self.v(x))

    def values(self, x: Tensor, ctx: Context) -> Tensor:
        return self.pairs(x, ctx)[0]

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        return self.weigh(self.alpha, self.pairs(x, ctx)[0], x, ctx)

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return self._finish(mixed, self.split(self.k(x)), self.v(x))

    def _finish(self, mixed: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.o((mixed * k).flatten(2) * v)  # type: ignore[no-any-return]

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        return self.held(("query",), batch, dtype, device)

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        q, k = self.pairs(x, ctx)
        values = q if ctx.taps is None else self.tapped_values(q, ctx)
        mixed = self.step("query", self.alpha, q, values, x, state, ctx)
        if ctx.taps is not None:
            mixed = ctx.taps(f"{self.path}.mixed", mixed)
        return self._finish(mixed, k, self.v(x))


def _prefixes(mixer: Lada, x: Tensor, ctx: Context) -> Tensor:
    """One head, each token as the last of the text that ends there."""
    q, k, v = (x @ product.weight.t() for product in (mixer.q, mixer.k, mixer.v))
    rows = []
    for t in range(x.shape[1]):
        so_far = q[:, : t + 1]
        alpha = torch.softmax(so_far @ mixer.alpha.weight.t() / mixer.width**0.5, 1)
        rows.append((alpha * so_far).sum(1))
    return (torch.stack(rows, 1) * k * v) @ mixer.o.weight.t()  # type: ignore[no-any-return]
