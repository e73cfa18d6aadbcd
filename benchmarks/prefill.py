"""Prefill of 512 tokens in bf16 against `llama.cpp` in f16, on the same shape with random weights."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from common import VOCABULARY, interleaved, ours, ratio, report, write_gguf

PROMPT = 512


@torch.no_grad()
def main() -> None:
    try:
        import gguf  # noqa: F401
        from llama_cpp import Llama
    except ImportError as error:
        print(f"prefill: llama.cpp is not here ({error}); pip install llama-cpp-python gguf", file=sys.stderr)
        return
    network = ours(torch.bfloat16, masters=torch.bfloat16).eval()
    ids = torch.randint(3, VOCABULARY, (1, PROMPT))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "random.gguf"
        write_gguf(file)
        threads = torch.get_num_threads()
        peer = Llama(
            str(file), n_ctx=PROMPT + 8, n_batch=PROMPT, n_threads=threads, n_threads_batch=threads, verbose=False
        )

        def prefill_ours() -> float:
            state = network.init_state(1, PROMPT)
            start = time.perf_counter()
            network.extend(ids, state, last=True)
            return PROMPT / (time.perf_counter() - start)

        def prefill_theirs() -> float:
            peer.reset()
            start = time.perf_counter()
            peer.eval(ids[0].tolist())
            return PROMPT / (time.perf_counter() - start)

        found = interleaved({"armillary": prefill_ours, "llama.cpp": prefill_theirs}, repeats=9)
    report(
        "prefill",
        {
            "armillary tokens/s": statistics.median(found["armillary"]),
            "llama.cpp tokens/s": statistics.median(found["llama.cpp"]),
            "speed ratio": ratio(found, "armillary", "llama.cpp"),
        },
        {"speed ratio": (1.2, "min")},
    )


if __name__ == "__main__":
    main()
