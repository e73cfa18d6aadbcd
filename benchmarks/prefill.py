"""Prefill of 512 tokens in bf16 against `llama.cpp` in f16, on the same shape with random weights."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from common import DEPTH, HEADS, HIDDEN, KV_HEADS, VOCABULARY, WIDTH, interleaved, ours, ratio, report

PROMPT = 512


def write_gguf(path: Path) -> None:
    """A random LLaMA-shaped model in f16, in the layout that llama.cpp reads."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(DEPTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}".encode() for i in range(VOCABULARY)])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([3, 3, 3, *[1] * (VOCABULARY - 3)])
    draw = np.random.default_rng(0)

    def half(*shape: int) -> np.ndarray:
        return (draw.standard_normal(shape, dtype=np.float32) * shape[-1] ** -0.5).astype(np.float16)

    each = WIDTH // HEADS
    writer.add_tensor("token_embd.weight", half(VOCABULARY, WIDTH))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for block in range(DEPTH):
        shapes = {
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (KV_HEADS * each, WIDTH),
            "attn_v": (KV_HEADS * each, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (HIDDEN, WIDTH),
            "ffn_up": (HIDDEN, WIDTH),
            "ffn_down": (WIDTH, HIDDEN),
        }
        for name, shape in shapes.items():
            writer.add_tensor(f"blk.{block}.{name}.weight", half(*shape))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
