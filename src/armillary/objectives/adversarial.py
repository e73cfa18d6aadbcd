"""Adversarial self-attention (Wu et al. 2023): predict alike whatever an adversary hides.

The network runs twice: as it is, and with the masks of its `adversarial` mixers. To the loss of the
objective within comes the divergence of the two predictions, D = ½ (KL(p‖q) + KL(q‖p)), wherever
something is asked; the model lowers it, the adversaries, whose gradient is reversed, raise it. An
update takes about twice the time. Evaluation runs the network once.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from armillary.base.errors import SettingsError
from armillary.data.batch import Batch
from armillary.nn.mixers.adversarial import AdversarialSettings
from armillary.nn.network import ModelSettings, Network
from armillary.nn.training import Training
from armillary.objectives.base import Loss, Objective, ObjectiveSettings, Prepared, Vocabulary, objectives
from armillary.objectives.causal import CausalSettings

CHUNK = 1024  # predictions at a time


@objectives.register
class AdversarialObjectiveSettings(ObjectiveSettings):
    """The loss of `inner`, and the divergence of the predictions with and without an adversary."""

    kind: ClassVar[str] = "adversarial"
    source: ClassVar[str] = "Wu et al. 2023, Adversarial Self-Attention for Language Understanding"
    oracle: ClassVar[str] = "tests/objectives/test_adversarial.py: PyTorch's KL divergence of the full log-softmax"
    inner: ObjectiveSettings = Field(CausalSettings(), description="what is predicted")
    weight: float = Field(1.0, ge=0, description="weight of the divergence")

    def check(self, model: ModelSettings) -> None:
        self.inner.check(model)
        if self.inner.kind == self.kind or model.form == "encoder_decoder":
            raise SettingsError(
                "the adversarial objective goes around a causal, masked or prefix objective of one network",
                path=("training", "objective", "inner"),
            )
        if not any(isinstance(b.mixer, AdversarialSettings) for block in model.layers() for b in block.all()):
            raise SettingsError(
                "the adversarial objective needs an adversary, but no block has one",
                path=("training", "objective"),
                hint="use mixer: {kind: adversarial}",
            )

    def build(self, vocabulary: Vocabulary) -> AdversarialObjective:
        return AdversarialObjective(self, self.inner.build(vocabulary))


class AdversarialObjective(Objective):
    """Two passes over what the inner objective prepares."""

    def __init__(self, settings: AdversarialObjectiveSettings, inner: Objective) -> None:
        self.settings, self.inner = settings, inner

    def tokens(self, context: int) -> int:
        return self.inner.tokens(context)

    def prepare(self, batch: Batch, generator: torch.Generator) -> Prepared:
        return self.inner.prepare(batch, generator)

    def loss(self, network: Network, prepared: Prepared) -> Loss:
        training = prepared.inputs.get("training")
        if not isinstance(training, Training):
            return self.inner.loss(network, prepared)
        clean = network.hidden(prepared.ids, **prepared.inputs)
        nats = network.cross_entropy(clean, prepared.targets, prepared.weights)
        attacked = {**prepared.inputs, "training": dataclasses.replace(training, adverse=True)}
        other = network.hidden(prepared.ids, **attacked)
        apart = divergence(network, clean, other, prepared.weights)
        total = nats + self.settings.weight * apart
        return Loss(total, prepared.weights.sum(), {"nats": nats.detach(), "divergence": apart.detach()})


def divergence(network: Network, a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Σ weights · ½ (KL(p‖q) + KL(q‖p)) in nats, p and q predicted from the hidden states a and b [B, T, D].

    The logits of a few tokens at a time exist, in the backward pass too.
    """

    def part(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
        p, q = (torch.log_softmax(network.head(h[None])[0].float(), -1) for h in (a, b))
        return (((p.exp() - q.exp()) * (p - q)).sum(-1) * weights).sum() / 2

    asked = weights.flatten() > 0
    rows = [t.flatten(0, 1)[asked] for t in (a, b)]
    total = a.new_zeros((), dtype=torch.float32)
    for x, y, w in zip(*(t.split(CHUNK) for t in (*rows, weights.flatten()[asked])), strict=True):
        total = total + checkpoint(part, x, y, w, use_reentrant=False)
    return total
