"""Expert choice against the paper's formula, one expert and one document at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.channels.expert_choice import ExpertChoice, ExpertChoiceSettings
from armillary.nn.context import Context
from armillary.nn.mask import Causal
from armillary.nn.mechanism import ChannelSettings, Place
from armillary.nn.taps import Taps
from armillary.nn.training import Training

BOTH = Place(16, order="bidirectional", path="m")


def built(**settings: Any) -> ExpertChoice:
    made = ExpertChoiceSettings(**{"experts": 4, "hidden": 12, **settings}).build(BOTH)
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    return made


@pytest.mark.parametrize("packed", [False, True])
def test_it_is_the_published_choice(packed: bool, agree: Any) -> None:
    """S = softmax(X W); expert e takes the k = ⌈n c / E⌉ highest of column e (Zhou et al. 2022, section 3.2)."""
    ours = built(capacity=1.5)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 11, 16, generator=generator)
    real = torch.rand(2, 11, generator=generator) > 0.25
    documents = torch.tensor([[5] * 6 + [2] * 5, [1] + [4] * 10]) if packed else torch.zeros(2, 11).long()
    expected = torch.zeros_like(x)
    for b in range(2):
        for document in documents[b].unique().tolist():
            inside = ((documents[b] == document) & real[b]).nonzero()[:, 0]
            scores = torch.softmax(x[b, inside] @ ours.router.weight.t(), -1)
            for e in range(4):
                gate, up, down = ours.gate.weight[e], ours.up.weight[e], ours.down.weight[e]  # type: ignore[union-attr]
                for n in scores[:, e].topk(math.ceil(1.5 * len(inside) / 4)).indices.tolist():
                    token = x[b, inside[n]]
                    expected[b, inside[n]] += scores[n, e] * (down @ (nn.functional.silu(gate @ token) * (up @ token)))
    found = ours(x, Context(padding=real, documents=documents if packed else None))
    agree(found[real], expected[real])


def test_load_is_even_and_tokens_left_out_are_reported() -> None:
    ours, taps = built(capacity=1.0), Taps(["m.router"])
    x = torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(4)) + 1.0
    y = ours(x, Context(training=Training.of(1), taps=taps))
    taken = taps.seen["m.router"] > 0  # [B, T, E]
    assert bool((taken.sum(1) == 5).all()), "every expert takes 20 / 4 tokens"
    left = ~taken.any(-1)
    assert bool(left.any()) and bool((y[left] == 0).all())
    ours.after_step(1, 10)
    assert ours.observe() == {"untaken_tokens": pytest.approx(float(left.float().mean()))}


@pytest.mark.parametrize("order", ["causal", "prefix"])
def test_it_refuses_models_that_must_not_see_later_tokens(order: Any) -> None:
    with pytest.raises(UnsupportedError, match="depends on later tokens"):
        ExpertChoiceSettings().build(Place(16, order=order))


def test_what_cannot_be_built_says_why() -> None:
    for settings, said in (({"experts": 2, "capacity": 2.5}, "is more than the 2 experts"), ({"capacity": 0}, "capa")):
        with pytest.raises(SettingsError, match=said):
            parse(ChannelSettings, {"kind": "expert_choice", **settings})


def test_rows_shorter_than_the_number_of_experts_and_of_padding_alone() -> None:
    ours = built(experts=8, capacity=1.0)
    x = torch.randn(2, 3, 16)
    real = torch.tensor([[True] * 3, [False] * 3])
    taps = Taps(["m.router"])
    y = ours(x, Context(padding=real, training=Training.of(1), taps=taps))
    assert bool(((taps.seen["m.router"] > 0).sum(1)[0] == 1).all()), "every expert takes one token"
    assert bool(y.isfinite().all()) and bool((y[1] == 0).all())


def test_padding_takes_no_place() -> None:
    """By definition: real tokens get what they get without padding, whatever it holds and however much there is."""
    ours = built(capacity=1.5)
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(1, 7, 16, generator=generator)
    alone = ours(x, Context(training=Training.of(1)))
    for before, after in ((0, 1), (3, 0), (5, 21)):
        for scale in (0.0, 1.0, 100.0):
            parts = [scale * torch.randn(1, n, 16, generator=generator) for n in (before, after)]
            real = torch.tensor([[False] * before + [True] * 7 + [False] * after])
            y = ours(torch.cat([parts[0], x, parts[1]], 1), Context(padding=real, training=Training.of(1)))
            torch.testing.assert_close(y[real], alone[0], rtol=1e-5, atol=1e-6)
            assert bool((y[~real] == 0).all()), "padding took a place"


def test_chunks_and_an_objectives_mask_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="'expert_choice' cannot take a mask"):
        built()(torch.randn(1, 4, 16), Context(mask=Causal()))
    with pytest.raises(UnsupportedError, match="'expert_choice' cannot be extended"):
        built().extend(torch.randn(1, 4, 16), None, Context())
