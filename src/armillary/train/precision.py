"""In what a run computes: what `precision: auto` comes to on this machine."""

from __future__ import annotations

from pathlib import Path

import torch

from armillary.recipe.training import TrainingSettings


def settled(training: TrainingSettings) -> TrainingSettings:
    """The settings with a precision that is float32 or bf16."""
    if training.precision != "auto":
        return training
    here = training.device.startswith("cpu") or not torch.cuda.is_available()
    return training.derive(precision="float32" if here and not computes_bf16() else "bf16")


def computes_bf16() -> bool:
    """Whether the processor has bf16 products; true where that cannot be told."""
    try:
        flags = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return True
    return "flags" not in flags or "avx512_bf16" in flags or "amx_bf16" in flags
