"""A block: ordered residual branches, given as data, so that new arrangements need no new class.

`{mixer, channel}` is short for two branches; `cross` adds one that looks at the encoder. Norm
placement, parallel branches and residual scaling are settings of the block and its branches.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from armillary.base.settings import Settings
from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost
from armillary.nn.linear import spared
from armillary.nn.mechanism import ChannelMixer, ChannelSettings, Mixer, MixerSettings, NormSettings, Place
from armillary.nn.norms.rmsnorm import RMSNormSettings
from armillary.nn.state import State
from armillary.nn.tape import Buffer, NoStep, Tape, record

Placement = Literal["pre", "post", "sandwich", "after"]
BlockState = dict[str, State]


class BranchSettings(Settings):
    """One residual branch: x + scale · f(norm(x)) (placement pre), or as `norm_at` says."""

    name: str = Field(description="name of the branch, used in parameter and tap names")
    mixer: MixerSettings | None = Field(None, description="a mixer, or")
    channel: ChannelSettings | None = Field(None, description="a channel mixer")
    look: Literal["self", "memory"] = Field("self", description="memory: keys and values come from the encoder")
    norm: NormSettings = Field(RMSNormSettings(), description="norm of the branch")
    norm_at: Placement = Field(
        "pre", description="pre: before f; post: after the sum; sandwich: before and after f; after: f only"
    )
    scale: float = Field(1.0, description="factor on the branch's result")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the result dropped in training")
    beside: bool = Field(
        False, description="reads what the branch before it read: heads of several kinds, added like one mixer's"
    )

    @model_validator(mode="after")
    def _coherent(self) -> BranchSettings:
        if (self.mixer is None) == (self.channel is None):
            raise ValueError("a branch has either a mixer or a channel")
        if self.look == "memory" and self.mixer is None:
            raise ValueError("only a mixer can look at the memory")
        taken = hasattr(Block, self.name) or self.name in ("residual", "path", "names", "parallel", "training")
        if not self.name.isidentifier() or taken:
            raise ValueError(f"'{self.name}' cannot name a branch: use a word of letters, digits and _ that is free")
        return self

    def build(self, place: Place) -> Mixer | ChannelMixer:
        """What the branch does, at the place of its block."""
        chosen = self.mixer or self.channel
        assert chosen is not None
        return chosen.build(dataclasses.replace(place.at(self.name), cross=self.look == "memory"))

    def cost(self, place: Place, length: int, itemsize: int) -> Cost:
        width = place.width
        inner = self.mixer.cost(place, length, itemsize) if self.mixer else None
        if inner is None:
            assert self.channel is not None
            inner = self.channel.cost(place, length, itemsize)
        if any(settings.kind != "dense" for settings in place.linear.values()):
            # Mechanisms declare what they take with dense products.
            rows = {} if self.mixer is None else self.mixer.rows(place, length)
            with torch.device("meta"):
                inner = inner + Cost(-spared(self.build(place), length, rows))
        norms = 2 if self.norm_at == "sandwich" else 1
        around = norms * self.norm.flops(width, length) + length * width * (1 if self.scale == 1.0 else 2)
        return inner + Cost(around)


class BlockSettings(Settings):
    """A block in short form (mixer, cross, channel) or as a list of branches."""

    mixer: MixerSettings | None = Field(None, description="short form: the mixer")
    cross: MixerSettings | None = Field(None, description="short form: a mixer over the encoder's output")
    channel: ChannelSettings | None = Field(None, description="short form: the channel mixer")
    norm: NormSettings = Field(RMSNormSettings(), description="short form: norm of every branch")
    norm_at: Placement = Field("pre", description="short form: pre, post, sandwich or after")
    dropout: float = Field(0.0, ge=0, lt=1, description="short form: dropout of every branch")
    branches: tuple[BranchSettings, ...] | None = Field(None, description="long form: the branches in order")
    parallel: bool = Field(False, description="all branches read the block's input and are summed")

    @model_validator(mode="after")
    def _coherent(self) -> BlockSettings:
        short = (self.mixer, self.cross, self.channel)
        if self.branches is not None and any(part is not None for part in short):
            raise ValueError("give either branches or the short form (mixer, cross, channel), not both")
        if self.branches is None and all(part is None for part in short):
            raise ValueError("a block needs a mixer, a channel or branches")
        names = [branch.name for branch in self.all()]
        if len(set(names)) < len(names):
            raise ValueError(f"branch names repeat: {', '.join(names)}")
        if self.all()[0].beside:
            raise ValueError("the first branch has none before it that it could stand beside")
        if any(a.norm_at == "post" and b.beside for a, b in pairwise(self.all())):
            raise ValueError("no branch can stand beside one with norm_at: post, which needs the sum of one branch")
        if self.parallel and any(branch.norm_at == "post" for branch in self.all()):
            raise ValueError("parallel branches cannot have norm_at: post, which needs the sum of one branch")
        return self

    def all(self) -> tuple[BranchSettings, ...]:
        """The branches, whichever form was given."""
        if self.branches is not None:
            return self.branches
        parts: list[tuple[str, MixerSettings | None, ChannelSettings | None]] = [
            ("mixer", self.mixer, None),
            ("cross", self.cross, None),
            ("channel", None, self.channel),
        ]
        return tuple(
            BranchSettings(
                name=name,
                mixer=mixer,
                channel=channel,
                look="memory" if name == "cross" else "self",
                norm=self.norm,
                norm_at=self.norm_at,
                dropout=self.dropout,
            )
            for name, mixer, channel in parts
            if mixer is not None or channel is not None
        )

    def build(self, place: Place) -> Block:
        return Block(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        total = Cost()
        for branch in self.all():
            total = total + branch.cost(place, length, itemsize)
        return total


class Branch(nn.Module):
    """One residual branch; `inner` is the mixer or channel mixer."""

    def __init__(self, settings: BranchSettings, place: Place) -> None:
        super().__init__()
        self.name, self.path = settings.name, f"{place.path}.{settings.name}"
        self.norm_at, self.scale, self.dropout = settings.norm_at, settings.scale, settings.dropout
        self.norm_first = settings.norm_at in ("pre", "sandwich")
        self.looks_back = settings.look == "memory"
        self.beside = settings.beside
        self.inner = settings.build(place)
        self.norm = settings.norm.build(place.width)
        self.norm_after = settings.norm.build(place.width) if settings.norm_at == "sandwich" else None

    def forward(self, x: Tensor, ctx: Context, state: State | None = None, extending: bool = False) -> Tensor:
        """The branch's contribution, before it is added to the residual stream."""
        h = self.norm(x) if self.norm_first else x
        if ctx.taps is not None:
            h = ctx.taps(f"{self.path}.in", h)
        if not self.looks_back and ctx.memory is not None:
            ctx = dataclasses.replace(ctx, memory=None)
        elif self.looks_back:
            ctx = Context(memory=ctx.memory, side=ctx.side, training=ctx.training, taps=ctx.taps)
        h = self.inner.extend(h, state, ctx) if extending else self.inner(h, ctx)
        if self.norm_after is not None:
            h = self.norm_after(h)
        elif self.norm_at == "after":
            h = self.norm(h)
        if self.scale != 1.0:
            h = h * self.scale
        if self.dropout and self.training:
            h = F.dropout(h, self.dropout)
        if ctx.taps is not None:
            h = ctx.taps(f"{self.path}.out", h)
        return h

    def record(self, tape: Tape, x: Buffer, start: Buffer, state: State | None) -> None:
        """x ← x + what the branch makes of `start`, as its parts write it down or else as it is."""

        def native() -> Buffer:
            h = record(self.norm, tape, start) if self.norm_first else start
            if self.looks_back:
                raise NoStep("a branch that looks at a memory")
            h = record(self.inner, tape, h, state)
            if self.norm_after is not None:
                h = record(self.norm_after, tape, h)
            elif self.norm_at == "after":
                h = record(self.norm, tape, h)
            return h  # type: ignore[no-any-return]

        lent = tape.scratched()
        h, own = tape.attempt(self.path, native, lambda: tape.call(self, start, state))
        tape.add(x, h, self.scale if own else 1.0)
        if self.norm_at == "post":
            record(self.norm, tape, x, place=True)
        tape.release(lent)


class Block(nn.Module):
    """x [B, T, D] → [B, T, D]."""

    def __init__(self, settings: BlockSettings, place: Place) -> None:
        super().__init__()
        self.path = place.path
        self.parallel = settings.parallel
        self.names = tuple(branch.name for branch in settings.all())
        for branch in settings.all():
            self.add_module(branch.name, Branch(branch, place))

    def branches(self) -> list[Branch]:
        return [self.get_submodule(name) for name in self.names]  # type: ignore[misc]

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self._run(x, ctx, None)

    def extend(self, x: Tensor, state: BlockState, ctx: Context) -> Tensor:
        return self._run(x, ctx, state)

    def record(self, tape: Tape, x: Buffer, state: BlockState) -> None:
        branches, start, lent = self.branches(), x, tape.scratched()
        for place, branch in enumerate(branches):
            if place == 0 or not (branch.beside or self.parallel):
                shared = place + 1 < len(branches) and (self.parallel or branches[place + 1].beside)
                start = tape.copy(x) if shared else x
            branch.record(tape, x, start, state.get(branch.name))
        tape.release(lent)

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> BlockState:
        states: BlockState = {}
        for branch in self.branches():
            looked = memory if branch.looks_back else None
            state = branch.inner.init_state(batch, capacity, dtype, device, looked)
            if state is not None:
                states[branch.name] = state
        return states

    def _run(self, x: Tensor, ctx: Context, state: BlockState | None) -> Tensor:
        if ctx.taps is not None:
            x = ctx.taps(f"{self.path}.residual.pre", x)
        start = x
        last = self.names[-1]
        for name in self.names:
            branch: Branch = self._modules[name]  # type: ignore[assignment]
            if ctx.taps is not None and name == last and len(self.names) > 1 and not self.parallel:
                x = ctx.taps(f"{self.path}.residual.mid", x)
            if not (branch.beside or self.parallel):
                start = x
            held = None if state is None else state.get(name)
            h = branch(start, ctx, held, state is not None)
            x = x + h
            if branch.norm_at == "post":
                x = branch.norm(x)
        if ctx.taps is not None:
            x = ctx.taps(f"{self.path}.residual.post", x)
        return x
