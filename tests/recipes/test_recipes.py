"""Every recipe that comes with Armillary loads and, made small, builds and learns.

The text is a few KB of the Python standard library; its bytes are the tokens.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from armillary.data.batch import Batch
from armillary.nn.describe import describe
from armillary.nn.network import build
from armillary.objectives.base import Vocabulary
from armillary.recipe import Recipe, library
from armillary.text import TokenizerSettings, train_tokenizer
from armillary.train import Trainer

NAMES = library.names()
CONTEXT, BATCH, STEPS = 32, 4, 3


def small(name: str) -> Recipe:
    """The recipe with its own mechanisms, each of them narrow."""
    recipe = Recipe.load(name)
    words = [
        "tokenizer={kind: byte}",
        "model.width=32",
        f"model.depth={min(3, recipe.model.depth)}",
        f"model.context={CONTEXT}",
        f"training.context={CONTEXT}",
        f"training.batch={BATCH}",
        f"training.steps={STEPS}",
        "training.compile=no",
        "training.precision=float32",
        "training.optimiser.learning_rate=3e-3",
        "training.schedule={kind: constant, warmup: 0}",
    ]
    if recipe.model.encoder is not None:
        words.append("model.encoder.depth=2")
    if recipe.model.scaling is not None:  # wider than the base, as it is
        words.append("model.scaling.width=16")
    if recipe.model.driver is not None:  # a few segments in a window
        words += ["model.driver.segment=8"]
        short = {"memory": 12, "tokens": 2, "rows": 2}
        words += [f"model.driver.{key}={size}" for key, size in short.items() if hasattr(recipe.model.driver, key)]
    data = Recipe.load(name, *words).to_data()
    _narrow(data["model"])
    return Recipe.load(data)


def _narrow(data: Any) -> None:
    """Fewer and narrower heads wherever a block says how many it has."""
    if isinstance(data, dict):
        small = {"heads": 2, "kv_heads": 1, "score_heads": 2, "head_width": 8, "hidden": 64}
        data |= {key: value for key, value in small.items() if type(data.get(key)) is int}
    for part in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        _narrow(part)


@pytest.fixture(scope="module")
def text() -> str:
    library = Path(os.__file__).parent
    return "".join((library / name).read_text(encoding="utf-8") for name in ("bisect.py", "keyword.py", "stat.py"))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_whole_recipe(name: str, tmp_path: Path) -> None:
    """Written with all its defaults and read again it is the same."""
    recipe = Recipe.load(name)
    assert recipe.name == name
    recipe.save(tmp_path / f"{name}.yaml")
    assert Recipe.load(tmp_path / f"{name}.yaml") == recipe
    first = (library.folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ") and first.rstrip().endswith("."), "a recipe begins by saying what it is"


@pytest.mark.parametrize("name", NAMES)
def test_it_describes_itself_as_it_is(name: str) -> None:
    """At its real size, without storage: what `describe` counts are the parameters of the build."""
    settings = Recipe.load(name).model.derive(vocabulary=1000)
    found = describe(settings, length=64)
    assert found.parameters == sum(p.numel() for p in build(settings, device="meta").parameters())
    assert found.parameters >= found.active >= found.embedding > 0
    assert (found.active > found.embedding) == (settings.depth > 0)
    # a product of every parameter but the embedding's look-up, twice for multiply and add, at the least;
    # an encoder–decoder's encoder works on other tokens
    if settings.encoder is None:
        looked_up = (1000 if settings.depth == 0 else 64) * settings.width  # an untied table of 1000
        assert found.flops_per_token > 1.9 * (found.active - looked_up)
    assert len(found.blocks) == settings.depth


@pytest.mark.parametrize("name", NAMES)
def test_it_learns(name: str, text: str) -> None:
    recipe = small(name)
    tokenizer = train_tokenizer(TokenizerSettings(kind="byte"), [])
    network = build(recipe.model.derive(vocabulary=tokenizer.size), seed=recipe.seed)
    special = tuple(sorted(tokenizer.special.values()))
    trainer = Trainer(
        network, recipe.training, vocabulary=Vocabulary(tokenizer.size, tokenizer.mask, special), seed=recipe.seed
    )
    rows = trainer.objective.tokens(CONTEXT)
    ids = torch.tensor(tokenizer.encode(text)[: BATCH * rows]).view(BATCH, rows)
    batch = Batch(ids, tasks=torch.arange(BATCH) % 2)
    losses = [trainer.step(batch) for _ in range(STEPS)]
    assert all(math.isfinite(loss) for loss in losses)
    # an untrained model knows nothing: about as many nats as a guess
    assert losses[0] == pytest.approx(trainer.objective.blank(tokenizer.size), abs=1.0)
    if recipe.training.objective.kind == "causal":  # others draw other targets in each step
        assert losses[-1] < losses[0]
    for parameter in network.parameters():
        assert torch.isfinite(parameter).all()
