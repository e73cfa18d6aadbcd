"""A window of 256 against fused dense attention: forward and backward, batch 1, 8 heads of 64; time against length."""

from __future__ import annotations

import statistics

import torch
import torch.nn.functional as F

from armillary.nn.mask import Window
from armillary.nn.ops.attend import attend, attend_plain
from common import exponent, forward_backward, interleaved, largest_difference, ratio, report, slow

WINDOW, HEADS, WIDTH, LENGTH, SHORT = 256, 8, 64, 16384, 4096


def tensors(length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(1, HEADS, length, WIDTH, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def windowed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    y, _ = attend(q, k, v, mask=Window(WINDOW - 1, 0), scale=WIDTH**-0.5)
    return y


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def check(dtype: torch.dtype) -> float:
    """The largest difference from the definition, outputs and gradients."""
    parts = tensors(1024, dtype)
    wide = [part.detach().float().requires_grad_() for part in parts]
    expected, _ = attend_plain(*wide, mask=Window(WINDOW - 1, 0), scale=WIDTH**-0.5)
    return largest_difference(windowed(*parts), parts, expected, wide)


def main() -> None:
    figures: dict[str, float] = {}
    reach: dict[str, tuple[float, str]] = {}
    for name, dtype, close in (("float32", torch.float32, 1e-4), ("bf16", torch.bfloat16, 3e-2)):
        error = check(dtype)
        assert error <= close, f"{name}: off by {error}"
        length = SHORT if slow(dtype) else LENGTH
        parts = tensors(length, dtype)
        calls = {"window": forward_backward(windowed, parts), "dense": forward_backward(dense, parts)}
        found = interleaved(calls, repeats=3)
        figures[f"{name}: tokens"] = length
        for call in calls:
            figures[f"{name}: {call}, ms"] = 1e3 * statistics.median(found[call])
        figures[f"{name}: faster, ×"] = ratio(found, "dense", "window")
        reach[f"{name}: faster, ×"] = (8.0, "min")
        lengths = [length // 4, length // 2, length, 2 * length]
        found = interleaved({str(n): forward_backward(windowed, tensors(n, dtype)) for n in lengths}, repeats=3)
        what = f"{name}: exponent of time, {lengths[0] // 1024}k to {lengths[-1] // 1024}k"
        figures[what], reach[what] = exponent(found), (1.15, "max")
        figures[f"{name}: largest difference"] = error
    report("window", figures, reach)


if __name__ == "__main__":
    main()
