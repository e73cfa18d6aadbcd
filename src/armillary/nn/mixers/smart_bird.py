"""Smart Bird: a small sketch of the attention says which few keys each head looks at (Wu et al. 2021).

Wu, Wu, Qi & Huang 2021, Smart Bird: Learnable Sparse Attention for Efficient and Effective
Transformer. One head of few features gives the sketched matrix A = softmax(q̃ k̃ᵀ / √d̃). In updates
every head draws M keys for each query without replacement with probability in proportion to its row
of A (Gumbel noise on log A, then the M largest: Kool et al. 2019, Stochastic Beams and Where to Find
Them); outside of updates all take the M likeliest. Softmax runs over those keys only. A query that
sees no more than M keys takes all of them.

The paper's abstract leaves open how the sketch learns and how it is evaluated. Here its output is one
more head, with values of a head's width, so the loss reaches it; the draws pass no gradient. The
sketch is computed in float32, so that low precision cannot change which keys are chosen.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from armillary.base.errors import UnsupportedError
from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mask import Causal, Documents, Keys, Mask, both
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
from armillary.nn.positions.none import NoPositionSettings
from armillary.nn.positions.rope import RopeSettings
from armillary.nn.state import SpanState, State
from armillary.nn.training import gumbel

ROWS = 256  # queries whose keys are gathered at once


@mixers.register
class SmartBirdSettings(MixerSettings):
    """Heads over the M keys that a sketch of the attention points at, and the sketch as one more head."""

    kind: ClassVar[str] = "smart_bird"
    source: ClassVar[str] = (
        "Wu et al. 2021, Smart Bird: Learnable Sparse Attention for Efficient and Effective Transformer"
    )
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_smart_bird.py: the docstring's formulas as loops, PyTorch's attention when every "
        "key is taken, the frequencies of drawn keys against the sketch (χ²)"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(
        bidirectional=True, mask=True, state="span", rollback="truncate", noise=True
    )
    heads: int = Field(4, gt=0, description="sparse heads (the sketch comes on top)")
    keys: int = Field(64, gt=0, description="keys that each head looks at for a query")
    sketch: int = Field(32, gt=0, description="features of the sketch's queries and keys")
    position: PositionSettings | None = Field(RopeSettings(), description="how queries and keys turn: rope or none")

    @classmethod
    def examples(cls) -> list[Example]:
        few = cls(heads=2, keys=4, sketch=4)
        return [
            Example("few_keys", few, compiled=True),
            Example("no_position", cls(heads=4, keys=3, sketch=6, position=NoPositionSettings())),
            Example("bidirectional", few, {"order": "bidirectional"}),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("all_keys", Example("all_keys", cls(heads=1, keys=64, sketch=4, position=None)), _attention)]

    def features(self, width: int) -> int:
        """Features per head."""
        return head_width(width, self.heads, settable=False)

    def build(self, place: Place) -> SmartBird:
        return SmartBird(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        width, each = place.width, self.features(place.width)
        flops = 2 * linear_flops(width, width, length) + 2 * linear_flops(width, self.sketch, length)
        flops += 2 * linear_flops(width, width + each, length)
        flops += float(length * length) * (4 * self.sketch + 2 * each + 6)  # the sketch's scores, twice, and its mix
        flops += float(self.heads * length * min(self.keys, length)) * (4 * each + 6)
        if self.position is not None:
            flops += self.position.cost(place, length, self.heads, self.heads, each).flops
            flops += self.position.cost(place, length, 1, 1, self.sketch).flops
        kept = 0 if place.order == "bidirectional" else length
        return Cost(flops, kept * ((2 * width + each) * itemsize + self.sketch * max(4, itemsize)))


class SmartBird(Mixer):
    """x [B, T, D] → [B, T, D]; its state holds keys, values, and the sketch's keys and values."""

    def __init__(self, settings: SmartBirdSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.heads, self.keys, self.sketch = settings.heads, settings.keys, settings.sketch
        self.width = settings.features(place.width)
        self.value_groups = self.heads + 1
        self.q = place.product(place.width, place.width, "q")
        self.k = place.product(place.width, place.width, "k")
        self.v = place.product(place.width, place.width + self.width, "v")
        self.sketch_q = place.product(place.width, self.sketch, "q")
        self.sketch_k = place.product(place.width, self.sketch, "k")
        self.o = place.product(place.width + self.width, place.width, "o")
        sites = settings.position.sites if settings.position is not None else frozenset()
        if sites - {"rotate"}:
            raise UnsupportedError("smart_bird takes rotations only", where=place.path, hint="position: rope or none")
        turns = settings.position if sites else None
        self.position = None if turns is None else turns.build(place.at("position"), self.heads, self.width)
        self.sketch_position = None if turns is None else turns.build(place.at("sketch_position"), 1, self.sketch)

    def values(self, x: Tensor, ctx: Context) -> Tensor:
        return self.v(x).unflatten(-1, (self.heads + 1, self.width))  # type: ignore[no-any-return]

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        q, k, sketch_q, sketch_k = self._products(x, ctx)
        mask: Mask | None = Causal() if self.order == "causal" else None
        mask = both(mask, ctx.mask)
        if ctx.documents is not None:
            mask = both(mask, Documents(ctx.documents, ctx.documents))
        if ctx.padding is not None:
            mask = both(mask, Keys(ctx.padding))
        return self._chosen(q, k, sketch_q, sketch_k, mask, ctx)

    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        v = values.transpose(1, 2)
        if frozen.weights is not None:
            return (frozen.weights.to(v.dtype) @ v).transpose(1, 2)
        parts = frozen.parts
        q, k, index, seen = parts["q"], parts["k"], parts["index"], parts["seen"]
        pieces = []
        for start in range(0, q.shape[2], ROWS):
            part = slice(start, start + ROWS)
            given = (q[:, :, part], k, v[:, :-1], index[:, :, part], seen[:, :, part])
            if torch.is_grad_enabled() and q.shape[2] > ROWS:
                pieces.append(checkpoint(_gathered, *given, use_reentrant=False))
            else:
                pieces.append(_gathered(*given))
        sparse = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)
        sketched, _ = attend(
            parts["sketch_q"],
            parts["sketch_k"],
            v[:, -1:].to(parts["sketch_q"].dtype),
            mask=parts["mask"],
            scale=self.sketch**-0.5,
        )
        return torch.cat([sparse, sketched.to(sparse.dtype)], 1).transpose(1, 2)

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return self.o(mixed.flatten(2))  # type: ignore[no-any-return]

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        if self.order == "bidirectional":
            raise UnsupportedError("a bidirectional mixer cannot be extended", where=self.path)
        wide = torch.promote_types(dtype, torch.float32)
        shapes = {"k": (self.heads, self.width), "v": (self.heads + 1, self.width), "sketch": (1, self.sketch)}
        # Zeros, not empty: a slot that a ragged row has not reached meets a weight of 0, and 0·NaN is NaN.
        return SpanState(
            {
                name: torch.zeros(
                    batch, groups, capacity, each, dtype=wide if name == "sketch" else dtype, device=device
                )
                for name, (groups, each) in shapes.items()
            }
        )

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        assert isinstance(state, SpanState)
        q, k, sketch_q, sketch_k = self._products(x, ctx)
        v = self.values(x, ctx)
        if ctx.taps is not None:
            v = ctx.taps(f"{self.path}.v", v)
        start, uniform = state.lengths, state.uniform
        held = state.append({"k": k, "v": v.transpose(1, 2), "sketch": sketch_k}, ctx.lengths)
        before: int | Tensor = start if uniform is None or state.uniform is None else uniform
        frozen = self._chosen(q, held["k"], sketch_q, held["sketch"], Causal(before), ctx)
        values = held["v"].transpose(1, 2)
        if ctx.taps is not None:
            frozen = self._weights(frozen, values, ctx)
        mixed = self.mix(frozen, values)
        if ctx.taps is not None:
            mixed = ctx.taps(f"{self.path}.mixed", mixed)
        return self.finish(mixed, x, ctx)

    # -- parts

    def _products(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries and keys [B, H, T, K], and the sketch's [B, 1, T, d̃] in float32."""
        q = self.q(x).unflatten(-1, (self.heads, self.width))
        k = self.k(x).unflatten(-1, (self.heads, self.width))
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        sketch_q, sketch_k = self.sketch_q(wide)[:, :, None], self.sketch_k(wide)[:, :, None]
        if self.position is not None and self.sketch_position is not None:
            q, k = self.position.rotate(q, k, ctx.where(x))
            sketch_q, sketch_k = self.sketch_position.rotate(sketch_q, sketch_k, ctx.where(x))
        if ctx.taps is not None:
            q, k = ctx.taps(f"{self.path}.q", q), ctx.taps(f"{self.path}.k", k)
        return q.transpose(1, 2), k.transpose(1, 2), sketch_q.transpose(1, 2), sketch_k.transpose(1, 2)

    def _chosen(
        self, q: Tensor, k: Tensor, sketch_q: Tensor, sketch_k: Tensor, mask: Mask | None, ctx: Context
    ) -> Frozen:
        """index [B, H or 1, T, M]: the keys that each query looks at, and whether it may see them."""
        found = []
        with torch.no_grad():
            for start in range(0, q.shape[2], ROWS):
                scores = sketch_q[:, :, start : start + ROWS] @ sketch_k.transpose(2, 3) * self.sketch**-0.5
                shape = (q.shape[0], self.heads, *scores.shape[2:])
                drawn = gumbel(ctx, self.path, f"keys of the queries from {start}", shape, scores)
                if drawn is not None:
                    scores = scores + drawn.to(scores.dtype)  # log A less a constant of each row
                if mask is not None:
                    queries = torch.arange(start, start + scores.shape[2], device=q.device)
                    columns = torch.arange(scores.shape[3], device=q.device)
                    scores = scores.masked_fill(~mask.rows(queries, columns), -torch.inf)
                found.append(scores.topk(min(self.keys, scores.shape[3]), -1))
        top, index = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
        parts = {"q": q, "k": k, "index": index, "seen": top > -torch.inf}
        return Frozen(parts | {"sketch_q": sketch_q, "sketch_k": sketch_k, "mask": mask})


def _gathered(q: Tensor, k: Tensor, v: Tensor, index: Tensor, seen: Tensor) -> Tensor:
    """q [B, H, t, K], k [B, H, S, K], v [B, H, S, V], index and seen [B, H or 1, t, M] → [B, H, t, V]."""
    batch, heads, _, width = q.shape
    index = index.expand(batch, heads, -1, -1)
    flat = index.flatten(2)[..., None]
    keys = k.gather(2, flat.expand(-1, -1, -1, width)).view(*index.shape, width)
    scores = (q[..., None, :] @ keys.transpose(3, 4))[..., 0, :]
    scores = (scores if scores.dtype == torch.float64 else scores.float()) * width**-0.5
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1).masked_fill(~seen, 0.0)
    values = v.gather(2, flat.expand(-1, -1, -1, v.shape[-1])).view(*index.shape, v.shape[-1])
    return (weights.to(v.dtype)[..., None, :] @ values)[..., 0, :]


def _attention(mixer: SmartBird, x: Tensor, ctx: Context) -> Tensor:
    """With every key taken: one head of equation (1) of Vaswani et al. 2017, and the sketch beside it."""
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    v = x @ mixer.v.weight.t()
    heads = []
    for q, k, part in ((mixer.q, mixer.k, v[..., :16]), (mixer.sketch_q, mixer.sketch_k, v[..., 16:])):
        scores = (x @ q.weight.t()) @ (x @ k.weight.t()).transpose(1, 2) / q.outputs**0.5
        heads.append(torch.softmax(scores.masked_fill(later, -torch.inf), -1) @ part)
    y: Tensor = torch.cat(heads, -1) @ mixer.o.weight.t()
    return y
