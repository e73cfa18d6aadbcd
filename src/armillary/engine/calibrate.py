"""What this machine is quickest with: how weights are held, and how many threads take a step.

Measured once for a network: weights by products with the largest one that its steps multiply with, threads by the
step itself. Neither changes what a step gives but for rounding. Whatever else the machine does comes and goes, so all
that is compared is done in turn, for a while, and the best of each counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from armillary.native.tape import Weights, tiles
from armillary.nn.network import Network
from armillary.nn.tape import Packed, Tape

K = TypeVar("K", bound=Hashable)
ALONE = 1 << 20  # bytes of weights below which a second thread costs more than it brings
EXACT: dict[Weights, torch.dtype] = {"bf16": torch.bfloat16, "float16": torch.float16}  # what may lose nothing
FEW, MANY, WHILE = 3, 200, 0.05  # times that each is done: at least, at the most; and seconds that are enough
TURNS, REST = 3, 0.1  # seconds between them
CLEARLY = 0.95  # of the time with more threads: what fewer must take to be chosen


def chosen_weights(network: Network, largest: Tensor, packed: Packed, loose: bool = False) -> Weights:
    """The quickest of those that lose nothing; loose: of bf16 and int8, whatever they lose."""
    able: list[Weights] = ["bf16", "int8"] if loose else ["float32"]
    if not loose:
        able += [kind for kind, dtype in EXACT.items() if loses_nothing(network, dtype)]
    if len(able) == 1:
        return able[0]
    if largest.numel() * 4 < ALONE:
        return able[0] if loose else able[1]
    if tiles() and not loose and "bf16" in able:
        return "bf16"
    # of one token and of sixteen: a step of few is not all that there is, but for a draft's
    times = dict.fromkeys(able, 0.0)
    for rows in (1,) if loose else (1, 16):
        for kind, took in best({kind: _product(largest, kind, packed, rows) for kind in able}).items():
            times[kind] += took
    quickest = min(reversed(able), key=times.__getitem__)
    for key in [key for key in packed if key[-1] in times and key[-1] != quickest]:
        del packed[key]
    return quickest


def most_threads(network: Network) -> int:
    """PyTorch's; one for a small network."""
    small = sum(p.numel() * p.element_size() for p in network.parameters()) < ALONE
    return 1 if small else torch.get_num_threads()


def chosen_threads(tape: Tape) -> int:
    """Threads of a step: as many as the tape was made for, half of them or one, whichever is quickest; two of one core,
    or cores that others use, can be in each other's way; of a tape with plain parts all. Steps of one token are taken
    at the beginning of row 0."""
    most = tape.threads
    if most == 1 or tape.plain:
        return most

    def step(threads: int) -> Callable[[], object]:
        def run() -> None:
            tape.threads = threads
            tape.run([0], [0], [0], [0])

        return run

    calls = {threads: step(threads) for threads in sorted({most, max(1, most // 2), 1}, reverse=True)}
    times, chosen = dict.fromkeys(calls, float("inf")), most
    for turn in range(TURNS):  # another may have a processor for a while: fewer have to be quicker each time
        time.sleep(REST * bool(turn))
        times = {threads: min(times[threads], took) for threads, took in best(calls).items()}
        chosen = most
        for threads, took in times.items():
            if took < CLEARLY * times[chosen]:
                chosen = threads
        if chosen == most:
            break
    tape.threads = most
    return chosen


def _product(weight: Tensor, kind: Weights, packed: Packed, rows: int) -> Callable[[], object]:
    """A product of so many rows by `weight`."""
    tape = Tape(rows, 1, weights=kind, packed=packed)
    x = tape.embed(torch.ones(rows, weight.shape[1]))
    tape.pick(x)
    tape.close(tape.product(x, weight))
    zeros, each = [0] * rows, list(range(rows))
    return lambda: tape.run(zeros, zeros, each, each)


def loses_nothing(network: Network, dtype: torch.dtype) -> bool:
    """Whether weights in `dtype` are those that plain steps see."""
    if network.dtype == dtype:
        return True
    others = (p.detach() for p in network.parameters() if p.dtype != dtype)
    return all(torch.equal(part, part.to(dtype).to(part.dtype)) for p in others for part in p.view(-1).split(1 << 16))


def best(calls: Mapping[K, Callable[[], object]]) -> dict[K, float]:
    """The least seconds of each."""
    times = dict.fromkeys(calls, float("inf"))
    begun = time.perf_counter()
    for done in range(MANY):
        if done >= FEW and time.perf_counter() - begun > WHILE:
            break
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            times[key] = min(times[key], time.perf_counter() - start)
    return times
