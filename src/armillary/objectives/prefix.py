"""Prefix language modelling (Raffel et al. 2020, T5): given a beginning, predict the rest.

For a prefix model the beginning is seen both ways; for an encoder–decoder it is the source.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator

from armillary.base.errors import SettingsError
from armillary.data.batch import Batch
from armillary.nn.network import ModelSettings, Network
from armillary.objectives.base import Loss, Objective, ObjectiveSettings, Prepared, Vocabulary, objectives


@objectives.register
class PrefixSettings(ObjectiveSettings):
    """A window is cut at a random place; what comes behind the cut is predicted."""

    kind: ClassVar[str] = "prefix"
    source: ClassVar[str] = "Raffel et al. 2020, Exploring the Limits of Transfer Learning (prefix LM)"
    oracle: ClassVar[str] = "tests/objectives/test_prefix.py: log-softmax of the full logits behind the cut"
    shortest: float = Field(0.25, gt=0, lt=1, description="the cut lies no earlier than this share of the window")
    longest: float = Field(0.75, gt=0, lt=1, description="and no later than this one")

    @model_validator(mode="after")
    def _coherent(self) -> PrefixSettings:
        if self.shortest > self.longest:
            raise ValueError("shortest must not exceed longest")
        return self

    def check(self, model: ModelSettings) -> None:
        if model.form not in ("prefix", "encoder_decoder"):
            raise SettingsError(
                f"the prefix objective needs a prefix model or an encoder_decoder, but model.form is {model.form}",
                path=("training", "objective"),
                hint="use objective: causal for a decoder, masked for an encoder",
            )

    def build(self, vocabulary: Vocabulary) -> PrefixObjective:
        return PrefixObjective(self)


class PrefixObjective(Objective):
    """One cut per batch, so that sources need no padding."""

    def __init__(self, settings: PrefixSettings) -> None:
        self.settings = settings

    def tokens(self, context: int) -> int:
        return context + 1

    def prepare(self, batch: Batch, generator: torch.Generator) -> Prepared:
        if batch.documents is not None:
            raise SettingsError(
                "the prefix objective cannot keep packed documents apart",
                path=("data", "isolate"),
                hint="set data.isolate: false",
            )
        length = batch.ids.shape[1] - 1
        first = max(1, round(self.settings.shortest * length))
        last = max(first, min(length - 1, round(self.settings.longest * length)))
        cut = int(torch.randint(first, last + 1, (), generator=generator))
        ids, targets = batch.ids[:, :-1], batch.ids[:, 1:]
        weights = (torch.arange(length) >= cut - 1).float().expand(targets.shape)
        return Prepared(ids, targets, weights, {"side": {"prefix": torch.full((len(ids),), cut)}})

    def loss(self, network: Network, prepared: Prepared) -> Loss:
        if network.settings.form == "prefix":
            return super().loss(network, prepared)
        # The decoder starts from the last token of the source, whose successor is the first to guess.
        cut = int(prepared.inputs["side"]["prefix"][0])
        behind = slice(cut - 1, None)
        return super().loss(
            network,
            Prepared(
                prepared.ids[:, behind],
                prepared.targets[:, behind],
                prepared.weights[:, behind],
                {"source": prepared.ids[:, :cut]},
            ),
        )
