"""Decoding at batch 1 behind 512 tokens, and prefill, against `transformers` with its cache (and, where it
is installed, prefill against `llama.cpp` f16 on the same shape)."""

from __future__ import annotations

import statistics
import time

import torch

from armillary.native import available
from armillary.native.rows import read_all
from common import VOCABULARY, interleaved, ours, ratio, report, theirs

PROMPT, TOKENS = 512, 32


def bandwidth() -> float:
    """Bytes/s of reading 128 MB once, the best of several: what decoding cannot exceed."""
    block = torch.ones(32 * 1024 * 1024)
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        read_all(block)
        best = max(best, block.numel() * 4 / (time.perf_counter() - start))
    return best


@torch.no_grad()
def main() -> None:
    ids = torch.randint(0, VOCABULARY, (1, PROMPT))
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        network, peer = ours(dtype, masters=dtype).eval(), theirs(dtype).eval()

        def prefill_ours(network=network) -> float:
            state = network.init_state(1, PROMPT)
            start = time.perf_counter()
            network.extend(ids, state, last=True)
            return PROMPT / (time.perf_counter() - start)

        def decode_ours(network=network) -> float:
            state = network.init_state(1, PROMPT + TOKENS)
            token = network.extend(ids, state, last=True)[:, -1].argmax(-1)[:, None]
            start = time.perf_counter()
            for _ in range(TOKENS):
                token = network.extend(token, state, last=True)[:, -1].argmax(-1)[:, None]
            return TOKENS / (time.perf_counter() - start)

        def prefill_theirs(peer=peer) -> float:
            start = time.perf_counter()
            peer(ids, use_cache=True, logits_to_keep=1)
            return PROMPT / (time.perf_counter() - start)

        def decode_theirs(peer=peer) -> float:
            start = time.perf_counter()
            peer.generate(ids, max_new_tokens=1, do_sample=False)
            first = time.perf_counter() - start
            start = time.perf_counter()
            peer.generate(ids, max_new_tokens=TOKENS + 1, do_sample=False)
            return TOKENS / (time.perf_counter() - start - first)

        found = interleaved({"armillary": decode_ours, "transformers": decode_theirs})
        filled = interleaved({"armillary": prefill_ours, "transformers": prefill_theirs})
        figures = {
            "armillary tokens/s": statistics.median(found["armillary"]),
            "transformers tokens/s": statistics.median(found["transformers"]),
            "speed ratio": ratio(found, "armillary", "transformers"),
            "armillary prefill tokens/s": statistics.median(filled["armillary"]),
            "transformers prefill tokens/s": statistics.median(filled["transformers"]),
            "prefill ratio": ratio(filled, "armillary", "transformers"),
        }
        if available():
            weights = sum(p.numel() * p.element_size() for p in network.parameters())
            figures["fraction of the bandwidth floor"] = weights * figures["armillary tokens/s"] / bandwidth()
        report(f"decoding {name}", figures, {"speed ratio": (1.3, "min")})


if __name__ == "__main__":
    main()
