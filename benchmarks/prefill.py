"""Prefill of 512 tokens in bf16 against `llama.cpp` in f16, on the same shape with random weights: the network's
pass alone, and a request for one token through the whole engine. The quickest of the peer's
settings is the peer."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from armillary.engine.core import Engine
from armillary.engine.request import Request
from armillary.engine.sampling import Sampling
from common import VOCABULARY, interleaved, ours, ratio, report, write_gguf
from rivals import fastest, missing

PROMPT = 512


@torch.no_grad()
def main() -> None:
    if missing("prefill"):
        return
    network = ours(torch.bfloat16, masters=torch.bfloat16).eval()
    draw = random.Random(0)
    engine = Engine(network, slots=1, keep=False)

    def prompt() -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(PROMPT)]

    def alone() -> float:
        ids, state = torch.tensor([prompt()]), network.init_state(1, PROMPT)
        start = time.perf_counter()
        network.extend(ids, state, last=True)
        return PROMPT / (time.perf_counter() - start)

    def whole() -> float:
        ids = tuple(prompt())
        start = time.perf_counter()
        engine.submit(Request(ids, Sampling(max_new_tokens=1, temperature=0))).wait()
        return PROMPT / (time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "random.gguf"
        write_gguf(file)
        peer = fastest(file, [prompt()], PROMPT + 8, lambda peer: peer.prefill(prompt()))
        calls = {
            "armillary": alone,
            "through the engine": whole,
            "llama.cpp": lambda: peer.prefill(prompt()),
        }
        found = interleaved(calls, repeats=15)
        peer.close()
    figures: dict[str, Any] = {f"{name} tokens/s": statistics.median(speeds) for name, speeds in found.items()}
    figures["llama.cpp"] = str(peer)
    figures["speed ratio"] = ratio(found, "armillary", "llama.cpp")
    figures["through the engine: speed ratio"] = ratio(found, "through the engine", "llama.cpp")
    report("prefill", figures, {"speed ratio": (1.5, "min"), "through the engine: speed ratio": (1.5, "min")})


if __name__ == "__main__":
    main()
