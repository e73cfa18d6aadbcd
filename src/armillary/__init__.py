"""Armillary: from text to a language model that its owner can trust.

    import armillary as arm

    run = arm.train(arm.Recipe.load("quick"))
    model = arm.load(run.folder)
    print(model.generate("def main(", max_new_tokens=64).text)

Names are loaded when first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Model": "armillary.model",
    "Watermark": "armillary.model",
    "build": "armillary.model",
    "load": "armillary.model",
    "save": "armillary.model",
    "detect": "armillary.model",
    "mechanisms": "armillary.model",
    "Recipe": "armillary.recipe",
    "Run": "armillary.train",
    "Trainer": "armillary.train",
    "train": "armillary.train",
    "resume": "armillary.train",
    "evaluate": "armillary.evaluate",
    "compare": "armillary.compare",
    "ArmillaryError": "armillary.base.errors",
}

if TYPE_CHECKING:
    from armillary.base.errors import ArmillaryError
    from armillary.compare import compare
    from armillary.evaluate import evaluate
    from armillary.model import Model, Watermark, build, detect, load, mechanisms, save
    from armillary.recipe import Recipe
    from armillary.train import Run, Trainer, resume, train

__all__ = [
    "ArmillaryError",
    "Model",
    "Recipe",
    "Run",
    "Trainer",
    "Watermark",
    "__version__",
    "build",
    "compare",
    "detect",
    "evaluate",
    "load",
    "mechanisms",
    "resume",
    "save",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'armillary' has no attribute '{name}'")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
