"""Mistral-shaped checkpoints (Jiang et al. 2023, Mistral 7B): LLaMA's arrangement with a window in every block, or
in none."""

from __future__ import annotations

from typing import ClassVar

from armillary.checkpoints.decoder import ACTIVATION, TIED, Decoder, epsilon, sizes
from armillary.checkpoints.fields import Field, Fixed
from armillary.checkpoints.layers import Window
from armillary.checkpoints.rope import Rope
from armillary.checkpoints.table import families


@families.register
class Mistral(Decoder):
    """Mistral 7B and its relatives, with and without a sliding window."""

    kind: ClassVar[str] = "mistral"
    source: ClassVar[str] = "Jiang et al. 2023, Mistral 7B"
    architectures: ClassVar[tuple[str, ...]] = ("MistralForCausalLM", "MistralModel")
    fields: ClassVar[tuple[Field, ...]] = (
        *sizes(131072, kv_heads=8),
        Fixed("attention_bias", False),
        Rope(),
        ACTIVATION,
        Fixed("mlp_bias", False),
        epsilon(1e-6),
        TIED,
        Window(default=4096),
    )
