"""Bands of sorted orders: the blocked form against the definition, and both against loops over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from armillary.native import bands
from armillary.nn import ops
from armillary.nn.ops import band, plain_ops
from armillary.nn.ops.band import NOWHERE, band_attend, band_seen, ranks, sort_groups


def given(length: int, widths: list[int], groups: int = 5, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, 2, length, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    chosen = [torch.randint(0, groups, (2, 2, length), generator=generator) for _ in widths]
    pairs = [sort_groups(one, width) for one, width in zip(chosen, widths, strict=True)]
    return q, k, v, [order for order, _ in pairs], torch.stack([place for _, place in pairs], 2), chosen


@pytest.mark.parametrize("widths", [[3], [2, 4, 90], [64]])
def test_the_seen_are_the_last_of_the_group_in_any_order(widths: list[int]) -> None:
    _, _, _, orders, places, chosen = given(40, widths, 3)
    seen = band_seen(orders, places, [min(width, 40) for width in widths])
    for b in range(2):
        for h in range(2):
            for t in range(40):
                wanted: set[int] = set()
                for groups, width in zip(chosen, widths, strict=True):
                    same = [s for s in range(t) if groups[b, h, s] == groups[b, h, t]]
                    wanted |= set(same[-width:])
                assert set(seen[b, h, t].nonzero()[:, 0].tolist()) == wanted


@pytest.mark.parametrize("widths", [[5], [64, 64], [100, 7, 300], [1000]])
@pytest.mark.parametrize("native", [True, False])
def test_blocks_are_the_definition(widths: list[int], native: bool, agree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, bands wider than a block, rows that do not fill the last; forward and backward."""
    if not native:
        monkeypatch.setattr(bands, "fits", lambda x: False)
    monkeypatch.setattr(band, "BLOCKS", 2)
    monkeypatch.setattr(band, "TOKENS", 1000)  # three heads of four together
    q, k, v, orders, places, _ = given(300, widths, 7)
    weights = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    found = band_attend(q, k, v, orders, places, widths, 0.4)
    slopes = torch.autograd.grad((found * weights).sum(), (q, k, v))
    with plain_ops():
        expected = band_attend(q, k, v, orders, places, widths, 0.4)
    wanted = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    agree(found, expected)
    for a, b in zip(slopes, wanted, strict=True):
        agree(a, b, 2e-5)


@pytest.mark.parametrize("multiplies", [True, False])
def test_bf16_stays_near(multiplies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On processors with products in bf16 and on those without."""
    monkeypatch.setattr(ops, "computes_bf16", lambda: multiplies)
    q, k, v, orders, places, _ = given(200, [20, 30], 4, torch.bfloat16)
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    found, expected = (band_attend(*x, orders, places, [20, 30], 0.4) for x in ((q, k, v), wide))
    assert found.dtype == torch.bfloat16
    slopes = torch.autograd.grad(found.float().square().sum(), (q, k, v))
    wanted = torch.autograd.grad(expected.square().sum(), wide)
    for a, b in zip((found.detach(), *slopes), (expected.detach(), *wanted), strict=True):
        assert float((a.float() - b).square().mean().sqrt()) < 0.02 * float(b.square().mean().sqrt())


def test_scores_far_apart_do_not_overflow() -> None:
    q, k, v, orders, places, _ = given(100, [10, 20])
    found = band_attend(q * 300, k * 300, v, orders, places, [10, 20], 1.0)
    assert found.isfinite().all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(found.sum(), (q, k, v)))


@pytest.mark.parametrize("length", [1, 2, 64, 65])
def test_short_sequences(length: int, agree) -> None:
    q, k, v, orders, places, _ = given(length, [64, 3])
    with plain_ops():
        expected = band_attend(q, k, v, orders, places, [64, 3], 1.0)
    found = band_attend(q, k, v, orders, places, [64, 3], 1.0)
    agree(found, expected)
    assert torch.equal(found[:, :, 0], v[:, :, 0])  # nobody is before the first token: it sees itself


def test_nobody_sees_what_stands_nowhere() -> None:
    q, k, v, _, places, _ = given(20, [30], 1)
    places[:, :, :, 4] = NOWHERE
    order = [torch.argsort(places[:, :, 0], dim=-1, stable=True)]
    base = band_attend(q, k, v, order, places, [30], 1.0)
    moved = band_attend(q, k, torch.where(torch.arange(20)[:, None] == 4, 99.0, v), order, places, [30], 1.0)
    rest = torch.arange(20) != 4
    assert torch.equal(base[:, :, rest], moved[:, :, rest])
    assert (moved[:, :, 4] == 99).all()


def test_ranks_count_within_groups() -> None:
    groups = torch.tensor([[3, 1, 3, 3, 1, 2], [0, 0, 0, 0, 0, 0]])
    assert ranks(groups).tolist() == [[0, 0, 1, 2, 1, 0], [0, 1, 2, 3, 4, 5]]


def kernels(x: Tensor, native: bool) -> tuple[Tensor, ...]:
    places = torch.arange(6 * 4, dtype=torch.int32).repeat(2, 1)
    places[0] //= 2  # in the first order half as far apart
    widths = torch.tensor([2, 6], dtype=torch.int32)
    scores, slopes = x.clone(), x.flip(0).contiguous()
    sums = (bands.band_softmax_ if native else bands._band_softmax_plain_)(scores, places, widths, 1, 0.7)
    weights, dots = x.clone(), torch.linspace(-1, 1, 12).view(3, 4)
    back = bands.band_softmax_backward_ if native else bands._band_softmax_backward_plain_
    back(weights, slopes, sums + 0.5, dots, places, widths, 1, 0.7)
    return scores.float(), sums, weights.float(), slopes.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_rows_are_the_plain_ones(dtype: torch.dtype) -> None:
    x = (torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(4)) * 3).to(dtype)
    for found, expected in zip(kernels(x, True), kernels(x, False), strict=True):
        assert torch.allclose(found, expected, atol=2e-6 if dtype == torch.float32 else 3e-2)
    weights = kernels(x, True)[0]
    assert torch.allclose(weights.sum(-1), torch.ones(3, 4), atol=1e-2)
    # the first order has pairs up to 5 apart (places 0, 0, 1, 1, … at width 2), so the second adds the sixth only
    assert int((weights != 0).sum()) <= 2 * 12
