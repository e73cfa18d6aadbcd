"""Steps of an engine by a tape of native calls (nn/tape.py): how weights are held, which steps it takes,
and how the states learn afterwards how long they have become.

The number of tokens that each row has seen is kept here while steps follow one another; `settle` gives
it to the states, before anybody else looks at them.
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from armillary.base.errors import InputError, UnsupportedError
from armillary.native import available
from armillary.native.tape import Weights
from armillary.nn.network import Network
from armillary.nn.network_state import NetworkState
from armillary.nn.tape import NoStep, Packed, Tape

Held = Literal["auto", "plain", "float32", "bf16", "int8", "int4"]
# Tokens of a step up to which the tape is taken. Plain steps cost as much for a few tokens as for many: at 33 million
# weights 23 ms for 16 tokens at the beginning of a sequence and 34 ms after 2,000, where the tape took 7 and 9 ms; 64
# cost 38 and 40 ms. Larger networks spend their time in products, where PyTorch's gain with the number of rows: so
# many tokens only if the tape's product of so many rows is as quick, else MOST.
MOST = 32
PIECE = 64  # tokens at a time, too, where the weights leave no other way to read a prompt
ALONE = 1 << 20  # bytes of weights below which a second thread costs more than it brings

_packed: weakref.WeakKeyDictionary[Network, Packed] = weakref.WeakKeyDictionary()


def replay(network: Network, state: NetworkState, capacity: int, weights: Held = "auto") -> Replay | None:
    """What takes the steps of such a network, or None where they stay plain: `plain` was asked for, or
    nothing has a native step here. Says so where other weights than those of the model were asked for."""
    if weights not in get_args(Held):
        raise InputError(f"weights cannot be held in '{weights}'", hint=f"one of {', '.join(get_args(Held))}")
    if weights == "plain":
        return None
    asked = weights in ("int8", "int4")
    why = "" if available() else "there is no native library"
    if not why:
        try:
            made = Replay(network, state, capacity, weights)
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

    def __init__(self, network: Network, state: NetworkState, capacity: int, weights: Held) -> None:
        self.network, self.state, self.capacity = network, state, capacity
        self.weights = _chosen(network, weights)
        # weights that plain steps do not see
        self.other = self.weights in ("int8", "int4") or (self.weights == "bf16" and not _halves(network))
        self.most = PIECE if self.other else _most(network, self.weights)
        self.tape = self._recorded()
        self._seen: list[int] | None = None  # tokens of each row, while the states do not know

    def _recorded(self) -> Tape:
        size = sum(p.numel() * p.element_size() for p in self.network.parameters())
        packed = _packed.setdefault(self.network, {})
        places = {p.untyped_storage().data_ptr() for p in self.network.parameters()}
        for key in [key for key, (_, held) in packed.items() if held[0].untyped_storage().data_ptr() not in places]:
            del packed[key]
        tape = Tape(
            self.most,
            self.capacity,
            weights=self.weights,
            dtype=self.network.dtype,
            threads=1 if size < ALONE else None,
            packed=packed,
        )
        with torch.no_grad():
            self.network.record(tape, self.state)
        return tape

    @property
    def beside(self) -> int:
        """Tokens of one call of native operations alone, with as many of any sequence as there are; 0: none."""
        return 0 if self.tape.plain or self.tape.single else self.tape.rows

    def takes(self, chunks: Sequence[Sequence[int]]) -> bool:
        """Whether a step of these chunks is better made here. Weights that lost something make every step here,
        so that an answer does not depend on which of its tokens were read together."""
        if self.other:
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
        """As `Slots.extend`."""
        if self._seen is None:
            self._seen = self.state.lengths.tolist()
            if not self.tape.fits():
                self.tape = self._recorded()
        seen, found = self._seen, list[list[Tensor]]([] for _ in rows)
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
            for line, at in zip(logits.clone(), owners, strict=True):
                found[at].append(line)
        longest = max(len(lines) for lines in found)
        blank = torch.zeros(logits.shape[1])
        return torch.stack([torch.stack(lines + [blank] * (longest - len(lines))) for lines in found])

    def settle(self) -> None:
        """Let the states know what was taken in."""
        if self._seen is None:
            return
        lengths = torch.tensor(self._seen, dtype=torch.int64)
        self.state.lengths, self.state.positions = lengths, lengths.clone()
        for state in self.tape.counted():
            state.resume(lengths)
        self._seen = None


def _chosen(network: Network, weights: Held) -> Weights:
    """The weights asked for; for `auto` the quicker of float32 and bf16, where bf16 loses nothing."""
    if weights != "auto":
        assert weights != "plain"
        return weights
    largest = max((p for p in network.parameters() if p.dim() == 2), key=Tensor.numel, default=None)
    if largest is None or not _halves(network):
        return "float32"
    if largest.numel() * 4 < ALONE:
        return "bf16"
    # of one token and of sixteen: a step of few is not all that there is
    times = {kind: _seconds(largest, kind) + _seconds(largest, kind, 16) for kind in ("float32", "bf16")}
    return "bf16" if times["bf16"] <= times["float32"] else "float32"


def _halves(network: Network) -> bool:
    """Whether plain steps see the weights in bf16 anyway."""
    if network.dtype == torch.bfloat16:
        return True
    wide = (p.detach() for p in network.parameters() if p.dtype != torch.bfloat16)
    return all(torch.equal(part, part.bfloat16().to(part.dtype)) for p in wide for part in p.view(-1).split(1 << 16))


def _most(network: Network, weights: Weights) -> int:
    """Tokens of a step that are better computed by the tape."""
    largest = max((p for p in network.parameters() if p.dim() == 2), key=Tensor.numel, default=None)
    if largest is None or largest.numel() * 4 < ALONE:
        return PIECE
    x, weight = torch.ones(PIECE, largest.shape[1], dtype=network.dtype), largest.detach().to(network.dtype)
    with torch.no_grad():
        theirs = _best(lambda: torch.nn.functional.linear(x, weight))
    return PIECE if _seconds(largest, weights, PIECE) <= theirs else MOST


def _seconds(weight: Tensor, kind: Weights, rows: int = 1) -> float:
    """Of a product of so many rows by `weight`, the best of a few."""
    tape = Tape(rows, 1, weights=kind)
    x = tape.embed(torch.ones(rows, weight.shape[1]))
    tape.pick(x)
    tape.close(tape.product(x, weight))
    zeros, each = [0] * rows, list(range(rows))
    return _best(lambda: tape.run(zeros, zeros, each, each))


def _best(call: Callable[[], object]) -> float:
    """The least seconds of a few calls."""
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
