"""Memory tokens: learned rows beside the tokens, in which a network keeps what it needs of the whole.

In an encoder (Burtsev et al. 2020, Memory Transformer) they stand in front of the sequence and are
left out of the result. `control`: a stack of its own moves them before the tokens look (MemCtrl).
`bottleneck`: tokens look at nothing but them (MemBottleneck). In a decoder they are a recurrence over
segments (Bulatov, Kuratov & Burtsev 2022, Recurrent Memory Transformer): the memory is read in front
of a segment and written behind it, by rows that see the segment, and goes on to the next.

Where the papers leave things open: tokens stand at positions counted from the beginning of their
segment, the rows that are read at that of its first token, those written at that of its last; and the
memory has unit root mean square when it is handed on, as the final norm of the published model gives.
Gradients flow through all segments of a training window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from armillary.base.errors import UnsupportedError
from armillary.nn.block import BlockState
from armillary.nn.context import Context
from armillary.nn.cost import Cost
from armillary.nn.driver import DriverSettings, Segmented, TokensOnly, Turn, drivers, padded_left_out
from armillary.nn.example import Example
from armillary.nn.mask import Mask
from armillary.nn.mechanism import Capabilities, Place
from armillary.nn.stack import Stack, StackSettings
from armillary.nn.state import State


@drivers.register
class MemoryTokensSettings(DriverSettings):
    """So many learned rows, in front of a sequence or handed on from segment to segment."""

    kind: ClassVar[str] = "memory_tokens"
    source: ClassVar[str] = (
        "Burtsev et al. 2020, Memory Transformer; Bulatov, Kuratov & Burtsev 2022, Recurrent Memory Transformer"
    )
    oracle: ClassVar[str] = (
        "tests/nn/drivers/test_memory_tokens.py: the recurrence written out over calls of the plain stack; the plain "
        "stack itself without memory"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(
        bidirectional=True, packed=False, state="window", sight="jacobian"
    )
    tokens: int = Field(16, ge=0, description="rows of memory")
    segment: int = Field(128, gt=0, description="tokens between two writes (decoders)")
    control: bool = Field(False, description="the memory has blocks of its own (encoders)")
    bottleneck: bool = Field(False, description="tokens see the memory only (encoders)")

    @classmethod
    def examples(cls) -> list[Example]:
        few, both_ways = cls(tokens=2, segment=4), {"order": "bidirectional"}
        return [
            Example("recurrent", few),
            Example("in_front", cls(tokens=3), both_ways),
            Example("control", cls(tokens=2, control=True), both_ways),
        ]

    def build(self, place: Place, settings: StackSettings) -> MemoryTokens:
        return MemoryTokens(self, place, settings)

    def cost(self, stack: StackSettings, place: Place, length: int, itemsize: int = 2) -> Cost:
        def flops_of(count: int) -> float:  # of the stack alone, where `stack` is a whole model's settings
            return StackSettings.cost(stack, place, count, itemsize).flops

        if place.order == "bidirectional":
            return Cost(flops_of(length + self.tokens) * (2 if self.control else 1))
        flops = 0.0
        for begin in range(0, length, self.segment):
            count = min(self.segment, length - begin)
            writes = begin + count < length
            flops += flops_of(self.tokens * (2 if writes else 1) + count)
            flops += 4.0 * self.tokens * place.width if writes else 0.0
        return Cost(flops, self.state_bytes(stack, place, itemsize))


@dataclass(frozen=True)
class Bottleneck(Mask):
    """The first `memory` rows see everything, the others only those."""

    memory: int

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        return ((q[:, None] < self.memory) | (k[None] < self.memory))[None, None]


class MemoryTokens(Segmented):
    """The memory at the start, [m, D]; in a decoder the state is that of the stack within one segment,
    with room for segment + 2m rows, and the memory [B, m, D]."""

    compiles = True

    def __init__(self, settings: MemoryTokensSettings, place: Place, stack: StackSettings) -> None:
        super().__init__(settings, place)
        self.tokens, self.segment = settings.tokens, settings.segment
        self.bottleneck = settings.bottleneck
        for name in ("control", "bottleneck"):
            if getattr(settings, name) and self.order != "bidirectional":
                raise UnsupportedError(
                    f"'{name}' is for encoders: a decoder writes its memory once for each segment",
                    where="model.driver",
                    hint=f"leave {name} out, or set form: encoder",
                )
        if settings.bottleneck and not settings.tokens:
            raise UnsupportedError("tokens that see nothing but the memory need some", where="model.driver.tokens")
        self.memory = nn.Parameter(torch.empty(self.tokens, place.width)) if self.tokens else None
        self.control = Stack(stack, place.at("driver.control")) if settings.control else None

    def reset(self, generator: torch.Generator | None) -> None:
        if self.memory is not None:
            nn.init.normal_(self.memory, generator=generator)

    def stacks(self) -> list[Stack]:
        return [] if self.control is None else [self.control]

    def forward(self, stack: Stack, x: Tensor, ctx: Context) -> Tensor:
        if self.order == "bidirectional":
            return self._in_front(stack, x, ctx)
        self.accept(ctx)
        if ctx.padding is not None:
            return padded_left_out(self, stack, x, ctx)
        memory, where, pieces = self._first(x.shape[0], x.dtype), ctx.where(x), []
        for start in range(0, x.shape[1], self.segment):
            part = x[:, start : start + self.segment]
            here = where[:, start : start + self.segment] - where[:, start : start + 1]
            writes = start + self.segment < x.shape[1]
            if memory is None:
                pieces.append(stack(part, ctx.replace(positions=here, ids=None)))
                continue
            y = self._segment(stack, memory, part, here, writes, ctx)
            pieces.append(y[:, self.tokens : self.tokens + part.shape[1]])
            if writes:
                memory = _handed_on(y[:, -self.tokens :])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

    def _segment(self, stack: Stack, memory: Tensor, part: Tensor, where: Tensor, writes: bool, ctx: Context) -> Tensor:
        """Memory, tokens, and the rows to write, in one call of the stack."""
        after = self.tokens if writes else 0
        rows = [memory, part, memory] if writes else [memory, part]
        places = [torch.zeros_like(where[:, :1]).expand(-1, self.tokens), where, where[:, -1:].expand(-1, after)]
        taps = None if ctx.taps is None else TokensOnly(ctx.taps, self.tokens, after)
        inner = ctx.replace(positions=torch.cat(places, 1), ids=None, taps=taps)
        return stack(torch.cat(rows, 1), inner)  # type: ignore[no-any-return]

    def _in_front(self, stack: Stack, x: Tensor, ctx: Context) -> Tensor:
        self.accept(ctx)
        memory, count = self._first(x.shape[0], x.dtype), self.tokens
        if memory is None:
            return stack(x, ctx)  # type: ignore[no-any-return]
        where = ctx.where(x)
        inner = ctx.replace(
            positions=torch.cat([torch.zeros_like(where[:, :1]).expand(-1, count), where], 1),
            padding=None if ctx.padding is None else F.pad(ctx.padding, (count, 0), value=True),
            mask=Bottleneck(count) if self.bottleneck else None,
            ids=None,
            taps=None if ctx.taps is None else TokensOnly(ctx.taps, count),
        )
        x = torch.cat([memory, x], 1)
        if self.control is None:
            return stack(x, inner)[:, count:]  # type: ignore[no-any-return]
        own = inner.replace(taps=None)
        for block, control in zip(stack, self.control, strict=True):
            moved = self.control.step(control, x, own)[:, :count]
            x = torch.cat([moved, stack.step(block, torch.cat([moved, x[:, count:]], 1), inner)[:, count:]], 1)
        return x[:, count:]

    # -- chunks

    def init_state(
        self, stack: Stack, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str
    ) -> list[BlockState]:
        if self.order == "bidirectional":
            raise UnsupportedError("an encoder sees whole sequences: it has no state", hint="call the model instead")
        blocks = self._fresh(stack, batch, dtype, device)
        memory = self._first(batch, dtype)
        origin = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        turn = Turn(batch, device, origin=origin, **({} if memory is None else {"memory": memory.clone()}))
        return [*blocks, {"driver": turn}]

    def piece(self, stack: Stack, x: Tensor, states: list[BlockState], ctx: Context) -> Tensor:
        turn = states[-1]["driver"]
        assert isinstance(turn, Turn)
        where = ctx.where(x).expand(x.shape[0], -1)
        if ctx.lengths is None and turn.uniform is not None:
            if turn.uniform % self.segment == 0:
                self._begin(stack, x, states, turn, where[:, :1], None)
        else:
            begins = turn.tensors["seen"] % self.segment == 0
            if ctx.lengths is not None:
                begins = begins & (ctx.lengths > 0)
            if bool(begins.any()):
                self._begin(stack, x, states, turn, where[:, :1], begins)
        taps = None if ctx.taps is None else TokensOnly(ctx.taps, keys=self.tokens)
        inner = ctx.replace(positions=where - turn.tensors["origin"], ids=None, taps=taps)
        return stack.extend(x, states[:-1], inner)

    def end(self, stack: Stack, states: list[BlockState], ctx: Context, rows: Tensor | None) -> None:
        turn = states[-1]["driver"]
        assert isinstance(turn, Turn) and ctx.positions is not None
        if not self.tokens:
            return
        memory = turn.tensors["memory"]
        last = (ctx.positions - turn.tensors["origin"]).expand(-1, self.tokens)
        new = _handed_on(stack.extend(memory, states[:-1], self._inner(ctx, last, rows)))
        turn.put("memory", new if rows is None else torch.where(rows[:, None, None], new, memory))

    def _begin(
        self, stack: Stack, x: Tensor, states: list[BlockState], turn: Turn, where: Tensor, rows: Tensor | None
    ) -> None:
        """A segment begins in the given rows (None: in all): an empty state, into which the memory is read."""
        fresh = self._fresh(stack, x.shape[0], x.dtype, x.device)
        for new, old in zip(fresh, states, strict=False):
            for name, state in old.items():
                old[name] = _renewed(state, new[name], rows)
        turn.put("origin", where if rows is None else torch.where(rows[:, None], where, turn.tensors["origin"]))
        if self.tokens:
            zeros = torch.zeros_like(where).expand(-1, self.tokens)
            stack.extend(turn.tensors["memory"], states[:-1], self._inner(Context(), zeros, rows))

    def _inner(self, ctx: Context, positions: Tensor, rows: Tensor | None) -> Context:
        lengths = None if rows is None else rows.long() * self.tokens
        return Context(positions=positions, lengths=lengths, training=ctx.training)

    def _fresh(self, stack: Stack, batch: int, dtype: torch.dtype, device: torch.device | str) -> list[BlockState]:
        return stack.init_state(batch, self.segment + 2 * self.tokens, dtype, device)

    def _first(self, batch: int, dtype: torch.dtype) -> Tensor | None:
        return None if self.memory is None else self.memory.to(dtype).expand(batch, -1, -1)


def _handed_on(rows: Tensor) -> Tensor:
    return F.rms_norm(rows, rows.shape[-1:])


def _renewed(state: State, fresh: State, rows: Tensor | None) -> State:
    """A state of which the given rows (None: all) begin anew; without gradients in the storage that it has."""
    storage = state.tensors
    if rows is not None:
        steps = torch.arange(len(rows), device=rows.device)
        fresh = type(state).join([state, fresh]).select(steps + len(rows) * rows.long())
    if not torch.is_grad_enabled():
        fresh.tensors = {name: storage[name].copy_(tensor) for name, tensor in fresh.tensors.items()}
    return fresh
