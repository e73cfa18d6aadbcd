"""Block-sparse attention: time against density, and against dense attention, forward and backward.

Batch 1, 8 heads of 64, 8,192 tokens in blocks of 64; layouts are random below the diagonal, which is
open. Every layout's output is checked against masked dense attention on some of its heads.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F

from common import interleaved, ratio, report, slow

LENGTH, BLOCK, HEADS, WIDTH = 8192, 64, 8, 64
DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05)
CHECKED = 256  # the last rows of one head


def layout(density: float) -> torch.Tensor:
    """[1, H, N, N] with this share of the pairs on and below the diagonal open."""
    count = LENGTH // BLOCK
    pairs = count * (count + 1) / 2
    beside = (density * pairs - count) / (pairs - count)  # the diagonal is open anyway
    generator = torch.Generator().manual_seed(int(1000 * density))
    drawn = torch.rand(1, HEADS, count, count, generator=generator) < beside
    return (drawn | torch.eye(count, dtype=torch.bool)).tril()


def check(y, q, k, v, opened) -> None:
    """The last rows of head 0 against PyTorch's attention under the mask written out."""
    rows = torch.arange(LENGTH - CHECKED, LENGTH)
    columns = torch.arange(LENGTH)
    mask = opened[0, 0][rows // BLOCK][:, columns // BLOCK] & (columns <= rows[:, None])
    wide = [x[:, :1].detach().float() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(wide[0][:, :, rows], wide[1], wide[2], attn_mask=mask)
    found = y[:, :1, rows].detach().float()
    error = float((found - expected).abs().max() / expected.abs().max())
    bound = 1e-4 if q.dtype == torch.float32 else 0.03
    if not error <= bound:
        raise SystemExit(f"the outputs are off by {error:.2e}, at most {bound}")


def measure(dtype: torch.dtype, figures: dict, reach: dict) -> None:
    from armillary.nn.mask import Causal
    from armillary.nn.ops.attend import attend
    from armillary.nn.ops.block_sparse import attend_block_sparse

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, LENGTH, WIDTH, dtype=dtype, requires_grad=True) for _ in range(3))
    grad = torch.randn(1, HEADS, LENGTH, WIDTH, dtype=dtype)
    layouts = {density: layout(density) for density in DENSITIES}
    scale = WIDTH**-0.5

    def sparse(density: float) -> torch.Tensor:
        return attend_block_sparse(q, k, v, layouts[density], rows=BLOCK, columns=BLOCK, scale=scale)

    calls = {str(density): lambda density=density: sparse(density) for density in DENSITIES}
    peers = () if slow(dtype) else ("dense", "PyTorch")  # where bf16 is slow they take minutes at this length
    if peers:
        calls["dense"] = lambda: attend(q, k, v, mask=Causal(), scale=scale)[0]
        calls["PyTorch"] = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for density in DENSITIES:
        check(sparse(density), q, k, v, layouts[density])

    def seconds(call) -> float:
        start = time.perf_counter()
        call().backward(grad)
        return time.perf_counter() - start

    found = interleaved({name: lambda call=call: seconds(call) for name, call in calls.items()}, repeats=3)
    name = str(dtype).removeprefix("torch.")
    count = LENGTH // BLOCK
    shares = {d: float(layouts[d].sum()) / (HEADS * count * (count + 1) / 2) for d in DENSITIES}
    for label in peers:
        figures[f"{name}: {label} s"] = statistics.median(found[label])
    for density in DENSITIES:
        figures[f"{name}: {density:.0%} open, s"] = statistics.median(found[str(density)])
        if peers:
            figures[f"{name}: {density:.0%} open, PyTorch / ours"] = ratio(found, "PyTorch", str(density))
        if density < 1:
            key = f"{name}: {density:.0%} open, time per open block against all open"
            figures[key] = ratio(found, str(density), "1.0") / shares[density]
            reach[key] = (1.5, "max")


def main() -> None:
    figures: dict = {}
    reach: dict = {}
    for dtype in (torch.float32, torch.bfloat16):
        measure(dtype, figures, reach)
    report("block_sparse", figures, reach)


if __name__ == "__main__":
    main()
