"""Neural n-grams against PyTorch's grouped 1-D convolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.mechanism import MixerSettings, Place
from armillary.nn.mixers.ngram import Ngram, NgramSettings


def built(order: Any = "causal", **settings: Any) -> Ngram:
    made = NgramSettings(**{"heads": 4, "n": 3, **settings}).build(Place(16, order=order))
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return made


def convolved(mixer: Ngram, x: Tensor, left: int, right: int) -> Tensor:
    """relu(conv1d(v)), one group of channels per head, zeros beyond the ends."""
    kernel = torch.cat([gram.weight.unflatten(1, (left + 1 + right, 4)).transpose(1, 2) for gram in mixer.grams])
    v = F.pad((x @ mixer.v.weight.t()).transpose(1, 2), (left, right))
    return F.relu(F.conv1d(v, kernel, groups=4)).transpose(1, 2) @ mixer.o.weight.t()


@pytest.mark.parametrize("length", [14, 2, 1])
@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize("order", ["causal", "bidirectional"])
def test_it_is_a_grouped_convolution(order: str, n: int, length: int, agree: Any) -> None:
    mixer = built(order, n=n)
    x = torch.randn(2, length, 16, requires_grad=True)
    found = mixer(x, Context())
    expected = convolved(mixer, x, n - 1, n - 1 if order == "bidirectional" else 0)
    agree(found, expected)
    weights = torch.randn_like(found)
    wanted = [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * weights).sum(), wanted)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 1e-4)


def test_a_token_is_out_of_reach_after_n() -> None:
    mixer, x = built(n=3), torch.randn(1, 9, 16)
    moved = x.clone()
    moved[:, 2] += 1
    change = (mixer(moved, Context()) - mixer(x, Context())).abs().amax((0, 2))
    assert (change > 0).tolist() == [t in (2, 3, 4) for t in range(9)]


def test_the_state_is_bounded() -> None:
    mixer = built(n=3)
    state = mixer.init_state(3, 100, torch.bfloat16, "cpu")
    size = state.nbytes
    mixer.extend(torch.randn(3, 50, 16), state, Context())
    assert state.nbytes == size == 3 * 2 * 16 * 2


def test_a_row_of_padding_alone_gives_zeros() -> None:
    padding = torch.tensor([[True] * 4, [False] * 4])
    y = built()(torch.randn(2, 4, 16), Context(padding=padding))
    assert bool((y[1] == 0).all()) and bool((y[0] != 0).any())


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(UnsupportedError, match="does not divide into 4 heads"):
        NgramSettings(heads=4).build(Place(18))
    for key in ("heads", "n"):
        with pytest.raises(SettingsError, match=key):
            parse(MixerSettings, {"kind": "ngram", key: 0})
