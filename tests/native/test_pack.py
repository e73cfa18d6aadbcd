"""Weights in 8 and 4 bits: the quick packing is the plain one, bit for bit."""

from __future__ import annotations

import pytest
import torch

from armillary.native import available
from armillary.native.pack import pack_int4, pack_int4_plain, pack_int8, pack_int8_plain

pytestmark = pytest.mark.skipif(not available(), reason="there is no C compiler here")


def weights(width: int) -> torch.Tensor:
    """Rows of very different sizes, one of zeros, one of a few, one of numbers that tie, one below what is normal."""
    made = torch.randn(9, width, generator=torch.Generator().manual_seed(width)) * torch.logspace(-4, 4, 9)[:, None]
    made[3], made[4, 1:] = 0, 0
    made[5] = torch.arange(width).remainder(2) * 2 - 1
    made[6] *= 1e-40
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 31, 32, 33, 200])
def test_as_the_plain_form(width: int, dtype: torch.dtype) -> None:
    held = weights(width).to(dtype)
    for given in (held, held.repeat(2, 1).T.contiguous().T[:9]):  # and rows that do not lie together
        for found, expected in zip(pack_int8(given), pack_int8_plain(given), strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(pack_int4(given), pack_int4_plain(given))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_stays_so(bad: float) -> None:
    held = weights(70)
    held[1, 40], held[2, 0] = bad, -bad
    _, scales = pack_int8(held)
    assert scales.isfinite().tolist() == [row not in (1, 2) for row in range(9)]
    sizes = pack_int4(held)[..., :2].contiguous().view(torch.bfloat16)[..., 0]
    spoilt = torch.zeros(9, 3, dtype=torch.bool)
    spoilt[1, 1] = spoilt[2, 0] = True
    assert torch.equal(~sizes.isfinite(), spoilt)
