"""The causal objective: targets, weights at the borders of documents, and the loss against PyTorch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from armillary.base.settings import parse
from armillary.data.batch import Batch
from armillary.nn.network import ModelSettings, Network, build
from armillary.objectives.base import Vocabulary
from armillary.objectives.causal import CausalSettings

V = 50
WORDS = Vocabulary(size=V)


def network() -> Network:
    return build(parse(ModelSettings, {"width": 16, "depth": 1, "vocabulary": V}))


def agree(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_causal_targets_are_the_next_tokens() -> None:
    objective = CausalSettings().build(WORDS)
    ids = torch.randint(2, V, (2, objective.tokens(12)))
    assert ids.shape == (2, 13)
    prepared = objective.prepare(Batch(ids), torch.Generator())
    assert torch.equal(prepared.ids, ids[:, :-1]) and torch.equal(prepared.targets, ids[:, 1:])
    assert bool((prepared.weights == 1).all()) and prepared.inputs == {}
    model = network()
    loss = objective.loss(model, prepared)
    expected = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    agree(loss.sum, expected)
    assert float(loss.weight) == 24
    assert torch.equal(loss.metrics["nats"], loss.sum.detach()) and not loss.metrics["nats"].requires_grad


def test_a_documents_first_token_is_not_asked_of_the_one_before() -> None:
    """With packed documents the loss is the sum of each document's loss alone."""
    objective, model = CausalSettings().build(WORDS), network()
    ids = torch.randint(2, V, (1, 13))
    documents = torch.tensor([[7] * 5 + [8] + [9] * 7])
    prepared = objective.prepare(Batch(ids, documents), torch.Generator())
    assert prepared.weights[0].tolist() == [1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1]
    loss = objective.loss(model, prepared)
    alone = [
        F.cross_entropy(model(ids[:, a : b - 1])[0], ids[0, a + 1 : b], reduction="sum") for a, b in ((0, 5), (6, 13))
    ]
    agree(loss.sum, alone[0] + alone[1])
    assert float(loss.weight) == 10
