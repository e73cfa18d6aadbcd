"""Every driver in a whole network: by recipe, in chunks, kept, described, generated with, bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import armillary as arm
from armillary.base.errors import ArmillaryError, SettingsError
from armillary.base.settings import parse
from armillary.nn.describe import describe
from armillary.nn.network import ModelSettings, Network, build
from armillary.nn.network_state import NetworkState
from armillary.recipe.training import TrainingSettings
from armillary.text import TokenizerSettings, train_tokenizer
from armillary.train import Trainer

DRIVERS: dict[str, dict[str, Any]] = {
    "transformer_xl": {"segment": 8, "memory": 12},
    "memory_tokens": {"segment": 8, "tokens": 3},
    "feedback": {"segment": 8, "window": 1, "rows": 3},
}
LENGTH = 30


def settings(kind: str, **more: Any) -> ModelSettings:
    data = {
        "width": 16,
        "depth": 2,
        "vocabulary": 262,
        "block": {"mixer": {"kind": "attention", "heads": 2, "position": "rope"}, "channel": "gated"},
        "driver": {"kind": kind, **DRIVERS[kind]},
    }
    return parse(ModelSettings, data | more)


@pytest.fixture(params=list(DRIVERS))
def network(request: Any) -> Network:
    return build(settings(request.param), seed=2)


def ids(rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_a_networks_state_goes_on_goes_back_and_is_put_together(network: Network, agree: Any) -> None:
    x = ids(3)
    whole, state = network(x), network.init_state(3)
    agree(network.extend(x[:, :11], state), whole[:, :11])
    kept = state.snapshot()
    once = network.extend(x[:, 11:], state)
    agree(once, whole[:, 11:])
    state.restore(kept)
    assert torch.equal(network.extend(x[:, 11:], state), once)
    rows = torch.tensor([2, 0])
    agree(network.extend(x[rows, 11:], kept.select(rows)), whole[rows, 11:])
    joined = NetworkState.join([kept.select(torch.tensor([1])), network.init_state(1)])
    found = network.extend(x[[1, 1], 11:20], joined, lengths=torch.tensor([9, 0]))
    agree(found[0], whole[1, 11:20])
    agree(network.extend(x[[1, 2], :7], joined, lengths=torch.tensor([0, 7]))[1], whole[2, :7])
    with pytest.raises(ArmillaryError, match="truncated"):
        state.truncate(torch.tensor([1, 1, 1]))


@torch.no_grad()
def test_the_state_does_not_grow_and_is_as_large_as_described(network: Network) -> None:
    state, sizes = network.init_state(1), []
    for _ in range(4):
        network.extend(ids(1, 37), state)
        sizes.append(state.nbytes)
    assert len(set(sizes)) == 1
    assert describe(network.settings, length=LENGTH, bf16=False).state_bytes == sizes[0]


@torch.no_grad()
def test_padded_rows_are_as_they_are_alone(network: Network, agree: Any) -> None:
    x = ids()
    for valid in (torch.arange(LENGTH) >= torch.tensor([[0], [13]]), torch.arange(LENGTH) < torch.tensor([[30], [17]])):
        found = network.hidden(torch.where(valid, x, 0), padding=valid)
        agree(found[1, valid[1]], network.hidden(x[1:, valid[1]])[0])
        agree(found[0], network.hidden(x[:1])[0])


def test_it_is_kept_and_comes_back(network: Network, tmp_path: Path) -> None:
    model = arm.Model(network, train_tokenizer(TokenizerSettings(kind="byte"), []))
    arm.save(model, tmp_path / "model")
    again = arm.load(tmp_path / "model")
    assert again.settings == network.settings
    with torch.no_grad():
        assert torch.equal(again(ids()), network.eval()(ids()))
    options = {"max_new_tokens": 20, "temperature": 0}
    one = model.generate(["def f(x):", "a", "import numpy as n"], **options)
    assert one.ids == [again.generate(text, **options).ids for text in ("def f(x):", "a", "import numpy as n")]
    with pytest.raises(ArmillaryError, match="driver"):
        arm.save(model, tmp_path / "open", layout="open")


def test_places_of_a_driven_network_can_be_watched_and_edited(network: Network) -> None:
    model = arm.Model(network)
    assert "blocks.1.residual.mid" in model.taps()
    with torch.no_grad():
        plain = model(ids())
        with model.watch("blocks.1.residual.post", "blocks.0.mixer.weights") as seen:
            assert torch.equal(model(ids()), plain)
        pieces = seen.steps("blocks.1.residual.post")
        assert torch.cat(pieces, 1).shape == (2, LENGTH, 16)  # segment by segment, tokens only
        with model.edit("blocks.1.residual.post", torch.zeros_like):
            assert not torch.equal(model(ids()), plain)


def test_it_learns_and_compiles_or_says_why_not(network: Network, agree: Any) -> None:
    training = parse(TrainingSettings, {"steps": 5, "batch": 2, "context": 29, "precision": "float32", "compile": "no"})
    trainer = Trainer(network, training)
    losses = [trainer.step(ids()) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert network.driver is not None
    if not network.driver.compiles:
        with pytest.raises(SettingsError, match="in pieces"):
            Trainer(network, training.derive(compile="yes"))
        return
    expected = network(ids()).detach()
    network.compile_blocks(backend="aot_eager")
    agree(network(ids()), expected)
    torch._dynamo.reset()


def test_every_parameter_is_reached(network: Network) -> None:
    """Every parameter takes part, the driver's through at least one segment's end."""
    network(ids()).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name
