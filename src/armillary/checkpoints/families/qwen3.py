"""Qwen3-shaped checkpoints (Yang et al. 2025, Qwen3 Technical Report): LLaMA's arrangement with a norm of the
queries and keys of each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from armillary.checkpoints.decoder import SIZES, Decoder
from armillary.checkpoints.fields import ACTIVATIONS, Field, Same, Word
from armillary.checkpoints.layers import UseWindow
from armillary.checkpoints.rope import Rope
from armillary.checkpoints.table import families


@families.register
class Qwen3(Decoder):
    """Qwen3 without experts."""

    kind: ClassVar[str] = "qwen3"
    source: ClassVar[str] = "Yang et al. 2025, Qwen3 Technical Report"
    architectures: ClassVar[tuple[str, ...]] = ("Qwen3ForCausalLM", "Qwen3Model")
    template: ClassVar[Mapping[str, Any]] = {
        **Decoder.template,
        "block": {
            "mixer": {
                "kind": "attention",
                "norm": {"kind": "rmsnorm"},
                "norm_over": "head",
                "position": {"kind": "rope"},
            },
            "channel": {"kind": "gated"},
            "norm": {"kind": "rmsnorm"},
        },
    }
    fields: ClassVar[tuple[Field, ...]] = (
        *SIZES,
        Same("max_position_embeddings", "context", default=32768),
        Same("num_key_value_heads", "block.mixer.kv_heads", default=32, null=None),
        Same("head_dim", "block.mixer.head_width", default=128),
        Same("attention_bias", "block.mixer.bias", "block.mixer.out_bias", kind=bool, default=False),
        Rope(),
        Word("hidden_act", "block.channel.activation", ACTIVATIONS, default="silu"),
        Same(
            "rms_norm_eps",
            "norm.epsilon",
            "block.norm.epsilon",
            "block.mixer.norm.epsilon",
            kind=float,
            default=1e-6,
        ),
        Same("tie_word_embeddings", "head.tied", kind=bool, default=False),
        UseWindow(),
    )
