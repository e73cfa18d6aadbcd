"""The decoding step of a network as a tape of native calls over fixed buffers.

Modules that have a native step write it down with `record(tape, …)`, in their own files; what has none
raises `NoStep`, and the branch that it belongs to runs as it is between two stretches of the tape. A
tape is written once and serves any rows of the states: which rows take a step, with how many tokens
each, is data of the call. A token is a row of every buffer; the tokens of one sequence stand in order.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from ctypes import addressof
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from armillary.native.choice import Row, Rows
from armillary.native.pack import KINDS, Kind
from armillary.native.tape import (
    ACTIVATIONS,
    Ahead,
    Call,
    Code,
    Memory,
    Program,
    Record,
    Weights,
    attend_floats,
    lay_out,
    tiles,
)
from armillary.nn.activation import ACTIVATIONS as FUNCTIONS
from armillary.nn.buffers import ROWS, WHOLE, Buffer, Buffers, Use
from armillary.nn.context import Context
from armillary.nn.state import CountedState, State

HOW = {
    "float32": Kind.F32,
    "bf16": Kind.BF16,
    "float16": Kind.F16,
    "int8": Kind.INT8,
    "int4": Kind.INT4,
}  # weights
HELD = (*KINDS, torch.int8, torch.int64)  # of states
UNIT = 16  # columns that are not shared between threads, where the width allows it


Packed = dict[tuple[Any, ...], tuple[int, tuple[Tensor, ...]]]  # by place: version, the weight, what was made of it


class NoStep(Exception):
    """A part has no native step; says which and why."""


@dataclass
class Turn:
    """One call: the row of the states, the position and the id of each token; side: by row of the states."""

    slots: np.ndarray
    places: np.ndarray
    ids: np.ndarray
    side: Mapping[str, Tensor]
    context: tuple[Context, Tensor, Tensor, int] | None = None


@dataclass
class _Mark:
    steps: int
    angles: dict[Any, Buffer]
    touched: dict[int, set[tuple[int, bool]]]
    held: int
    single: bool


class Tape(Buffers):
    """rows: most tokens of a call; room: most tokens of a sequence; weights: how products hold theirs;
    dtype: in what branches without a native step compute; packed: weights as other tapes of the same network
    took them; read: told of each weight that was packed; dry: write down only, nothing can run."""

    def __init__(
        self,
        rows: int,
        room: int,
        *,
        weights: Weights = "float32",
        dtype: torch.dtype = torch.float32,
        threads: int | None = None,
        packed: Packed | None = None,
        read: Callable[[Tensor], None] | None = None,
        dry: bool = False,
    ) -> None:
        super().__init__(rows, threads or torch.get_num_threads())
        self.room, self.weights, self.dtype = room, weights, dtype
        self.dry = dry
        self.single = False  # whether a sequence can take only one token in a call
        self.plain: dict[str, str] = {}  # branches that run as they are, and why
        self.complete: Callable[[Mapping[str, Tensor], Tensor], Mapping[str, Tensor]] | None = None
        self.branches = self.scratch = 0
        self._steps: list[Record | Callable[[Turn], None]] = []
        self._program: list[Program | Callable[[Turn], None]] = []
        self.wanted: list[Tensor] = []  # weights that products would take, of a dry tape
        self._tables: list[Tensor] = []
        self._held: list[tuple[State, str, int]] = []
        self._packed: Packed = {} if packed is None else packed
        self._read = read
        self._memory = Memory()
        self._angles: dict[Any, Buffer] = {}
        self._picked = False
        self._call = Call()
        self._given: tuple[array[int], ...] = ()  # what the call points to
        self._shown: dict[int, Tensor] = {}  # scores, by how many were asked for

    # -- records

    def write(
        self,
        code: Code,
        *,
        out: Buffer | None = None,
        into: Buffer | None = None,
        reads: Sequence[Use] = (),
        writes: Sequence[Use] = (),
        kind: int = 0,
        n: Sequence[int] = (),
        f: Sequence[float] = (),
        weight: int = 0,
        more: int = 0,
        bias: int = 0,
        rest: int = 0,
        target: int = 0,
    ) -> None:
        """One record (record.h): what it reads and writes decides whether threads wait for one another before it."""
        pointers = {"weight": weight, "more": more, "bias": bias, "rest": rest, "out": target}
        pointers["in"] = 0 if into is None else into.at
        record = Record(code=code, kind=kind, picked=self._picked, **{k: v or None for k, v in pointers.items()})
        if out is not None:
            record.out, record.out_stride = out.at, out.stride
        if into is not None:
            record.in_stride = into.stride
        record.n[: len(n)] = n
        record.f[: len(f)] = f
        record.wait = self.touch(reads, writes)
        for what, _ in writes:
            if isinstance(what, Buffer):
                what.prepared.clear()
        self._steps.append(record)

    def embed(self, table: Tensor, scale: float = 1.0, onto: Buffer | None = None, *, places: bool = False) -> Buffer:
        """Rows of a table [entries, D], by id or by position."""
        table = table.detach().contiguous()
        if table.dtype not in KINDS:
            raise NoStep(f"a table of {table.dtype}")
        width = table.shape[1]
        out = onto or self.buffer(width)
        units = split(width)
        n = (width, units, int(places), int(onto is not None))
        self._tables.append(table)  # of which a step reads a row, not the whole
        at, kind = table.data_ptr(), KINDS[table.dtype]
        self.write(Code.EMBED, out=out, writes=[(out, units)], kind=kind, n=n, f=(scale,), weight=at)
        return out

    def norm(
        self,
        x: Buffer,
        gain: Tensor | None,
        bias: Tensor | None,
        *,
        centred: bool,
        epsilon: float,
        offset: float = 0.0,
        over: tuple[int, int] | None = None,
        place: bool = False,
    ) -> Buffer:
        """A norm of rows into a buffer of its own; in place; or in place `over` so many units of a width."""
        weight, shift = self.vector(gain), self.vector(bias)
        f = (epsilon, offset)
        if over is not None:
            self.write(
                Code.HEAD_NORM,
                out=x,
                reads=[(x, over[0])],
                writes=[(x, over[0])],
                n=(*over, int(centred)),
                f=f,
                weight=weight,
                bias=shift,
            )
            return x
        out = x if place and not x.own else self.buffer(x.width, own=True)
        part = WHOLE if out.own else ROWS
        n = (x.width, int(centred))
        self.write(
            Code.NORM, into=x, out=out, reads=[(x, part)], writes=[(out, part)], n=n, f=f, weight=weight, bias=shift
        )
        return out

    def product(
        self,
        x: Buffer,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        unit: int | None = None,
        factor: float = 1.0,
        weights: Weights | None = None,
    ) -> Buffer:
        """factor · x Wᵀ + b; unit: columns that one thread must have together, a head's say; weights: how these
        are held, in place of how all are."""
        outputs, inputs = weight.shape
        kind, data, scales = self.pack(weight, weights)
        out = self.buffer(outputs)
        units = split(outputs) if unit is None else outputs // unit
        by_tiles = not self.dry and kind in (Kind.BF16, Kind.INT8) and tiles()
        taken = self._prepare(x, kind) if by_tiles or kind in (Kind.INT8, Kind.INT4) else x
        self.write(
            Code.PRODUCT,
            into=taken,
            out=out,
            reads=[(taken, WHOLE)],
            writes=[(out, units)],
            kind=kind,
            n=(inputs, outputs, units, int(by_tiles)),
            f=(factor,),
            weight=data,
            more=scales,
            bias=self.vector(bias),
        )
        return out

    def _prepare(self, x: Buffer, kind: Kind) -> Buffer:
        """Rows in int8, or split in two bf16 numbers for tiles: once for all products that take them."""
        rows, filled = self.prepared(x, kind)
        if not filled:
            self.write(Code.QUANTISE, into=x, out=rows, reads=[(x, WHOLE)], kind=kind, n=(x.width,))
        return rows

    def pack(self, weight: Tensor, weights: Weights | None = None) -> tuple[Kind, int, int]:
        """How a weight is held, where it lies and where its scales do."""
        weights = weights or self.weights
        if weight.dtype not in KINDS or type(weight.data) is not Tensor:
            raise NoStep(f"weights of {weight.dtype}")
        if self.dry:
            self.wanted.append(weight.detach())
            return Kind.F32, 0, 0
        kind = HOW[weights]
        key, version = (weight.data_ptr(), *weight.shape, weights), weight._version
        if key not in self._packed or self._packed[key][0] != version:
            held = weight.detach()
            # with the weight itself, so that no other can come to lie where it lies
            self._packed[key] = version, (held, *lay_out(held, kind, self._memory))
            if self._read is not None:
                self._read(held)
        _, numbers, *scales = self._packed[key][1]
        return kind, self.keep(numbers), self.keep(scales[0]) if scales else 0

    @property
    def pieces(self) -> list[Tensor]:
        """The memory that steps read (of experts, those that are picked), each piece once."""
        return list({t.data_ptr(): t for t in self._kept}.values())

    def activate(self, x: Buffer, function: Callable[[Tensor], Tensor], times: Buffer | None = None) -> Buffer:
        """f(x) · times, in place; times must be split as x is (the same count of units)."""
        return self._each(Code.ACTIVATE, x, times, kind=self.activation(function))

    def activation(self, function: Callable[[Tensor], Tensor]) -> int:
        """Its number."""
        name = next((name for name, known in FUNCTIONS.items() if known is function), None)
        if name not in ACTIVATIONS:
            raise NoStep("an activation that is not known here")
        return ACTIVATIONS[name]

    def add(self, x: Buffer, y: Buffer, factor: float = 1.0) -> None:
        """x ← x + factor · y."""
        self._each(Code.ADD, x, y, factor)

    def copy(self, x: Buffer) -> Buffer:
        return self._each(Code.COPY, self.buffer(x.width), x, 1.0)

    def cap(self, x: Buffer, bound: float) -> None:
        """x ← bound · tanh(x / bound)."""
        self._each(Code.CAP, x, None, bound)

    def clip(self, x: Buffer, bound: float, unit: int) -> None:
        self._each(Code.CLIP, x, None, bound, unit=unit)

    def _each(
        self, code: Code, x: Buffer, y: Buffer | None, factor: float = 1.0, kind: int = 0, unit: int | None = None
    ) -> Buffer:
        assert not x.own
        units = x.width // unit if unit is not None else self.units_of(x)
        reads = [] if y is None else [(y, units)]
        n = (x.width, units)
        self.write(code, into=y, out=x, reads=reads, writes=[(x, units)], kind=kind, n=n, f=(factor,))
        return x

    def units_of(self, x: Buffer) -> int:
        """As the value was last written, so that no thread waits for another; else by columns."""
        last = [part for part, wrote in self.touched.get(x.at, ()) if wrote and part > 0]
        return last[0] if len(last) == 1 and x.width % last[0] == 0 else split(x.width)

    def pick(self, x: Buffer) -> Buffer:
        """Go on with the rows of which scores are asked for."""
        out = self.buffer(x.width, own=True)
        self._picked = True
        self.write(Code.PICK, into=x, out=out, reads=[(x, WHOLE)], n=(x.width,))
        return out

    # -- what mixers need

    def angles(self, speeds: Tensor, factor: float) -> Buffer:
        """Cosines and sines of the positions, once for all mixers that turn alike."""
        key = (tuple(speeds.tolist()), factor)
        if key not in self._angles:
            pairs = len(speeds)
            out = Buffer(torch.zeros(1, self.rows * 2 * pairs), 2 * pairs, False)
            self.keep(out.tensor)
            self.write(Code.ANGLES, out=out, writes=[(out, ROWS)], n=(pairs,), f=(factor,), weight=self.vector(speeds))
            self._angles[key] = out
        return self._angles[key]

    def rotate(self, x: Buffer, angles: Buffer, units: int, *, interleaved: bool) -> None:
        n = (units, x.width // units, angles.width // 2, int(interleaved))
        self.write(Code.ROTATE, into=angles, out=x, reads=[(angles, WHOLE)], writes=[(x, units)], n=n)

    def hold(self, state: State, *names: str) -> list[Tensor]:
        """Tensors of a state that the tape reads and writes itself."""
        for name in names:
            tensor = state.tensors[name]
            if tensor.dtype not in HELD or not (tensor.is_contiguous() or self.dry):
                raise NoStep(f"a state of {tensor.dtype}")
            self._held.append((state, name, tensor.data_ptr()))
        return [state.tensors[name] for name in names]

    def append(self, held: Tensor, x: Buffer | None) -> None:
        """Each token's entry, or its position, to a state [slots, units, room, width]."""
        units, room = held.shape[1], held.shape[2]
        width = 1 if x is None else x.width // units
        reads = [] if x is None else [(x, units)]
        at = held.data_ptr()
        kind = Kind.INT64 if x is None else kind_of(held)
        self.write(Code.APPEND, into=x, reads=reads, writes=[(at, units)], kind=kind, n=(units, width, room), target=at)

    def attend(
        self,
        q: Buffer,
        k: Tensor,
        v: Tensor,
        heads: int,
        *,
        scale: float,
        softcap: float | None = None,
        back: int | None = None,
        sinks: Tensor | None = None,
        slopes: Sequence[float] | None = None,
    ) -> Buffer:
        """Attention of every token over the keys and values so far, [slots, groups, room, width]."""
        groups, room, width = k.shape[1:]
        out = self.buffer(q.width)
        if not self.dry:
            self.scratch = max(self.scratch, attend_floats(width))
        self.write(
            Code.ATTEND,
            into=q,
            out=out,
            reads=[(q, WHOLE), (k.data_ptr(), WHOLE), (v.data_ptr(), WHOLE)],
            writes=[(out, WHOLE)],
            kind=kind_of(k),
            n=(heads, groups, width, room, 2**40 if back is None else back),
            f=(scale, softcap or 0.0),
            more=k.data_ptr(),
            weight=v.data_ptr(),
            bias=self.vector(sinks),
            rest=0 if slopes is None else self.keep(torch.tensor(slopes, dtype=torch.float32)),
        )
        return out

    def retain(self, q: Buffer, k: Buffer, v: Buffer, state: Tensor, decays: Sequence[float], factor: float) -> Buffer:
        """S ← decay·S + factor·kᵀv, y = q S over states [slots, heads, K, V] float32."""
        heads, keys, values = state.shape[1:]
        out = self.buffer(v.width)
        self.write(
            Code.RETAIN,
            into=q,
            out=out,
            reads=[(q, heads), (k, heads), (v, heads)],
            writes=[(out, heads), (state.data_ptr(), heads)],
            n=(heads, keys, values),
            f=(factor,),
            more=k.at,
            weight=v.at,
            bias=self.keep(torch.tensor(decays, dtype=torch.float32)),
            rest=state.data_ptr(),
        )
        return out

    # -- what has no native step

    def attempt(self, name: str, native: Callable[[], Buffer], plain: Callable[[], Buffer]) -> tuple[Buffer, bool]:
        """What `native` writes down, or else what `plain` does; and whether it was native."""
        touched = {place: set(uses) for place, uses in self.touched.items()}
        mark = _Mark(len(self._steps), dict(self._angles), touched, len(self._held), self.single)
        packed, kept, tables, wanted = set(self._packed), len(self._kept), len(self._tables), len(self.wanted)
        lent = self.scratched()
        self.branches += 1
        try:
            return native(), True
        except NoStep as why:
            self.plain[name] = str(why)
            self.release(lent)
            del self._steps[mark.steps :], self._held[mark.held :]
            del self._kept[kept:], self._tables[tables:], self.wanted[wanted:]
            for key in self._packed.keys() - packed:
                del self._packed[key]
            self._angles, self.touched, self.single = mark.angles, mark.touched, mark.single
            return plain(), False

    def call(self, branch: nn.Module, x: Buffer, state: State | None) -> Buffer:
        """A branch as it is: x [tokens, D] as rows of the states, with as many tokens as each has."""
        out = self.buffer(x.width)
        source, target = x.tensor.view(-1), out.tensor.view(-1)

        def run(turn: Turn) -> None:
            ctx, offsets, steps, first = self._context(turn)
            count, width = len(offsets), x.width
            assert ctx.ids is not None
            h = torch.zeros(*ctx.ids.shape, width, dtype=self.dtype)
            h[offsets, steps] = source[: count * width].view(count, width).to(self.dtype)
            part = None if state is None else state.rows(first, len(h))
            y = branch(h, ctx, part, True)
            if state is not None and part is not None:
                state.absorb(first, part)
            target[: count * width].view(count, width).copy_(y[offsets, steps])

        self._steps.append(run)
        self.touched.clear()
        return out

    def _context(self, turn: Turn) -> tuple[Context, Tensor, Tensor, int]:
        """The call as mixers know it, and where each token stands in it."""
        if turn.context is None:
            first = int(turn.slots[0])
            offsets = torch.from_numpy(turn.slots - first)
            span = int(offsets[-1]) + 1
            lengths = torch.bincount(offsets, minlength=span)
            starts = lengths.cumsum(0) - lengths
            steps = torch.arange(len(offsets)) - starts[offsets]
            longest = int(lengths.max())
            ids = torch.zeros(span, longest, dtype=torch.int64)
            positions = torch.zeros(span, longest, dtype=torch.int64)
            ids[offsets, steps], positions[offsets, steps] = torch.from_numpy(turn.ids), torch.from_numpy(turn.places)
            side = {name: tensor[first : first + span] for name, tensor in turn.side.items()}
            if self.complete is not None:
                side = dict(self.complete(side, ids))
            ragged = bool((lengths != longest).any())
            ctx = Context(positions=positions, lengths=lengths if ragged else None, ids=ids, side=side)
            turn.context = ctx, offsets, steps, first
        return turn.context

    # -- running

    def close(self, logits: Buffer) -> None:
        """The tape is whole."""
        self._logits = logits
        if self.dry:
            return
        self.scratch = -(-self.scratch // 16) * 16  # whole lines of the cache
        self._room = torch.empty(self.threads * self.scratch)
        self._call.scratch, self._call.room = self.scratch, self._room.data_ptr()
        self._at = addressof(self._call)
        stretch: list[Record] = []
        for step in [*self._steps, None]:
            if isinstance(step, Record):
                stretch.append(step)
                continue
            if stretch:
                self._program.append(Program(stretch))
            stretch = []
            if step is not None:
                self._program.append(step)

    @property
    def width(self) -> int:
        """Scores of a token."""
        return self._logits.width

    @property
    def native_parts(self) -> bool:
        """Whether any branch has a native step."""
        return self.branches > len(self.plain)

    def fits(self) -> bool:
        """Whether the states still lie where they lay."""
        return all(state.tensors[name].data_ptr() == at for state, name, at in self._held)

    def counted(self) -> list[CountedState]:
        """The states whose lengths the tape leaves to `settle`."""
        found = {id(state): state for state, _, _ in self._held if isinstance(state, CountedState)}
        return list(found.values())

    def run(
        self,
        slots: Sequence[int],
        places: Sequence[int],
        ids: Sequence[int],
        picked: Sequence[int],
        side: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Take in tokens, those of a sequence one after another and the sequences' rows ascending; returns
        the scores [len(picked), V] of those asked for, in memory that the next call overwrites."""
        asked = len(picked)
        self._set_out(slots, places, ids, picked)
        turn: Turn | None = None
        for part in self._program:
            if isinstance(part, Program):
                part.run(self._at, self.threads)
            else:
                if turn is None:
                    rows, where, tokens = (np.array(one, np.int64) for one in (slots, places, ids))
                    turn = Turn(rows, where, tokens, side or {})
                part(turn)
        shown = self._shown.get(asked)
        if shown is None:
            width = self._logits.width
            shown = self._shown[asked] = self._logits.tensor.view(-1)[: asked * width].view(asked, width)
        return shown

    def _set_out(self, slots: Sequence[int], places: Sequence[int], ids: Sequence[int], picked: Sequence[int]) -> None:
        """What the next call takes in."""
        assert 0 < len(ids) <= self.rows
        # Between two steps nothing of Python, and less of PyTorch, is in the processor's caches: little is touched.
        self._given = given = array("q", ids), array("q", slots), array("q", places), array("q", picked)
        call = self._call
        call.rows, call.picks = len(ids), len(picked)
        call.ids, call.slots, call.places, call.picked = [one.buffer_info()[0] for one in given]

    def go_on(
        self,
        slot: int,
        start: int,
        ids: Sequence[int],
        row: Row,
        draws: Sequence[float],
        *,
        bounds: tuple[float, float, float],
        vocabulary: int | None = None,
    ) -> tuple[list[int], list[float]]:
        """Takes in tokens of one sequence, of which `start` are there, and writes on: a token for each draw, and their
        probabilities, or fewer where one lies below a bound, or a power of the product of all below another (bounds:
        both, and the power). All but the one of the last draw have then been taken in. row: how they are chosen, of the
        first `vocabulary` entries. Only where all branches have native steps."""
        count = len(ids)
        self._set_out([slot] * count, range(start, start + count), ids, [count - 1])
        (program,) = self._program
        assert isinstance(program, Program)
        width = self._logits.width
        scores = self._logits.at, width if vocabulary is None else min(width, vocabulary)
        return program.go_on(self._at, self.threads, scores, row, draws, bounds)

    def go_on_together(
        self,
        slots: Sequence[int],
        places: Sequence[int],
        ids: Sequence[int],
        rows: Rows,
        ahead: Ahead,
    ) -> list[float]:
        """Takes in a token of each sequence and writes on; what `Rows.choose` gives, step by step, of which the last
        step's tokens have not been taken in. Only where all branches have native steps."""
        self._set_out(slots, places, ids, range(len(ids)))
        (program,) = self._program
        assert isinstance(program, Program)
        scores = self._logits.at, self._logits.width
        return program.go_on_together(self._at, self.threads, scores, rows, ahead)


def kind_of(held: Tensor) -> Kind:
    """In what a state keeps its numbers; raises NoStep for what operations do not read."""
    if held.dtype not in KINDS:
        raise NoStep(f"a state of {held.dtype}")
    return KINDS[held.dtype]


def split(width: int) -> int:
    """Into how many units columns are split that need not stay together."""
    return width // UNIT if width % UNIT == 0 else width


def record(module: Any, tape: Tape, *given: Any, **options: Any) -> Any:
    """What a module writes down; raises NoStep for one that cannot."""
    own = getattr(module, "record", None)
    if own is None:
        raise NoStep(f"{type(module).__name__} has no native step")
    return own(tape, *given, **options)


__all__ = ["Buffer", "NoStep", "Tape", "Turn", "kind_of", "record", "split"]
