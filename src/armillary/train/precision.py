"""In what a run computes: what `precision: auto` comes to on this machine."""

from __future__ import annotations

import torch

from armillary.nn.ops import computes_bf16
from armillary.recipe.training import TrainingSettings


def settled(training: TrainingSettings) -> TrainingSettings:
    """The settings with a precision that is float32 or bf16."""
    if training.precision != "auto":
        return training
    here = training.device.startswith("cpu") or not torch.cuda.is_available()
    return training.derive(precision="float32" if here and not computes_bf16() else "bf16")
