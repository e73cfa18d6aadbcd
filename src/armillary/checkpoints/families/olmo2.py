"""OLMo 2-shaped checkpoints (OLMo Team 2025, 2 OLMo 2 Furious): RMSNorm after attention and feed-forward, before
the sum, and over the queries and keys of all heads together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from armillary.checkpoints.decoder import SIZES, Decoder
from armillary.checkpoints.fields import ACTIVATIONS, Field, Same, Word
from armillary.checkpoints.rope import Rope
from armillary.checkpoints.table import families


@families.register
class Olmo2(Decoder):
    """OLMo 2 in all sizes."""

    kind: ClassVar[str] = "olmo2"
    source: ClassVar[str] = "OLMo Team 2025, 2 OLMo 2 Furious"
    architectures: ClassVar[tuple[str, ...]] = ("Olmo2ForCausalLM", "Olmo2Model")
    norms: ClassVar[tuple[tuple[str, str], ...]] = (
        ("post_attention_layernorm", "mixer.norm"),
        ("post_feedforward_layernorm", "channel.norm"),
    )
    template: ClassVar[Mapping[str, Any]] = {
        **Decoder.template,
        "block": {
            "mixer": {
                "kind": "attention",
                "norm": {"kind": "rmsnorm"},
                "norm_over": "all",
                "position": {"kind": "rope"},
            },
            "channel": {"kind": "gated"},
            "norm": {"kind": "rmsnorm"},
            "norm_at": "after",
        },
    }
    fields: ClassVar[tuple[Field, ...]] = (
        *SIZES,
        Same("max_position_embeddings", "context", default=2048),
        Same("num_key_value_heads", "block.mixer.kv_heads"),
        Same("head_dim", "block.mixer.head_width"),
        Same("attention_bias", "block.mixer.bias", "block.mixer.out_bias", kind=bool, default=False),
        Rope(),
        Word("hidden_act", "block.channel.activation", ACTIVATIONS, default="silu"),
        Same(
            "rms_norm_eps",
            "norm.epsilon",
            "block.norm.epsilon",
            "block.mixer.norm.epsilon",
            kind=float,
            default=1e-5,
        ),
        Same("tie_word_embeddings", "head.tied", kind=bool, default=False),
    )
