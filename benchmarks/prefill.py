"""Prefill of 512 tokens in bf16 against `llama.cpp` in f16, on the same shape with random weights: the network's
pass alone, and a request for one token through the whole engine. `llama.cpp` is asked with its fused attention and
without, and the faster of the two is the peer."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

from armillary.engine.core import Engine
from armillary.engine.request import Request
from armillary.engine.sampling import Sampling
from common import VOCABULARY, interleaved, ours, ratio, report, write_gguf
from rivals import Llama, missing

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
        calls, peers = {"armillary": alone, "through the engine": whole}, list[Llama]()
        for name, flash in (("llama.cpp", False), ("llama.cpp, its fused attention", True)):
            peer = Llama(file, [prompt()], PROMPT + 8, flash=flash)
            calls[name] = lambda peer=peer: peer.prefill(prompt())
            peers.append(peer)
        found = interleaved(calls, repeats=15)
        for peer in peers:
            peer.close()
    figures = {f"{name} tokens/s": statistics.median(speeds) for name, speeds in found.items()}
    rival = max((name for name in found if name.startswith("llama.cpp")), key=lambda one: statistics.median(found[one]))
    figures["speed ratio"] = ratio(found, "armillary", rival)
    figures["through the engine: speed ratio"] = ratio(found, "through the engine", rival)
    report("prefill", figures, {"speed ratio": (1.5, "min"), "through the engine: speed ratio": (1.5, "min")})


if __name__ == "__main__":
    main()
