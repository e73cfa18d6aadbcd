"""Attention over codewords: the past is a histogram of codes, so its cost and state do not grow with it.

Wu et al. 2021, Linear-Time Self Attention with Codeword Histogram for Efficient Recommendation (LISA).
Every token is encoded by one codeword of each codebook, each codebook encoding what the ones before it
left over. Within a codebook attention between codewords is a table, and softmax over all earlier tokens
is softmax over codewords that weigh as often as they were seen: exact attention among quantised
tokens, O(T·codebooks·codewords). Codebooks are summed, which stands for one joint softmax.

Codes are piecewise constant in the input. In training updates their gradient is that of the softmax
over similarities (straight through), and the quantisation error is an auxiliary loss as in van den
Oord et al. 2017, Neural Discrete Representation Learning; outside of them the derivative is what it
is, zero. With `assignment: soft` a token spreads over codewords and everything is smooth. One bilinear
similarity serves all codebooks (the paper does not say whether it is shared).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from armillary.base.errors import UnsupportedError
from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import Capabilities, Mixer, MixerSettings, Place, head_width, mixers
from armillary.nn.ops.histogram import running_histogram
from armillary.nn.state import FixedState, State
from armillary.nn.training import attach

EMPTY, TINY = -1e30, 1e-30


@mixers.register
class LisaSettings(MixerSettings):
    """Σ_b softmax(table_b[own code] + log counts_b) · values_b."""

    kind: ClassVar[str] = "lisa"
    source: ClassVar[str] = (
        "Wu et al. 2021, Linear-Time Self Attention with Codeword Histogram for Efficient Recommendation"
    )
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_lisa.py: softmax attention among quantised tokens, pair by pair; plain softmax "
        "attention where the codewords are the tokens"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(
        bidirectional=True, state="fixed", rollback="snapshot", sight="jacobian"
    )
    heads: int = Field(4, gt=0, description="heads")
    codebooks: int = Field(4, gt=0, description="codewords that stand for a token, one of each codebook")
    codewords: int = Field(64, gt=0, description="codewords per codebook")
    assignment: Literal["hard", "soft"] = Field("hard", description="one codeword per codebook, or a mixture")
    temperature: float = Field(1.0, gt=0, description="of the softmax over similarities")
    decay: float = Field(1.0, gt=0, le=1, description="what a count keeps with every token (causal only below 1)")
    own: bool = Field(True, description="whether a token sees itself; if not, only where it is alone")
    commitment: float = Field(0.25, ge=0, description="weight of the quantisation error on the tokens")
    codebook_loss: float = Field(1.0, ge=0, description="weight of the quantisation error on the codewords")

    @classmethod
    def examples(cls) -> list[Example]:
        both = {"order": "bidirectional"}
        small = partial(cls, heads=2, codebooks=2, codewords=5)
        return [
            Example("hard", small()),
            Example("one_codebook", small(codebooks=1), compiled=True),
            Example("soft", small(assignment="soft")),
            Example("soft_decay", small(assignment="soft", decay=0.8, temperature=2.0)),
            Example("hard_both_ways", small(), both),
            # Causally without itself a second token sees one token whatever it asks, which the law of
            # causality takes for a fault; the oracle's tests hold that case to its chunks.
            Example("soft_both_ways", small(assignment="soft", own=False), both),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("one_codeword", Example("one", cls(heads=2, codebooks=3, codewords=1)), _constant)]

    def features(self, width: int) -> int:
        """Features per head."""
        return head_width(width, self.heads, settable=False)

    def rows(self, place: Place, length: int) -> Mapping[str, float]:
        return dict.fromkeys(("q", "k", "v"), self.codebooks * self.codewords)

    def build(self, place: Place) -> Lisa:
        return Lisa(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        width, each = place.width, self.features(place.width)
        books, words, heads = self.codebooks, self.codewords, self.heads
        kinds = books * words
        # codewords: the similarity folded in, queries, keys and values, the tables
        flops = 4 * linear_flops(width, width, kinds) + books * heads * words * words * (2.0 * each + 1)
        flops += linear_flops(width, width, length)
        flops += books * length * (2.0 * words * width + width)
        if self.assignment == "soft":
            flops += books * length * (words * 6 + 2.0 * words * width + 2.0 * heads * words * words)
        if place.order == "causal":
            flops += length * kinds * 2
        else:
            flops += length * kinds
        if not self.own:
            flops += 2 * length * kinds
        # per codebook and head: maximum, difference, bound, exponential, product with counts, sum; the mix
        flops += books * heads * length * (words * (6.0 + 2 * each) + each + 1 + each)
        return Cost(flops, 4.0 * kinds if place.order == "causal" else 0)


class Lisa(Mixer):
    """x [B, T, D] → [B, T, D]; its state is the histogram [B, codebooks·codewords], float32."""

    def __init__(self, settings: LisaSettings, place: Place) -> None:
        super().__init__(settings, place)
        if settings.decay < 1 and place.order == "bidirectional":
            raise UnsupportedError(
                f"'{self.kind}' forgets in one direction only", where=place.path, hint="decay: 1 for both ways"
            )
        self.heads, self.width = settings.heads, settings.features(place.width)
        self.books, self.words = settings.codebooks, settings.codewords
        self.soft, self.temperature = settings.assignment == "soft", settings.temperature
        self.decay, self.own = settings.decay, settings.own
        self.commitment, self.codebook_loss = settings.commitment, settings.codebook_loss
        self.q = place.product(place.width, place.width, "q")
        self.k = place.product(place.width, place.width, "k")
        self.v = place.product(place.width, place.width, "v")
        self.o = place.product(place.width, place.width, "o")
        self.codes = nn.Parameter(torch.empty(self.books, self.words, place.width))
        self.similarity = nn.Parameter(torch.empty(place.width, place.width))

    def reset(self, generator: torch.Generator | None) -> None:
        """Codewords whose sum has the variance of a normed token; the similarity near the inner product."""
        nn.init.normal_(self.codes, std=self.books**-0.5, generator=generator)
        nn.init.normal_(self.similarity, std=0.1 * self.similarity.shape[0] ** -0.5, generator=generator)
        self.similarity.diagonal().add_(1)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        self.accept(ctx)
        shares, error = self._encode(x, ctx)
        live = ctx.padding
        if self.order == "causal":
            counts, _ = running_histogram(shares.flatten(2), self.decay, documents=ctx.documents, live=live)
        elif ctx.documents is None:
            there = shares if live is None else shares * live[..., None, None]
            counts = there.sum(1, keepdim=True).flatten(2)
        else:
            counts, _ = running_histogram(shares.flatten(2), 1.0, documents=ctx.documents, live=live)
            counts = counts.gather(1, _ends(ctx.documents)[..., None].expand_as(counts))
        y = self._mix(shares, counts, live, x, ctx)
        if error is None:
            return y
        return attach(y, error.mean() if live is None else (error * live).sum() / live.sum().clamp(min=1), ctx)

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        if self.order == "bidirectional":
            raise UnsupportedError("a bidirectional mixer cannot be extended", where=self.path)
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        return FixedState({"counts": torch.zeros(batch, self.books * self.words, dtype=kind, device=device)})

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        assert isinstance(state, FixedState)
        shares, _ = self._encode(x, ctx)
        live = ctx.present(x)
        counts, held = running_histogram(shares.flatten(2), self.decay, state=state.tensors["counts"], live=live)
        state.put("counts", held)
        return self._mix(shares, counts, live, x, ctx)

    def _encode(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        """Each token's share of each codeword [B, T, codebooks, codewords]; in an update also the weighed
        quantisation error [B, T]."""
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        codes, rest = self.codes.to(kind), x.to(kind)
        directions = codes @ self.similarity.to(kind).t()
        straight = ctx.training is not None and not self.soft
        shares = []
        for book in range(self.books):
            if self.soft:
                share = torch.softmax(rest @ directions[book].t() / self.temperature, -1)
                word = share @ codes[book]
            else:
                # In float64 and rounded, so that how many rows a product has cannot tip a choice.
                scores = (rest.double() @ directions[book].double().t()).to(kind)
                picked = scores.argmax(-1)
                share = F.one_hot(picked, self.words).to(kind)
                word = F.embedding(picked, codes[book])
                if straight:
                    likely = torch.softmax(scores / self.temperature, -1)
                    share = share + (likely - likely.detach())
            rest = rest - word
            shares.append(share)
        error = None
        if ctx.training is not None:
            given, made = x.to(kind), x.to(kind) - rest
            error = self.codebook_loss * (given.detach() - made).square().mean(-1)
            error = error + self.commitment * (given - made.detach()).square().mean(-1)
        return torch.stack(shares, 2), error

    def _tables(self, kind: torch.dtype) -> tuple[Tensor, Tensor]:
        """Log weights between codewords [codebooks, H, W, W] and their values [codebooks, H, W, K]."""
        codes = self.codes.to(kind)
        q, k, v = (
            product(codes).unflatten(-1, (self.heads, self.width)).transpose(1, 2)
            for product in (self.q, self.k, self.v)
        )
        return q @ k.transpose(2, 3) * self.width**-0.5, v

    def _mix(self, shares: Tensor, counts: Tensor, live: Tensor | None, x: Tensor, ctx: Context) -> Tensor:
        """shares [B, T, codebooks, W] and counts [B, T or 1, codebooks·W] → y [B, T, D]."""
        counts = counts.unflatten(-1, (self.books, self.words))
        if not self.own:
            there = shares if live is None else shares * live[..., None, None]
            others = counts - there
            alone = others.sum((-1, -2), keepdim=True) <= 0  # a first token would see nothing at all
            counts = torch.where(alone, counts, others)
        if ctx.taps is not None:
            counts = ctx.taps(f"{self.path}.counts", counts)
        tables, values = self._tables(shares.dtype)
        discrete = not self.soft and ctx.training is None
        total: Tensor | None = None
        for book in range(self.books):
            table = tables[book].transpose(0, 1)  # [W, H, W]
            if discrete:
                scores = F.embedding(shares[:, :, book].argmax(-1), table.flatten(1)).unflatten(-1, table.shape[1:])
            else:
                scores = (shares[:, :, book] @ table.flatten(1)).unflatten(-1, table.shape[1:])
            seen = counts[:, :, book, None]  # [B, T or 1, 1, W]
            top = scores.detach().masked_fill(seen <= 0, EMPTY).amax(-1, keepdim=True)
            # A codeword that was not seen may lie above the maximum; its weight is 0 whatever is put here.
            weights = (scores - top).clamp(max=0).exp() * seen
            mass = weights.sum(-1, keepdim=True).clamp(min=TINY)
            mixed = (weights.to(x.dtype).transpose(1, 2) @ values[book].to(x.dtype)).transpose(1, 2)
            mixed = mixed / mass.to(x.dtype)
            total = mixed if total is None else total + mixed
        assert total is not None
        if ctx.taps is not None:
            total = ctx.taps(f"{self.path}.mixed", total)
        return self.o(total.flatten(2))  # type: ignore[no-any-return]


def _ends(documents: Tensor) -> Tensor:
    """For each token [B, T] the place of the last one of its document."""
    length = documents.shape[1]
    places = torch.arange(length, device=documents.device).expand_as(documents)
    last = torch.ones_like(documents, dtype=torch.bool)
    last[:, :-1] = documents[:, 1:] != documents[:, :-1]
    marked = torch.where(last, places, length)
    return marked.flip(1).cummin(1).values.flip(1)


def _constant(mixer: Lisa, x: Tensor, ctx: Context) -> Tensor:
    """With one codeword per codebook every token gives the same: the sum of the codewords' values."""
    y: Tensor = mixer.codes[:, 0].sum(0) @ mixer.v.weight.t() @ mixer.o.weight.t()
    return y.expand_as(x)
