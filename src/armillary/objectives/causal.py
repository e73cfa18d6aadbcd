"""Causal language modelling: predict every next token (Radford et al. 2018)."""

from __future__ import annotations

from typing import ClassVar

import torch

from armillary.base.errors import SettingsError
from armillary.data.batch import Batch
from armillary.nn.network import ModelSettings
from armillary.objectives.base import Objective, ObjectiveSettings, Prepared, Vocabulary, objectives


@objectives.register
class CausalSettings(ObjectiveSettings):
    """Each token is predicted from those before it."""

    kind: ClassVar[str] = "causal"
    source: ClassVar[str] = "Radford et al. 2018, Improving Language Understanding by Generative Pre-Training"
    oracle: ClassVar[str] = "tests/train/test_trainer.py: PyTorch's cross-entropy of the full logits"

    def check(self, model: ModelSettings) -> None:
        if model.form != "decoder":
            raise SettingsError(
                f"the causal objective needs a decoder, but model.form is {model.form}",
                path=("training", "objective"),
                hint="use form: decoder, or objective: masked for an encoder",
            )

    def build(self, vocabulary: Vocabulary) -> Causal:
        return Causal()


class Causal(Objective):
    """Windows of context + 1 tokens; the target of a position is the next token."""

    def tokens(self, context: int) -> int:
        return context + 1

    def prepare(self, batch: Batch, generator: torch.Generator) -> Prepared:
        ids, targets = batch.ids[:, :-1], batch.ids[:, 1:]
        weights = torch.ones(targets.shape, dtype=torch.float32, device=targets.device)
        if batch.documents is None:
            return Prepared(ids, targets, weights)
        # The first token of a document is not to be guessed from the document before it.
        same = batch.documents[:, 1:] == batch.documents[:, :-1]
        return Prepared(ids, targets, weights * same, {"documents": batch.documents[:, :-1]})
