"""Efficient Attention: queries pick among global context vectors, one per feature (Shen et al. 2021).

E = ρ_q(Q) (ρ_k(K)ᵀ V). `softmax`: ρ_q is a softmax over the features of each query, ρ_k one over the
positions of each feature, so that the implied weights of a row sum to 1. `scaling`: both divide by
√n, which gives (Q Kᵀ / n) V for n tokens.

As published it looks both ways. Causal, which the paper does not have: the softmax over positions
and n run over the tokens so far, so that each row is what the published form gives for the text
that ends there; only the last row is the same.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from armillary.base.errors import UnsupportedError
from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import Capabilities, Frozen, Mixer, Place, mixers
from armillary.nn.mixers.linear import KernelSettings, tokens_so_far
from armillary.nn.ops.columns import column_attend
from armillary.nn.ops.linear import LOWEST, linear_attend
from armillary.nn.state import FixedState, State


@mixers.register
class EfficientSettings(KernelSettings):
    """ρ_q(Q) (ρ_k(K)ᵀ V)."""

    kind: ClassVar[str] = "efficient"
    source: ClassVar[str] = "Shen et al. 2021, Efficient Attention: Attention with Linear Complexities"
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_efficient.py: the paper's equations with explicit softmaxes, for every prefix when "
        "causal; outputs and gradients"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(bidirectional=True, state="fixed", rollback="snapshot")
    normalisation: Literal["softmax", "scaling"] = Field("softmax", description="ρ of queries and keys")

    @classmethod
    def examples(cls) -> list[Example]:
        both = {"order": "bidirectional"}
        return [
            Example("softmax", cls(heads=2)),
            Example("scaling", cls(normalisation="scaling")),
            Example("softmax_bidirectional", cls(), both),
            Example("scaling_bidirectional", cls(heads=2, normalisation="scaling"), both),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        alone = cls(heads=16)  # one feature per head: ρ_q is 1, and the queries do not matter
        return [Limit("one_feature", Example("heads", alone), _averages)]

    def build(self, place: Place) -> Efficient:
        return Efficient(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        each, causal = self.size(place.width), place.order == "causal"
        rows = float(length * self.heads)
        flops = self.products(place.width, length)
        if self.normalisation == "softmax":
            flops += rows * 5 * each  # of queries
            # log-sum, two differences, two exponentials; fade, outer product, sum, product with q
            flops += rows * (5 * each + 5 * each * each) if causal else rows * (5 * each + 4 * each * each)
            held = self.heads * each * (each + 1) * 4.0
        else:
            flops += rows * (5 * each * each + 1 if causal else 4 * each * each) + rows * each
            held = self.heads * each * each * 4.0 + 8
        return Cost(flops, held if causal else 0.0)


class Efficient(Mixer):
    """x [B, T, D] → [B, T, D]. State: for softmax the averages [B, H, K, K] and log-sums [B, H, K]; for
    scaling the sums [B, H, K, K] and the number of tokens [B]."""

    scaled = ()

    def __init__(self, settings: EfficientSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.heads = self.value_groups = settings.heads
        self.width, self.soft = settings.size(place.width), settings.normalisation == "softmax"
        inner = self.heads * self.width
        self.q = place.product(place.width, inner, "q")
        self.k = place.product(place.width, inner, "k")
        self.v = place.product(place.width, inner, "v")
        self.o = place.product(inner, place.width, "o")

    def values(self, x: Tensor, ctx: Context) -> Tensor:
        return self.v(x).unflatten(-1, (self.heads, self.width))  # type: ignore[no-any-return]

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        q = self.q(x).unflatten(-1, (self.heads, self.width))
        k = self.k(x).unflatten(-1, (self.heads, self.width))
        if ctx.taps is not None:
            q, k = ctx.taps(f"{self.path}.q", q), ctx.taps(f"{self.path}.k", k)
        real = ctx.present(x)
        if self.soft:
            q = torch.softmax(q, -1, dtype=torch.promote_types(q.dtype, torch.float32))
            return Frozen({"q": q, "k": k, "real": real, "documents": ctx.documents})
        if real is not None:
            k = k * real[..., None, None].to(k.dtype)
        count = _count(x, real, ctx.documents, self.order == "causal")
        return Frozen({"q": q, "k": k, "count": count, "documents": ctx.documents})

    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        if frozen.weights is not None:
            return (frozen.weights.to(values.dtype) @ values.transpose(1, 2)).transpose(1, 2)
        parts, causal = frozen.parts, self.order == "causal"
        q, k, documents = parts["q"], parts["k"], parts["documents"]
        if self.soft:
            return column_attend(q, k, values, causal=causal, present=parts["real"], documents=documents)[0]
        y, _ = linear_attend(q, k, values, causal=causal, eps=None, documents=documents)
        return _over(y, parts["count"])

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return self.o(mixed.flatten(2))  # type: ignore[no-any-return]

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        if self.order == "bidirectional":
            raise UnsupportedError("a bidirectional mixer cannot be extended", where=self.path)
        wide = torch.promote_types(dtype, torch.float32)
        shape = (batch, self.heads, self.width)
        matrix = torch.zeros(*shape, self.width, dtype=wide, device=device)
        if self.soft:
            return FixedState({"matrix": matrix, "level": torch.full(shape, LOWEST, dtype=wide, device=device)})
        return FixedState({"matrix": matrix, "count": torch.zeros(batch, dtype=torch.int64, device=device)})

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        assert isinstance(state, FixedState)
        values = self.values(x, ctx)
        if ctx.taps is not None:
            values = self.tapped_values(values, ctx)
        parts, matrix = self.freeze(x, ctx).parts, state.tensors["matrix"]
        if self.soft:
            mixed, held = column_attend(
                parts["q"], parts["k"], values, present=parts["real"], state=(matrix, state.tensors["level"])
            )
            assert held is not None
            state.put("matrix", held[0])
            state.put("level", held[1])
        else:
            sums, end = linear_attend(parts["q"], parts["k"], values, eps=None, state=matrix)
            assert end is not None
            count = parts["count"] + state.tensors["count"][:, None]
            mixed = _over(sums, count)
            state.put("matrix", end)
            state.put("count", count[:, -1])
        if ctx.taps is not None:
            mixed = ctx.taps(f"{self.path}.mixed", mixed)
        return self.finish(mixed, x, ctx)


def _over(sums: Tensor, count: Tensor) -> Tensor:
    return sums / count.clamp(min=1)[..., None, None].to(sums.dtype)


def _count(x: Tensor, real: Tensor | None, documents: Tensor | None, causal: bool) -> Tensor:
    """How many tokens each sees, [B, T] int64."""
    ones = torch.ones(x.shape[:2], dtype=torch.int64, device=x.device) if real is None else real.long()
    ahead = tokens_so_far(ones, documents)
    if causal:
        return ahead
    back = tokens_so_far(ones.flip(1), None if documents is None else documents.flip(1)).flip(1)
    return ahead + back - ones


def _averages(mixer: Efficient, x: Tensor, ctx: Context) -> Tensor:
    """With one feature per head every token gets the average of the values so far, weighted by exp(k)."""
    k, v = x @ mixer.k.weight.t(), x @ mixer.v.weight.t()
    heavy = k.exp()
    return ((heavy * v).cumsum(1) / heavy.cumsum(1)) @ mixer.o.weight.t()  # type: ignore[no-any-return]
