"""Stick-breaking attention against the products of the paper, written out as loops over pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.mask import Causal
from armillary.nn.mechanism import MixerSettings, Place
from armillary.nn.mixers.stick_breaking import StickBreaking, StickBreakingSettings
from armillary.nn.ops import stick


@pytest.fixture
def mixer() -> StickBreaking:
    made = StickBreakingSettings(heads=4, kv_heads=2).build(Place(16))
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return made


def shares(mixer: StickBreaking, x: Tensor) -> Tensor:
    """β [B, H, T, T]."""
    q = (x @ mixer.q.weight.t()).unflatten(-1, (4, 4)).transpose(1, 2)
    k = (x @ mixer.k.weight.t()).unflatten(-1, (2, 4)).transpose(1, 2).repeat_interleave(2, 1)
    return torch.sigmoid(q @ k.transpose(2, 3) / 2)


def published(mixer: StickBreaking, x: Tensor) -> Tensor:
    """a_ij = β_ij Π_{j<m≤i} (1 − β_im), pair by pair."""
    beta = shares(mixer, x)
    rows = []
    for i in range(x.shape[1]):
        row = []
        for j in range(x.shape[1]):
            weight = beta[:, :, i, j] if j <= i else torch.zeros_like(beta[:, :, i, j])
            for m in range(j + 1, i + 1):
                weight = weight * (1 - beta[:, :, i, m])
            row.append(weight)
        rows.append(torch.stack(row, -1))
    v = (x @ mixer.v.weight.t()).unflatten(-1, (2, 4)).transpose(1, 2).repeat_interleave(2, 1)
    return (torch.stack(rows, 2) @ v).transpose(1, 2).flatten(2) @ mixer.o.weight.t()


@pytest.mark.parametrize("block", [256, 5])
def test_forward_is_the_papers(block: int, mixer: StickBreaking, agree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stick, "BLOCK", block)
    x = torch.randn(2, 18, 16, requires_grad=True)
    weights = torch.randn(2, 18, 16)
    found, expected = mixer(x, Context()), published(mixer, x)
    agree(found, expected)
    wanted = [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * weights).sum(), wanted)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 1e-4)


def test_weights_and_what_is_left_make_one(mixer: StickBreaking, agree: Any) -> None:
    """Σ_j a_ij + Π_j (1 − β_ij) = 1."""
    x = torch.randn(2, 12, 16)
    with torch.no_grad():
        weights, beta = mixer.sight(x, Context()), shares(mixer, x)
        left = (1 - beta).masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), 1).prod(-1)
    agree(weights.sum(-1) + left, torch.ones(2, 4, 12))


def test_scores_of_any_size_give_finite_weights() -> None:
    """A score of 1000 takes the whole stick, one of −1000 nothing; gradients stay finite."""
    q = torch.tensor([[1000.0], [-1000.0], [0.0]]).expand(3, 1)[None, None].clone().requires_grad_()
    k, v = torch.ones(1, 1, 3, 1), torch.tensor([1.0, 2.0, 4.0])[None, None, :, None]
    y = stick.stick_attend(q, k, v, mask=Causal(), scale=1.0)
    assert y.flatten().tolist() == [1.0, 0.0, 4.0 / 2 + 2.0 / 4 + 1.0 / 8]
    (slope,) = torch.autograd.grad(y.sum(), q)
    assert bool(slope.isfinite().all())


def test_no_matrix_of_pairs_is_kept_for_the_backward_pass(mixer: StickBreaking) -> None:
    kept: list[int] = []
    x = torch.randn(1, 1024, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        mixer(x, Context())
    assert max(kept) < 1024 * 1024 // 4


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(UnsupportedError, match="does not divide into 4 heads"):
        StickBreakingSettings(heads=4).build(Place(18))
    with pytest.raises(UnsupportedError, match="cannot be bidirectional"):
        StickBreakingSettings().build(Place(16, order="bidirectional"))
    with pytest.raises(SettingsError, match="heads"):
        parse(MixerSettings, {"kind": "stick_breaking", "heads": 0})
    with pytest.raises(SettingsError, match="must divide heads"):
        parse(MixerSettings, {"kind": "stick_breaking", "heads": 4, "kv_heads": 3})


def test_a_row_of_padding_alone_gives_zeros(mixer: StickBreaking) -> None:
    padding = torch.tensor([[True] * 4, [False] * 4])
    y = mixer(torch.randn(2, 4, 16), Context(padding=padding))
    assert bool((y[1] == 0).all()) and bool((y[0] != 0).any())
