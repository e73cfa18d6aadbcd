"""The order that a search found as an ordinary model; "sfsf…" is the ordinary Transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from armillary.base.errors import UnsupportedError
from armillary.base.settings import parse
from armillary.compress import found_model, found_order, found_recipe
from armillary.data.batch import Batch
from armillary.nn.network import ModelSettings, Network, build
from armillary.recipe import Recipe
from armillary.train import Trainer

MIXER = {"kind": "attention", "heads": 2, "position": "rope"}
SEARCH = {"mixer": {"kind": "choice", "mixer": MIXER, "channel": "gated"}}


def model(**settings: Any) -> Network:
    return build(parse(ModelSettings, {"width": 16, "vocabulary": 30, **settings}), seed=2)


def choose(network: Network, order: str) -> None:
    for block, letter in zip(network.blocks, order, strict=True):
        with torch.no_grad():
            block.mixer.inner.logits["sfi".index(letter)] = 5.0


def test_the_found_order_is_an_ordinary_model() -> None:
    network = model(depth=6, block=SEARCH)
    choose(network, "sfifsf")
    assert found_order(network) == ["mixer", "channel", "nothing", "channel", "mixer", "channel"]
    found = found_model(network)
    assert found.pattern == ("look", "think", "think", "look", "think") and found.depth == 5
    kinds = [(block.mixer or block.channel).kind for block in found.layers()]  # type: ignore[union-attr]
    assert kinds == ["attention", "gated", "gated", "attention", "gated"]
    # the super-network with settled choices computes the same
    plain = build(found)
    tensors = {}
    for index, place in enumerate([0, 1, 3, 4, 5]):
        for name, value in network.state_dict().items():
            prefix = f"blocks.{place}.mixer."
            if not name.startswith(prefix):
                continue
            rest = name.removeprefix(prefix)
            role = "mixer" if kinds[index] == "attention" else "channel"
            for inner in (f"inner.{role}.", "norm"):
                if rest.startswith(inner):
                    new = rest.replace(f"inner.{role}.", "inner.")
                    tensors[f"blocks.{index}.{role}.{new}"] = value
    for name in ("embed.weight", "norm.weight"):
        tensors[name] = network.state_dict()[name]
    missing = plain.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"head.product.weight"}
    plain.tie()
    with torch.no_grad():
        for block, letter in zip(network.blocks, "sfifsf", strict=True):
            block.mixer.inner.logits["sfi".index(letter)] = 200.0
    ids = torch.randint(0, 30, (2, 12))
    assert torch.allclose(plain(ids), network(ids), atol=1e-4)


def test_alternating_blocks_are_the_transformer() -> None:
    usual = model(depth=3, block={"mixer": MIXER, "channel": "gated"})
    blocks = {"s": {"mixer": MIXER}, "f": {"channel": "gated"}}
    split = model(depth=6, blocks=blocks, pattern=["s", "f"])
    tensors = dict(usual.state_dict())
    for index in range(3):
        for place, role in ((2 * index, "mixer"), (2 * index + 1, "channel")):
            for name in list(tensors):
                if name.startswith(f"blocks.{index}.{role}.") and name in usual.state_dict():
                    tensors[f"X{place}.{name.split('.', 2)[2]}"] = tensors.pop(name)
    tensors = {f"blocks.{name[1:]}" if name.startswith("X") else name: value for name, value in tensors.items()}
    split.load_state_dict(tensors)
    ids = torch.randint(0, 30, (2, 12))
    assert torch.equal(split(ids), usual(ids))


def test_state_and_blocks_shrink_with_attention() -> None:
    par = Recipe.load("par").model
    attention = sum(block.mixer is not None for block in par.layers())
    assert par.depth == 22 and 1 - attention / 11 >= 0.63
    last = max(index for index, block in enumerate(par.layers()) if block.mixer is not None)
    assert last < 2 / 3 * par.depth  # the paper's finding: none in the last third
    full = par.derive(pattern=("s", "f"))
    place = par.place()
    assert par.cost(place, 100).state_bytes == attention / 11 * full.cost(place, 100).state_bytes


def test_a_search_leaves_out_what_costs_and_does_not_help(tmp_path: Path) -> None:
    """On tokens that follow from the one before, attention is dear and of no use."""
    words = ["tokenizer={kind: byte}", "model.width=16", "model.depth=3", "training.compile=no"]
    words += ["training.context=16", "training.batch=4", "training.steps=60", "training.precision=float32"]
    words += ["training.optimiser.learning_rate=0.03", "model.block.mixer.penalty=0.3"]
    words += ["model.block.mixer.mixer.heads=2", "model.context=64", "model.block.mixer.costs=[4, 1]"]
    recipe = Recipe.load("par-search", *words)
    network = build(recipe.model.derive(vocabulary=16), seed=1)
    trainer = Trainer(network, recipe.training, seed=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        start = torch.randint(0, 16, (4, 1), generator=generator)
        trainer.step(Batch((start + 3 * torch.arange(17)) % 16))
    order = found_order(network)
    assert "mixer" not in order and "channel" in order
    path = tmp_path / "found.yaml"
    found_recipe(recipe, network).save(path)
    again = Recipe.load(path)
    assert all(block.mixer is None for block in again.model.layers())
    assert again.model.depth == sum(option == "channel" for option in order)


def test_what_is_no_search_says_why() -> None:
    with pytest.raises(UnsupportedError, match="not a single choice"):
        found_model(model(depth=2))
    network = model(depth=2, block=SEARCH)
    choose(network, "ii")
    with pytest.raises(UnsupportedError, match="came to nothing"):
        found_model(network)
