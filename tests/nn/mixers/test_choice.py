"""Choices against each of their options alone, the mean of many draws, and the penalty by differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.base.errors import SettingsError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.mechanism import MixerSettings, Place, initialise
from armillary.nn.mixers.attention import AttentionSettings
from armillary.nn.mixers.choice import Choice, ChoiceSettings
from armillary.nn.training import Training

WIDTH = 16


def made(**settings: Any) -> Choice:
    place = Place(WIDTH, length=32)
    choice = ChoiceSettings(**({"mixer": AttentionSettings(heads=2)} | settings)).build(place)
    initialise(choice, 1)
    return choice


def alone(choice: Choice, option: int) -> None:
    with torch.no_grad():
        choice.logits.copy_(torch.full((3,), -200.0).index_fill(0, torch.tensor(option), 200.0))


@pytest.mark.parametrize("training", [None, Training.of(7)])
def test_a_settled_choice_is_its_option(training: Training | None, agree: Any) -> None:
    choice, x = made(), torch.randn(2, 9, WIDTH)
    ctx = Context(training=training)
    expected = (choice.mixer(x, Context()), choice.channel(x, Context()), torch.zeros_like(x))
    for option, name in enumerate(("mixer", "channel", "nothing")):
        alone(choice, option)
        assert choice.found() == name
        agree(choice(x, ctx), expected[option], 1e-5)


def test_draws_are_a_gumbel_softmax() -> None:
    """At a low temperature each draw is one option, as often as its probability; hot draws are even."""
    choice, x = made(temperature=0.01), torch.randn(1, 3, WIDTH)
    with torch.no_grad():
        choice.logits.copy_(torch.tensor([1.0, 0.0, -1.0]))
        drawn = torch.stack([choice._draw(x, Context(training=Training.of(seed))) for seed in range(3000)])
        assert ((drawn > 0.99).any(1)).float().mean() > 0.9
        assert torch.allclose(drawn.mean(0), torch.softmax(choice.logits, 0), atol=0.03)
        choice.temperature.fill_(100.0)
        assert torch.allclose(choice._draw(x, Context(training=Training.of(1))), torch.full((3,), 1 / 3), atol=0.05)


def test_the_penalty_is_the_expected_cost() -> None:
    choice = made(penalty=0.5, costs=(3.0, 1.5))
    assert choice.costs == (1.0, 0.5)
    with torch.no_grad():
        choice.logits.copy_(torch.tensor([0.3, -0.2, 0.5]))
    x = torch.randn(1, 4, WIDTH)

    def slope(penalty: float) -> Tensor:
        choice.penalty = penalty
        y = choice(x, Context(training=Training.of(1, share=0.25)))
        return torch.autograd.grad(y.sum(), choice.logits)[0]

    logits = choice.logits.detach().double()
    expected = []
    for option in range(3):
        sides = []
        for step in (1e-5, -1e-5):
            moved = logits.clone()
            moved[option] += step
            share = torch.exp(moved) / torch.exp(moved).sum()
            sides.append(0.25 * 0.5 * float(share[0] * 1.0 + share[1] * 0.5))
        expected.append((sides[0] - sides[1]) / 2e-5)
    assert torch.allclose(slope(0.5) - slope(0.0), torch.tensor(expected), atol=1e-5)


def test_costs_are_flops_unless_measured() -> None:
    place = Place(WIDTH, length=1000)
    settings = ChoiceSettings(mixer=AttentionSettings(heads=2))
    a, b = settings.mixer.cost(place, 1000).flops, settings.channel.cost(place, 1000).flops
    assert settings.shares(place) == (1.0, pytest.approx(b / a))


def test_the_temperature_falls() -> None:
    choice = made(temperature=2.0, final=0.5)
    assert float(choice.temperature) == 2.0
    choice.after_step(50, 100)
    assert float(choice.temperature) == pytest.approx(1.0)
    choice.after_step(100, 100)
    assert float(choice.temperature) == pytest.approx(0.5)
    assert "temperature" in choice.state_dict()  # a run that goes on finds it where it was


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(SettingsError, match="must be attention, found retention"):
        parse(MixerSettings, {"kind": "choice", "mixer": "retention"})
    with pytest.raises(SettingsError, match="costs must be above 0"):
        parse(MixerSettings, {"kind": "choice", "costs": [1, 0]})
    with pytest.raises(SettingsError, match="heads"):
        parse(MixerSettings, {"kind": "choice", "mixer": {"kind": "attention", "heads": 0}})
