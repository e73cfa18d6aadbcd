"""Block-sparse attention against PyTorch's attention under the same mask written out; outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.nn.cost import Counter
from armillary.nn.ops import block_sparse, plain_ops
from armillary.nn.ops.block_sparse import attend_block_sparse, open_pairs

B, H, G, K = 2, 4, 2, 8


def setting(name: str) -> dict[str, Any]:
    """Sizes and extras of one way to call the op."""
    found: dict[str, Any] = {"length": 32, "rows": 8, "columns": 8, "causal": True}
    found |= {
        "square": {},
        "thin": {"rows": 2},
        "ends": {"length": 29, "rows": 4},
        "open": {"causal": False},
        "open_ends": {"causal": False, "length": 29, "rows": 4},
    }[name]
    return found


def written_out(layout: Tensor, at: dict[str, Any], extra: dict[str, Tensor]) -> Tensor:
    """Bool [B, H, T, T] by a loop over pairs of tokens."""
    length = at["length"]
    mask = torch.zeros(B, H, length, length, dtype=torch.bool)
    for t in range(length):
        for s in range(length):
            seen = layout.expand(B, H, -1, -1)[:, :, t // at["rows"], s // at["columns"]]
            if at["causal"] and s > t:
                seen = torch.zeros_like(seen)
            if "documents" in extra:
                seen = seen & (extra["documents"][:, t] == extra["documents"][:, s])[:, None]
            if "padding" in extra:
                seen = seen & extra["padding"][:, s, None]
            mask[:, :, t, s] = seen
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("extras", [(), ("documents", "padding"), ("gate",), ("gate", "documents")])
@pytest.mark.parametrize("name", ["square", "thin", "ends", "open", "open_ends"])
def test_it_is_masked_attention(
    name: str, extras: tuple[str, ...], dtype: torch.dtype, agree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_sparse, "SCORES", 600)  # several passes over each group of tiles
    at = setting(name)
    length, rows, columns = at["length"], at["rows"], at["columns"]
    blocks = -(-length // columns)
    q = torch.randn(B, H, length, K, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(B, G, length, K, dtype=dtype, requires_grad=True) for _ in range(2))
    layout = torch.rand(B, H, -(-length // rows), blocks) < 0.5
    extra: dict[str, Tensor] = {}
    if "documents" in extras:
        extra["documents"] = (torch.arange(length) >= torch.tensor([[5], [17]])).long()
    if "padding" in extras:
        extra["padding"] = torch.arange(length) < torch.tensor([[length], [length - 6]])
    wanted = [q, k, v]
    mask: Tensor = written_out(layout, at, extra)
    added = torch.zeros(B, H, length, length, dtype=dtype)
    if "gate" in extras:
        gate = torch.rand(B, H, length, blocks, dtype=dtype).add(0.1).log()
        extra["gate"] = gate.masked_fill(torch.rand(gate.shape) < 0.3, -torch.inf).requires_grad_()
        wanted.append(extra["gate"])
        spread = extra["gate"][..., torch.arange(length) // columns]
        mask = mask & (spread > -torch.inf)
        added = added + spread.masked_fill(~mask, 0)
    y = attend_block_sparse(q, k, v, layout, rows=rows, columns=columns, scale=0.4, causal=at["causal"], **extra)
    added = added.masked_fill(~mask, -torch.inf)
    lonely = ~mask.any(-1)  # a query that may see nothing gives zeros
    added = added.masked_fill(lonely[..., None], 0.0)
    each_k, each_v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
    expected = F.scaled_dot_product_attention(q, each_k, each_v, attn_mask=added, scale=0.4)
    expected = expected.masked_fill(lonely[..., None], 0.0)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    agree(y, expected, tolerance)
    weights = torch.randn_like(y)
    ours = torch.autograd.grad((y * weights).sum(), wanted)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 10 * tolerance)
    with plain_ops():
        again = attend_block_sparse(
            q, k, v, layout, rows=rows, columns=columns, scale=0.4, causal=at["causal"], **extra
        )
    agree(again, expected, tolerance)


def test_rows_begin_where_they_say(agree: Any) -> None:
    """Queries behind other numbers of keys in each row, as decoding has them."""
    q, k, v = torch.randn(2, 4, 3, K), torch.randn(2, 2, 20, K), torch.randn(2, 2, 20, 5)
    offset = torch.tensor([4, 13])
    layout = torch.rand(2, 4, 3, 5) < 0.6
    layout[..., 0] = True
    y = attend_block_sparse(q, k, v, layout, rows=1, columns=4, scale=0.5, offset=offset)
    for b in range(2):
        for h in range(4):
            for t in range(3):
                last = int(offset[b]) + t
                seen = [s for s in range(last + 1) if layout[b, h, t, s // 4]]
                weights = torch.softmax(k[b, h // 2, seen] @ q[b, h, t] * 0.5, 0)
                agree(y[b, h, t], weights @ v[b, h // 2, seen], 1e-5)


def test_closed_blocks_are_left_alone() -> None:
    """What is in them, even if it is not a number, reaches neither outputs nor gradients."""
    q, k, v = (torch.randn(1, 2, 32, K) for _ in range(3))
    layout = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    layout[..., 0] = layout[..., 2] = True
    k[:, :, 8:16] = torch.nan
    v[:, :, 8:16] = torch.inf
    tensors = [x.requires_grad_() for x in (q, k, v)]
    y = attend_block_sparse(q, k, v, layout, rows=8, columns=8, scale=1.0)
    slopes = torch.autograd.grad(y.sum(), tensors)
    assert y.isfinite().all() and all(slope.isfinite().all() for slope in slopes)
    assert not slopes[1][:, :, 8:16].any() and not slopes[2][:, :, 8:16].any()


def test_work_is_counted_by_open_blocks() -> None:
    q = k = v = torch.randn(1, 2, 32, K)
    layout = torch.eye(4, dtype=torch.bool)[None, None]
    assert open_pairs(layout, 1, 2, 8, 8, True) == 2 * 4 * 64
    with torch.no_grad(), Counter() as counter:
        attend_block_sparse(q, k, v, layout, rows=8, columns=8, scale=1.0)
    assert counter.flops == 4 * K * 2 * 4 * 64


def test_bf16_is_close(agree: Any) -> None:
    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
    layout = torch.rand(1, 2, 4, 4) < 0.5
    layout |= torch.eye(4, dtype=torch.bool)
    low = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    high = [x.bfloat16().float().requires_grad_() for x in (q, k, v)]
    ys = [attend_block_sparse(*x, layout, rows=16, columns=16, scale=0.25) for x in (low, high)]
    assert ys[0].dtype == torch.bfloat16
    agree(ys[0].float(), ys[1], 0.02)
    for a, b in zip(torch.autograd.grad(ys[0].sum(), low), torch.autograd.grad(ys[1].sum(), high), strict=True):
        assert a.dtype == torch.bfloat16
        agree(a.float(), b, 0.03)
