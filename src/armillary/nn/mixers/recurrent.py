"""What `rnn`, `lstm` and `gru` share: a state that reads one token after another, h_t = cell(W x_t, U h_{t−1}).

The products of the inputs are one product over all tokens; only that of the state goes token by token.
Both ways there are two scans of parameters of their own, and the output product reads both states. The
recurrence runs in float32 or wider, whatever type activations have. A residual block stands around a
mixer, so the output passes a product to the width of the stream.
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
from armillary.nn.linear import Linear
from armillary.nn.mechanism import Capabilities, Mixer, MixerSettings, Place
from armillary.nn.ops import plain
from armillary.nn.ops.recurrent import GATES, WORK, CellKind, begins, fused_lstm, has_fused_lstm, recur, recur_plain
from armillary.nn.state import FixedState, State
from armillary.nn.steps.recurrent import cell, sums, take
from armillary.nn.tape import Buffer, Tape, record


class RecurrentSettings(MixerSettings):
    """The settings that they share."""

    capabilities: ClassVar[Capabilities] = Capabilities(bidirectional=True, state="fixed", sight="jacobian")
    hidden: int | None = Field(None, gt=0, description="features of the state; by default the width")

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("forward", cls(hidden=12)),
            Example("both_ways", cls(hidden=6), {"order": "bidirectional"}),
        ]

    @property
    def cell(self) -> CellKind:
        raise NotImplementedError

    def build(self, place: Place) -> Recurrent:
        return Recurrent(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        size, gates = self.hidden or place.width, GATES[self.cell]
        ways = 2 if place.order == "bidirectional" else 1
        scan = linear_flops(place.width, gates * size, length, True) + WORK[self.cell] * float(length * size)
        scan += linear_flops(size, gates * size, length, self.cell == "gru")
        flops = ways * scan + linear_flops(ways * size, place.width, length)
        return Cost(flops, max(4, itemsize) * float(size * len(parts(self.cell))) if ways == 1 else 0)


def parts(cell: CellKind) -> tuple[str, ...]:
    """The tensors of a state."""
    return ("h", "c") if cell == "lstm" else ("h",)


class Scan(nn.Module):
    """One direction: x [B, T, D] → h [B, T, R] in the dtype of the state, and the state after the last token."""

    def __init__(self, settings: RecurrentSettings, place: Place, forget: float) -> None:
        super().__init__()
        self.cell, self.forget = settings.cell, forget
        self.size, gates = settings.hidden or place.width, GATES[settings.cell]
        self.inputs = place.product(place.width, gates * self.size, "cell")
        self.bias = nn.Parameter(torch.empty(gates * self.size))
        # the biases of a sum are one; in a GRU the reset gate acts on that of the state
        self.held = place.product(self.size, gates * self.size, "cell", settings.cell == "gru")

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.bias)

    def blank(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, ...]:
        wide = torch.promote_types(dtype, torch.float32)
        return tuple(torch.zeros(batch, self.size, dtype=wide, device=device) for _ in parts(self.cell))

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...], start: Tensor | None, valid: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """start: [B, T], tokens that find the state at 0; valid: [B, T], tokens that are there."""
        wide = state[0].dtype
        bias = self.biases(wide)
        direct = not plain() and type(self.held) is Linear
        alone = x.shape[1] == 1 and not torch.is_grad_enabled()  # decoding: the product of few rows is quicker
        if direct and not alone and self._fuses(x.to(wide), start, valid):
            weights = [self.inputs.weight.to(wide), self.held.weight.to(wide), bias, torch.zeros_like(bias)]
            return fused_lstm(x.to(wide), weights, state)
        found = self.inputs(x).to(wide) + bias
        if alone or not direct:
            return recur_plain(self.cell, found, self.held, state, start, valid)
        own = None if self.held.bias is None else self.held.bias.to(wide)
        return recur(self.cell, found, self.held.weight.to(wide), own, state, start, valid)

    def biases(self, dtype: torch.dtype) -> Tensor:
        bias = self.bias.to(dtype)
        if self.forget:
            offset = torch.tensor([0.0, self.forget, 0.0, 0.0], dtype=dtype, device=bias.device)
            bias = bias + offset.repeat_interleave(self.size)
        return bias

    def _fuses(self, x: Tensor, start: Tensor | None, valid: Tensor | None) -> bool:
        dense = self.cell == "lstm" and type(self.inputs) is Linear
        return dense and start is None and valid is None and has_fused_lstm(x)


class Recurrent(Mixer):
    """x [B, T, D] → [B, T, D]."""

    scaled = ()

    def __init__(self, settings: RecurrentSettings, place: Place, forget: float = 0.0) -> None:
        super().__init__(settings, place)
        self.ahead = Scan(settings, place, forget)
        self.back = Scan(settings, place, forget) if place.order == "bidirectional" else None
        ways = 1 if self.back is None else 2
        self.o = place.product(ways * self.ahead.size, place.width, "o")

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        self.accept(ctx)
        mixed = self._scanned(self.ahead, x, ctx.documents, ctx.padding)
        if self.back is not None:
            documents, padding = (None if t is None else t.flip(1) for t in (ctx.documents, ctx.padding))
            mixed = torch.cat([mixed, self._scanned(self.back, x.flip(1), documents, padding).flip(1)], -1)
        return self._finished(mixed, x, ctx)

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        if self.back is not None:
            raise UnsupportedError("a bidirectional mixer cannot be extended", where=self.path)
        names = parts(self.ahead.cell)
        return FixedState(dict(zip(names, self.ahead.blank(batch, dtype, device), strict=True)))

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        assert isinstance(state, FixedState)
        valid = ctx.present(x)
        names = parts(self.ahead.cell)
        mixed, after = self.ahead(x, tuple(state.tensors[name] for name in names), None, valid)
        for name, value in zip(names, after, strict=True):
            state.put(name, value)
        return self._finished(mixed, x, ctx)

    def record(self, tape: Tape, x: Buffer, state: State) -> Buffer:
        scan = self.ahead
        h, *c = sums(tape, state, *parts(scan.cell))
        held = record(scan.held, tape, take(tape, h))
        found = record(scan.inputs, tape, x)
        mixed = cell(tape, scan.cell, found, held, scan.biases(torch.float32), h, c[0] if c else None)
        return record(self.o, tape, mixed)  # type: ignore[no-any-return]

    def _scanned(self, scan: Scan, x: Tensor, documents: Tensor | None, padding: Tensor | None) -> Tensor:
        start = None if documents is None else begins(documents, padding)
        mixed: Tensor = scan(x, scan.blank(x.shape[0], x.dtype, x.device), start, padding)[0]
        return mixed

    def _finished(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        mixed = mixed.to(x.dtype)
        if ctx.taps is not None:
            mixed = ctx.taps(f"{self.path}.mixed", mixed)
        return self.o(mixed)  # type: ignore[no-any-return]
