"""XLNet-shaped checkpoints (Yang et al. 2019, XLNet): encoders that score tokens in any order.

Attention by content, by distance (as in Transformer-XL) and by whether two tokens are of one segment,
each with a bias; a norm after every sum. The embedding of a token that is asked for belongs to the
second stream (`nn/two_stream.py`). States that are carried over segments of a text are not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from armillary.checkpoints import sentence
from armillary.checkpoints.facts import Facts, facts
from armillary.checkpoints.fields import ACTIVATIONS, Config, Data, Field, Fixed, Same, Word, put
from armillary.checkpoints.table import Entry, Family, Step, families
from armillary.nn.network import ModelSettings

_NORM = {"kind": "layernorm", "weight": True, "bias": True}
_IGNORED = """
dropout end_n_top start_n_top mem_len reuse_len same_length use_mems use_mems_eval use_mems_train
summary_activation summary_last_dropout summary_type summary_use_proj output_past layer_norm_epsilon
"""


class OfHeads(Step):
    """[D, H, K] on disk for a product's weight: from the heads, [D, H·K], or to them, [H·K, D]."""

    def __init__(self, heads: int, transposed: bool) -> None:
        self.heads, self.transposed = heads, transposed

    def apply(self, parts: list[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        return [part.flatten(1).t() if self.transposed else part.flatten(1) for part in parts]

    def undo(self, parts: list[Tensor]) -> list[Tensor]:
        return [(part.t() if self.transposed else part).unflatten(1, (self.heads, -1)) for part in parts]


class OneToken(Step):
    """[1, 1, D] on disk for a table of one entry."""

    def apply(self, parts: list[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        return [part.flatten(0, 1) for part in parts]

    def undo(self, parts: list[Tensor]) -> list[Tensor]:
        return [part[None] for part in parts]


class HeadWidth(Field):
    """`d_head`, which can only be the width's share of a head."""

    keys: tuple[str, ...] = ("d_head",)

    def read(self, config: Config, data: Data) -> None:
        width, heads = data["width"], data["block"]["mixer"]["heads"]
        given = config.take("d_head")
        if given is not None and (type(given) is not int or given * heads != width):
            raise config.clash(f"'d_head': {given!r}", f"'d_model': {width} and 'n_head': {heads}")

    def write(self, facts: Facts, config: Data) -> None:
        config["d_head"] = facts.get("blocks.0.mixer.head_width")


class Body(Field):
    """`architectures`: with the language model's head, or bare."""

    keys: tuple[str, ...] = ("architectures",)
    paths: tuple[str, ...] = ("head.kind",)

    def read(self, config: Config, data: Data) -> None:
        given = config.take("architectures")
        bare = bool(given) and "XLNetModel" in (given if isinstance(given, list) else [given])
        scores = {"kind": "language_model", "bias": True}
        put(data, "head", {"kind": "embedding", "pool": "mean", "normalise": False} if bare else scores)

    def write(self, facts: Facts, config: Data) -> None:
        config["architectures"] = ["XLNetModel" if facts.get("head.kind") == "embedding" else "XLNetLMHeadModel"]


@families.register
class XLNet(Family):
    """XLNet in all sizes, both streams."""

    kind: ClassVar[str] = "xlnet"
    source: ClassVar[str] = "Yang et al. 2019, XLNet: Generalized Autoregressive Pretraining"
    architectures: ClassVar[tuple[str, ...]] = ("XLNetLMHeadModel", "XLNetModel")
    prefix: ClassVar[str] = "transformer."
    head: ClassVar[str] = "lm_loss."
    template: ClassVar[Mapping[str, Any]] = {
        "form": "encoder",
        "context": 512,  # what it was trained with; nothing depends on it
        "queries": True,
        "norm": None,
        "block": {
            "mixer": {"kind": "attention", "position": {"kind": "transformer_xl", "segments": True}},
            "channel": {"kind": "ffn", "bias": True},
            "norm": _NORM,
            "norm_at": "post",
        },
    }
    fields: ClassVar[tuple[Field, ...]] = (
        Same("vocab_size", "vocabulary", needed=True),
        Same("d_model", "width", needed=True),
        Same("n_layer", "depth", needed=True),
        Same("n_head", "block.mixer.heads", needed=True),
        HeadWidth(),
        Same("d_inner", "block.channel.hidden", needed=True),
        Word("ff_activation", "block.channel.activation", ACTIVATIONS, default="gelu"),
        Same("layer_norm_eps", "block.norm.epsilon", kind=float, default=1e-12),
        Body(),
        Fixed("attn_type", "bi"),
        Fixed("bi_data", False),
        Fixed("clamp_len", -1),
        Fixed("untie_r", True),
        Fixed("tie_word_embeddings", True, "the scores always share the embedding's weight"),
    )
    ignored: ClassVar[frozenset[str]] = frozenset(_IGNORED.split())
    constants: ClassVar[Mapping[str, Any]] = {"dropout": 0.1, "initializer_range": 0.02, "mem_len": None}

    def equivalent(self, wanted: Facts) -> Facts:
        """No table ends with the context, and how sentences are pooled is said by files of their own."""
        wanted = super().equivalent(wanted) | {"context": 512}
        if wanted.get("head.kind") == "embedding":
            wanted |= sentence.SAID
        return wanted

    def table(self, settings: ModelSettings) -> Sequence[Entry]:
        heads = facts(settings)["blocks.0.mixer.heads"]
        theirs, ours = "transformer.layer.{i}", "blocks.{i}"
        position = f"{ours}.mixer.inner.position"
        of_head, model = "n_head", "d_model"
        entries = [
            Entry("transformer.word_embedding.weight", "embed.weight", sizes="vocab_size, d_model"),
            Entry("transformer.mask_emb", "query.weight", (OneToken(),), model),
            Entry("lm_loss.weight", "head.product.weight", sizes="vocab_size, d_model"),
            Entry("lm_loss.bias", "head.product.bias", sizes="vocab_size"),
            Entry(f"{theirs}.rel_attn.r", f"{position}.r.weight", (OfHeads(heads, True),), "d_model, n_head"),
            Entry(f"{theirs}.rel_attn.r_w_bias", f"{position}.u", sizes=of_head),
            Entry(f"{theirs}.rel_attn.r_r_bias", f"{position}.v", sizes=of_head),
            Entry(f"{theirs}.rel_attn.r_s_bias", f"{position}.w", sizes=of_head),
            Entry(f"{theirs}.rel_attn.seg_embed", f"{position}.segment", sizes=of_head),
        ]
        entries += [
            Entry(
                f"{theirs}.rel_attn.{name}",
                f"{ours}.mixer.inner.{name}.weight",
                (OfHeads(heads, name != "o"),),
                "d_model, n_head",
            )
            for name in "qkvo"
        ]
        entries += [
            Entry(f"{theirs}.{a}.{leaf}", f"{ours}.{b}.{leaf}", sizes=sizes)
            for leaf in ("weight", "bias")
            for a, b, sizes in (
                ("rel_attn.layer_norm", "mixer.norm", model),
                ("ff.layer_1", "channel.inner.up", "d_inner, d_model"),
                ("ff.layer_2", "channel.inner.down", "d_inner, d_model"),
                ("ff.layer_norm", "channel.norm", model),
            )
        ]
        return entries
