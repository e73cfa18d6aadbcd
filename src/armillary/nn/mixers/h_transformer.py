"""Hierarchical attention: near tokens exactly, far ones as means over blocks that grow with distance.

Zhu & Soricut 2021, H-Transformer-1D: Fast One-Dimensional Hierarchical Attention for Sequences. Keys
are averaged and values summed in pairs, level after level; a query sees its own block and, at each
level, the sibling of the node that it lies in. Both ways queries are averaged as well, as published.
A causal model cannot average queries, since an earlier output would then depend on later ones: here
its queries stay fine and see finished left siblings only, which covers every earlier token exactly
once. A coarse token of level l counts 2^l times in the normaliser, and all levels share one row
maximum. Nodes of documents and of padded rows begin with their first token; a node that a document
does not fill counts the tokens that are there.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from armillary.base.errors import UnsupportedError
from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import Capabilities, Frozen, Mixer, MixerSettings, Place, head_width, mixers
from armillary.nn.ops.hierarchy import hierarchy_attend, hierarchy_extend, layout, pairs_of
from armillary.nn.state import NodeState, State


@mixers.register
class HTransformerSettings(MixerSettings):
    """softmax over the own block's tokens and the siblings' coarse tokens, each weighing 2^l."""

    kind: ClassVar[str] = "h_transformer"
    source: ClassVar[str] = (
        "Zhu & Soricut 2021, H-Transformer-1D: Fast One-Dimensional Hierarchical Attention for Sequences"
    )
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_h_transformer.py: the hierarchy written out pair by pair of tokens, softmax attention"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(bidirectional=True, state="scored", rollback="snapshot")
    heads: int = Field(4, gt=0, description="heads")
    block: int = Field(16, gt=0, description="tokens seen one by one, and coarse tokens per node (the paper's N_r)")

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("causal", cls(heads=2, block=3)),
            Example("blocks_of_one", cls(heads=2, block=1)),
            Example("both_ways", cls(heads=2, block=2), {"order": "bidirectional"}),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        both = {"order": "bidirectional"}
        return [
            Limit("softmax", Example("one_block", cls(heads=1, block=32)), _softmax),
            Limit("softmax_both_ways", Example("one_block", cls(heads=1, block=32), both), _softmax),
        ]

    def features(self, width: int) -> int:
        """Features per head."""
        return head_width(width, self.heads, settable=False)

    def build(self, place: Place) -> HTransformer:
        return HTransformer(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        each = self.features(place.width)
        flops = 4 * linear_flops(place.width, place.width, length)
        blocks = max(1, -(-length // self.block))
        pairs = pairs_of(blocks)
        size = self.block << (blocks - 1).bit_length()
        causal = place.order == "causal"
        own = blocks * self.block
        found = own * self._row(each)
        for level, count in enumerate(pairs):
            coarse, reach = size >> level, 2 * count * self.block
            if causal:
                rows = count * (self.block << level)
                found += rows * (self._row(each) + 1 + 2 * each) + (4 * coarse * each if level else 0)
            else:
                found += reach * (self._row(each) + self.block + 3 * each) + (3 * coarse * each if level else 0)
                joined = own if level == 0 else max(reach << 1, 2 * pairs[level - 1] * self.block)
                found += joined * (3 * each + 3)
        if causal and pairs:  # the levels' logarithms, their common one and the shares; the own block's share
            found += (len(pairs) + 1) * size * 6 + size * each
        found += size * each * (1 if causal else 4)  # what is not there becomes 0
        flops += self.heads * found
        levels = NodeState.levels_for(length, self.block)
        kept = 0 if place.order == "bidirectional" else 2 * place.width * itemsize * (1 + levels) * self.block
        return Cost(flops, kept)

    def _row(self, each: int) -> float:
        """One query against `block` keys: two products, scale, softmax in parts, and its logarithm."""
        return self.block * (4.0 * each + 5) + each + 2


class HTransformer(Mixer):
    """x [B, T, D] → [B, T, D]; its state holds the current block and one closed node per level."""

    scaled = ("scale",)

    def __init__(self, settings: HTransformerSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.heads = self.value_groups = settings.heads
        self.width = settings.features(place.width)
        self.block = settings.block
        self.scale = self.width**-0.5
        self.q = place.product(place.width, place.width, "q")
        self.k = place.product(place.width, place.width, "k")
        self.v = place.product(place.width, place.width, "v")
        self.o = place.product(place.width, place.width, "o")

    def values(self, x: Tensor, ctx: Context) -> Tensor:
        return self.v(x).unflatten(-1, (self.heads, self.width))  # type: ignore[no-any-return]

    def _queries_keys(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        q = self.q(x).unflatten(-1, (self.heads, self.width))
        k = self.k(x).unflatten(-1, (self.heads, self.width))
        if ctx.taps is not None:
            q, k = ctx.taps(f"{self.path}.q", q), ctx.taps(f"{self.path}.k", k)
        return q, k

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        q, k = self._queries_keys(x, ctx)
        held = layout(x.shape[0], x.shape[1], self.block, x.device, ctx.padding, ctx.documents)
        return Frozen({"q": q, "k": k, "layout": held})

    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        if frozen.weights is not None:
            return (frozen.weights.to(values.dtype) @ values.transpose(1, 2)).transpose(1, 2)
        parts = frozen.parts
        return hierarchy_attend(
            parts["q"],
            parts["k"],
            values,
            parts["layout"],
            block=self.block,
            scale=self.scale,
            causal=self.order == "causal",
        )

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return self.o(mixed.flatten(2))  # type: ignore[no-any-return]

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        if self.order == "bidirectional":
            raise UnsupportedError("a bidirectional mixer cannot be extended", where=self.path)
        groups = 1 + NodeState.levels_for(capacity, self.block)
        shape = (batch, self.heads, groups * self.block, self.width)
        return NodeState({name: torch.zeros(shape, dtype=dtype, device=device) for name in ("k", "v")}, self.block)

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        assert isinstance(state, NodeState)
        values = self.values(x, ctx)
        if ctx.taps is not None:
            values = self.tapped_values(values, ctx)
        q, k = self._queries_keys(x, ctx)
        count = x.shape[1]
        levels = NodeState.levels_for(state.longest + count, self.block)
        state.reserve(levels)
        filled = self.block - 1 if state.uniform is None else state.uniform % self.block
        y, held = hierarchy_extend(
            q.transpose(1, 2),
            k.transpose(1, 2),
            values.transpose(1, 2),
            state.tensors,
            state.lengths,
            torch.full_like(state.lengths, count) if ctx.lengths is None else ctx.lengths,
            levels=state.levels,
            blocks=-(-(filled + count) // self.block),
            block=self.block,
            scale=self.scale,
        )
        state.advance(held, count, ctx.lengths)
        mixed = y.transpose(1, 2)
        if ctx.taps is not None:
            mixed = ctx.taps(f"{self.path}.mixed", mixed)
        return self.finish(mixed, x, ctx)


def _softmax(mixer: HTransformer, x: Tensor, ctx: Context) -> Tensor:
    """softmax(q kᵀ / √K) v of one head, over all tokens or the earlier ones."""
    q, k, v = (x @ product.weight.t() for product in (mixer.q, mixer.k, mixer.v))
    scores = q @ k.transpose(1, 2) / mixer.width**0.5
    if mixer.order == "causal":
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    y: Tensor = torch.softmax(scores, -1) @ v @ mixer.o.weight.t()
    return y
