"""Learned and sinusoidal positions: the published formula, and what lies beyond the table."""

from __future__ import annotations

import math

import pytest
import torch

from armillary.base.errors import InputError, UnsupportedError
from armillary.nn.mechanism import Place
from armillary.nn.positions.learned import LearnedPositionSettings
from armillary.nn.positions.sinusoidal import SinusoidalPositionSettings


def test_sinusoidal_positions_are_the_papers() -> None:
    """PE(p, 2i) = sin(p / 10000^(2i/D)), PE(p, 2i+1) = cos of the same (Vaswani et al. 2017, section 3.5)."""
    ours = SinusoidalPositionSettings().build(Place(12))
    found = ours.embed(torch.tensor([[0, 1, 7, 500]]))[0]
    for row, p in enumerate([0, 1, 7, 500]):
        for i in range(6):
            angle = p / 10000 ** (2 * i / 12)
            assert float(found[row, 2 * i]) == pytest.approx(math.sin(angle), abs=3e-5)
            assert float(found[row, 2 * i + 1]) == pytest.approx(math.cos(angle), abs=3e-5)


def test_sinusoidal_positions_need_pairs() -> None:
    with pytest.raises(UnsupportedError, match="even model.width"):
        SinusoidalPositionSettings().build(Place(13))


def test_learned_positions_end_with_the_table() -> None:
    position = LearnedPositionSettings().build(Place(8, length=5))
    torch.nn.init.normal_(position.table.weight)
    places = torch.tensor([[4, 0, 2]])
    assert torch.equal(position.embed(places), position.table.weight[places])
    with pytest.raises(InputError, match=r"position 5 is beyond the 5 learned positions\n.*shorten"):
        position.embed(torch.tensor([[0, 5]]))
