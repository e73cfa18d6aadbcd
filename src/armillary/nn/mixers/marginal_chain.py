"""Attention over whole alignments: every token points at one, and pointers move a bounded way per token.

A structured prior in the sense of Singh & Buckley 2023, Attention: Marginal Probability is All You
Need?: the edges of a row are not independent but one chain, as in alignments by jump widths (Vogel et
al. 1996, HMM-Based Word Alignment; Kim et al. 2017, Structured Attention Networks). The weight of an
alignment a is Π_t exp(q_t·k_{a_t} / √K) · m[a_t − a_{t−1}], m learned for jumps up to `reach`; a head
gives the mean of the values under the marginal of each pointer. Both ways these are the marginals
of the whole row; causally, those of the row so far, so that nothing later is seen. The recurrence runs
token by token, in training too: a token costs O(length · reach), and the whole matrix is kept.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary.base.errors import UnsupportedError
from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example
from armillary.nn.mechanism import Capabilities, Frozen, Mixer, MixerSettings, Place, head_width, mixers
from armillary.nn.ops.chain import LARGE, backward_messages, forward_messages
from armillary.nn.state import SpanState, State, zeros


@mixers.register
class MarginalChainSettings(MixerSettings):
    """Σ_j p(a_t = j) v_j, a a chain of pointers with scores q kᵀ / √K and learned jumps."""

    kind: ClassVar[str] = "marginal_chain"
    source: ClassVar[str] = "Singh & Buckley 2023, Attention: Marginal Probability is All You Need?"
    oracle: ClassVar[str] = "tests/nn/mixers/test_marginal.py: every alignment of short rows, one by one"
    capabilities: ClassVar[Capabilities] = Capabilities(bidirectional=True, state="span", rollback="snapshot")
    heads: int = Field(4, gt=0, description="heads")
    head_width: int | None = Field(None, gt=0, description="features per head; by default width / heads")
    reach: int = Field(2, gt=0, description="how far a pointer moves from one token to the next, at most")

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("so_far", cls(heads=2)),
            Example("whole", cls(heads=2, reach=1, head_width=6), {"order": "bidirectional"}),
        ]

    def build(self, place: Place) -> MarginalChain:
        return MarginalChain(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        width, each = place.width, head_width(place.width, self.heads, self.head_width)
        joined, pairs = self.heads * each, float(self.heads * length * length)
        flops = 3 * linear_flops(width, joined, length) + linear_flops(joined, width, length)
        # the products, scale and exponential; per message: jumps, their sum, scores, a softmax, two floors
        flops += pairs * (4 * each + 2)
        jumps = 2 * self.reach + 1
        message = 8.0 + jumps
        flops += pairs * message
        if place.order == "bidirectional":
            flops += pairs * (message + 6)
            return Cost(flops)
        return Cost(flops, length * (2.0 * joined * itemsize + self.heads * max(4, itemsize)))


class ChainState(SpanState):
    """Keys, values and the message over them; a message cannot be taken back to an earlier token."""

    divisible: ClassVar[bool] = False

    def truncate(self, lengths: Tensor) -> None:
        raise UnsupportedError("a chain's state cannot be truncated", hint="take a snapshot before and restore it")


class MarginalChain(Mixer):
    """x [B, T, D] → [B, T, D]; its state are keys and values, and where the pointers may be."""

    scaled = ("scale",)

    def __init__(self, settings: MarginalChainSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.heads = self.value_groups = settings.heads
        self.width = head_width(place.width, settings.heads, settings.head_width)
        self.scale = self.width**-0.5
        joined = self.heads * self.width
        self.q, self.k, self.v = (place.product(place.width, joined, role) for role in ("q", "k", "v"))
        self.o = place.product(joined, place.width, "o")
        self.moves = nn.Parameter(torch.empty(self.heads, 2 * settings.reach + 1))

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.moves)

    def values(self, x: Tensor, ctx: Context) -> Tensor:
        return self.v(x).unflatten(-1, (self.heads, self.width))  # type: ignore[no-any-return]

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        q, k = self._scored(x, ctx)
        scores = self._scores(q, k.transpose(1, 2))
        steps = torch.arange(x.shape[1], device=x.device)
        seen = torch.ones(1, x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        if self.order == "causal":
            seen = seen.tril()
        valid = torch.ones_like(seen[:, 0]) if ctx.padding is None else ctx.padding
        if ctx.padding is not None:
            seen = seen & ctx.padding[:, None]
        # the token before each one that is there; a chain begins where there is none, or in a document
        last = torch.where(valid, steps, -1).cummax(1).values
        before = torch.cat([torch.full_like(last[:, :1], -1), last[:, :-1]], 1)
        begun = before < 0
        if ctx.documents is not None:
            seen = seen & (ctx.documents[:, :, None] == ctx.documents[:, None])
            earlier = ctx.documents.gather(1, before.clamp(min=0).expand(x.shape[0], -1))
            begun = begun | (earlier != ctx.documents)
        log, _ = forward_messages(scores, self.moves, seen, begun, valid, None)
        if self.order == "bidirectional":
            log = torch.log_softmax(log + backward_messages(scores, self.moves, seen, begun, valid), -1)
        return Frozen({"weights": self._marginals(log, seen)})

    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        weights: Tensor = frozen.parts["weights"] if frozen.weights is None else frozen.weights
        return (weights.to(values.dtype) @ values.transpose(1, 2)).transpose(1, 2)

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return self.o(mixed.flatten(2))  # type: ignore[no-any-return]

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        if self.order == "bidirectional":
            raise UnsupportedError("a bidirectional mixer cannot be extended", where=self.path)
        shape = (batch, self.heads, capacity)
        tensors = {name: zeros((*shape, self.width), dtype, device) for name in ("k", "v")}
        wide = torch.promote_types(dtype, torch.float32)
        return ChainState({**tensors, "message": torch.zeros(shape, dtype=wide, device=device)})

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        assert isinstance(state, ChainState)
        q, k = self._scored(x, ctx)
        values = self.values(x, ctx)
        if ctx.taps is not None:
            values = ctx.taps(f"{self.path}.v", values)
        steps = torch.arange(x.shape[1], device=x.device)
        valid = torch.ones_like(steps, dtype=torch.bool)[None]
        if ctx.lengths is not None:
            valid = steps < ctx.lengths[:, None]
        before = state.lengths[:, None] if state.uniform is None else state.lengths[:1, None]
        fresh = torch.full((x.shape[0], self.heads, x.shape[1]), -LARGE, dtype=state.tensors["message"].dtype)
        added = {"k": k.transpose(1, 2), "v": values.transpose(1, 2), "message": fresh.to(x.device)}
        held = state.append(added, ctx.lengths)
        places = torch.arange(held["k"].shape[2], device=x.device)
        own = before + steps  # the place of each token in its row
        seen = places <= own[..., None]
        # Slots that a row has not reached hold no probability.
        message = held["message"].masked_fill((places >= state.lengths[:, None])[:, None], -LARGE)
        scores = self._scores(q, held["k"])
        log, message = forward_messages(scores, self.moves, seen, own == 0, valid, message)
        self._keep(state, message, valid)
        frozen = Frozen({"weights": self._marginals(log, seen)})
        if ctx.taps is None:
            return self.finish(self.mix(frozen, held["v"].transpose(1, 2)), x, ctx)
        values = held["v"].transpose(1, 2)
        mixed = self.mix(self._weights(frozen, values, ctx), values)
        return self.finish(ctx.taps(f"{self.path}.mixed", mixed), x, ctx)

    def _keep(self, state: ChainState, message: Tensor, valid: Tensor) -> None:
        """The message after the chunk, in the rows that took part in it."""
        size, old = message.shape[2], state.tensors["message"]
        message = torch.where(valid.any(1)[:, None, None], message, old[:, :, :size])
        if torch.is_grad_enabled():
            state.tensors["message"] = torch.cat([message, old[:, :, size:]], 2)
        else:
            old[:, :, :size] = message

    def _scored(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Queries and keys [B, T, H, K]."""
        q = self.q(x).unflatten(-1, (self.heads, self.width))
        k = self.k(x).unflatten(-1, (self.heads, self.width))
        if ctx.taps is not None:
            q, k = ctx.taps(f"{self.path}.q", q), ctx.taps(f"{self.path}.k", k)
        return q, k

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        """q [B, T, H, K], k [B, H, S, K] → [B, H, T, S] in float32 (float64 for float64)."""
        scores = q.transpose(1, 2) @ k.transpose(2, 3)
        scaled: Tensor = (scores if scores.dtype == torch.float64 else scores.float()) * self.scale
        return scaled

    def _marginals(self, log: Tensor, seen: Tensor) -> Tensor:
        return log.exp().masked_fill(~seen[:, None], 0.0)
