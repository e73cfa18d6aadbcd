"""Fading and dot products in C against their plain forms, and against exact powers."""

from __future__ import annotations

import pytest
import torch
from native_parts import VECTORS, built

from armillary.native.decay import dots, fade, fade_plain


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("steepness", [0.0, 0.01, 5.0, 1e4])
def test_it_is_the_plain_form(chunk: int, steepness: float) -> None:
    total = (-steepness * torch.rand(2, 3, chunk, dtype=torch.float64)).cumsum(-1)
    torch.testing.assert_close(fade(total), fade_plain(total), rtol=1e-6, atol=1e-36)


@pytest.mark.parametrize("form", VECTORS)
def test_it_is_exact_however_small(form: str) -> None:
    """Powers of e in float64: what is lost in an exponent of some tens is lost as often in the result."""
    total = -torch.linspace(0, 87, 500, dtype=torch.float64)
    with built(form):
        found = fade(total)
    exact = (total[:, None] - total).float().double().exp().tril()
    assert float((found.double() / exact - 1).tril().nan_to_num(0).abs().max()) < 3e-7


def test_what_follows_a_steep_token_is_exact() -> None:
    """In float32 the sums around −10⁵ would stand in steps of 1/128."""
    total = torch.cat([torch.tensor([-1e5]), torch.full((9,), -0.01)]).double().cumsum(-1)
    found = fade(total)
    distance = (torch.arange(10)[:, None] - torch.arange(10)).double()
    torch.testing.assert_close(found, torch.exp(-0.01 * distance).tril().float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("width", [1, 7, 64])
def test_dots(width: int) -> None:
    a, b = torch.randn(5, 3, width), torch.randn(3, 5, width).transpose(0, 1)
    torch.testing.assert_close(dots(a, b), (a * b).sum(-1), rtol=1e-5, atol=1e-5)
