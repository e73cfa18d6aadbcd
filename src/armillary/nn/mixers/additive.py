"""Additive attention (Fastformer, Wu et al. 2021): a global query and a global key instead of pairs.

α = softmax over positions of w_q·q / √K gives the global query g = Σ α q; β = softmax of w_k·p / √K over
p = g ⊙ k gives the global key κ = Σ β p; and out = W (κ ⊙ v) + q. The cost is linear in length, and
linear in width beside the projections. As in the released code, w_q and w_k read all heads and give
one logit per head; unlike there, values have a projection of their own, as in the paper.

As published it looks both ways. Causal, which the paper does not have: both softmaxes run over the
tokens so far, with a running maximum, and p_j uses the global query of its own time, g_j.

Sight: the values are p, the weights β.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from armillary.base.errors import UnsupportedError
from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import Capabilities, Frozen, Mixer, MixerSettings, Place, head_width, mixers
from armillary.nn.mixers.linear import TINY
from armillary.nn.ops.linear import LOWEST, linear_attend, running_max, whole_max
from armillary.nn.state import FixedState, State


class PoolSettings(MixerSettings):
    """What the mixers of this kind share."""

    heads: int = Field(4, gt=0, description="heads, each with its own weights of tokens (divides the width)")

    def size(self, width: int) -> int:
        """Width of a head."""
        return head_width(width, self.heads, settable=False)

    def pool_flops(self, place: Place, length: int) -> float:
        """FLOPs of one set of logits and of the averages that it weighs."""
        each, causal = self.size(place.width), place.order == "causal"
        flops = 3.0 + (5 if causal else 4) * (each + 1) + each + 1  # scaled, difference, exponential; sums; quotient
        flops += 5 if causal else 0  # the running maximum in steps, as a decay
        return linear_flops(place.width, self.heads, length) + length * self.heads * flops

    def pool_bytes(self, place: Place) -> float:
        return 4.0 * (place.width + 2 * self.heads) if place.order == "causal" else 0.0


@mixers.register
class AdditiveSettings(PoolSettings):
    """W (κ ⊙ v) + q, with κ an average of g ⊙ k and g one of q."""

    kind: ClassVar[str] = "additive"
    source: ClassVar[str] = "Wu et al. 2021, Fastformer: Additive Attention Can Be All You Need"
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_additive.py: the paper's equations, for every prefix when causal; outputs and gradients"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(bidirectional=True, state="fixed", rollback="snapshot")

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("causal", cls()),
            Example("bidirectional", cls(heads=2), {"order": "bidirectional"}),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("prefixes", Example("one_head", cls(heads=1)), _prefixes)]

    def build(self, place: Place) -> Additive:
        return Additive(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        flops = 4 * linear_flops(place.width, place.width, length) + 2 * self.pool_flops(place, length)
        flops += 3.0 * length * place.width  # g ⊙ k, κ ⊙ v, + q
        return Cost(flops, 2 * self.pool_bytes(place))


class Pooling(Mixer):
    """Averages over positions, weighted by softmaxes of logits [B, T, H]."""

    def __init__(self, settings: PoolSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.heads = self.value_groups = settings.heads
        self.width = settings.size(place.width)
        self.q = place.product(place.width, place.width, "q")
        self.k = place.product(place.width, place.width, "k")
        self.v = place.product(place.width, place.width, "v")
        self.alpha = place.product(place.width, self.heads, "gate")
        self.o = place.product(place.width, place.width, "o")

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.width))  # type: ignore[no-any-return]

    def pairs(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Queries and keys [B, T, H, K]."""
        q, k = self.split(self.q(x)), self.split(self.k(x))
        if ctx.taps is not None:
            q, k = ctx.taps(f"{self.path}.q", q), ctx.taps(f"{self.path}.k", k)
        return q, k

    def weigh(self, score: Any, y: Tensor, x: Tensor, ctx: Context, before: Tensor | None = None) -> Frozen:
        """Weights of the tokens from y [B, T, H, K], as exponentials below the largest (so far)."""
        logits = score(y.flatten(2))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.width**-0.5
        real = ctx.present(x)
        if real is not None:
            logits = logits.masked_fill(~real[..., None], -torch.inf)
        causal = self.order == "causal"
        scale = running_max(logits, before, ctx.documents) if causal else whole_max(logits, ctx.documents)
        heavy = (logits - scale).exp()[..., None]
        return Frozen({"heavy": heavy, "scale": scale if causal else None, "documents": ctx.documents})

    def average(
        self, frozen: Frozen, values: Tensor, state: Tensor | None = None, before: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        heavy = frozen.parts["heavy"]
        return linear_attend(
            torch.ones_like(heavy),
            heavy,
            values,
            causal=self.order == "causal",
            eps=TINY,
            scale=frozen.parts["scale"],
            state=state,
            before=before,
            documents=frozen.parts["documents"],
        )

    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        if frozen.weights is not None:
            return (frozen.weights.to(values.dtype) @ values.transpose(1, 2)).transpose(1, 2)
        return self.average(frozen, values)[0]

    def mixed(self, frozen: Frozen, values: Tensor, ctx: Context) -> Tensor:
        """`mix` between its taps."""
        if ctx.taps is None:
            return self.mix(frozen, values)
        values = ctx.taps(f"{self.path}.v", values)
        return ctx.taps(f"{self.path}.mixed", self.mix(self._weights(frozen, values, ctx), values))

    def held(self, names: tuple[str, ...], batch: int, dtype: torch.dtype, device: torch.device | str) -> State:
        if self.order == "bidirectional":
            raise UnsupportedError("a bidirectional mixer cannot be extended", where=self.path)
        wide, tensors = torch.promote_types(dtype, torch.float32), {}
        for name in names:
            tensors[name] = torch.zeros(batch, self.heads, 1, self.width + 1, dtype=wide, device=device)
            tensors[f"{name}_scale"] = torch.full((batch, self.heads), LOWEST, dtype=wide, device=device)
        return FixedState(tensors)

    def step(self, name: str, score: Any, y: Tensor, values: Tensor, x: Tensor, state: State, ctx: Context) -> Tensor:
        """Averages of a chunk's values, weighted by logits from y, after those that the state holds."""
        assert isinstance(state, FixedState)
        before = state.tensors[f"{name}_scale"]
        frozen = self.weigh(score, y, x, ctx, before)
        mean, end = self.average(frozen, values, state.tensors[name], before)
        assert end is not None
        state.put(name, end)
        state.put(f"{name}_scale", frozen.parts["scale"][:, -1])
        return mean


class Additive(Pooling):
    """x [B, T, D] → [B, T, D]. State: the sums [B, H, 1, K + 1] of both averages and their scales [B, H]."""

    def __init__(self, settings: AdditiveSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.beta = place.product(place.width, self.heads, "gate")

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        self.accept(ctx)
        q, products = self._products(x, ctx)
        frozen = self.weigh(self.beta, products, x, ctx)
        return self._finish(self.mixed(frozen, products, ctx), q, self.v(x))

    def values(self, x: Tensor, ctx: Context) -> Tensor:
        return self._products(x, ctx)[1]

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        return self.weigh(self.beta, self._products(x, ctx)[1], x, ctx)

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return self._finish(mixed, self.split(self.q(x)), self.v(x))

    def _products(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """q and p = g ⊙ k, [B, T, H, K]."""
        q, k = self.pairs(x, ctx)
        return q, self.average(self.weigh(self.alpha, q, x, ctx), q)[0] * k

    def _finish(self, mixed: Tensor, q: Tensor, v: Tensor) -> Tensor:
        return self.o(mixed.flatten(2) * v) + q.flatten(2)  # type: ignore[no-any-return]

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        return self.held(("query", "key"), batch, dtype, device)

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        q, k = self.pairs(x, ctx)
        products = self.step("query", self.alpha, q, q, x, state, ctx) * k
        values = products if ctx.taps is None else self.tapped_values(products, ctx)
        mixed = self.step("key", self.beta, products, values, x, state, ctx)
        if ctx.taps is not None:
            mixed = ctx.taps(f"{self.path}.mixed", mixed)
        return self._finish(mixed, q, self.v(x))


def _prefixes(mixer: Additive, x: Tensor, ctx: Context) -> Tensor:
    """One head, each token as the last of the text that ends there; p keeps the g of its own time."""
    q, k, v = (x @ product.weight.t() for product in (mixer.q, mixer.k, mixer.v))
    products, rows = [], []
    for t in range(x.shape[1]):
        so_far = q[:, : t + 1]
        alpha = torch.softmax(so_far @ mixer.alpha.weight.t() / mixer.width**0.5, 1)
        products.append((alpha * so_far).sum(1) * k[:, t])
        p = torch.stack(products, 1)
        beta = torch.softmax(p @ mixer.beta.weight.t() / mixer.width**0.5, 1)
        rows.append((beta * p).sum(1))
    return (torch.stack(rows, 1) * v) @ mixer.o.weight.t() + q  # type: ignore[no-any-return]
