"""BLOOM-shaped checkpoints (BigScience Workshop 2022, BLOOM).

LayerNorm with bias, also right after the embedding; scores that fall with distance (ALiBi) and no other
positions. Queries, keys and values are stored as one tensor, head after head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from armillary.checkpoints.facts import facts
from armillary.checkpoints.fields import Field, Fixed, Same
from armillary.checkpoints.table import Entry, Family, SplitByHead, families
from armillary.nn.network import ModelSettings

_THEIRS, _OURS = "transformer.h.{i}", "blocks.{i}"
_NORM = {"kind": "layernorm", "weight": True, "bias": True}
# The last ones are of the program that BLOOM was trained with.
_IGNORED = """
attention_dropout hidden_dropout pretraining_tp slow_but_exact unk_token_id
attention_softmax_in_fp32 bias_dropout_fusion masked_softmax_fusion offset_alibi skip_bias_add skip_bias_add_qkv
"""


@families.register
class Bloom(Family):
    """BLOOM and BLOOMZ in all sizes."""

    kind: ClassVar[str] = "bloom"
    source: ClassVar[str] = "BigScience Workshop 2022, BLOOM: A 176B-Parameter Open-Access Multilingual Language Model"
    architectures: ClassVar[tuple[str, ...]] = ("BloomForCausalLM", "BloomModel")
    prefix: ClassVar[str] = "transformer."
    template: ClassVar[Mapping[str, Any]] = {
        "form": "decoder",
        "embed_norm": _NORM,
        "norm": _NORM,
        "head": {"kind": "language_model"},
        "block": {
            "mixer": {"kind": "attention", "bias": True, "out_bias": True, "position": {"kind": "alibi"}},
            "channel": {"kind": "ffn", "activation": "gelu_tanh", "bias": True},
            "norm": _NORM,
        },
    }
    fields: ClassVar[tuple[Field, ...]] = (
        Same("vocab_size", "vocabulary", needed=True),
        Same("hidden_size", "width", needed=True, older=("n_embed",)),
        Same("n_layer", "depth", needed=True, older=("num_hidden_layers",)),
        Same("n_head", "block.mixer.heads", needed=True, older=("num_attention_heads",)),
        Same("seq_length", "context", default=2048),
        Same(
            "layer_norm_epsilon", "norm.epsilon", "embed_norm.epsilon", "block.norm.epsilon", kind=float, default=1e-5
        ),
        Same("tie_word_embeddings", "head.tied", kind=bool, default=True),
        Fixed("apply_residual_connection_post_layernorm", False),
        Fixed("n_inner", None, "the feed-forward is always 4 × hidden_size wide"),
    )
    ignored: ClassVar[frozenset[str]] = frozenset(_IGNORED.split())
    constants: ClassVar[Mapping[str, Any]] = {
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }

    def table(self, settings: ModelSettings) -> Sequence[Entry]:
        heads = facts(settings)["blocks.0.mixer.heads"]
        qkv = f"{_THEIRS}.self_attention.query_key_value"
        entries = [
            Entry("transformer.word_embeddings.weight", "embed.weight", sizes="vocab_size, hidden_size"),
            Entry("lm_head.weight", "head.product.weight", sizes="vocab_size, hidden_size"),
        ]
        for leaf in ("weight", "bias"):
            ours = tuple(f"{_OURS}.mixer.inner.{name}.{leaf}" for name in "qkv")
            entries.append(Entry(f"{qkv}.{leaf}", ours, (SplitByHead(heads),), "hidden_size"))
            entries += [
                Entry(f"{theirs}.{leaf}", f"{ours}.{leaf}", sizes="hidden_size")
                for theirs, ours in (
                    ("transformer.word_embeddings_layernorm", "embed_norm"),
                    ("transformer.ln_f", "norm"),
                    (f"{_THEIRS}.input_layernorm", f"{_OURS}.mixer.norm"),
                    (f"{_THEIRS}.self_attention.dense", f"{_OURS}.mixer.inner.o"),
                    (f"{_THEIRS}.post_attention_layernorm", f"{_OURS}.channel.norm"),
                    (f"{_THEIRS}.mlp.dense_h_to_4h", f"{_OURS}.channel.inner.up"),
                    (f"{_THEIRS}.mlp.dense_4h_to_h", f"{_OURS}.channel.inner.down"),
                )
            ]
        return entries
