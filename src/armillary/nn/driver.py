"""A driver: recurrence over segments of a row. It wraps a stack, which stays as it is, and owns the state.

Segments begin at multiples of their length, counted in the tokens of a row, wherever chunks begin. A
write phase runs when the last token of a segment arrives. Rows that a driver inserts stand in no
output, at no position and on no axis of a tap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from armillary.base.errors import UnsupportedError
from armillary.base.registry import Registry
from armillary.nn.block import BlockSettings, BlockState
from armillary.nn.context import Context
from armillary.nn.cost import Cost
from armillary.nn.mechanism import Capabilities, MechanismSettings, Mixer, Place
from armillary.nn.stack import Stack, StackSettings
from armillary.nn.state import SlideState, State
from armillary.nn.taps import Taps

drivers: Registry[DriverSettings] = Registry("driver", "armillary.nn.drivers", default="transformer_xl")

_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


class DriverSettings(MechanismSettings):
    """Settings of a driver: `build` makes it for a stack, `cost` says what both take together."""

    choices: ClassVar[Registry[DriverSettings]] = drivers
    capabilities: ClassVar[Capabilities]

    def build(self, place: Place, settings: StackSettings) -> Driver:
        """place: of the stack's blocks; its parameters are named driver.…"""
        raise NotImplementedError

    def cost(self, stack: StackSettings, place: Place, length: int, itemsize: int = 2) -> Cost:
        """Forward FLOPs of driver and stack for one row of `length` tokens on the plain path, and the
        bytes of their state."""
        raise NotImplementedError

    def state_bytes(self, stack: StackSettings, place: Place, itemsize: int) -> float:
        """Bytes of one row's state, which do not depend on its tokens: read off a build without storage."""
        with torch.device("meta"):
            driver, blocks = self.build(place, stack), Stack(stack, place)
            held = driver.init_state(blocks, 1, 1, _DTYPES[itemsize], "meta")
        return float(sum(state.nbytes for block in held for state in block.values()))


class Driver(nn.Module):
    """x [B, T, D] → [B, T, D] through a stack; `init_state` gives the states of the blocks and, last, its own.

    compiles: whether `forward` calls the blocks as the stack does, so that compiling them acts.
    """

    compiles = False

    def __init__(self, settings: DriverSettings, place: Place) -> None:
        super().__init__()
        can = type(settings).capabilities
        self.kind = settings.kind
        self.path = place.path
        self.order = place.order
        if not getattr(can, place.order):
            able = [name for name in ("causal", "bidirectional", "prefix") if getattr(can, name)]
            raise UnsupportedError(
                f"the driver '{self.kind}' cannot be {place.order}",
                where=self.path or None,
                hint=f"it can be {', '.join(able)}",
            )

    def forward(self, stack: Stack, x: Tensor, ctx: Context) -> Tensor:
        raise NotImplementedError

    def init_state(
        self, stack: Stack, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str
    ) -> list[BlockState]:
        raise UnsupportedError(f"the driver '{self.kind}' has no state here: it cannot be extended")

    def extend(self, stack: Stack, x: Tensor, states: list[BlockState], ctx: Context) -> Tensor:
        """The next chunk [B, T ≥ 1, D] of every row; the states move on in place."""
        raise UnsupportedError(f"the driver '{self.kind}' cannot be extended here")

    def stacks(self) -> list[Stack]:
        """Stacks of its own, to be compiled and recomputed like the one it drives."""
        return []

    def accept(self, ctx: Context, *, extending: bool = False) -> None:
        """Refuse what no driver can honour; called first by `forward` and `extend`."""
        if ctx.documents is not None:
            raise UnsupportedError(
                f"the driver '{self.kind}' cannot keep packed documents apart",
                where=self.path or None,
                hint="set data.isolate: false, or give each document a row of its own",
            )
        if ctx.mask is not None:
            raise UnsupportedError(f"the driver '{self.kind}' takes no mask from the objective")
        if ctx.side:
            raise UnsupportedError(f"the driver '{self.kind}' takes no side tensors ({', '.join(ctx.side)})")
        if ctx.memory is not None:
            raise UnsupportedError(f"the driver '{self.kind}' drives no decoder that looks at an encoder")
        if extending and ctx.padding is not None:
            raise UnsupportedError("extend takes no padding", hint="rows of one batch are ragged by `lengths`")
        if not extending and ctx.lengths is not None:
            raise UnsupportedError("forward takes no lengths", hint="use `padding`")


class Segmented(Driver):
    """A causal driver that goes through its rows piece by piece, no piece crossing a segment's end.

    A class says what a piece does (`piece`) and, where a segment ends, what is written (`end`). The
    state it returns from `init_state` ends with {"driver": Turn}.
    """

    segment: int

    def piece(self, stack: Stack, x: Tensor, states: list[BlockState], ctx: Context) -> Tensor:
        """Tokens [B, n, D] of one segment of each row; ctx.lengths as in `extend`."""
        raise NotImplementedError

    def end(self, stack: Stack, states: list[BlockState], ctx: Context, rows: Tensor | None) -> None:
        """The segment of the given rows [B] bool (None: of all) is complete; ctx.positions [B or 1, 1] is
        that of its last token."""

    def begun(self, stack: Stack, batch: int, x: Tensor) -> list[BlockState]:
        """States for a whole row, where every piece but the last is a whole segment."""
        return self.init_state(stack, batch, x.shape[1], x.dtype, x.device)

    def forward(self, stack: Stack, x: Tensor, ctx: Context) -> Tensor:
        self.accept(ctx)
        if ctx.padding is not None:
            return padded_left_out(self, stack, x, ctx)
        states = self.begun(stack, x.shape[0], x)
        if not (stack.recompute and torch.is_grad_enabled()):
            return self._uniform(stack, x, states, ctx, 0, close=False)
        pieces, count = [], x.shape[1]
        for start in range(0, count, self.segment):
            stop = min(count, start + self.segment)
            here = _at(ctx, x, start, stop)
            pieces.append(self._again(stack, x[:, start:stop], states, here, close=stop < count))
        return torch.cat(pieces, 1)

    def extend(self, stack: Stack, x: Tensor, states: list[BlockState], ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        turn = states[-1]["driver"]
        assert isinstance(turn, Turn)
        lengths = ctx.lengths
        if lengths is not None and turn.uniform is not None and bool((lengths == x.shape[1]).all()):
            lengths = None
        if lengths is None and turn.uniform is not None:
            return self._uniform(stack, x, states, ctx.replace(lengths=None), turn.uniform % self.segment)
        return self._ragged(stack, x, states, ctx, turn, lengths)

    def _uniform(
        self, stack: Stack, x: Tensor, states: list[BlockState], ctx: Context, offset: int, close: bool = True
    ) -> Tensor:
        """All rows stand `offset` tokens into their segments; close: whether a segment that ends with the
        last token is written (in `forward` nothing comes after it)."""
        pieces, start, count = [], 0, x.shape[1]
        turn = states[-1]["driver"]
        assert isinstance(turn, Turn)
        while start < count:
            stop = min(count, start + self.segment - offset)
            here = _at(ctx, x, start, stop)
            pieces.append(self.piece(stack, x[:, start:stop], states, here))
            turn.move(stop - start)
            if offset + stop - start == self.segment and (close or stop < count):
                self.end(stack, states, here.replace(positions=here.where(x)[:, -1:]), None)
            start, offset = stop, 0
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

    def _ragged(
        self, stack: Stack, x: Tensor, states: list[BlockState], ctx: Context, turn: Turn, lengths: Tensor | None
    ) -> Tensor:
        """Rows stand at different places of their segments: in each round every row goes on to the end of
        its segment or of its chunk."""
        batch, count = x.shape[:2]
        left = torch.full((batch,), count, device=x.device) if lengths is None else lengths.to(x.device).clone()
        done = torch.zeros_like(left)
        positions = ctx.where(x).expand(batch, -1)
        out = torch.zeros_like(x)
        while bool((left > 0).any()):
            offset = turn.tensors["seen"] % self.segment
            take = torch.minimum(self.segment - offset, left)
            steps = torch.arange(int(take.max()), device=x.device)
            places = (done[:, None] + steps).clamp(max=count - 1)
            valid = steps < take[:, None]
            ids = None if ctx.ids is None else ctx.ids.gather(1, places)
            here = ctx.replace(positions=positions.gather(1, places), ids=ids, lengths=take)
            wide = places[..., None].expand(-1, -1, x.shape[2])
            y = self.piece(stack, x.gather(1, wide), states, here)
            rows, columns = valid.nonzero(as_tuple=True)
            out = out.index_put((rows, places[rows, columns]), y[rows, columns])
            turn.move(take)
            ends = (offset + take == self.segment) & (take > 0)
            if bool(ends.any()):
                last = positions.gather(1, (done + take - 1).clamp(min=0)[:, None])
                self.end(stack, states, here.replace(positions=last, lengths=None), ends)
            left, done = left - take, done + take
        return out

    def _again(self, stack: Stack, x: Tensor, states: list[BlockState], ctx: Context, close: bool) -> Tensor:
        """A segment whose insides the backward pass computes again; the states go in and out as tensors."""
        outer = [state for block in states for state in block.values()]
        names = [(index, name) for index, state in enumerate(outer) for name in state.tensors]

        def run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            copies = [state._with({}) for state in outer]
            for (index, name), tensor in zip(names, tensors, strict=True):
                copies[index].tensors[name] = tensor
            left = iter(copies)
            inner = [{key: next(left) for key in block} for block in states]
            y = self._uniform(stack, x, inner, ctx, 0, close)
            return (y, *(copies[index].tensors[name] for index, name in names))

        y, *after = checkpoint(run, x, *(outer[index].tensors[name] for index, name in names), use_reentrant=False)
        for (index, name), tensor in zip(names, after, strict=True):
            outer[index].tensors[name] = tensor
        return y  # type: ignore[no-any-return]


class Turn(State):
    """Where each row stands: "seen" [B] tokens so far, and whatever else a driver carries.

    `uniform` is the common value of `seen` as a Python number, or None once rows differ.
    """

    kind: ClassVar[str] = "window"

    def __init__(self, batch: int, device: torch.device | str, **tensors: Tensor) -> None:
        super().__init__({"seen": torch.zeros(batch, dtype=torch.int64, device=device), **tensors})
        self.uniform: int | None = 0

    def move(self, count: int | Tensor) -> None:
        """So many tokens further (one number, or [B])."""
        self.put("seen", self.tensors["seen"] + count)
        self.uniform = self.uniform + count if isinstance(count, int) and self.uniform is not None else None

    def put(self, name: str, value: Tensor) -> None:
        if torch.is_grad_enabled():
            self.tensors[name] = value
        else:
            self.tensors[name].copy_(value)

    def select(self, rows: Tensor) -> Self:
        return super().select(rows)._counted()

    def rows(self, first: int, count: int) -> Self:
        return super().rows(first, count)._counted()

    def absorb(self, first: int, part: Self) -> None:
        super().absorb(first, part)
        self._counted()

    @classmethod
    def join(cls, states: Sequence[Self]) -> Self:
        return super().join(states)._counted()

    def restore(self, snapshot: Self) -> None:
        super().restore(snapshot)
        self._counted()

    def _counted(self) -> Self:
        seen = self.tensors["seen"]
        self.uniform = int(seen[0]) if bool((seen == seen[0]).all()) else None
        return self


@dataclass(frozen=True)
class Window:
    """What the driven mixers of a layer hold: `rows` tokens, of which a token sees its own segment and
    `memory` before it; detached: without gradient to them."""

    rows: int
    segment: int
    memory: int
    detached: bool = False


def driven(stack: Stack, kind: str) -> None:
    """Raise unless every mixer of the stack lets a driver decide what it sees."""
    for mixer in mixers_of(stack):
        if not mixer.capabilities.driven:
            raise UnsupportedError(
                f"the driver '{kind}' cannot drive '{mixer.kind}'",
                where=mixer.path,
                hint="it drives mixers that keep keys and values of tokens, such as attention",
            )


def mixers_of(stack: Stack) -> Iterator[Mixer]:
    for module in stack.modules():
        if isinstance(module, Mixer):
            yield module


def slide(held: BlockState, window: Window, make: type[SlideState] = SlideState) -> BlockState:
    """A block's states with every span (keys and values) turned into a window that slides."""
    return {
        name: make(state.tensors, window.segment, window.memory, window.detached) if state.kind == "span" else state
        for name, state in held.items()
    }


def pair_flops(block: BlockSettings, place: Place, queries: int, keys: int) -> float:
    """FLOPs of a block whose `queries` tokens look at `keys` each: what a block declares for whole
    sequences is a part per token and a part per pair."""
    once, twice = (block.cost(place, count).flops for count in (queries, 2 * queries))
    return once + (twice - 2 * once) / (2 * queries) * (keys - queries)


def padded_left_out(driver: Driver, stack: Stack, x: Tensor, ctx: Context) -> Tensor:
    """`forward` with padding: the real tokens of each row move to its beginning and back; what then
    stands behind them can change nothing before it."""
    assert ctx.padding is not None
    order = torch.argsort(ctx.padding.logical_not().long(), dim=1, stable=True)
    wide = order[..., None].expand(-1, -1, x.shape[2])
    positions = ctx.where(x).expand(x.shape[0], -1).gather(1, order)
    ids = None if ctx.ids is None else ctx.ids.gather(1, order)
    y: Tensor = driver(stack, x.gather(1, wide), ctx.replace(padding=None, positions=positions, ids=ids))
    return torch.zeros_like(y).scatter(1, wide, y)


class TokensOnly(Taps):
    """Taps that see the tokens of a call and none of the rows that a driver put around them.

    before, after: inserted rows on the time axis (and on the keys of weights); keys: inserted keys in
    front of weights alone, where only queries are tokens.
    """

    def __init__(self, taps: Taps, before: int = 0, after: int = 0, keys: int = 0) -> None:
        super().__init__()
        self.taps, self.before, self.after, self.keys = taps, before, after, keys

    def watches(self, name: str) -> bool:
        return self.taps.watches(name)

    def edited(self, name: str) -> bool:
        return self.taps.edited(name)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        part = self._cut(name, value)
        changed = self.taps(name, part)
        if changed is part:
            return value
        whole = value.clone()
        self._cut(name, whole).copy_(changed)
        return whole

    def lazy(self, name: str, make: Callable[[], Tensor]) -> None:
        self.taps.lazy(name, lambda: self._cut(name, make()))

    def _cut(self, name: str, value: Tensor) -> Tensor:
        if name.endswith(".weights"):
            value = value.narrow(2, self.before, value.shape[2] - self.before - self.after)
            return value.narrow(3, self.before + self.keys, value.shape[3] - self.before - self.after - self.keys)
        return value.narrow(1, self.before, value.shape[1] - self.before - self.after)


def _at(ctx: Context, x: Tensor, start: int, stop: int) -> Context:
    """The context of some columns of a chunk."""
    ids = None if ctx.ids is None else ctx.ids[:, start:stop]
    return ctx.replace(positions=ctx.where(x)[:, start:stop], ids=ids)
