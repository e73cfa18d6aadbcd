"""Mistral-shaped checkpoints (Jiang et al. 2023, Mistral 7B): LLaMA's arrangement with a window in every block, or
in none."""

from __future__ import annotations

from typing import ClassVar

from armillary.checkpoints.decoder import SIZES, Decoder
from armillary.checkpoints.fields import ACTIVATIONS, Field, Fixed, Same, Word
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
        *SIZES,
        Same("max_position_embeddings", "context", default=131072),
        Same("num_key_value_heads", "block.mixer.kv_heads", default=8, null=None),
        Same("head_dim", "block.mixer.head_width"),
        Fixed("attention_bias", False),
        Rope(),
        Word("hidden_act", "block.channel.activation", ACTIVATIONS, default="silu"),
        Fixed("mlp_bias", False),
        Same("rms_norm_eps", "norm.epsilon", "block.norm.epsilon", kind=float, default=1e-6),
        Same("tie_word_embeddings", "head.tied", kind=bool, default=False),
        Window(default=4096),
    )
