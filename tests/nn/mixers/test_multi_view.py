"""Multi-view attention against each head's band, written as loops, and dense attention at its limit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary.base.errors import SettingsError
from armillary.nn.context import Context
from armillary.nn.mechanism import Place
from armillary.nn.mixers.multi_view import MultiViewSettings

T, WIDTH = 24, 16


def test_radii_are_a_geometric_series() -> None:
    settings = MultiViewSettings(heads=8, narrowest=4, full=1)
    assert settings.radii(512) == [4, 8, 16, 32, 64, 128, 256, None]
    assert MultiViewSettings(heads=4, narrowest=100, full=2).radii(10) == [100, 100, None, None]


def written_out(mixer: Any, x: Tensor, radii: list[int | None], both_ways: bool) -> Tensor:
    q, k, v = (x @ product.weight.t() for product in (mixer.q, mixer.k, mixer.v))
    y = torch.zeros_like(v)
    for h, radius in enumerate(radii):
        part = slice(h * 4, h * 4 + 4)
        for i in range(T):
            low = 0 if radius is None else max(0, i - radius)
            stop = i + 1 if not both_ways else T if radius is None else min(T, i + radius + 1)
            scores = (k[low:stop, part] @ q[i, part]) / math.sqrt(4)
            y[i, part] = torch.softmax(scores, 0) @ v[low:stop, part]
    return y @ mixer.o.weight.t()


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
def test_every_head_has_its_own_view(order: str, agree: Any) -> None:
    settings = MultiViewSettings(narrowest=2)
    mixer = settings.build(Place(WIDTH, order=order, length=16)).double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.4)
    assert settings.radii(16) == [2, 4, 8, None]
    x = torch.randn(1, T, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        agree(mixer(x, Context())[0], written_out(mixer, x[0], [2, 4, 8, None], order == "bidirectional"), 1e-9)
        weights = mixer.sight(x, Context())[0]
    distance = torch.arange(T)[:, None] - torch.arange(T)
    for head, radius in enumerate((2, 4, 8, T)):
        seen = distance.abs() <= radius if order == "bidirectional" else (distance >= 0) & (distance <= radius)
        assert torch.equal(weights[head] > 0, seen)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"full \(5\) is more than the heads \(4\)"):
        MultiViewSettings(full=5)
    with pytest.raises(SettingsError, match="narrowest"):
        MultiViewSettings(narrowest=0)
