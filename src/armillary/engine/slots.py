"""The states of the sequences that run: rows of one network state, and what is cut out of it and put back.

It knows kinds of states (divisible or not), never mechanisms. Memory of a row is taken only as its
tokens are written.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from armillary.engine.choosing import Choosers
from armillary.engine.prefix import Entries, Match, Snapshot
from armillary.engine.replay import Held, Replay, replay
from armillary.engine.sampling import Choice
from armillary.native.choice import Rows
from armillary.native.tape import Ahead
from armillary.nn.cache import Cache
from armillary.nn.network import Network
from armillary.nn.network_state import NetworkState
from armillary.nn.state import SpanState, State, WindowState
from armillary.nn.taps import Taps

ANY = 256  # tokens of a step where nothing bounds it


class Slots:
    """`count` rows of at most `capacity` tokens each; cache: how their keys and values are kept; loose: weights "auto"
    may lose something (of a draft)."""

    replay: Replay | None = None  # takes the steps that it is better at

    def __init__(
        self,
        network: Network,
        count: int,
        capacity: int,
        cache: Cache | None = None,
        *,
        weights: Held = "auto",
        loose: bool = False,
    ) -> None:
        self.network, self.count, self.capacity, self.cache = network, count, capacity, cache
        self.state = network.init_state(count, capacity, cache=cache)
        self.replay = replay(network, self.state, capacity, weights, loose)
        self.blank = self._blank(network)
        self.state.absorb(0, self.blank)  # steps have been tried there
        spans = sum(state.nbytes for _, _, state in self.state.each() if self._cuts(state))
        self.each = -(-spans // (count * capacity))  # bytes per token
        self.fixed = -(-(self.state.nbytes - spans) // count)  # bytes per row
        self.divisible = all(self._cuts(state) for _, _, state in self.state.each())

    @property
    def beside(self) -> int:
        """Tokens that one call takes, a piece of a prompt together with tokens of running answers; 0: that is not
        done. A call that fails then has computed nothing."""
        return 0 if self.replay is None else self.replay.beside

    @property
    def together(self) -> int:
        """Tokens that a step takes as well at a time as one after another; 0: not even two of a sequence."""
        return ANY if self.replay is None else self.replay.beside

    def _cuts(self, state: State) -> TypeGuard[SpanState]:
        """Whether its tokens' entries stand on their own; under a driver a state holds parts of a sequence."""
        return isinstance(state, SpanState) and state.divisible and self.network.driver is None

    def extend(
        self,
        rows: Sequence[int],
        chunks: Sequence[Sequence[int]],
        *,
        last: bool = True,
        side: Mapping[str, Tensor] | None = None,
        taps: Taps | None = None,
        network: Network | None = None,
    ) -> Tensor:
        """The chunk of each row, and logits: of the last token of each [n, 1, V], or of every place [n, T,
        V]; rows: ascending; side: tensors with one row for each row of the state, of which the right
        ones are taken; network: another one over the same states, which takes plain steps."""
        if self.replay is not None and taps is None and network is None and self.replay.takes(chunks):
            return self.replay.extend(rows, chunks, last=last, side=side)
        self.settle()
        first, stop = rows[0], rows[-1] + 1
        longest = max(len(chunk) for chunk in chunks)
        ids = torch.zeros(stop - first, longest, dtype=torch.int64)
        lengths = torch.zeros(stop - first, dtype=torch.int64)
        for row, chunk in zip(rows, chunks, strict=True):
            ids[row - first, : len(chunk)] = torch.tensor(chunk, dtype=torch.int64)
            lengths[row - first] = len(chunk)
        device = self.network.device
        ragged = bool((lengths != longest).any())
        given = {name: tensor[first:stop] for name, tensor in (side or {}).items()}
        part = self.state if stop - first == self.count else self.state.rows(first, stop - first)
        logits = (self.network if network is None else network).extend(
            ids.to(device), part, lengths=lengths.to(device) if ragged else None, last=last, side=given, taps=taps
        )
        if part is not self.state:
            self.state.absorb(first, part)
        picked = [row - first for row in rows]
        return logits if len(picked) == stop - first else logits[picked]

    def go_on_together(
        self, rows: Sequence[int], ids: Sequence[int], choosers: Choosers, most: int, seconds: float, halt: array[int]
    ) -> list[list[Choice | Exception]] | None:
        """Takes in a token of each row, and the tokens that are chosen then, up to `most` of each, but for the last: in
        one native call, which ends early where one of them ends, `seconds` have passed or `halt` is set. None, and
        nothing done, where that cannot be."""
        replay = self.replay
        if replay is None or replay.tape.plain or len(rows) > replay.tape.rows:
            return None

        def made(given: Rows, draws: array[float]) -> list[float]:
            return replay.go_on_together(rows, ids, given, Ahead(draws, seconds, halt))

        return choosers.go_on(made, replay.tape.width, most)

    def settle(self) -> None:
        """Before anybody but the replay looks at the states."""
        if self.replay is not None:
            self.replay.settle()

    def begin(
        self, row: int, match: Match, source: Sequence[int] | None = None, network: Network | None = None
    ) -> None:
        """Put a row where an earlier sequence was, or at the beginning."""
        assert source is None
        self.clear(row, network)
        if match.length:
            self.restore(row, match)

    def clear(self, row: int, network: Network | None = None) -> None:
        """Begin anew; what a state begins with may come from weights."""
        self.settle()
        self.state.absorb(row, self.blank if network is None else self._blank(network))

    def _blank(self, network: Network) -> NetworkState:
        """What a row begins with, with rings as long as here."""
        made = network.init_state(1, 1, cache=self.cache)
        for (_, _, mine), (_, _, state) in zip(self.state.each(), made.each(), strict=True):
            if isinstance(state, WindowState) and isinstance(mine, WindowState):
                state.widen(mine.window)
        return made

    def entries(self, row: int, start: int, stop: int) -> Entries:
        """Of the divisible states, the tokens from `start` to before `stop`."""
        return {
            (index, name): state.cut(row, start, stop) for index, name, state in self.state.each() if self._cuts(state)
        }

    def snapshot(self, row: int) -> Snapshot:
        """Of the other states, all that they hold now."""
        self.settle()
        return {
            (index, name): state.rows(row, 1).snapshot()
            for index, name, state in self.state.each()
            if not self._cuts(state)
        }

    def restore(self, row: int, match: Match) -> None:
        """Put a fresh row where an earlier sequence was."""
        self.settle()
        for index, name, state in self.state.each():
            if self._cuts(state):
                at = 0
                for entries, count in match.path:
                    parts = {part: t[:, :count] for part, t in entries[index, name].items()}
                    state.paste(row, at, parts)
                    at += count
        self._put(row, match.snapshot or {}, match.length)

    def go_back(self, row: int, length: int, snapshot: Snapshot) -> None:
        """Forget the tokens from `length` on; snapshot: of that moment."""
        if self.divisible and self.replay is not None and self.replay.go_back(row, length):
            return
        self.settle()
        kept = self.state.lengths.clone()
        kept[row] = length
        for _, _, state in self.state.each():
            if self._cuts(state):
                state.truncate(kept)
        self._put(row, snapshot, length)

    def _put(self, row: int, snapshot: Snapshot, length: int) -> None:
        for index, name, state in self.state.each():
            if not self._cuts(state):
                state.absorb(row, snapshot[index, name])
        for tensor in (self.state.lengths, self.state.positions):
            tensor[row] = length


class Apart(Slots):
    """Slots of an encoder–decoder: every sequence looks at a source of its own length, so each has a state
    of its own and is computed by itself; nothing is kept of it."""

    def __init__(
        self, network: Network, count: int, capacity: int, cache: Cache | None = None, *, weights: Held = "auto"
    ) -> None:
        self.network, self.count, self.capacity, self.cache = network, count, capacity, cache
        source = torch.zeros(1, 1, dtype=torch.int64, device=network.device)
        one = network.init_state(1, 1, source=source, cache=cache)
        replay(network, one, capacity, weights)  # says why there is none
        kinds = [state for _, _, state in one.each()]
        looks = sum(state.nbytes for state in kinds if state.kind == "fixed")
        self.each = sum(state.nbytes for state in kinds if state.divisible)
        self.fixed = looks * network.settings.context  # of a source as long as the context
        self.divisible = False
        self.rows: dict[int, NetworkState] = {}

    def extend(
        self,
        rows: Sequence[int],
        chunks: Sequence[Sequence[int]],
        *,
        last: bool = True,
        side: Mapping[str, Tensor] | None = None,
        taps: Taps | None = None,
        network: Network | None = None,
    ) -> Tensor:
        assert network is None
        found = []
        longest = max(len(chunk) for chunk in chunks)
        for row, chunk in zip(rows, chunks, strict=True):
            ids = torch.tensor([chunk], dtype=torch.int64, device=self.network.device)
            given = {name: tensor[row : row + 1] for name, tensor in (side or {}).items()}
            logits = self.network.extend(ids, self.rows[row], last=last, side=given, taps=taps)
            missing = (1 if last else longest) - logits.shape[1]
            found.append(torch.nn.functional.pad(logits, (0, 0, 0, missing)))
        return torch.cat(found)

    def begin(
        self, row: int, match: Match, source: Sequence[int] | None = None, network: Network | None = None
    ) -> None:
        assert source is not None and not match.length and network is None
        given = torch.tensor([list(source)], dtype=torch.int64, device=self.network.device)
        self.rows[row] = self.network.init_state(1, self.capacity, source=given, cache=self.cache)

    def snapshot(self, row: int) -> Snapshot:
        return {(index, name): state.snapshot() for index, name, state in self.rows[row].each()}

    def go_back(self, row: int, length: int, snapshot: Snapshot) -> None:
        state = self.rows[row]
        for index, name, each in state.each():
            each.restore(snapshot[index, name])
        for tensor in (state.lengths, state.positions):
            tensor[0] = length
