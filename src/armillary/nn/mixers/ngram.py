"""Multi-head neural n-gram: each head reads a few neighbouring tokens through one product.

Loem et al. 2022, Are Neighbors Enough? Multi-Head Neural n-gram can be Alternative to Self-attention.
A head projects the tokens, joins the last n of them, itself included, and maps them to its features
through a product and a non-linearity; heads are joined and mapped back. A bidirectional one also
joins the n − 1 tokens to come. Beyond either end of a row or document neighbours are zeros. The
paper leaves the non-linearity open: ReLU, unless said otherwise. Its best models mix these heads
with attention heads: two branches, the second with `beside`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from armillary.base.errors import UnsupportedError
from armillary.nn.activation import ACTIVATIONS, Activation
from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import Capabilities, Mixer, MixerSettings, Place, head_width, mixers
from armillary.nn.state import State, WindowState


@mixers.register
class NgramSettings(MixerSettings):
    """relu(W_h [v_{t−n+1}; …; v_t]) per head, joined and mapped back."""

    kind: ClassVar[str] = "ngram"
    source: ClassVar[str] = (
        "Loem et al. 2022, Are Neighbors Enough? Multi-Head Neural n-gram can be Alternative to Self-attention"
    )
    oracle: ClassVar[str] = "tests/nn/mixers/test_ngram.py: PyTorch's grouped 1-D convolution; outputs and gradients"
    capabilities: ClassVar[Capabilities] = Capabilities(bidirectional=True, state="window", sight="jacobian")
    heads: int = Field(4, gt=0, description="heads (divides width)")
    n: int = Field(5, gt=0, description="tokens that a head joins, itself included (bidirectional: on either side)")
    activation: Activation = Field("relu", description="relu, gelu, gelu_tanh or silu")

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("published", cls(), compiled=True),
            Example("one_token", cls(n=1, heads=2)),
            Example("both_sides", cls(n=3, activation="gelu"), {"order": "bidirectional"}),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("one_token", Example("one_token", cls(n=1, heads=1)), _one_token)]

    def features(self, width: int) -> int:
        """Features per head."""
        return head_width(width, self.heads, settable=False)

    def joined(self, place: Place) -> int:
        """How many tokens a head joins."""
        return 2 * self.n - 1 if place.order == "bidirectional" else self.n

    def build(self, place: Place) -> Ngram:
        return Ngram(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        width, each = place.width, self.features(place.width)
        flops = 2 * linear_flops(width, width, length) + length * width
        flops += self.heads * linear_flops(self.joined(place) * each, each, length)
        kept = 0 if place.order == "bidirectional" else max(1, self.n - 1)
        return Cost(flops, float(kept * width * itemsize))


class Ngram(Mixer):
    """x [B, T, D] → [B, T, D]; its state are the last n − 1 projected tokens."""

    scaled = ()

    def __init__(self, settings: NgramSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.heads, self.width, self.n = settings.heads, settings.features(place.width), settings.n
        self.v = place.product(place.width, place.width, "v")
        joined = settings.joined(place) * self.width
        self.grams = nn.ModuleList(place.product(joined, self.width, "gram") for _ in range(self.heads))
        self.o = place.product(place.width, place.width, "o")
        self.activation = ACTIVATIONS[settings.activation]

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        self.accept(ctx)
        v = self._projected(x, ctx)
        if ctx.padding is not None:
            v = v.masked_fill(~ctx.padding[..., None], 0.0)
        before, after = self.n - 1, self.n - 1 if self.order == "bidirectional" else 0
        hidden = None
        if ctx.documents is not None:
            ids = F.pad(ctx.documents, (before, after)).unfold(1, before + 1 + after, 1)
            hidden = ids != ctx.documents[..., None]
        return self._mixed(F.pad(v, (0, 0, before, after)), hidden, ctx)

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        if self.order == "bidirectional":
            raise UnsupportedError("a bidirectional mixer cannot be extended", where=self.path)
        shape = (batch, 1, max(1, self.n - 1), self.heads * self.width)
        return WindowState({"v": torch.zeros(shape, dtype=dtype, device=device)})

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        assert isinstance(state, WindowState)
        held, places = state.append({"v": self._projected(x, ctx)[:, None]}, ctx.lengths)
        rows = held["v"][:, 0]
        # The ring in the order of its tokens, which the chunk follows; empty slots are zeros.
        order = places.argsort(1).expand(x.shape[0], -1)[:, state.window - self.n + 1 :]
        rows = rows.gather(1, order[..., None].expand(-1, -1, rows.shape[2]))
        return self._mixed(rows, None, ctx)

    def _projected(self, x: Tensor, ctx: Context) -> Tensor:
        v: Tensor = self.v(x)
        return v if ctx.taps is None else ctx.taps(f"{self.path}.v", v)

    def _mixed(self, rows: Tensor, hidden: Tensor | None, ctx: Context) -> Tensor:
        """rows [B, T + n − 1, D] (one window from every token on), hidden [B, T, n] → [B, T, D]."""
        joined = self.n + (self.n - 1 if self.order == "bidirectional" else 0)
        windows = rows.unflatten(-1, (self.heads, self.width)).unfold(1, joined, 1)  # [B, T, H, K, n]
        windows = windows.permute(2, 0, 1, 4, 3)
        if hidden is not None:
            windows = windows.masked_fill(hidden[..., None], 0.0)
        parts = [gram(each) for gram, each in zip(self.grams, windows.flatten(3), strict=True)]
        mixed = self.activation(torch.cat(parts, -1))
        if ctx.taps is not None:
            mixed = ctx.taps(f"{self.path}.mixed", mixed)
        return self.o(mixed)  # type: ignore[no-any-return]


def _one_token(mixer: Ngram, x: Tensor, ctx: Context) -> Tensor:
    """With n = 1 there is no neighbour: a network of its own for every token."""
    gram: Tensor = mixer.grams[0].weight  # type: ignore[assignment]
    return F.relu(x @ mixer.v.weight.t() @ gram.t()) @ mixer.o.weight.t()  # type: ignore[no-any-return]
