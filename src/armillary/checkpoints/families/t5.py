"""T5-shaped checkpoints (Raffel et al. 2020, T5): an encoder and a decoder with biases for relative positions.

RMSNorm before every part, no other biases, and scores that are not scaled. All blocks of a side share the
biases of the first one. The first T5 scales what its tied head reads by 1/√d_model; later versions (T5 1.1,
Flan-T5, mT5) have a gated feed-forward, no such factor, and mostly a head of their own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from armillary.base.errors import UnsupportedError
from armillary.checkpoints.facts import Facts, facts
from armillary.checkpoints.fields import ACTIVATIONS, Config, Data, Field, Fixed, Same, put
from armillary.checkpoints.table import Entry, Family, families
from armillary.nn.heads.language_model import LanguageModelHeadSettings
from armillary.nn.network import ModelSettings

_MIXERS = ("block.mixer", "block.cross", "encoder.block.mixer")
_CHANNELS = ("block.channel", "encoder.block.channel")
_SELF = ("block.mixer", "encoder.block.mixer")
_NORM = {"kind": "rmsnorm"}
_MIXER = {"kind": "attention", "scale": 1.0}
_PLACED = _MIXER | {"position": {"kind": "t5"}}
_GROUPS = {"encoder_positions": ("encoder", "encoder.*"), "positions": ("", "blocks.*")}
_IGNORED = """
classifier_dropout dense_act_fn dropout_rate initializer_factor is_gated_act output_past
"""


def _each(paths: Sequence[str], name: str) -> tuple[str, ...]:
    return tuple(f"{path}.{name}" for path in paths)


class Depths(Field):
    """`num_layers` of the encoder, `num_decoder_layers` (by default as many); all of a side share positions."""

    keys: tuple[str, ...] = ("num_layers", "num_decoder_layers")
    paths: tuple[str, ...] = ("encoder.depth", "depth")

    def read(self, config: Config, data: Data) -> None:
        Same("num_layers", "encoder.depth", needed=True).read(config, data)
        Same("num_decoder_layers", "depth", default=data["encoder"]["depth"]).read(config, data)
        data["share"] = {
            group: [f"{pattern}.mixer.inner.position"]
            for group, (side, pattern) in _GROUPS.items()
            if (data[side] if side else data)["depth"] > 1
        }

    def write(self, facts: Facts, config: Data) -> None:
        config["num_layers"], config["num_decoder_layers"] = facts["encoder.depth"], facts["depth"]


class FeedForward(Field):
    """`feed_forward_proj`: an activation, or gated- and an activation."""

    keys: tuple[str, ...] = ("feed_forward_proj",)
    paths: tuple[str, ...] = (*_each(_CHANNELS, "kind"), *_each(_CHANNELS, "activation"))

    def __init__(self, default: str) -> None:
        self.default = default

    def read(self, config: Config, data: Data) -> None:
        value = config.take("feed_forward_proj", self.default)
        kind, _, name = str(value).rpartition("-")
        # "gelu" was meant as its approximation in the first gated models, and is read so everywhere
        activation = "gelu_tanh" if value == "gated-gelu" else ACTIVATIONS.get(name)
        if not isinstance(value, str) or kind not in ("", "gated") or activation is None:
            raise UnsupportedError(
                f"'feed_forward_proj' is {value!r}, which is not known here",
                where=config.where,
                hint=f"known: {', '.join(ACTIVATIONS)}, each with or without gated- before it",
            )
        for path in _CHANNELS:
            put(data, f"{path}.kind", "gated" if kind else "ffn")
            put(data, f"{path}.activation", activation)

    def write(self, facts: Facts, config: Data) -> None:
        gated = facts.get("blocks.0.channel.kind") == "gated"
        activation = facts.get("blocks.0.channel.activation")
        name = next((name for name, meaning in ACTIVATIONS.items() if meaning == activation), "")
        if gated and name == "gelu":
            raise UnsupportedError("model.blocks.0.channel.activation: 'gelu' has no name in 'feed_forward_proj'")
        config["feed_forward_proj"] = f"gated-{name.removesuffix('_new')}" if gated else name


class Start(Field):
    """`decoder_start_token_id`, by default `pad_token_id`."""

    keys: tuple[str, ...] = ("decoder_start_token_id", "pad_token_id")
    paths: tuple[str, ...] = ("start",)

    def read(self, config: Config, data: Data) -> None:
        pad = config.take("pad_token_id", 0)
        data["start"] = config.number(self.keys[0], config.take("decoder_start_token_id", pad), int)

    def write(self, facts: Facts, config: Data) -> None:
        config["decoder_start_token_id"] = facts["start"]


class Scaled(Field):
    """`tie_word_embeddings`: whether what the head reads is scaled. That it shares the embedding is
    said by the tensors alone, which contradict this key in folders of later versions."""

    keys: tuple[str, ...] = ("tie_word_embeddings", "scale_decoder_outputs")
    paths: tuple[str, ...] = ("head.scale",)

    def read(self, config: Config, data: Data) -> None:
        scaled = True
        for key in self.keys:  # the later one wins
            scaled = config.take(key, scaled)
            if type(scaled) is not bool:
                raise config.wrong(key, scaled, "true or false")
        put(data, "head.scale", data["width"] ** -0.5 if scaled else 1.0)

    def write(self, facts: Facts, config: Data) -> None:
        config["tie_word_embeddings"] = facts["head.scale"] != 1.0


class _T5(Family):
    head: ClassVar[str] = "lm_head."
    template: ClassVar[Mapping[str, Any]] = {
        "form": "encoder_decoder",
        "norm": _NORM,
        "head": {"kind": "language_model"},
        "block": {"mixer": _PLACED, "cross": _MIXER, "norm": _NORM},
        "encoder": {"block": {"mixer": _PLACED, "norm": _NORM}},
    }
    ignored: ClassVar[frozenset[str]] = frozenset(_IGNORED.split())
    constants: ClassVar[Mapping[str, Any]] = {"is_encoder_decoder": True, "dropout_rate": 0.1, "use_cache": True}
    # older folders have an empty table of relative positions in one cross attention
    leftovers: ClassVar[re.Pattern[str] | None] = re.compile(
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
    )
    repeats: ClassVar[Mapping[str, str]] = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }

    def suit(self, settings: ModelSettings, names: Collection[str]) -> ModelSettings:
        """A head of its own is one whose weight is there."""
        assert isinstance(settings.head, LanguageModelHeadSettings)
        return settings.derive(head=settings.head.derive(tied="lm_head.weight" not in names))

    def equivalent(self, wanted: Facts) -> Facts:
        wanted = super().equivalent(wanted)
        if wanted.get("head.kind") == "language_model":
            wanted["head.tied"] = True
        return wanted

    def table(self, settings: ModelSettings) -> Sequence[Entry]:
        of_q, of_up = "num_heads × d_kv, d_model", "d_ff, d_model"
        gated = facts(settings).get("blocks.0.channel.kind") == "gated"
        entries = [
            Entry("shared.weight", "embed.weight", sizes="vocab_size, d_model"),
            Entry("lm_head.weight", "head.product.weight", sizes="vocab_size, d_model"),
            Entry("encoder.final_layer_norm.weight", "encoder_norm.weight", sizes="d_model"),
            Entry("decoder.final_layer_norm.weight", "norm.weight", sizes="d_model"),
        ]
        for side, ours, parts in (
            ("encoder", "encoder", ("mixer SelfAttention", "channel DenseReluDense")),
            ("decoder", "blocks", ("mixer SelfAttention", "cross EncDecAttention", "channel DenseReluDense")),
        ):
            entries.append(
                Entry(
                    f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                    f"{ours}.0.mixer.inner.position.table.weight",
                    sizes="relative_attention_num_buckets, num_heads",
                )
            )
            for index, part in enumerate(parts):
                name, _, module = part.partition(" ")
                layer, branch = f"{side}.block.{{i}}.layer.{index}", f"{ours}.{{i}}.{name}"
                entries.append(Entry(f"{layer}.layer_norm.weight", f"{branch}.norm.weight", sizes="d_model"))
                products = [(one, one, of_q) for one in "qkvo"]
                if name == "channel":
                    products = [("wo", "down", of_up), ("wi", "up", of_up)]
                    if gated:
                        products = [products[0], ("wi_0", "gate", of_up), ("wi_1", "up", of_up)]
                entries += [
                    Entry(f"{layer}.{module}.{a}.weight", f"{branch}.inner.{b}.weight", sizes=sizes)
                    for a, b, sizes in products
                ]
        return entries


def _fields(feed_forward: str) -> tuple[Field, ...]:
    return (
        Same("vocab_size", "vocabulary", needed=True),
        Same("d_model", "width", needed=True),
        Depths(),
        Same("num_heads", *_each(_MIXERS, "heads"), needed=True),
        Same("d_kv", *_each(_MIXERS, "head_width"), needed=True),
        Same("d_ff", *_each(_CHANNELS, "hidden"), needed=True),
        Same("n_positions", "context", default=512),
        Same("relative_attention_num_buckets", *_each(_SELF, "position.buckets"), default=32),
        Same("relative_attention_max_distance", *_each(_SELF, "position.farthest"), default=128),
        Same(
            "layer_norm_epsilon",
            "norm.epsilon",
            "block.norm.epsilon",
            "encoder.block.norm.epsilon",
            kind=float,
            default=1e-6,
        ),
        FeedForward(feed_forward),
        Start(),
        Fixed("is_encoder_decoder", True, "the encoder alone is not read"),
    )


@families.register
class T5(_T5):
    """T5, T5 1.1 and Flan-T5 in all sizes."""

    kind: ClassVar[str] = "t5"
    source: ClassVar[str] = "Raffel et al. 2020, Exploring the Limits of Transfer Learning; Chung et al. 2022, Flan-T5"
    architectures: ClassVar[tuple[str, ...]] = ("T5ForConditionalGeneration", "T5WithLMHeadModel")
    fields: ClassVar[tuple[Field, ...]] = (*_fields("relu"), Scaled())


@families.register
class MT5(_T5):
    """mT5 in all sizes."""

    kind: ClassVar[str] = "mt5"
    source: ClassVar[str] = "Xue et al. 2021, mT5: A Massively Multilingual Pre-trained Text-to-Text Transformer"
    architectures: ClassVar[tuple[str, ...]] = ("MT5ForConditionalGeneration",)
    template: ClassVar[Mapping[str, Any]] = {
        **_T5.template,
        "head": {"kind": "language_model", "scale": 1.0},
    }
    ignored: ClassVar[frozenset[str]] = _T5.ignored | {"tie_word_embeddings"}
    fields: ClassVar[tuple[Field, ...]] = _fields("gated-gelu")
