"""AttentionRNN: a mask over tokens that is predicted one after another, each from those before it.

Khandelwal & Sigal 2019, AttentionRNN: A Structured Spatial Attention Mechanism, on a row of text in
place of an image. A value of the mask comes from the token's features and from an LSTM that has read
the values predicted so far: a_t = σ(W x_t + U h_t), h_t = LSTM(a_{t−1}, h_{t−1}); the result is
a_t ⊙ v_t, one value per head. Causally it is one scan; both ways there are two, of parameters of their
own, and the mask is the mean of theirs. The scan runs token by token, in training too. Left open by
the paper for text and chosen here: products for values and output as in other mixers, and σ, since a
softmax over positions would look ahead.
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
from armillary.nn.mechanism import Capabilities, Mixer, MixerSettings, Place, head_width, mixers
from armillary.nn.ops.recurrent import begins, lstm_step, where_rows
from armillary.nn.state import FixedState, State


@mixers.register
class AttentionRNNSettings(MixerSettings):
    """a_t ⊙ v_t with a_t = σ(W x_t + U h_t), h an LSTM over the mask so far."""

    kind: ClassVar[str] = "attention_rnn"
    source: ClassVar[str] = "Khandelwal & Sigal 2019, AttentionRNN: A Structured Spatial Attention Mechanism"
    oracle: ClassVar[str] = "tests/nn/mixers/test_attention_rnn.py: a loop over PyTorch's LSTM cell; outputs, gradients"
    capabilities: ClassVar[Capabilities] = Capabilities(bidirectional=True, state="fixed", sight="jacobian")
    heads: int = Field(4, gt=0, description="values of the mask per token, each for its share of the features")
    hidden: int = Field(32, gt=0, description="features of the LSTM")

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("forward", cls(hidden=6)),
            Example("both_ways", cls(heads=2, hidden=5), {"order": "bidirectional"}),
        ]

    def features(self, width: int) -> int:
        """Features per head."""
        return head_width(width, self.heads, settable=False)

    def build(self, place: Place) -> AttentionRNN:
        return AttentionRNN(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        width, hidden, heads = place.width, self.hidden, self.heads
        scan = linear_flops(width, heads, length, True) + linear_flops(hidden, heads, length)
        scan += linear_flops(heads + hidden, 4 * hidden, length, True)
        scan += length * (9.0 * hidden + 2 * heads)  # gates and state of the cell, sum and σ of the mask
        flops = 2 * linear_flops(width, width, length) + length * width
        if place.order == "bidirectional":
            return Cost(flops + 2 * scan + 2.0 * length * heads)
        return Cost(flops + scan, max(4, itemsize) * (2.0 * hidden + heads))


class Scan(nn.Module):
    """The mask of a row in one direction: x [B, T, D] → [B, T, H]."""

    def __init__(self, settings: AttentionRNNSettings, place: Place) -> None:
        super().__init__()
        heads, hidden = settings.heads, settings.hidden
        self.local = place.product(place.width, heads, "mask", True)
        self.read = place.product(hidden, heads, "mask")
        self.cell = place.product(heads + hidden, 4 * hidden, "cell", True)  # gates: in, forget, new, out

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...], start: Tensor | None, valid: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """state: h, c [B, R] and the value before [B, H], in float32; start: [B, T], tokens that begin anew;
        valid: [B, T], tokens that are there. Returns the mask in the state's dtype, and the state."""
        local = self.local(x).to(state[0].dtype)
        rows = []
        for t in range(x.shape[1]):
            if start is not None:
                state = where_rows(start[:, t], tuple(torch.zeros_like(part) for part in state), state)
            h, c, before = state
            h, c = lstm_step(self.cell(torch.cat([before, h], -1)), c)
            value = torch.sigmoid(local[:, t] + self.read(h))
            rows.append(value)
            after = (h, c, value)
            state = after if valid is None else where_rows(valid[:, t], after, state)
        return torch.stack(rows, 1), state


class AttentionRNN(Mixer):
    """x [B, T, D] → [B, T, D]; its state is the LSTM's, and the last value of the mask."""

    scaled = ()

    def __init__(self, settings: AttentionRNNSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.heads, self.hidden, self.width = settings.heads, settings.hidden, settings.features(place.width)
        self.v = place.product(place.width, place.width, "v")
        self.o = place.product(place.width, place.width, "o")
        self.ahead = Scan(settings, place)
        self.back = Scan(settings, place) if place.order == "bidirectional" else None

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        self.accept(ctx)
        mask = self._scanned(self.ahead, x, ctx.documents, ctx.padding)
        if self.back is not None:
            documents, padding = (None if t is None else t.flip(1) for t in (ctx.documents, ctx.padding))
            mask = (mask + self._scanned(self.back, x.flip(1), documents, padding).flip(1)) * 0.5
        return self._masked(x, mask, ctx)

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        if self.order == "bidirectional":
            raise UnsupportedError("a bidirectional mixer cannot be extended", where=self.path)
        return FixedState(dict(zip(("h", "c", "before"), self._blank(batch, dtype, device), strict=True)))

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        assert isinstance(state, FixedState)
        valid = ctx.present(x)
        h, c, before = (state.tensors[name] for name in ("h", "c", "before"))
        mask, after = self.ahead(x, (h, c, before), None, valid)
        for name, value in zip(("h", "c", "before"), after, strict=True):
            state.put(name, value)
        return self._masked(x, mask, ctx)

    def _scanned(self, scan: nn.Module, x: Tensor, documents: Tensor | None, padding: Tensor | None) -> Tensor:
        start = None if documents is None else begins(documents, padding)
        mask: Tensor = scan(x, self._blank(x.shape[0], x.dtype, x.device), start, padding)[0]
        return mask

    def _blank(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        h, c = (torch.zeros(batch, self.hidden, dtype=wide, device=device) for _ in range(2))
        return h, c, torch.zeros(batch, self.heads, dtype=wide, device=device)

    def _masked(self, x: Tensor, mask: Tensor, ctx: Context) -> Tensor:
        v = self.v(x).unflatten(-1, (self.heads, self.width))
        mask = mask.to(v.dtype)
        if ctx.taps is not None:
            mask, v = ctx.taps(f"{self.path}.mask", mask), ctx.taps(f"{self.path}.v", v)
        mixed = mask[..., None] * v
        if ctx.taps is not None:
            mixed = ctx.taps(f"{self.path}.mixed", mixed)
        return self.o(mixed.flatten(2))  # type: ignore[no-any-return]
