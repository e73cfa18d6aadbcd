"""Cases: one example of a mechanism, put where the laws can call it.

Mixers and channel mixers are called as they are. A position that rotates or biases is hosted by
attention, one that acts on the embedding and every norm and head by a module that applies just it,
a driver by a small stack.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from armillary.nn.block import BlockSettings
from armillary.nn.channels.gated import GatedSettings
from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost
from armillary.nn.driver import DriverSettings
from armillary.nn.example import Example
from armillary.nn.heads.base import HeadSettings
from armillary.nn.linear import Embedding
from armillary.nn.mechanism import (
    WITHIN,
    Capabilities,
    ChannelMixer,
    ChannelSettings,
    MechanismSettings,
    MixerSettings,
    NormSettings,
    Place,
    Position,
    PositionSettings,
    initialise,
)
from armillary.nn.mixers.attention import AttentionSettings
from armillary.nn.network_state import NetworkState
from armillary.nn.positions.rope import RopeSettings
from armillary.nn.stack import Stack, StackSettings
from armillary.nn.state import State

WIDTH = 16
SOURCE = 7  # tokens of the memory that cross mixers look at
VOCABULARY = 24


class NotApplicable(Exception):
    """A law that cannot be tried here; the message says why."""


class _Added(ChannelMixer):
    """x plus the position's embedding."""

    def __init__(self, position: Position) -> None:
        super().__init__()
        self.position = position

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return x + self.position.embed(ctx.where(x)).to(x.dtype)


class _Normed(ChannelMixer):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self.norm(x)  # type: ignore[no-any-return]


class _Read(ChannelMixer):
    """What the head reads off x; its result need not be [B, T, D]."""

    def __init__(self, settings: HeadSettings, place: Place) -> None:
        super().__init__()
        self.embedding = Embedding(VOCABULARY, place.width)
        self.head = settings.build(place, VOCABULARY, self.embedding)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self.head(x, ctx.padding)  # type: ignore[no-any-return]


# What drivers drive: two blocks, whose tokens know where they stand.
HOST = StackSettings(
    depth=2,
    block=BlockSettings(mixer=AttentionSettings(heads=2, position=RopeSettings()), channel=GatedSettings(hidden=24)),
)


class _Driven(ChannelMixer):
    """A stack with its driver; the states of all blocks count as one."""

    def __init__(self, settings: DriverSettings, place: Place) -> None:
        super().__init__()
        self.blocks = Stack(HOST, place)
        self.driver = settings.build(place, HOST)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self.driver(self.blocks, x, ctx)  # type: ignore[no-any-return]

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        blocks = self.driver.init_state(self.blocks, batch, capacity, dtype, device)
        return _Together(NetworkState(blocks, torch.zeros(batch, dtype=torch.int64, device=device)))

    def extend(self, x: Tensor, state: Any, ctx: Context) -> Tensor:
        return self.driver.extend(self.blocks, x, state.network.blocks, ctx)


class _Together(State):
    """The states of a network, as one."""

    kind: ClassVar[str] = "window"

    def __init__(self, network: NetworkState) -> None:
        self.network = network

    @property
    def tensors(self) -> dict[str, Tensor]:  # type: ignore[override]
        return {
            f"{index}.{key}.{name}": tensor
            for index, key, state in self.network.each()
            for name, tensor in state.tensors.items()
        }

    def select(self, rows: Tensor) -> _Together:
        return _Together(self.network.select(rows))

    def rows(self, first: int, count: int) -> _Together:
        return _Together(self.network.rows(first, count))

    def absorb(self, first: int, part: State) -> None:
        assert isinstance(part, _Together)
        self.network.absorb(first, part.network)

    @classmethod
    def join(cls, states: Sequence[Any]) -> Any:
        return cls(NetworkState.join([state.network for state in states]))

    def snapshot(self) -> _Together:
        return _Together(self.network.snapshot())

    def restore(self, snapshot: Any) -> None:
        self.network.restore(snapshot.network)

    def truncate(self, lengths: Tensor) -> None:
        self.network.truncate(lengths)

    def to(self, device: torch.device | str) -> _Together:
        return _Together(self.network.to(device))


@dataclass(frozen=True)
class Case:
    """One example of the mechanism `name` of `role`."""

    role: str
    name: str
    example: Example

    @property
    def settings(self) -> MechanismSettings:
        given: MechanismSettings = self.example.settings
        if isinstance(given, PositionSettings) and "embed" not in given.sites:
            return AttentionSettings(heads=2, position=given)
        return given

    @property
    def mixes(self) -> bool:
        """Whether information moves between positions."""
        settings = self.settings
        if isinstance(settings, ChannelSettings):
            return settings.mixes
        return isinstance(settings, (MixerSettings, DriverSettings))

    @property
    def can(self) -> Capabilities:
        settings = self.settings
        if isinstance(settings, ChannelSettings):
            return settings.can()
        return type(settings).capabilities if isinstance(settings, (MixerSettings, DriverSettings)) else WITHIN

    @property
    def extends(self) -> bool:
        return self.cross or self.order != "bidirectional"

    @property
    def order(self) -> str:
        return str(self.example.place.get("order", "causal"))

    @property
    def cross(self) -> bool:
        return bool(self.example.place.get("cross", False))

    @property
    def reads(self) -> bool:
        """Whether this is a head, whose result is not one vector per token of width D."""
        return isinstance(self.settings, HeadSettings)

    def place(self, width: int = WIDTH, **changes: Any) -> Place:
        return Place(**{"width": width, "length": 64, "path": "here", **self.example.place, **changes})

    def build(
        self, *, width: int = WIDTH, dtype: torch.dtype = torch.float32, seed: int = 1, fresh: bool = False
    ) -> Any:
        """The module, its parameters moved off their starting values unless `fresh`: a bias of 0 or a
        gain of 1 would hide mistakes."""
        module = self.bare(width)
        if any(True for _ in module.parameters()):
            initialise(module, seed)
        if not fresh:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return module.to(dtype)

    def bare(self, width: int = WIDTH) -> nn.Module:
        """The module as built, on the default device, its parameters not drawn."""
        settings, place = self.settings, self.place(width)
        if isinstance(settings, (MixerSettings, ChannelSettings)):
            return settings.build(place)
        if isinstance(settings, PositionSettings):
            return _Added(settings.build(place))
        if isinstance(settings, HeadSettings):
            return _Read(settings, place)
        if isinstance(settings, DriverSettings):
            return _Driven(settings, place)
        assert isinstance(settings, NormSettings)
        return _Normed(settings.build(width))

    def cost(self, width: int, length: int, itemsize: int) -> Cost:
        """What the mechanism declares for one row."""
        settings, place = self.settings, self.place(width)
        if isinstance(settings, (MixerSettings, ChannelSettings)):
            return settings.cost(place, length, itemsize)
        if isinstance(settings, PositionSettings):
            return settings.cost(place, length, 0, 0, 0)
        if isinstance(settings, DriverSettings):
            return settings.cost(HOST, place, length, itemsize)
        if isinstance(settings, HeadSettings):
            return Cost(settings.flops(width, VOCABULARY, length))
        assert isinstance(settings, NormSettings)
        return Cost(settings.flops(width, length))


class Trial:
    """A case with inputs for a batch: x [B, T, D] and whatever else its mixer looks at."""

    def __init__(
        self,
        case: Case,
        batch: int = 3,
        length: int = 12,
        *,
        seed: int = 1,
        dtype: torch.dtype = torch.float32,
        width: int = WIDTH,
        source: int = SOURCE,
    ) -> None:
        self.case, self.batch, self.length, self.dtype = case, batch, length, dtype
        self.module = case.build(width=width, dtype=dtype, seed=seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.x = self.noise(batch, length, width)
        self.memory = Memory(self.noise(batch, source, width)) if case.cross else None
        self.side: dict[str, Tensor] = {}
        if case.order == "prefix":
            self.side["prefix"] = self.integers(0, min(4, length), batch)
        if case.example.side is not None:
            self.side |= case.example.side(batch, length)

    def noise(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype or self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Uniform from low to high, both included."""
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def ctx(self, rows: Tensor | slice = slice(None), **fields: Any) -> Context:
        """The context of the given rows, positions counted from 0 unless given."""
        memory = self.memory
        if memory is not None:
            padding = None if memory.padding is None else memory.padding[rows]
            memory = Memory(memory.hidden[rows], padding)
        side: Mapping[str, Tensor] = {name: tensor[rows] for name, tensor in self.side.items()}
        return Context(**{"memory": memory, "side": side, **fields})

    def whole(self, x: Tensor | None = None, **fields: Any) -> Tensor:
        x = self.x if x is None else x
        out: Tensor = self.module(x, self.ctx(**fields))
        return out

    def alone(self, row: int, part: slice | Tensor, **fields: Any) -> Tensor:
        """The outputs [1, n, D] of some tokens of one row, called as a batch of their own."""
        rows = slice(row, row + 1)
        out: Tensor = self.module(self.x[rows, part], self.ctx(rows, **fields))
        return out

    def state(self, rows: Tensor | slice = slice(None), capacity: int = 2) -> State | None:
        memory = self.ctx(rows).memory
        count = len(torch.arange(self.batch)[rows])
        state: State | None = self.module.init_state(count, capacity, self.dtype, "cpu", memory)
        return state

    def extend(
        self,
        state: State | None,
        x: Tensor,
        start: int | Tensor,
        *,
        rows: Tensor | slice = slice(None),
        lengths: Tensor | None = None,
        **fields: Any,
    ) -> Tensor:
        """The next chunk x [B, C, D] of rows that have seen `start` tokens."""
        begun = torch.as_tensor(start).expand(len(x))
        positions = begun[:, None] + torch.arange(x.shape[1])
        ctx = self.ctx(rows, positions=positions, lengths=lengths, **fields)
        out: Tensor = self.module.extend(x, state, ctx)
        return out

    def fill(self, state: State | None, stop: int, start: int = 0) -> Tensor:
        """Tokens [start, stop) of every row in one chunk."""
        return self.extend(state, self.x[:, start:stop], start)

    def first(self) -> int:
        """The least that a first chunk must hold: a prefix comes whole."""
        prefix = self.side.get("prefix") if self.case.order == "prefix" else None
        return 1 if prefix is None else max(1, int(prefix.max()))

    def places(self, start: Tensor, width: int) -> Tensor:
        """Which tokens [B, width, D] stand in a chunk of rows at `start`, for `gather`; beyond the end, the last."""
        steps = (start[:, None] + torch.arange(width)).clamp(max=self.length - 1)
        return steps[..., None].expand(-1, -1, self.x.shape[2])

    def cuts(self, largest: int = 5) -> list[tuple[int, int]]:
        """Random chunks (start, stop) of the whole length."""
        start, cuts = 0, []
        while start < self.length:
            least = self.first() if start == 0 else 1
            stop = min(self.length, start + max(least, int(self.integers(1, largest, 1))))
            cuts.append((start, stop))
            start = stop
        return cuts

    def parameters(self) -> list[nn.Parameter]:
        return list(self.module.parameters())


def swap(trial: Trial, **changes: Any) -> Trial:
    """The same trial with other inputs (x, memory, side)."""
    other = object.__new__(Trial)
    other.__dict__.update({**trial.__dict__, **changes})
    return other


def padded(memory: Memory, padding: Tensor) -> Memory:
    return dataclasses.replace(memory, padding=padding)
