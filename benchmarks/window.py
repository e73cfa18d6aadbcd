"""A window of 256 against fused dense attention: forward and backward, batch 1, 8 heads of 64; time against length."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from armillary.nn.mask import Window
from armillary.nn.ops.attend import attend, attend_plain
from common import interleaved, ratio, report

WINDOW, HEADS, WIDTH, LENGTH = 256, 8, 64, 16384


def tensors(length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(1, HEADS, length, WIDTH, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def windowed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    y, _ = attend(q, k, v, mask=Window(WINDOW - 1, 0), scale=WIDTH**-0.5)
    return y


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def timed(call: Callable[..., torch.Tensor], parts: list[torch.Tensor]) -> Callable[[], float]:
    """Seconds of one forward and backward pass."""

    def once() -> float:
        start = time.perf_counter()
        y = call(*parts)
        torch.autograd.grad(y, parts, torch.ones_like(y))
        return time.perf_counter() - start

    return once


def check(dtype: torch.dtype) -> float:
    """The largest difference from the definition, relative, outputs and gradients."""
    parts = tensors(1024, dtype)
    wide = [part.detach().float().requires_grad_() for part in parts]
    found = windowed(*parts)
    expected, _ = attend_plain(*wide, mask=Window(WINDOW - 1, 0), scale=WIDTH**-0.5)
    pairs = [(found, expected)]
    pairs += zip(
        torch.autograd.grad(found, parts, torch.ones_like(found)),
        torch.autograd.grad(expected, wide, torch.ones_like(expected)),
        strict=True,
    )
    return max(float(((a.float() - b).abs().max() / b.abs().max()).detach()) for a, b in pairs)


def main() -> None:
    figures: dict[str, float] = {}
    reach: dict[str, tuple[float, str]] = {}
    for name, dtype, close in (("float32", torch.float32, 1e-4), ("bf16", torch.bfloat16, 3e-2)):
        error = check(dtype)
        assert error <= close, f"{name}: off by {error}"
        parts = tensors(LENGTH, dtype)
        found = interleaved({"window": timed(windowed, parts), "dense": timed(dense, parts)})
        figures[f"{name}: window, ms"] = 1e3 * sorted(found["window"])[len(found["window"]) // 2]
        figures[f"{name}: dense, ms"] = 1e3 * sorted(found["dense"])[len(found["dense"]) // 2]
        figures[f"{name}: faster, ×"] = ratio(found, "dense", "window")
        reach[f"{name}: faster, ×"] = (8.0, "min")
        calls = {str(n): timed(windowed, tensors(n, dtype)) for n in (4096, 8192, 16384, 32768)}
        figures[f"{name}: exponent of time, 4k to 32k"] = exponent(interleaved(calls))
        reach[f"{name}: exponent of time, 4k to 32k"] = (1.15, "max")
        figures[f"{name}: largest difference"] = error
    report("window", figures, reach)


def exponent(found: dict[str, list[float]]) -> float:
    """Slope of log time against log length, through the medians."""
    x = torch.tensor([float(length) for length in found]).log()
    y = torch.tensor([sorted(times)[len(times) // 2] for times in found.values()]).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


if __name__ == "__main__":
    main()
