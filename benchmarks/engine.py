"""Decoding by the engine with weights in float32, bf16, int8 and int4: one stream behind a prompt, at a shape
that fits a processor's cache and at one that does not, and 16 streams; against reading the same weights
and states and nothing else (the floor), against plain steps and, where it is installed, against `llama.cpp`
in F32, F16, Q8_0 and Q4_0. Scores are compared in the run: float32 with plain steps, the others with a
pass in float64 over exactly the numbers that they hold.
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armillary.engine.slots import Slots
from armillary.native import available
from armillary.native import tape as native
from armillary.native.rows import read_all
from armillary.nn.linear import Linear
from common import SMALL, Shape, interleaved, ours, ratio, report, write_gguf

LARGE = Shape(width=1024, depth=30, heads=16, kv_heads=8, hidden=2816, vocabulary=32768)
PROMPT, TOKENS, STREAMS = 256, 16, 16
PEERS = {"float32": "F32", "bf16": "F16", "int8": "Q8_0", "int4": "Q4_0"}


class Stream:
    """Answers under way: as many as `rows`, each behind a prompt, taking a token in every step."""

    def __init__(self, network: Any, weights: str, rows: int) -> None:
        self.rows = rows
        self.slots = Slots(network, rows, PROMPT + 64 * TOKENS, weights=weights)  # type: ignore[arg-type]
        prompt = [3 + place % 1000 for place in range(PROMPT)]
        for row in range(rows):
            self.logits = self.slots.extend([row], [prompt])[0, 0].clone()

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
        return self.slots.replay.tape.packed + held

    def floor(self) -> Callable[[], float]:
        """Tokens/s if reading were all."""
        parts = [part.reshape(-1).view(torch.uint8) for part in self.memory()]
        views = [part[: len(part) // 4 * 4].view(torch.float32) for part in parts if len(part) >= 4]

        def once() -> float:
            start = time.perf_counter()
            for _ in range(4):
                for view in views:
                    read_all(view)
            return 4 / (time.perf_counter() - start)

        return once


def held(network: Any, weights: str) -> Any:
    """The network with exactly the weights that products hold, in float64."""
    made = copy.deepcopy(network).double()
    for module in made.modules():
        if isinstance(module, Linear):
            module.weight = torch.nn.Parameter(module.weight.detach().clone())
    for name, module in made.named_modules():
        if isinstance(module, Linear):
            weight, width = network.get_submodule(name).weight, module.inputs
            if weights == "int8":
                module.weight.data = native.unpack_int8(native.pack_int8(weight), width)
            elif weights == "int4":
                module.weight.data = native.unpack_int4(native.pack_int4(weight), width)
            elif weights == "bf16":
                module.weight.data = weight.detach().bfloat16().double()
    return made.compute(torch.float64)


def apart(network: Any, weights: str) -> float:
    """How far the scores after a short prompt are from float64's over the same weights, relative; in int8
    and int4 the rounding of what the weights are multiplied with is all that is left."""
    ids = [3 + 7 * place % 1000 for place in range(24)]
    slots = Slots(network, 1, 32, weights=weights)  # type: ignore[arg-type]
    found = torch.cat([slots.extend([0], [[token]])[0].clone() for token in ids]).double()
    expected = held(network, weights)(torch.tensor([ids]))[0]
    return float((found - expected).norm() / expected.norm())


def peer(kind: str, shape: Shape, folder: str) -> Callable[[], float] | None:
    """Tokens/s of llama.cpp on the same shape with the same prompt, or None where it is not installed."""
    try:
        import gguf  # noqa: F401
        from llama_cpp import Llama
    except ImportError as error:
        print(f"engine: llama.cpp is not here ({error}); pip install llama-cpp-python gguf", file=sys.stderr)
        return None
    file = Path(folder) / f"{kind}-{shape.width}.gguf"
    write_gguf(file, kind, shape)
    threads = torch.get_num_threads()
    model = Llama(
        str(file), n_ctx=PROMPT + 64 * TOKENS, n_batch=PROMPT, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    model.eval([3 + place % 1000 for place in range(PROMPT)])

    def once() -> float:
        start = time.perf_counter()
        for _ in range(TOKENS):
            model.eval([5])
        return TOKENS / (time.perf_counter() - start)

    return once


def one(network: Any, name: str, shape: Shape, kinds: tuple[str, ...], repeats: int) -> None:
    """One stream: each kind of weights in turn with its floor and its peer."""
    for weights in kinds:
        with tempfile.TemporaryDirectory() as folder:
            stream = Stream(network, weights, 1)
            calls = {"armillary": stream.decode, "floor": stream.floor()}
            rival = peer(PEERS[weights], shape, folder)
            if rival is not None:
                calls["llama.cpp"] = rival
            found = interleaved(calls, repeats)
        size = sum(part.numel() * part.element_size() for part in stream.memory())
        figures: dict[str, Any] = {
            "tokens/s": statistics.median(found["armillary"]),
            "MB read per token": size / 1e6,
            "GB/s of reading alone": statistics.median(found["floor"]) * size / 1e9,
            "fraction of the floor": ratio(found, "armillary", "floor"),
        }
        reach = {"fraction of the floor": (0.6 if weights == "int4" else 0.8, "min")}
        if rival is not None:
            figures[f"llama.cpp {PEERS[weights]} tokens/s"] = statistics.median(found["llama.cpp"])
            figures["speed ratio"] = ratio(found, "armillary", "llama.cpp")
            reach["speed ratio"] = (1.0, "min")
        report(f"engine {name} {weights}", figures, reach)


def many(network: Any) -> None:
    """16 streams: each kind of weights against plain steps."""
    calls = {kind: Stream(network, kind, STREAMS).decode for kind in ("plain", *PEERS)}
    found = interleaved(calls, 3)
    figures: dict[str, Any] = {f"{kind} tokens/s": statistics.median(found[kind]) for kind in calls}
    figures |= {f"{kind} against plain": ratio(found, kind, "plain") for kind in PEERS}
    report("engine 16 streams", figures, {"float32 against plain": (1.0, "min"), "int8 against plain": (2.0, "min")})


@torch.no_grad()
def main() -> None:
    if not available():
        print("engine: there is no C compiler here, so no native step", file=sys.stderr)
        return
    small = ours(torch.float32).eval()
    alike = {weights: apart(small, weights) for weights in PEERS}
    reach = {"float32": 1e-4, "bf16": 1e-4, "int8": 0.05, "int4": 0.05}
    report("engine scores", alike, {kind: (bound, "max") for kind, bound in reach.items()})
    one(small, "33 M", SMALL, tuple(PEERS), 5)
    many(small)
    del small
    large = ours(torch.float32, masters=torch.bfloat16, shape=LARGE).eval()
    one(large, "388 M", LARGE, ("bf16", "int8", "int4"), 3)


if __name__ == "__main__":
    main()
