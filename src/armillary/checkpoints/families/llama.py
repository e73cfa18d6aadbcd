"""LLaMA-shaped checkpoints (Touvron et al. 2023, LLaMA; Dubey et al. 2024, The Llama 3 Herd of Models).

RMSNorm before gated feed-forward and grouped-query attention with rotary positions in half pairing.
"""

from __future__ import annotations

from typing import ClassVar

from armillary.checkpoints.decoder import SIZES, Decoder
from armillary.checkpoints.fields import ACTIVATIONS, Field, Fixed, Same, Word
from armillary.checkpoints.rope import Rope
from armillary.checkpoints.table import families


@families.register
class Llama(Decoder):
    """LLaMA 1 to 3 and everything that is stored as they are."""

    kind: ClassVar[str] = "llama"
    source: ClassVar[str] = "Touvron et al. 2023, LLaMA; Dubey et al. 2024, The Llama 3 Herd of Models"
    architectures: ClassVar[tuple[str, ...]] = ("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel")
    whole: ClassVar[bool] = True
    fields: ClassVar[tuple[Field, ...]] = (
        *SIZES,
        Same("max_position_embeddings", "context", default=2048),
        Same("num_key_value_heads", "block.mixer.kv_heads"),
        Same("head_dim", "block.mixer.head_width"),
        Same("attention_bias", "block.mixer.bias", "block.mixer.out_bias", kind=bool, default=False),
        Rope(),
        Word("hidden_act", "block.channel.activation", ACTIVATIONS, default="silu"),
        Same("mlp_bias", "block.channel.bias", kind=bool, default=False),
        Same("rms_norm_eps", "norm.epsilon", "block.norm.epsilon", kind=float, default=1e-6),
        Same("tie_word_embeddings", "head.tied", kind=bool, default=False),
        Fixed("sliding_window", None),
    )
    ignored: ClassVar[frozenset[str]] = Decoder.ignored | {"max_sequence_length"}
