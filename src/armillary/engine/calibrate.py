"""What this machine is quickest with: how weights are held, and how many threads take a step.

Measured once for a network, by products with the largest weight that its steps multiply with. Neither changes what
a step gives but for rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from armillary.native.tape import Weights, tiles
from armillary.nn.network import Network
from armillary.nn.tape import Packed, Tape

ALONE = 1 << 20  # bytes of weights below which a second thread costs more than it brings
EXACT: dict[Weights, torch.dtype] = {"bf16": torch.bfloat16, "float16": torch.float16}  # what may lose nothing
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
    counts = (1,) if loose else (1, 16)
    times = {kind: sum(seconds(largest, kind, packed, rows) for rows in counts) for kind in able}
    quickest = min(reversed(able), key=times.__getitem__)
    for key in [key for key in packed if key[-1] in times and key[-1] != quickest]:
        del packed[key]
    return quickest


def chosen_threads(network: Network, largest: Tensor, weights: Weights, packed: Packed) -> int:
    """Threads of a step: PyTorch's, half of them or one, whichever is quickest; two of one core, or cores that others
    use, can be in each other's way."""
    most = torch.get_num_threads()
    if most == 1 or sum(p.numel() * p.element_size() for p in network.parameters()) < ALONE:
        return 1
    best, least = most, float("inf")
    for threads in sorted({most, max(1, most // 2), 1}, reverse=True):
        took = seconds(largest, weights, packed, threads=threads)
        if took < CLEARLY * least:
            best, least = threads, took
    return best


def seconds(weight: Tensor, kind: Weights, packed: Packed, rows: int = 1, threads: int | None = None) -> float:
    """Of a product of so many rows by `weight`, the best of a few."""
    tape = Tape(rows, 1, weights=kind, packed=packed, threads=threads)
    x = tape.embed(torch.ones(rows, weight.shape[1]))
    tape.pick(x)
    tape.close(tape.product(x, weight))
    zeros, each = [0] * rows, list(range(rows))
    return _best(lambda: tape.run(zeros, zeros, each, each))


def loses_nothing(network: Network, dtype: torch.dtype) -> bool:
    """Whether weights in `dtype` are those that plain steps see."""
    if network.dtype == dtype:
        return True
    others = (p.detach() for p in network.parameters() if p.dtype != dtype)
    return all(torch.equal(part, part.to(dtype).to(part.dtype)) for p in others for part in p.view(-1).split(1 << 16))


def _best(call: Callable[[], object]) -> float:
    """The least seconds of a few calls."""
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
