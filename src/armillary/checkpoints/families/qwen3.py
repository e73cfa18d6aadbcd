"""Qwen3-shaped checkpoints (Yang et al. 2025, Qwen3 Technical Report): LLaMA's arrangement with a norm of the
queries and keys of each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from armillary.checkpoints.decoder import ACTIVATION, BIASES, RMSNORM, TIED, Decoder, arrangement, epsilon, sizes
from armillary.checkpoints.fields import Field
from armillary.checkpoints.layers import UseWindow
from armillary.checkpoints.rope import Rope
from armillary.checkpoints.table import families


@families.register
class Qwen3(Decoder):
    """Qwen3 without experts."""

    kind: ClassVar[str] = "qwen3"
    source: ClassVar[str] = "Yang et al. 2025, Qwen3 Technical Report"
    architectures: ClassVar[tuple[str, ...]] = ("Qwen3ForCausalLM", "Qwen3Model")
    template: ClassVar[Mapping[str, Any]] = arrangement({"norm": RMSNORM, "norm_over": "head"})
    fields: ClassVar[tuple[Field, ...]] = (
        *sizes(32768, kv_heads=32, head_width=128),
        BIASES,
        Rope(),
        ACTIVATION,
        epsilon(1e-6, "block.mixer.norm.epsilon"),
        TIED,
        UseWindow(),
    )
