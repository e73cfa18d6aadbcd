"""What the benchmarks share: the shape, the two models, interleaved timing, floors, and the result file."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the command line does, before PyTorch starts its threads

import torch

WIDTH, DEPTH, HEADS, KV_HEADS, HIDDEN, VOCABULARY = 512, 8, 8, 4, 1408, 16384
RESULTS = Path(__file__).with_name("results.jsonl")


class Shape(NamedTuple):
    """A LLaMA-shaped decoder with a tied head."""

    width: int = WIDTH
    depth: int = DEPTH
    heads: int = HEADS
    kv_heads: int = KV_HEADS
    hidden: int = HIDDEN
    vocabulary: int = VOCABULARY


SMALL = Shape()


def ours(dtype: torch.dtype, *, masters: torch.dtype = torch.float32, shape: Shape = SMALL) -> Any:
    """Our network: weights in `masters`, activations in `dtype`."""
    from armillary.base.settings import parse
    from armillary.nn.network import ModelSettings, build

    settings = parse(
        ModelSettings,
        {
            "width": shape.width,
            "depth": shape.depth,
            "vocabulary": shape.vocabulary,
            "context": 2048,
            "block": {
                "mixer": {"kind": "attention", "heads": shape.heads, "kv_heads": shape.kv_heads, "position": "rope"},
                "channel": {"kind": "gated", "hidden": shape.hidden},
            },
        },
    )
    return build(settings).to(masters).compute(dtype)


def theirs(dtype: torch.dtype, shape: Shape = SMALL) -> Any:
    """The same shape in `transformers`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.hidden,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def write_gguf(path: Path, kind: str = "F16", shape: Shape = SMALL) -> None:
    """A random model of the shape in the layout that llama.cpp reads; kind: F32, F16, Q8_0 or Q4_0."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.depth)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}".encode() for i in range(shape.vocabulary)])
    writer.add_token_scores([0.0] * shape.vocabulary)
    writer.add_token_types([3, 3, 3, *[1] * (shape.vocabulary - 3)])
    held = gguf.GGMLQuantizationType[kind]
    draw = np.random.default_rng(0)
    made: dict[tuple[int, int], Any] = {}  # layers may be alike: a file holds each of them, so memory does, too

    def matrix(name: str, rows: int, columns: int) -> None:
        if (rows, columns) not in made:
            data = draw.standard_normal((rows, columns), dtype=np.float32) * np.float32(columns**-0.5)
            made[rows, columns] = gguf.quants.quantize(data, held)
        writer.add_tensor(name, made[rows, columns], raw_dtype=held)

    keys = shape.width // shape.heads * shape.kv_heads
    matrix("token_embd.weight", shape.vocabulary, shape.width)
    writer.add_tensor("output_norm.weight", np.ones(shape.width, np.float32))
    for block in range(shape.depth):
        matrix(f"blk.{block}.attn_q.weight", shape.width, shape.width)
        matrix(f"blk.{block}.attn_k.weight", keys, shape.width)
        matrix(f"blk.{block}.attn_v.weight", keys, shape.width)
        matrix(f"blk.{block}.attn_output.weight", shape.width, shape.width)
        matrix(f"blk.{block}.ffn_gate.weight", shape.hidden, shape.width)
        matrix(f"blk.{block}.ffn_up.weight", shape.hidden, shape.width)
        matrix(f"blk.{block}.ffn_down.weight", shape.width, shape.hidden)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{name}.weight", np.ones(shape.width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(calls: dict[str, Callable[[], float]], repeats: int = 5) -> dict[str, list[float]]:
    """Each call gives a figure (tokens/s, say); they take turns, after one round that is not counted."""
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            found[name].append(call())
    return found


def ratio(found: dict[str, list[float]], a: str, b: str) -> float:
    """Median of the pairwise ratios: machines drift, neighbours in time do not."""
    return statistics.median(x / y for x, y in zip(found[a], found[b], strict=True))


def matmul_peak(dtype: torch.dtype) -> float:
    """FLOP/s of a large product, the best of several."""
    a, b = torch.ones(2048, 2048, dtype=dtype), torch.ones(2048, 2048, dtype=dtype)
    best = 0.0
    for _ in range(12):
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        best = max(best, 2 * 2048**3 / (time.perf_counter() - start))
    return best


def slow(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies `dtype` so slowly (bf16 without instructions for it) that a peer
    must be timed at a shorter length than the claim's; a ratio that grows with length is then a lower bound."""
    return dtype != torch.float32 and matmul_peak(dtype) < matmul_peak(torch.float32) / 4


def forward_backward(call: Callable[..., torch.Tensor], parts: Sequence[torch.Tensor]) -> Callable[[], float]:
    """Seconds of one forward and backward pass; parts: the inputs, each of which gets its gradient."""

    def once() -> float:
        start = time.perf_counter()
        y = call(*parts)
        torch.autograd.grad(y, parts, torch.ones_like(y))
        return time.perf_counter() - start

    return once


def largest_difference(
    found: torch.Tensor, parts: Sequence[torch.Tensor], expected: torch.Tensor, wide: Sequence[torch.Tensor]
) -> float:
    """Of outputs and gradients, each relative to the largest expected value."""
    pairs = [(found, expected)]
    pairs += zip(
        torch.autograd.grad(found, parts, torch.ones_like(found)),
        torch.autograd.grad(expected, wide, torch.ones_like(expected)),
        strict=True,
    )
    return max(float(((a.float() - b).abs().max() / b.abs().max()).detach()) for a, b in pairs)


def exponent(found: dict[str, list[float]]) -> float:
    """Slope of log time against log length, through the medians; found: length → seconds."""
    x = torch.tensor([float(length) for length in found]).log()
    y = torch.tensor([statistics.median(times) for times in found.values()]).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def peak_rss() -> int:
    """Bytes of the largest resident set so far (of this program: getrusage would count its parent's too)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def report(name: str, figures: dict[str, Any], reach: dict[str, tuple[float, str]], **more: Any) -> None:
    """Print a benchmark's figures against what they should reach, and append them to the results.

    reach: figure → (value, "min" or "max"); more: what else the record holds.
    """
    print(f"\n{name}")
    for key, value in figures.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        goal = ""
        if key in reach:
            bound, kind = reach[key]
            met = value >= bound if kind == "min" else value <= bound
            goal = f"   {'reached' if met else 'MISSED'}: {'≥' if kind == 'min' else '≤'} {bound}"
        print(f"  {key:<42} {text}{goal}")
    record = {
        "benchmark": name,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "figures": figures,
        "reach": {key: {"bound": bound, "kind": kind} for key, (bound, kind) in reach.items()},
        **more,
    }
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
