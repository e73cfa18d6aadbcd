"""Steps of an engine by a tape of native calls (nn/tape.py): how weights are held, which steps it takes,
and how the states learn afterwards how long they have become.

The number of tokens that each row has seen is kept here while steps follow one another; `settle` gives
it to the states, before anybody else looks at them.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from armillary.base.errors import InputError, UnsupportedError
from armillary.checkpoints.mapped import forget
from armillary.engine.calibrate import EXACT, chosen_threads, chosen_weights, loses_nothing, most_threads
from armillary.native import available
from armillary.native.choice import Row, Rows
from armillary.native.tape import Ahead, Weights, tiles
from armillary.nn.network import Network
from armillary.nn.network_state import NetworkState
from armillary.nn.tape import NoStep, Packed, Tape

Held = Literal["auto", "plain", "float32", "bf16", "float16", "int8", "int4"]
# Tokens of a step up to which the tape is taken. Where the processor has tiles (AMX) there is no bound: at 33 million
# weights in bf16 40 tokens took 6 ms where plain steps took 45, 512 took 64 and 158, 2,048 took 362 and 857; at 388
# million 1,000 took 1.9 s and 2.7. Elsewhere plain steps win in the end, since PyTorch's products gain with the number
# of rows: with AVX2 16 tokens cost 7 and 23 ms, 64 cost 32 and 34, 128 cost 64 and 46.
MOST = 32
PIECE = 64  # tokens that the tape takes at a time, where no other way to read a prompt is open or as quick

_packed: weakref.WeakKeyDictionary[Network, Packed] = weakref.WeakKeyDictionary()


def replay(
    network: Network, state: NetworkState, capacity: int, weights: Held = "auto", loose: bool = False
) -> Replay | None:
    """What takes the steps of such a network, or None where they stay plain: `plain` was asked for, or
    nothing has a native step here. Says so where other weights than those of the model were asked for. loose: "auto"
    may be what loses something."""
    if weights not in get_args(Held):
        raise InputError(f"weights cannot be held in '{weights}'", hint=f"one of {', '.join(get_args(Held))}")
    if weights == "plain":
        return None
    asked = weights in ("int8", "int4")
    why = "" if available() else "there is no native library"
    if not why:
        try:
            made = Replay(network, state, capacity, weights, loose)
            if not made.tape.native_parts and not asked:
                return None
            if asked and made.tape.plain:
                left = ", ".join(made.tape.plain)
                warnings.warn(f"the weights of {left} are not held in {weights}: no native step there", stacklevel=3)
            return made
        except NoStep as reason:
            why = str(reason)
    if weights != "auto":
        warnings.warn(f"weights cannot be held in {weights} here ({why}): plain steps run instead", stacklevel=3)
    return None


class Replay:
    """The tape of one network over one state."""

    def __init__(
        self, network: Network, state: NetworkState, capacity: int, weights: Held, loose: bool = False
    ) -> None:
        """Row 0 of the state has to begin anew afterwards."""
        self.network, self.state, self.capacity = network, state, capacity
        if any(type(parameter.data) is not Tensor for parameter in network.parameters()):
            raise NoStep("its parameters are not plain tensors, or lie in several processes")
        packed = _packed.setdefault(network, {})
        assert weights != "plain"
        largest = _largest(network, state, capacity)
        self.weights: Weights = chosen_weights(network, largest, packed, loose) if weights == "auto" else weights
        # weights that plain steps do not see; by itself only what is loose chooses such
        self.other = self.weights in ("int8", "int4") or (
            self.weights in EXACT and (weights != "auto" or loose) and not loses_nothing(network, EXACT[self.weights])
        )
        # steps of any size: PyTorch multiplies with fp16 on a CPU by far more slowly than with anything else
        whole = tiles() or torch.float16 in {network.dtype, *(p.dtype for p in network.parameters())}
        self.most = PIECE if self.other or whole else MOST
        self.threads = most_threads(network)
        self.tape = self._recorded()
        self.threads = chosen_threads(self.tape)
        if self.threads != self.tape.threads:
            self.tape = self._recorded()
        # weights that lost something make every step here, so that an answer does not depend on which of its tokens
        # were read together
        self.always = self.other or (whole and not self.tape.plain and not self.tape.single)
        self._seen: list[int] | None = None  # tokens of each row, while the states do not know
        self._scores = self._shown = torch.empty(0)  # what the tape gave last, and as it is handed on
        if self.always:
            for parameter in network.parameters():
                forget(parameter.detach())

    def _recorded(self) -> Tape:
        packed = _packed.setdefault(self.network, {})
        places = {p.untyped_storage().data_ptr() for p in self.network.parameters()}
        for key in [key for key, (_, held) in packed.items() if held[0].untyped_storage().data_ptr() not in places]:
            del packed[key]
        tape = Tape(
            self.most,
            self.capacity,
            weights=self.weights,
            dtype=self.network.dtype,
            threads=self.threads,
            packed=packed,
            read=forget,
        )
        with torch.no_grad():
            self.network.record(tape, self.state)
        return tape

    @property
    def beside(self) -> int:
        """Tokens of one call of native operations alone, with as many of any sequence as there are; 0: none."""
        return 0 if self.tape.plain or self.tape.single else self.tape.rows

    def takes(self, chunks: Sequence[Sequence[int]]) -> bool:
        """Whether a step of these chunks is better made here."""
        if self.always:
            return True
        longest = max(len(chunk) for chunk in chunks)
        return sum(len(chunk) for chunk in chunks) <= self.tape.rows and not (self.tape.single and longest > 1)

    def extend(
        self,
        rows: Sequence[int],
        chunks: Sequence[Sequence[int]],
        *,
        last: bool = True,
        side: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """As `Slots.extend`, often in memory that the next call overwrites."""
        seen, count = self._counted(), len(rows)
        ids = [token for chunk in chunks for token in chunk]
        if len(ids) == len(chunks) == count <= self.tape.rows and min(map(len, chunks)) == 1:
            # every row takes one token, step after step: nothing is to be shared out
            places = [seen[row] for row in rows]
            if max(places) < self.capacity:
                logits = self.tape.run(rows, places, ids, range(count), side)
                for row in rows:
                    seen[row] += 1
                if logits is not self._scores:
                    self._scores, self._shown = logits, logits[:, None]
                return self._shown
        found = list[list[Tensor]]([] for _ in rows)
        if any(seen[row] + len(chunk) > self.capacity for row, chunk in zip(rows, chunks, strict=True)):
            raise UnsupportedError(f"a sequence is longer than the {self.capacity} tokens that its row holds")
        done = [0] * len(rows)
        while True:
            slots, places, ids, picked, owners = (list[int]() for _ in range(5))
            taken = list[tuple[int, int]]()
            for at, (row, chunk) in enumerate(zip(rows, chunks, strict=True)):
                room = 1 if self.tape.single else self.tape.rows - len(ids)
                count = min(len(chunk) - done[at], room, self.tape.rows - len(ids))
                for step in range(done[at], done[at] + count):
                    if not last or step + 1 == len(chunk):
                        picked.append(len(ids))
                        owners.append(at)
                    slots.append(row)
                    places.append(seen[row] + step - done[at])
                    ids.append(chunk[step])
                done[at] += count
                taken.append((row, count))
            if not ids:
                break
            logits = self.tape.run(slots, places, ids, picked, side)
            for row, count in taken:  # only now, so that a call that failed can be made again
                seen[row] += count
            if len(owners) == len(rows) and not any(found) and last:
                return logits[:, None]
            if len(rows) == 1 and len(owners) == len(chunks[0]):
                return logits[None]
            for line, at in zip(logits.clone(), owners, strict=True):
                found[at].append(line)
        longest = max(len(lines) for lines in found)
        blank = torch.zeros(logits.shape[1])
        return torch.stack([torch.stack(lines + [blank] * (longest - len(lines))) for lines in found])

    def _counted(self) -> list[int]:
        if self._seen is None:
            self._seen = self.state.lengths.tolist()
            if not self.tape.fits():
                self.tape = self._recorded()
        return self._seen

    def go_on(
        self, row: int, chunk: Sequence[int], choice: Row, draws: Sequence[float], **more: Any
    ) -> tuple[list[int], list[float]] | None:
        """The chunk of a row, and what it writes on (`Tape.go_on`); None, and nothing done, where that cannot be by one
        native call."""
        seen = self._counted()
        if self.tape.plain or len(chunk) > (1 if self.tape.single else self.tape.rows):
            return None
        if seen[row] + len(chunk) + len(draws) - 1 > self.capacity:
            return None
        found, sure = self.tape.go_on(row, seen[row], chunk, choice, draws, **more)
        seen[row] += len(chunk) + len(found) - (len(found) == len(draws))
        return found, sure

    def go_on_together(self, slots: Sequence[int], ids: Sequence[int], rows: Rows, ahead: Ahead) -> list[float]:
        """A token of each row of the state, and what they write on (`Tape.go_on_together`), if the tape has no plain
        part."""
        seen, count = self._counted(), len(slots)
        places = [seen[slot] for slot in slots]
        if max(places) + len(ahead.draws) // count > self.capacity:
            raise UnsupportedError(f"a sequence is longer than the {self.capacity} tokens that its row holds")
        found = self.tape.go_on_together(slots, places, ids, rows, ahead)
        steps = len(found) // (3 * count)
        for slot in slots:
            seen[slot] += steps
        return found

    def go_back(self, row: int, length: int) -> bool:
        """Forget the tokens of a row from `length` on, if that is all there is to do: where every state is one whose
        tokens' entries stand on their own, and they are counted here now."""
        if self._seen is None or self.tape.plain:
            return False
        self._seen[row] = length
        return True

    def settle(self) -> None:
        """Let the states know what was taken in."""
        if self._seen is None:
            return
        lengths = torch.tensor(self._seen, dtype=torch.int64)
        self.state.lengths, self.state.positions = lengths, lengths.clone()
        for state in self.tape.counted():
            state.resume(lengths)
        self._seen = None


@torch.no_grad()
def _largest(network: Network, state: NetworkState, capacity: int) -> Tensor:
    """The largest weight that native products would take; raises NoStep where there is no tape at all."""
    tape = Tape(MOST, capacity, dtype=network.dtype, threads=1, dry=True)
    network.record(tape, state)
    return max(tape.wanted, key=Tensor.numel, default=torch.zeros(1, 1))
