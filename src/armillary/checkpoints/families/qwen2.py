"""Qwen2-shaped checkpoints (Yang et al. 2024, Qwen2 Technical Report; Qwen2.5): LLaMA's arrangement with
biases on queries, keys and values, and windows in the later blocks where they are in use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from armillary.checkpoints.decoder import SIZES, Decoder
from armillary.checkpoints.fields import ACTIVATIONS, Field, Fixed, Same, Word
from armillary.checkpoints.layers import UseWindow
from armillary.checkpoints.rope import Rope
from armillary.checkpoints.table import families


@families.register
class Qwen2(Decoder):
    """Qwen2 and Qwen2.5 without experts."""

    kind: ClassVar[str] = "qwen2"
    source: ClassVar[str] = "Yang et al. 2024, Qwen2 Technical Report"
    architectures: ClassVar[tuple[str, ...]] = ("Qwen2ForCausalLM", "Qwen2Model")
    template: ClassVar[Mapping[str, Any]] = {
        **Decoder.template,
        "block": {
            "mixer": {"kind": "attention", "bias": True, "out_bias": False, "position": {"kind": "rope"}},
            "channel": {"kind": "gated"},
            "norm": {"kind": "rmsnorm"},
        },
    }
    fields: ClassVar[tuple[Field, ...]] = (
        *SIZES,
        Same("max_position_embeddings", "context", default=32768),
        Same("num_key_value_heads", "block.mixer.kv_heads", default=32, null=None),
        Same("head_dim", "block.mixer.head_width"),
        Rope(),
        Word("hidden_act", "block.channel.activation", ACTIVATIONS, default="silu"),
        Same("rms_norm_eps", "norm.epsilon", "block.norm.epsilon", kind=float, default=1e-6),
        Same("tie_word_embeddings", "head.tied", kind=bool, default=False),
        Fixed("use_mrope", False),
        UseWindow(),
    )
