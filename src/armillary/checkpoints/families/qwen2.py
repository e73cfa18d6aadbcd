"""Qwen2-shaped checkpoints (Yang et al. 2024, Qwen2 Technical Report; Qwen2.5): LLaMA's arrangement with
biases on queries, keys and values, and windows in the later blocks where they are in use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from armillary.checkpoints.decoder import ACTIVATION, TIED, Decoder, arrangement, epsilon, sizes
from armillary.checkpoints.fields import Field, Fixed
from armillary.checkpoints.layers import UseWindow
from armillary.checkpoints.rope import Rope
from armillary.checkpoints.table import families


@families.register
class Qwen2(Decoder):
    """Qwen2 and Qwen2.5 without experts."""

    kind: ClassVar[str] = "qwen2"
    source: ClassVar[str] = "Yang et al. 2024, Qwen2 Technical Report"
    architectures: ClassVar[tuple[str, ...]] = ("Qwen2ForCausalLM", "Qwen2Model")
    template: ClassVar[Mapping[str, Any]] = arrangement({"bias": True, "out_bias": False})
    fields: ClassVar[tuple[Field, ...]] = (
        *sizes(32768, kv_heads=32),
        Rope(),
        ACTIVATION,
        epsilon(1e-6),
        TIED,
        Fixed("use_mrope", False),
        UseWindow(),
    )
