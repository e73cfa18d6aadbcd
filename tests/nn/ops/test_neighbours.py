"""Neighbours along a row and in a grid against unfolding, and rows whose padding is moved behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from armillary.base.errors import InputError, UnsupportedError
from armillary.nn.ops.neighbours import Front, Neighbourhood, fits_in


def test_a_square_in_a_grid_is_unfolded(agree: Any) -> None:
    hood, x = Neighbourhood.of(3, "bidirectional", (4, 5)), torch.randn(2, 20, 6)
    found = hood.stacked(hood.line(x), hood.seen(torch.arange(20)[None]))
    unfolded = F.unfold(x.transpose(1, 2).unflatten(2, (4, 5)), 3, padding=1).unflatten(1, (6, 9))
    agree(found, unfolded.permute(0, 3, 2, 1))
    assert hood.shifts[hood.centre] == 0 and (hood.before, hood.after) == (6, 6)
    causal = Neighbourhood.of(3, "causal", (4, 5))
    assert causal.shifts == hood.shifts[:5] and causal.after == 0
    agree(causal.stacked(causal.line(x), causal.seen(torch.arange(20)[None])), found[:, :, :5])


@pytest.mark.parametrize("order, size, sides", [("causal", 4, (3, 0)), ("bidirectional", 5, (2, 2))])
def test_a_convolution_along_the_row(order: str, size: int, sides: tuple[int, int], agree: Any) -> None:
    hood, x, kernel = Neighbourhood.of(size, order), torch.randn(2, 9, 6), torch.randn(6, size)
    where = torch.arange(9)[None]
    expected = F.conv1d(F.pad(x.transpose(1, 2), sides), kernel[:, None], groups=6).transpose(1, 2)
    agree(hood.convolved(x, kernel, where), expected)
    seen = hood.seen(where, ends=True)
    agree(hood.weighted(hood.line(x)[..., None], kernel[None, None], seen)[..., 0], expected)
    assert seen is not None
    ones = F.pad(torch.ones(1, 1, 9), sides).unfold(2, size, 1)
    assert torch.equal(seen[0], ones[0, 0] > 0)
    documents = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1]).expand(2, -1)
    split = torch.cat([hood.convolved(x[:, :4], kernel, where), hood.convolved(x[:, 4:], kernel, where)], 1)
    agree(hood.convolved(x, kernel, where, documents=documents), split)
    padding = torch.arange(9) >= torch.tensor([[3], [0]])
    alone = hood.convolved(x[:1, 3:], kernel, where[:, :6])
    agree(hood.convolved(x, kernel, where, padding=padding)[:1, 3:], alone)


def test_real_tokens_move_to_the_front_and_back() -> None:
    x = torch.randn(3, 4, 2)
    padding = torch.tensor([[False, True, False, True], [True] * 4, [False] * 4])
    front = Front.of(x, padding)
    assert torch.equal(front.x[0, :2], x[0, [1, 3]]) and bool((front.x[0, 2:] == 0).all())
    assert front.count is not None and front.count.tolist() == [2, 4, 0]
    assert torch.equal(front.back(front.x), x * padding[..., None])
    assert Front.of(x, None).back(x) is x


def test_what_has_no_middle_or_does_not_fit_is_refused() -> None:
    assert Neighbourhood.of(2, "causal").shifts == (-1, 0)
    for order, grid in (("bidirectional", None), ("causal", (2, 2))):
        with pytest.raises(UnsupportedError, match="a kernel of 2 has no middle"):
            Neighbourhood.of(2, order, grid)
    fits_in((2, 3), 6, "here")
    with pytest.raises(InputError, match="7 tokens do not fit a grid of 2 lines and 3 columns"):
        fits_in((2, 3), 7, "here")
