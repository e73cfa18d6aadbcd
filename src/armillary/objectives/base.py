"""The contract of objectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from armillary.base.registry import Registry
from armillary.base.settings import Choice
from armillary.data.batch import Batch
from armillary.nn.network import ModelSettings, Network

objectives: Registry[ObjectiveSettings] = Registry("objective", "armillary.objectives", default="causal")


@dataclass(frozen=True)
class Vocabulary:
    """What an objective must know of the tokenizer and its text: how many ids there are, those it may
    not use or may insert, and how often each occurs in the training text [size] (None: not known)."""

    size: int
    mask: int | None = None
    special: tuple[int, ...] = ()
    counts: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Prepared:
    """ids: [B, T] inputs; inputs: the other arguments of `network.hidden`; targets: [B, T] int64 (or as
    the objective says, the batch first); weights: [B, T] float32, 0 where nothing is asked."""

    ids: Tensor
    targets: Tensor
    weights: Tensor
    inputs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """sum: differentiable scalar; weight: by what the trainer divides it; metrics: sums by name."""

    sum: Tensor
    weight: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class ObjectiveSettings(Choice):
    """Settings of an objective."""

    choices: ClassVar[Registry[ObjectiveSettings]] = objectives

    def check(self, model: ModelSettings) -> None:
        """Raise SettingsError when this objective does not fit the form of the model."""

    def build(self, vocabulary: Vocabulary) -> Objective:
        raise NotImplementedError


class Objective:
    """A batch transform and a loss."""

    def tokens(self, context: int) -> int:
        """How many tokens a window needs so that the network sees `context` of them."""
        return context

    def blank(self, vocabulary: int) -> float:
        """The mean loss in nats of who knows nothing: a guess among all entries."""
        return math.log(vocabulary)

    def prepare(self, batch: Batch, generator: torch.Generator) -> Prepared:
        """Inputs, targets and weights from a batch of windows; randomness from `generator` only."""
        raise NotImplementedError

    def loss(self, network: Network, prepared: Prepared) -> Loss:
        """The sum of the weighted losses in nats."""
        hidden = network.hidden(prepared.ids, **prepared.inputs)
        total = network.cross_entropy(hidden, prepared.targets, prepared.weights)
        return Loss(total, prepared.weights.sum(), {"nats": total.detach()})
