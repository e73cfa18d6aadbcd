"""Decoding by the engine with weights in float32, bf16, fp16, int8 and int4.

One stream behind a prompt, at a shape that fits a processor's cache and at one that does not: against reading the
same weights and states and nothing else (the floor), and against `llama.cpp` in F32, F16, Q8_0 and Q4_0. 16 streams
together: against plain steps, against a batch of 16 sequences of `llama.cpp` (steps alone on both sides) and against
`transformers` generate at batch 16 in bf16 (with the choice of tokens on both sides, through the whole engine). Peers
take turns with us, `llama.cpp` with whichever number of threads, waiting, order of weights and attention is quickest
for it; where one is not installed, its figures and goals are left out. Scores are compared in the run:
float32 with plain steps, the others with a pass in float64 over exactly the numbers that they hold.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armillary.engine.core import Engine
from armillary.engine.request import Request
from armillary.engine.sampling import Sampling
from armillary.engine.slots import Slots
from armillary.native import available
from armillary.native.rows import read_all
from armillary.testing.held import with_held
from common import SMALL, Shape, interleaved, ours, ratio, report, slow, theirs, write_gguf
from rivals import Llama, Transformers, fastest, missing

LARGE = Shape(width=1024, depth=30, heads=16, kv_heads=8, hidden=2816, vocabulary=32768)
PROMPT, TOKENS, STREAMS = 256, 16, 16
ROOM = PROMPT + 64 * TOKENS
WHOLE = 512  # tokens of an answer through the whole engine: the first ones come while other prompts are read
PEERS = {"float32": "F32", "bf16": "F16", "float16": "F16", "int8": "Q8_0", "int4": "Q4_0"}
# what is to be reached: the share of the floor where the weights exceed a processor's cache, and times the peer
FLOORS = {"float32": 0.85, "bf16": 0.85, "float16": 0.85, "int8": 0.7}
RATIOS = {"float32": 1.0, "bf16": 1.2, "float16": 1.2, "int8": 1.1, "int4": 1.0}
TOGETHER = {"llama.cpp": 1.5, "transformers": 3.0}
Call = Callable[[], float]


def prompt(row: int = 0) -> list[int]:
    """No two rows begin alike, so that nothing can be shared."""
    return [3 + (place + 50 * row) % 1000 for place in range(PROMPT)]


class Stream:
    """Answers under way: as many as `rows`, each behind a prompt, taking a token in every step."""

    def __init__(self, network: Any, weights: str, rows: int) -> None:
        self.rows = rows
        self.slots = Slots(network, rows, ROOM, weights=weights)  # type: ignore[arg-type]
        for row in range(rows):
            self.slots.extend([row], [prompt(row)])

    def decode(self) -> float:
        """Tokens/s of all rows together."""
        token = [[5]] * self.rows
        start = time.perf_counter()
        for _ in range(TOKENS):
            self.slots.extend(list(range(self.rows)), token)
        return self.rows * TOKENS / (time.perf_counter() - start)

    def memory(self) -> list[Tensor]:
        """What a step reads: weights, and the entries of the tokens so far."""
        assert self.slots.replay is not None
        self.slots.settle()
        length = int(self.slots.state.lengths[0])
        held = [
            tensor[0, :, :length].contiguous() for _, _, s in self.slots.state.each() for tensor in s.tensors.values()
        ]
        return self.slots.replay.tape.pieces + held

    def floor(self) -> Call:
        """Tokens/s if reading were all: the best of several times."""
        parts = [part.reshape(-1).view(torch.uint8) for part in self.memory()]
        views = [part[: len(part) // 4 * 4].view(torch.float32) for part in parts if len(part) >= 4]

        def once() -> float:
            best = 0.0
            for _ in range(8):
                start = time.perf_counter()
                for view in views:
                    read_all(view)
                best = max(best, 1 / (time.perf_counter() - start))
            return best

        return once


def apart(network: Any, weights: str) -> float:
    """How far the scores after a short prompt are from float64's over the same weights, relative; in int8
    and int4 the rounding of what the weights are multiplied with is all that is left."""
    ids = [3 + 7 * place % 1000 for place in range(24)]
    slots = Slots(network, 1, 32, weights=weights)  # type: ignore[arg-type]
    found = torch.cat([slots.extend([0], [[token]])[0].clone() for token in ids]).double()
    expected = with_held(network, weights)(torch.tensor([ids]))[0]
    return float((found - expected).norm() / expected.norm())


def peer(kind: str, shape: Shape, rows: int, folder: str) -> Llama | None:
    """llama.cpp on the same shape behind the same prompts, in its quickest way; None where it is not installed."""
    if missing("engine"):
        return None
    file = Path(folder) / f"{kind}.gguf"
    write_gguf(file, kind, shape)
    return fastest(file, [prompt(row) for row in range(rows)], ROOM, lambda peer: peer.decode(TOKENS))


def one(network: Any, name: str, shape: Shape, repeats: int, exceeds: bool) -> None:
    """One stream: each kind of weights in turn with its floor and its peer; exceeds: whether the weights
    do not fit a cache, so that the floor is memory's."""
    for weights in PEERS:
        with tempfile.TemporaryDirectory() as folder:
            stream = Stream(network, weights, 1)
            calls = {"armillary": stream.decode, "floor": stream.floor()}
            rival = peer(PEERS[weights], shape, 1, folder)
            if rival is not None:
                calls["llama.cpp"] = partial(rival.decode, TOKENS)
            found = interleaved(calls, repeats)
            if rival is not None:
                rival.close()
        size = sum(part.numel() * part.element_size() for part in stream.memory())
        figures: dict[str, Any] = {
            "tokens/s": statistics.median(found["armillary"]),
            "MB read per token": size / 1e6,
            "GB/s of reading alone": statistics.median(found["floor"]) * size / 1e9,
            "fraction of the floor": ratio(found, "armillary", "floor"),
            "fraction of the quickest reading": statistics.median(found["armillary"]) / max(found["floor"]),
        }
        reach: dict[str, tuple[float, str]] = {}
        if exceeds and weights in FLOORS:
            reach["fraction of the floor"] = (FLOORS[weights], "min")
        if rival is not None:
            figures[f"llama.cpp {PEERS[weights]} tokens/s"] = statistics.median(found["llama.cpp"])
            figures["llama.cpp"] = str(rival)
            figures["speed ratio"] = ratio(found, "armillary", "llama.cpp")
            reach["speed ratio"] = (RATIOS[weights], "min")
        report(f"engine {name} {weights}", figures, reach)


class Whole:
    """16 requests to an engine: tokens/s while all of them are answered, and of everything."""

    def __init__(self, network: Any, weights: str) -> None:
        self.engine = Engine(network, slots=STREAMS, capacity=PROMPT + WHOLE, keep=False, weights=weights)  # type: ignore[arg-type]
        self.whole: list[float] = []

    def __call__(self) -> float:
        times: list[list[float]] = [[] for _ in range(STREAMS)]
        sampling = Sampling(max_new_tokens=WHOLE, temperature=0)
        start = time.perf_counter()
        answers = [
            self.engine.submit(
                Request(tuple(prompt(row)), sampling, stream=row),
                lambda piece, row=row: times[row].extend([time.perf_counter()] * len(piece.choices)),
            )
            for row in range(STREAMS)
        ]
        for answer in answers:
            answer.wait()
        assert all(len(row) == WHOLE for row in times)
        self.whole.append(STREAMS * WHOLE / (max(row[-1] for row in times) - start))
        first, last = max(row[0] for row in times), min(row[-1] for row in times)
        assert first < last, "no moment in which all of them were answered"
        return sum(first < at <= last for row in times for at in row) / (last - first)


def many(repeats: int) -> None:
    """16 streams: each kind of weights against plain steps, and the claim's against the peers. Keys and values take 16
    bits, as the peers' do, where the processor has products of such numbers; beside weights in float32, 32."""
    half = torch.float32 if slow(torch.bfloat16) else torch.bfloat16
    wide, narrow = ours(torch.float32).eval(), ours(half, masters=torch.bfloat16).eval()
    calls: dict[str, Call] = {kind: Stream(wide, kind, STREAMS).decode for kind in ("plain", "float32")}
    calls |= {kind: Stream(narrow, kind, STREAMS).decode for kind in PEERS if kind != "float32"}
    wholes = {kind: Whole(narrow, kind) for kind in ("bf16", "int8")}
    calls |= {f"{kind} with choice": whole for kind, whole in wholes.items()}
    with tempfile.TemporaryDirectory() as folder:
        rivals = {f"llama.cpp {PEERS[kind]}": peer(PEERS[kind], SMALL, STREAMS, folder) for kind in wholes}
        calls |= {name: partial(rival.decode, TOKENS) for name, rival in rivals.items() if rival is not None}
        generate = transformers()
        if generate is not None:
            calls["transformers"] = generate
        found = interleaved(calls, repeats)
        for rival in rivals.values():
            if rival is not None:
                rival.close()
    figures: dict[str, Any] = {f"{name} tokens/s": statistics.median(found[name]) for name in calls}
    figures |= {name: str(rival) for name, rival in rivals.items() if rival is not None}
    for kind, whole in wholes.items():
        figures[f"{kind}, requests from end to end, tokens/s"] = statistics.median(whole.whole[1:])
    figures |= {f"{kind} against plain": ratio(found, kind, "plain") for kind in PEERS}
    reach: dict[str, tuple[float, str]] = {"float32 against plain": (1.0, "min"), "int8 against plain": (2.0, "min")}
    for kind in wholes:
        name = f"llama.cpp {PEERS[kind]}"
        if name in calls:
            figures[f"{kind} against {name}"] = ratio(found, kind, name)
            reach[f"{kind} against {name}"] = (TOGETHER["llama.cpp"], "min")
            figures[f"{kind} with choice against {name}"] = ratio(found, f"{kind} with choice", name)
        if "transformers" in calls:
            key = f"{kind} with choice against transformers"
            figures[key] = ratio(found, f"{kind} with choice", "transformers")
            reach[key] = (TOGETHER["transformers"], "min")
    report("engine 16 streams", figures, reach)


def transformers() -> Call | None:
    try:
        model = theirs(torch.float32 if slow(torch.bfloat16) else torch.bfloat16).eval()
    except ImportError as error:
        print(f"engine: transformers is not here ({error})", file=sys.stderr)
        return None
    made = Transformers(model, [prompt(row) for row in range(STREAMS)])
    return lambda: made.decode(TOKENS)


@torch.no_grad()
def main() -> None:
    if not available():
        print("engine: there is no C compiler here, so no native step", file=sys.stderr)
        return
    small = ours(torch.float32).eval()
    alike = {weights: apart(small, weights) for weights in PEERS}
    reach = {"float32": 1e-4, "bf16": 1e-4, "float16": 1e-4, "int8": 0.05, "int4": 0.05}
    report("engine scores", alike, {kind: (bound, "max") for kind, bound in reach.items()})
    one(small, "33 M", SMALL, 7, exceeds=False)
    del small
    many(4)
    large = ours(torch.float32, masters=torch.bfloat16, shape=LARGE).eval()
    one(large, "388 M", LARGE, 5, exceeds=True)


if __name__ == "__main__":
    main()
