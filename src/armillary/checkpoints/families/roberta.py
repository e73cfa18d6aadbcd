"""RoBERTa-shaped checkpoints (Liu et al. 2019, RoBERTa): BERT's network with other names and positions.

Positions are counted from behind the padding token's id, so the first rows of their table are unused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from armillary.base.errors import UnsupportedError
from armillary.checkpoints.facts import Facts
from armillary.checkpoints.families.bert import FIELDS, Encoder, Head
from armillary.checkpoints.fields import Config, Data, Field, put
from armillary.checkpoints.table import families


class Counted(Field):
    """`max_position_embeddings`, of which those up to `pad_token_id` serve no token."""

    keys: tuple[str, ...] = ("max_position_embeddings", "pad_token_id")
    paths: tuple[str, ...] = ("context", "position.offset")

    def read(self, config: Config, data: Data) -> None:
        rows = config.number(self.keys[0], config.take("max_position_embeddings", 512), int)
        offset = config.number(self.keys[1], config.take("pad_token_id", 1), int) + 1
        if offset < 0 or rows <= offset:
            raise config.clash(f"'max_position_embeddings': {rows}", f"'pad_token_id': {offset - 1}")
        put(data, "context", rows - offset)
        put(data, "position.offset", offset)

    def write(self, facts: Facts, config: Data) -> None:
        offset = facts.get("position.offset", 0)
        config["max_position_embeddings"] = facts["context"] + offset
        config["pad_token_id"] = offset - 1


class _Roberta(Encoder):
    prefix: ClassVar[str] = "roberta."
    head: ClassVar[str] = "lm_head."
    parts: ClassVar[Mapping[str, str]] = {
        "scores": "lm_head.decoder.weight",
        "bias": "lm_head.bias",
        "transform": "lm_head.dense",
        "norm": "lm_head.layer_norm",
    }
    repeats: ClassVar[Mapping[str, str]] = {"lm_head.decoder.bias": "lm_head.bias"}

    def check(self, wanted: Facts) -> None:
        if wanted["position.offset"] == 0:
            raise UnsupportedError(f"model.position.offset: 0 has no counterpart in the '{self.kind}' layout")


@families.register
class Roberta(_Roberta):
    """RoBERTa in all sizes."""

    kind: ClassVar[str] = "roberta"
    source: ClassVar[str] = "Liu et al. 2019, RoBERTa: A Robustly Optimized BERT Pretraining Approach"
    architectures: ClassVar[tuple[str, ...]] = ("RobertaForMaskedLM", "RobertaModel")
    fields: ClassVar[tuple[Field, ...]] = (*FIELDS, Counted(), Head("RobertaForMaskedLM", "RobertaModel"))


@families.register
class XLMRoberta(_Roberta):
    """XLM-RoBERTa, and multilingual encoders of sentences that are stored as it is."""

    kind: ClassVar[str] = "xlm-roberta"
    source: ClassVar[str] = "Conneau et al. 2020, Unsupervised Cross-lingual Representation Learning at Scale"
    architectures: ClassVar[tuple[str, ...]] = ("XLMRobertaForMaskedLM", "XLMRobertaModel")
    fields: ClassVar[tuple[Field, ...]] = (*FIELDS, Counted(), Head("XLMRobertaForMaskedLM", "XLMRobertaModel"))
