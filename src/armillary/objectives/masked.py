"""Masked language modelling (Devlin et al. 2019, BERT): guess tokens that were hidden."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator

from armillary.base.errors import SettingsError
from armillary.data.batch import Batch
from armillary.nn.network import ModelSettings
from armillary.objectives.base import Objective, ObjectiveSettings, Prepared, Vocabulary, objectives


@objectives.register
class MaskedSettings(ObjectiveSettings):
    """A share of the tokens is asked for; most of them are replaced by <|mask|>, some by a random
    token, some left as they are."""

    kind: ClassVar[str] = "masked"
    source: ClassVar[str] = "Devlin et al. 2019, BERT: Pre-training of Deep Bidirectional Transformers"
    oracle: ClassVar[str] = (
        "tests/objectives/test_masked.py: the paper's shares; PyTorch's cross-entropy at the hidden tokens"
    )
    share: float = Field(0.15, gt=0, lt=1, description="share of tokens to guess")
    replaced: float = Field(0.8, ge=0, le=1, description="share of those that become <|mask|>")
    random: float = Field(0.1, ge=0, le=1, description="share of those that become a random token")

    @model_validator(mode="after")
    def _coherent(self) -> MaskedSettings:
        if self.replaced + self.random > 1:
            raise ValueError("replaced + random must not exceed 1")
        return self

    def check(self, model: ModelSettings) -> None:
        if model.form != "encoder":
            raise SettingsError(
                f"the masked objective needs an encoder, but model.form is {model.form}",
                path=("training", "objective"),
                hint="use form: encoder, or objective: causal for a decoder",
            )

    def build(self, vocabulary: Vocabulary) -> Masked:
        if vocabulary.mask is None:
            raise SettingsError("the tokenizer has no <|mask|> token", path=("training", "objective"))
        return Masked(self, vocabulary)


class Masked(Objective):
    """Targets are the original tokens; weight 1 where a token was chosen."""

    def __init__(self, settings: MaskedSettings, vocabulary: Vocabulary) -> None:
        self.settings, self.vocabulary = settings, vocabulary
        assert vocabulary.mask is not None
        self.mask = vocabulary.mask
        barred = set(vocabulary.special)
        self.ordinary = torch.tensor([i for i in range(vocabulary.size) if i not in barred], dtype=torch.int64)
        self.special = torch.tensor(sorted(barred), dtype=torch.int64)

    def prepare(self, batch: Batch, generator: torch.Generator) -> Prepared:
        ids = batch.ids
        chosen = torch.rand(ids.shape, generator=generator) < self.settings.share
        ordinary = ~torch.isin(ids, self.special)
        chosen &= ordinary
        empty = ordinary.any(1) & ~chosen.any(1)
        if bool(empty.any()):
            # A row without a question would teach nothing: ask for its first ordinary token.
            chosen[empty.nonzero()[:, 0], ordinary.long().argmax(1)[empty]] = True
        fate = torch.rand(ids.shape, generator=generator)
        drawn = self.ordinary[torch.randint(len(self.ordinary), ids.shape, generator=generator)]
        hidden = torch.where(chosen & (fate < self.settings.replaced), self.mask, ids)
        swapped = chosen & (fate >= self.settings.replaced) & (fate < self.settings.replaced + self.settings.random)
        hidden = torch.where(swapped, drawn, hidden)
        inputs = {} if batch.documents is None else {"documents": batch.documents}
        return Prepared(hidden, ids, chosen.float(), inputs)
