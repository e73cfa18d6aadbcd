"""BERT-shaped checkpoints (Devlin et al. 2019, BERT): encoders with a norm after every sum.

Learned positions and segments are added to the embedding and normed with it. The masked language
model's head has a product, an activation and a norm before the scores; a bare body becomes an encoder
of sentences. Its pooler and the scores of the next sentence are left out: neither takes part in them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from armillary.checkpoints import sentence
from armillary.checkpoints.facts import Facts
from armillary.checkpoints.fields import ACTIVATIONS, Config, Data, Field, Fixed, Same, Word
from armillary.checkpoints.table import Entry, Family, families
from armillary.nn.network import ModelSettings

_NORM = {"kind": "layernorm", "weight": True, "bias": True}
_IGNORED = """
attention_probs_dropout_prob hidden_dropout_prob classifier_dropout directionality output_past
pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type
"""


class Head(Field):
    """`architectures`: a masked language model, or the bare body. Reads after the activation and the epsilon."""

    keys: tuple[str, ...] = ("architectures",)
    paths: tuple[str, ...] = ("head.kind",)

    def __init__(self, masked: str, bare: str) -> None:
        self.masked, self.bare = masked, bare

    def read(self, config: Config, data: Data) -> None:
        given = config.take("architectures")
        if given and self.bare in (given if isinstance(given, list) else [given]):
            data["head"] = {"kind": "embedding", "pool": "mean", "normalise": False}
            return
        norm = dict(data["block"]["norm"])
        activation = data["block"]["channel"]["activation"]
        data["head"] = {"kind": "language_model", "bias": True, "transform": activation, "norm": norm}

    def write(self, facts: Facts, config: Data) -> None:
        config["architectures"] = [self.bare if facts.get("head.kind") == "embedding" else self.masked]


FIELDS: tuple[Field, ...] = (
    Same("vocab_size", "vocabulary", needed=True),
    Same("hidden_size", "width", needed=True),
    Same("num_hidden_layers", "depth", needed=True),
    Same("num_attention_heads", "block.mixer.heads", needed=True),
    Same("intermediate_size", "block.channel.hidden", needed=True),
    Same("type_vocab_size", "segments", default=2),
    Word("hidden_act", "block.channel.activation", ACTIVATIONS, default="gelu"),
    Same("layer_norm_eps", "embed_norm.epsilon", "block.norm.epsilon", kind=float, default=1e-12),
    Fixed("position_embedding_type", "absolute"),
    Fixed("tie_word_embeddings", True, "the scores always share the embedding's weight"),
    Fixed("is_decoder", False),
)


class Encoder(Family):
    """What BERT and its relatives share. parts: their names of what the head is made of."""

    parts: ClassVar[Mapping[str, str]] = {}
    template: ClassVar[Mapping[str, Any]] = {
        "form": "encoder",
        "position": {"kind": "learned"},
        "embed_norm": _NORM,
        "norm": None,
        "block": {
            "mixer": {"kind": "attention", "bias": True, "out_bias": True},
            "channel": {"kind": "ffn", "bias": True},
            "norm": _NORM,
            "norm_at": "post",
        },
    }
    ignored: ClassVar[frozenset[str]] = frozenset(_IGNORED.split())
    constants: ClassVar[Mapping[str, Any]] = {
        "attention_probs_dropout_prob": 0.1,
        "hidden_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    leftovers: ClassVar[re.Pattern[str] | None] = re.compile(
        r"pooler\.dense\.(weight|bias)|embeddings\.position_ids|cls\.seq_relationship\.(weight|bias)"
    )
    older: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"LayerNorm\.gamma$", "LayerNorm.weight"),
        (r"LayerNorm\.beta$", "LayerNorm.bias"),
    )

    def equivalent(self, wanted: Facts) -> Facts:
        """How sentences are pooled is said by files of their own."""
        wanted = super().equivalent(wanted)
        if wanted.get("head.kind") == "embedding":
            wanted |= sentence.SAID
        return wanted

    def table(self, settings: ModelSettings) -> Sequence[Entry]:
        theirs, ours = f"{self.prefix}encoder.layer.{{i}}", "blocks.{i}"
        tables = f"{self.prefix}embeddings"
        hidden, inner = "hidden_size", "intermediate_size"
        entries = [
            Entry(f"{tables}.word_embeddings.weight", "embed.weight", sizes="vocab_size, hidden_size"),
            Entry(
                f"{tables}.position_embeddings.weight",
                "position.table.weight",
                sizes="max_position_embeddings, hidden_size",
            ),
            Entry(f"{tables}.token_type_embeddings.weight", "segment.weight", sizes="type_vocab_size, hidden_size"),
            Entry(self.parts["scores"], "head.product.weight", sizes="vocab_size, hidden_size"),
            Entry(self.parts["bias"], "head.product.bias", sizes="vocab_size"),
        ]
        for leaf in ("weight", "bias"):
            entries += [
                Entry(f"{a}.{leaf}", f"{b}.{leaf}", sizes=sizes)
                for a, b, sizes in (
                    (f"{tables}.LayerNorm", "embed_norm", hidden),
                    (f"{theirs}.attention.self.query", f"{ours}.mixer.inner.q", hidden),
                    (f"{theirs}.attention.self.key", f"{ours}.mixer.inner.k", hidden),
                    (f"{theirs}.attention.self.value", f"{ours}.mixer.inner.v", hidden),
                    (f"{theirs}.attention.output.dense", f"{ours}.mixer.inner.o", hidden),
                    (f"{theirs}.attention.output.LayerNorm", f"{ours}.mixer.norm", hidden),
                    (f"{theirs}.intermediate.dense", f"{ours}.channel.inner.up", f"{inner}, {hidden}"),
                    (f"{theirs}.output.dense", f"{ours}.channel.inner.down", f"{inner}, {hidden}"),
                    (f"{theirs}.output.LayerNorm", f"{ours}.channel.norm", hidden),
                    (self.parts["transform"], "head.transform", hidden),
                    (self.parts["norm"], "head.norm", hidden),
                )
            ]
        return entries


@families.register
class Bert(Encoder):
    """BERT in all sizes, and encoders of sentences that are stored as it is, such as MiniLM and BGE."""

    kind: ClassVar[str] = "bert"
    source: ClassVar[str] = "Devlin et al. 2019, BERT: Pre-training of Deep Bidirectional Transformers"
    architectures: ClassVar[tuple[str, ...]] = ("BertForMaskedLM", "BertModel", "BertForPreTraining")
    prefix: ClassVar[str] = "bert."
    head: ClassVar[str] = "cls."
    parts: ClassVar[Mapping[str, str]] = {
        "scores": "cls.predictions.decoder.weight",
        "bias": "cls.predictions.bias",
        "transform": "cls.predictions.transform.dense",
        "norm": "cls.predictions.transform.LayerNorm",
    }
    repeats: ClassVar[Mapping[str, str]] = {"cls.predictions.decoder.bias": "cls.predictions.bias"}
    fields: ClassVar[tuple[Field, ...]] = (
        *FIELDS,
        Same("max_position_embeddings", "context", default=512),
        Head("BertForMaskedLM", "BertModel"),
    )
