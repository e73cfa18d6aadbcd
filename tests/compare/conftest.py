"""A few kilobytes of text and a recipe that trains on them in a moment."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from armillary.compare import measure, skills, tasks
from armillary.recipe import Recipe

WORDS = ["the", "a", "of", "dog", "cat", "sees", "runs", "to", "Über", "home"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "corpus"
    folder.mkdir()
    draw = random.Random(0)
    for number in range(30):
        text = " ".join(draw.choice(WORDS) for _ in range(80))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def recipe(corpus: Path) -> Callable[..., Recipe]:
    def make(*overrides: str, **training: Any) -> Recipe:
        return Recipe.load(
            {
                "name": "tiny",
                "seed": 3,
                "data": {"sources": [{"path": str(corpus)}], "heldout": 0.2, "workers": 1},
                "tokenizer": {"kind": "byte"},
                "model": {
                    "width": 16,
                    "depth": 1,
                    "context": 32,
                    "block": {"mixer": {"kind": "attention", "heads": 2}, "channel": {"kind": "gated", "hidden": 32}},
                },
                "training": {
                    "context": 24,
                    "batch": 4,
                    "steps": 3,
                    "precision": "float32",
                    "compile": "no",
                    "device": "cpu",
                    "evaluate_tokens": 256,
                    "sample_tokens": 2,
                    "log_every": 1,
                }
                | training,
            },
            *overrides,
        )

    return make


@pytest.fixture(autouse=True, scope="session")
def short() -> Iterator[None]:
    """Measurements and probes that take no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "SHORTEST", 64)
        patch.setattr(measure, "LONGEST", 64)
        patch.setattr(measure, "HALVINGS", 2)
        patch.setattr(measure, "REPEATS", 1)
        tiny = {"recall": tasks.recall(2, keys=4, values=3), "nesting": tasks.nesting(6)}
        patch.setitem(skills.LEVELS, "quick", skills.Level(tiny, 4, 1))
        patch.setattr(skills, "TESTS", 128)
        yield
