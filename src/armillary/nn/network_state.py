"""The state of a whole network: those of its blocks, and how many tokens each row has seen."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from armillary.nn.block import BlockState
from armillary.nn.context import Memory
from armillary.nn.state import State


class NetworkState:
    """The states of all blocks (last, of a driver), and how many tokens each row has seen."""

    def __init__(self, blocks: list[BlockState], lengths: Tensor, memory: Memory | None = None) -> None:
        self.blocks, self.lengths, self.memory = blocks, lengths, memory
        self.positions = lengths.clone()  # the next position of each row

    @property
    def batch(self) -> int:
        return int(self.lengths.shape[0])

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for _, _, state in self.each())

    def select(self, rows: Tensor) -> NetworkState:
        memory = self.memory
        if memory is not None:
            memory = Memory(memory.hidden[rows], None if memory.padding is None else memory.padding[rows])
        return self._map(lambda state: state.select(rows), self.lengths[rows], self.positions[rows], memory)

    @classmethod
    def join(cls, states: Sequence[NetworkState]) -> NetworkState:
        first = states[0]
        other = copy.copy(first)
        other.blocks = [
            {name: type(held).join([s.blocks[i][name] for s in states]) for name, held in block.items()}
            for i, block in enumerate(first.blocks)
        ]
        other.lengths = torch.cat([s.lengths for s in states])
        other.positions = torch.cat([s.positions for s in states])
        memories = [s.memory for s in states if s.memory is not None]
        if memories:
            paddings = [m.padding for m in memories if m.padding is not None]
            padding = torch.cat(paddings) if len(paddings) == len(memories) else None
            other.memory = Memory(torch.cat([m.hidden for m in memories]), padding)
        return other

    def rows(self, first: int, count: int) -> NetworkState:
        """The state of `count` rows from `first` on, over the same storage; give it back to `absorb` after
        every chunk."""
        memory, part = self.memory, slice(first, first + count)
        if memory is not None:
            memory = Memory(memory.hidden[part], None if memory.padding is None else memory.padding[part])
        return self._map(
            lambda s: s.rows(first, count), self.lengths[part].clone(), self.positions[part].clone(), memory
        )

    def absorb(self, first: int, part: NetworkState) -> None:
        """Make the rows from `first` on those of `part`: what `rows` gave, or a state of its own."""
        for index, name, state in self.each():
            state.absorb(first, part.blocks[index][name])
        place = slice(first, first + part.batch)
        self.lengths, self.positions = self.lengths.clone(), self.positions.clone()
        self.lengths[place], self.positions[place] = part.lengths, part.positions

    def snapshot(self) -> NetworkState:
        return self._map(lambda state: state.snapshot(), self.lengths.clone(), self.positions.clone(), self.memory)

    def restore(self, snapshot: NetworkState) -> None:
        for index, name, state in self.each():
            state.restore(snapshot.blocks[index][name])
        self.lengths, self.positions = snapshot.lengths.clone(), snapshot.positions.clone()

    def truncate(self, lengths: Tensor) -> None:
        """Forget the tokens from lengths[b] on; raises, with nothing changed, where a state cannot."""
        for _, _, state in self.each():
            if state.kind not in ("span", "fixed") or (state.kind == "fixed" and not _constant(state)):
                state.truncate(lengths)
        kept = torch.minimum(self.lengths, lengths.to(self.lengths))
        for _, _, state in self.each():
            if state.kind == "span":
                state.truncate(kept)
        self.positions = self.positions - (self.lengths - kept)
        self.lengths = kept

    def to(self, device: torch.device | str) -> NetworkState:
        memory = self.memory
        if memory is not None:
            memory = Memory(memory.hidden.to(device), None if memory.padding is None else memory.padding.to(device))
        return self._map(lambda state: state.to(device), self.lengths.to(device), self.positions.to(device), memory)

    def each(self) -> Iterator[tuple[int, str, State]]:
        """(index of the block, name of the branch, its state), of every state."""
        for index, block in enumerate(self.blocks):
            for name, state in block.items():
                yield index, name, state

    def _map(self, change: Any, lengths: Tensor, positions: Tensor, memory: Memory | None) -> NetworkState:
        other = copy.copy(self)
        other.blocks = [{name: change(state) for name, state in block.items()} for block in self.blocks]
        other.lengths, other.positions, other.memory = lengths, positions, memory
        return other


def _constant(state: State) -> bool:
    """An encoder's keys and values do not change with the tokens, so cutting them back is nothing."""
    return "k" in state.tensors and "v" in state.tensors
