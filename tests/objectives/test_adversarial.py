"""The adversarial objective: two passes, the divergence of their predictions, and who follows which slope."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from armillary.base.errors import SettingsError
from armillary.base.settings import parse
from armillary.data.batch import Batch
from armillary.nn.network import ModelSettings, Network, build
from armillary.nn.training import Training
from armillary.objectives import adversarial
from armillary.objectives.adversarial import AdversarialObjective, AdversarialObjectiveSettings
from armillary.objectives.base import ObjectiveSettings, Prepared, Vocabulary
from armillary.recipe.training import TrainingSettings
from armillary.train import Trainer

BLOCK = {"mixer": {"kind": "adversarial", "heads": 2, "adversary": 4}, "channel": "ffn"}
SHAPE = {"width": 16, "depth": 2, "vocabulary": 50}
IDS = torch.randint(0, 50, (3, 13), generator=torch.Generator().manual_seed(0))


def network() -> Network:
    made = build(parse(ModelSettings, SHAPE | {"block": BLOCK}))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    return made


def objective(**settings: Any) -> tuple[AdversarialObjective, Prepared]:
    made = AdversarialObjectiveSettings(**settings).build(Vocabulary(50))
    prepared = made.prepare(Batch(IDS), torch.Generator())
    weights = prepared.weights.clone()
    weights[1, 4:] = 0
    return made, dataclasses.replace(prepared, weights=weights, inputs={"training": Training.of(1)})


@pytest.mark.parametrize("chunk", [1024, 7])
def test_the_loss_is_the_inner_one_and_the_divergence(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adversarial, "CHUNK", chunk)
    model, (made, prepared) = network(), objective(weight=0.7)
    loss = made.loss(model, prepared)
    inputs = {"training": Training(torch.tensor(1), torch.tensor(1.0), adverse=True)}
    p, q = (torch.log_softmax(model(prepared.ids, **each), -1) for each in ({}, inputs))
    kl = [F.kl_div(a, b, reduction="none", log_target=True).sum(-1) for a, b in ((q, p), (p, q))]
    apart = ((kl[0] + kl[1]) / 2 * prepared.weights).sum()
    nats = -(p.gather(2, prepared.targets[..., None])[..., 0] * prepared.weights).sum()
    assert apart > 0.1
    torch.testing.assert_close(loss.metrics["divergence"], apart.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss.metrics["nats"], nats.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss.sum, nats + 0.7 * apart, rtol=1e-4, atol=1e-4)
    wanted = list(model.parameters())
    ours = torch.autograd.grad(loss.sum, wanted)
    theirs = torch.autograd.grad(nats + 0.7 * apart, wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_evaluation_runs_the_network_once_as_it_is() -> None:
    model, (made, prepared) = network(), objective()
    plain = dataclasses.replace(prepared, inputs={})
    assert torch.equal(made.loss(model, plain).sum, made.inner.loss(model, plain).sum)


@pytest.mark.parametrize("adverse", [True, False])
def test_the_adversary_raises_what_the_model_lowers(adverse: bool) -> None:
    """Either one alone, a few steps down its own slope of the divergence."""
    model, (made, prepared) = network(), objective()
    moving = [value for name, value in model.named_parameters() if ("adverse" in name) == adverse]
    optimiser = torch.optim.Adam(moving, lr=0.01)
    found = []
    for _ in range(15):
        apart = _apart(model, made, prepared)
        found.append(apart.item())
        for value, slope in zip(moving, torch.autograd.grad(apart, moving), strict=True):
            value.grad = slope
        optimiser.step()
    first, last = sum(found[:3]), sum(found[-3:])
    assert last > 1.05 * first if adverse else last < 0.95 * first


def _apart(model: Network, made: AdversarialObjective, prepared: Prepared) -> torch.Tensor:
    adverse = {"training": Training(torch.tensor(1), torch.tensor(1.0), adverse=True)}
    hidden = [model.hidden(prepared.ids, **each) for each in ({}, adverse)]
    return adversarial.divergence(model, *hidden, prepared.weights)


def test_a_trainer_moves_model_and_adversary() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.named_parameters()}
    training = parse(
        TrainingSettings, {"objective": {"kind": "adversarial"}, "context": 12, "batch": 3, "steps": 2, "compile": "no"}
    )
    trainer = Trainer(model, training, vocabulary=Vocabulary(50))
    trainer.step(IDS)
    assert trainer.last is not None and trainer.last.metrics["divergence"] > 0
    assert all(not torch.equal(before[name], value) for name, value in model.named_parameters())


def test_what_does_not_fit_says_so() -> None:
    plain = parse(ModelSettings, SHAPE | {"block": {"mixer": "attention"}})
    with pytest.raises(SettingsError, match="no block has one"):
        AdversarialObjectiveSettings().check(plain)
    made = parse(ModelSettings, SHAPE | {"block": BLOCK})
    with pytest.raises(SettingsError, match="goes around"):
        AdversarialObjectiveSettings(inner=AdversarialObjectiveSettings()).check(made)
    with pytest.raises(SettingsError, match="needs an encoder"):
        parse(ObjectiveSettings, {"kind": "adversarial", "inner": {"kind": "masked"}}).check(made)
