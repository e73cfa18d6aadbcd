"""Linear attention: forward and backward against fused dense attention, growth with length, chunks against the loop.

Batch 1, 8 heads of 64, causal, from queries, keys and values on, features included: elu + 1 (`linear`) and
256 positive random features (`performer`). Outputs are compared with the plain form in the run.
Where the processor multiplies bf16 slowly, dense attention in bf16 is timed at a length at which it ends
soon; it falls behind further as length grows, so the ratio there is a lower bound.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.nn.context import Context
from armillary.nn.mechanism import Frozen, Place, initialise
from armillary.nn.mixers.linear import LinearAttentionSettings
from armillary.nn.mixers.performer import PerformerSettings
from armillary.nn.ops import plain_ops
from common import interleaved, matmul_peak, ratio, report

HEADS, WIDTH = 8, 64
LENGTH, SLOW = 16384, 2048


def inputs(length: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v [1, T, H, K] as products make them, and the gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, length, HEADS, WIDTH, generator=generator).to(dtype) for _ in range(4)]
    return [x.requires_grad_() for x in made[:3]] + made[3:]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def mixers() -> dict[str, Callable[..., Tensor]]:
    """Everything between the projections of a mixer."""
    found: dict[str, Callable[..., Tensor]] = {}
    for name, settings in (
        ("linear", LinearAttentionSettings(heads=HEADS)),
        ("performer", PerformerSettings(heads=HEADS, features=256)),
    ):
        mixer: Any = settings.build(Place(HEADS * WIDTH))
        initialise(mixer, 0)

        def call(q: Tensor, k: Tensor, v: Tensor, mixer: Any = mixer) -> Tensor:
            return mixer.mix(Frozen(mixer.kernel(q, k, v.flatten(2), Context(), None)), v)

        found[name] = call
    return found


def seconds(call: Callable[..., Tensor], tensors: list[Tensor]) -> float:
    *inputs, weights = tensors
    start = time.perf_counter()
    y = call(*inputs)
    torch.autograd.grad(y, inputs, weights)
    return time.perf_counter() - start


def timed(call: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[[], float]:
    return lambda: seconds(call, tensors)


def check(calls: dict[str, Callable[..., Tensor]]) -> float:
    """The largest difference from the plain form, of outputs and gradients, relative to their size."""
    *tensors, weights = inputs(700, torch.float32)
    worst = 0.0
    for call in calls.values():
        y = call(*tensors)
        ours = [y, *torch.autograd.grad(y, tensors, weights)]
        with plain_ops():
            y = call(*tensors)
            theirs = [y, *torch.autograd.grad(y, tensors, weights)]
        for a, b in zip(ours, theirs, strict=True):
            worst = max(worst, float(((a - b).abs().max() / b.abs().max()).detach()))
    return worst


def main(repeats: int = 3) -> None:
    calls = mixers()
    figures: dict[str, Any] = {"largest relative difference from the plain form": check(calls)}
    reach: dict[str, tuple[float, str]] = {"largest relative difference from the plain form": (1e-4, "max")}
    slow = matmul_peak(torch.bfloat16) < matmul_peak(torch.float32) / 4
    for dtype in (torch.float32, torch.bfloat16):
        word = str(dtype).removeprefix("torch.")
        length = SLOW if slow and dtype == torch.bfloat16 else LENGTH
        tensors = inputs(length, dtype)
        sides = {"dense": dense, **calls}
        found = interleaved({name: timed(call, tensors) for name, call in sides.items()}, repeats)
        for name in calls:
            figures[f"{name}, {word}, {length} tokens, s"] = statistics.median(found[name])
            figures[f"{name} over dense, {word}, {length} tokens"] = ratio(found, "dense", name)
            reach[f"{name} over dense, {word}, {length} tokens"] = (8.0, "min")
        figures[f"dense, {word}, {length} tokens, s"] = statistics.median(found["dense"])
    short, long = inputs(4096, torch.float32), inputs(32768, torch.float32)
    for name, call in calls.items():
        found = interleaved({"4k": timed(call, short), "32k": timed(call, long)}, repeats)
        figures[f"{name}, time exponent 4k to 32k"] = math.log(ratio(found, "32k", "4k")) / math.log(8)
        reach[f"{name}, time exponent 4k to 32k"] = (1.1, "max")
    tensors = inputs(2048, torch.float32)

    def loop() -> float:
        with plain_ops():
            return seconds(calls["linear"], tensors)

    found = interleaved({"chunks": timed(calls["linear"], tensors), "loop": loop}, repeats)
    figures["chunks over the token loop, 2048 tokens"] = ratio(found, "loop", "chunks")
    reach["chunks over the token loop, 2048 tokens"] = (20.0, "min")
    report("linear_attention", figures, reach)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
