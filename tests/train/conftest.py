"""A corpus of a few kilobytes, recipes that train on it in a second, and what runs are compared by."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from armillary.recipe import Recipe
from armillary.train import Run, train

MODEL = {
    "width": 16,
    "depth": 2,
    "context": 32,
    "block": {"mixer": {"kind": "attention", "heads": 2, "kv_heads": 1}, "channel": "gated", "dropout": 0.1},
}
TRAINING = {
    "context": 24,
    "batch": 4,
    "steps": 12,
    "precision": "float32",
    "compile": "no",
    "device": "cpu",
    "evaluate_every": 4,
    "evaluate_tokens": 256,
    "samples_every": 6,
    "sample_tokens": 4,
    "checkpoint_every": 4,
    "log_every": 2,
}
WORDS = ["the", "a", "of", "dog", "cat", "sees", "runs", "to", "Über", "home"]
TIMES = ("tokens_per_second", "seconds", "memory")  # what two equal runs may differ in


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for number in range(30):
        text = " ".join(draw.choice(WORDS) for _ in range(80))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def recipe(corpus: Path) -> Callable[..., Recipe]:
    """recipe(steps=…, …) → a recipe with those training settings; model={…} adds to the model's."""

    def make(model: dict[str, Any] | None = None, **training: Any) -> Recipe:
        return Recipe.load(
            {
                "name": "tiny",
                "seed": 3,
                "data": {"sources": [{"path": str(corpus)}], "heldout": 0.2, "workers": 1},
                "tokenizer": {"kind": "byte"},
                "model": MODEL | (model or {}),
                "training": TRAINING | training,
            }
        )

    return make


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, recipe: Callable[..., Recipe]) -> Run:
    """The plain recipe's run, never stopped."""
    return train(recipe(), tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="session")
def same() -> Callable[[Run, Run], None]:
    """Assert that two runs ended in the same weights and optimiser, bit for bit, with the same curves."""

    def compare(one: Run, other: Run) -> None:
        assert one.step == other.step
        assert [path.name for path in one.checkpoints] == [path.name for path in other.checkpoints]
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert (one.checkpoints[-1] / name).read_bytes() == (other.checkpoints[-1] / name).read_bytes(), name
        assert _timeless(one.metrics) == _timeless(other.metrics)
        assert one.samples == other.samples

    return compare


def _timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
