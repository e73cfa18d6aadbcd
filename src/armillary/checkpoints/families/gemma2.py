"""Gemma 2-shaped checkpoints (Gemma Team 2024, Gemma 2): a norm before and after each part whose gain is 1 + w,
every other block with a window, soft caps on scores and logits, and an embedding scaled by the root of its width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from armillary.checkpoints.decoder import BIASES, SIZES, Decoder, arrangement, epsilon
from armillary.checkpoints.facts import Facts
from armillary.checkpoints.fields import ACTIVATIONS, Config, Data, Equal, Field, Fixed, Same, Word, put
from armillary.checkpoints.layers import Layers
from armillary.checkpoints.rope import Rope
from armillary.checkpoints.table import families

NORM = {"kind": "rmsnorm", "unit_offset": True}
NORMS = (
    ("input_layernorm", "mixer.norm"),
    ("post_attention_layernorm", "mixer.norm_after"),
    ("pre_feedforward_layernorm", "channel.norm"),
    ("post_feedforward_layernorm", "channel.norm_after"),
)


class EmbedScale(Field):
    """No key: the embedding is scaled by the root of the width."""

    def read(self, config: Config, data: Data) -> None:
        put(data, "embed_scale", max(data["width"], 0) ** 0.5)


class Scalar(Field):
    """`query_pre_attn_scalar`: the scores are divided by its root."""

    keys = ("query_pre_attn_scalar",)
    paths = ("block.mixer.scale",)

    def read(self, config: Config, data: Data) -> None:
        (key,) = self.keys
        value = config.number(key, config.take(key, 256), float)
        if value <= 0:
            raise config.wrong(key, value, "more than 0")
        put(data, "block.mixer.scale", value**-0.5)

    def write(self, facts: Facts, config: Data) -> None:
        config[self.keys[0]] = round(facts["blocks.0.mixer.scale"] ** -2)  # a whole number to their readers


class Alternating(Layers):
    """Without `layer_types`, every other block has a window, the first one too."""

    def rule(self, config: Config, depth: int) -> list[bool]:
        return [index % 2 == 0 for index in range(depth)]

    def write(self, facts: Facts, config: Data) -> None:
        super().write(facts, config)
        config["sliding_window"] = config["sliding_window"] or facts["context"]  # their readers need a number


@families.register
class Gemma2(Decoder):
    """Gemma 2 in all sizes."""

    kind: ClassVar[str] = "gemma2"
    source: ClassVar[str] = "Gemma Team 2024, Gemma 2: Improving Open Language Models at a Practical Size"
    architectures: ClassVar[tuple[str, ...]] = ("Gemma2ForCausalLM", "Gemma2Model")
    whole: ClassVar[bool] = True
    norms: ClassVar[tuple[tuple[str, str], ...]] = NORMS
    template: ClassVar[Mapping[str, Any]] = arrangement(norm=NORM, norm_at="sandwich")
    fields: ClassVar[tuple[Field, ...]] = (
        *SIZES,
        Same("max_position_embeddings", "context", default=8192),
        Same("num_key_value_heads", "block.mixer.kv_heads", default=4),
        Same("head_dim", "block.mixer.head_width", default=256),
        BIASES,
        Scalar(),
        Same("attn_logit_softcapping", "block.mixer.softcap", kind=float, default=50.0, null=None),
        Same("final_logit_softcapping", "head.softcap", kind=float, default=30.0, null=None),
        Rope(),
        Word("hidden_activation", "block.channel.activation", ACTIVATIONS, default="gelu_pytorch_tanh"),
        Equal("hidden_act", "hidden_activation"),
        epsilon(1e-6),
        Same("tie_word_embeddings", "head.tied", kind=bool, default=True),
        Fixed("use_bidirectional_attention", False),
        Equal("sliding_window_size", "sliding_window"),
        EmbedScale(),
        Alternating(default=4096),
    )
    ignored: ClassVar[frozenset[str]] = Decoder.ignored | {"cache_implementation"}
