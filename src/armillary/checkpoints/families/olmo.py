"""OLMo-shaped checkpoints (Groeneveld et al. 2024, OLMo): LLaMA's arrangement with LayerNorm that has neither
gain nor bias, and with queries, keys and values cut to a range."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from armillary.checkpoints.decoder import SIZES, Decoder
from armillary.checkpoints.fields import ACTIVATIONS, Field, Same, Word
from armillary.checkpoints.rope import Rope
from armillary.checkpoints.table import families

_NORM = {"kind": "layernorm", "weight": False, "bias": False, "epsilon": 1e-5}


@families.register
class Olmo(Decoder):
    """OLMo 1B and 7B."""

    kind: ClassVar[str] = "olmo"
    source: ClassVar[str] = "Groeneveld et al. 2024, OLMo: Accelerating the Science of Language Models"
    architectures: ClassVar[tuple[str, ...]] = ("OlmoForCausalLM", "OlmoModel")
    template: ClassVar[Mapping[str, Any]] = {
        **Decoder.template,
        "norm": _NORM,
        "block": {**Decoder.template["block"], "norm": _NORM},
    }
    fields: ClassVar[tuple[Field, ...]] = (
        *SIZES,
        Same("max_position_embeddings", "context", default=2048),
        Same("num_key_value_heads", "block.mixer.kv_heads"),
        Same("head_dim", "block.mixer.head_width"),
        Same("attention_bias", "block.mixer.bias", "block.mixer.out_bias", kind=bool, default=False),
        Same("clip_qkv", "block.mixer.clip", kind=float),
        Rope(),
        Word("hidden_act", "block.channel.activation", ACTIVATIONS, default="silu"),
        Same("tie_word_embeddings", "head.tied", kind=bool, default=False),
    )
