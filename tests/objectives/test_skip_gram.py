"""word2vec's objective against the paper's formula, and what its vectors learn."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from armillary.base.errors import SettingsError
from armillary.base.settings import parse
from armillary.data.batch import Batch
from armillary.nn.network import ModelSettings, Network, build
from armillary.objectives.base import Vocabulary
from armillary.objectives.skip_gram import NONE, SkipGram, SkipGramSettings
from armillary.recipe.training import TrainingSettings
from armillary.train import Trainer

V = 12
HEAD = {"kind": "language_model", "tied": False}


def network(**changes: Any) -> Network:
    data = {"form": "encoder", "width": 8, "depth": 0, "norm": None, "vocabulary": V, "head": HEAD}
    return build(parse(ModelSettings, data | changes))


def objective(counts: torch.Tensor | None = None, special: tuple[int, ...] = (), **settings: Any) -> SkipGram:
    how = None if counts is None else (lambda: counts)
    return SkipGramSettings(**settings).build(Vocabulary(V, special=special, counts=how))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_loss_is_the_papers() -> None:
    """−log σ(u_c · v_w) − Σ log σ(−u_n · v_w) over pairs, one by one; its gradients by both tables."""
    model, ids = network().double().compute(torch.float64), torch.randint(V, (3, 10), generator=generator())
    prepared = objective(window=3, negatives=4).prepare(Batch(ids), generator(1))
    found = SkipGram.loss(objective(), model, prepared)
    v, u = model.embed.weight, model.head.product.weight
    expected, pairs = torch.zeros((), dtype=torch.float64), 0
    for row in range(3):
        for token in range(10):
            for place in range(6):
                if not prepared.weights[row, token, place]:
                    continue
                centre = v[prepared.ids[row, token]]
                neighbour, *others = prepared.targets[row, token, place].tolist()
                expected = expected - torch.log(torch.sigmoid(u[neighbour] @ centre))
                for other in others:
                    if other != NONE:
                        expected = expected - torch.log(torch.sigmoid(-u[other] @ centre))
                pairs += 1
    assert float(found.weight) == pairs > 40
    torch.testing.assert_close(found.sum, expected, rtol=1e-10, atol=0)
    for ours, theirs in zip(torch.autograd.grad(found.sum, [v, u]), torch.autograd.grad(expected, [v, u]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_neighbours_are_those_within_a_radius_drawn_for_each_centre() -> None:
    ids = torch.arange(V).expand(400, -1)
    documents = (torch.arange(V) >= 7).long().expand(400, -1)
    prepared = objective(window=3, negatives=1).prepare(Batch(ids, documents), generator())
    far: dict[int, int] = dict.fromkeys(range(4), 0)
    for token, (asked, row) in enumerate(zip(prepared.weights[0], prepared.targets[0, :, :, 0], strict=True)):
        places = row[asked > 0].tolist()
        assert all(0 < abs(place - token) <= 3 and (place >= 7) == (token >= 7) for place in places)
        radius = max(abs(place - token) for place in places)
        left = [place for place in range(token - radius, token) if (place >= 7) == (token >= 7) and place >= 0]
        assert places[: len(left)] == left  # all within the radius, in order
    for asked in prepared.weights[:, 3]:  # a centre with three neighbours on either side
        far[int(asked.sum()) // 2] += 1
    assert far[0] == 0 and min(far[1], far[2], far[3]) > 100  # a third each


def test_random_tokens_and_frequent_ones_go_by_their_counts() -> None:
    counts = torch.tensor([0, 5, 10, 20, 40, 80, 160, 320, 640, 1000, 3000, 9000])
    made = objective(counts, special=(11,), window=1, negatives=5, frequent=0.05)
    ids = torch.randint(1, V, (64, 200), generator=generator())
    prepared = made.prepare(Batch(ids), generator(1))
    there = prepared.weights.sum(-1) > 0
    # kept at √(0.05 / f), f among ordinary tokens; special ones never
    share = counts.double() / (counts.sum() - 9000)
    kept = torch.bincount(prepared.ids[there], minlength=V) / torch.bincount(ids.flatten(), minlength=V).clamp(min=1)
    for token in range(1, 11):
        assert float(kept[token]) == pytest.approx(min(1.0, math.sqrt(0.05 / float(share[token]))), abs=0.05)
    assert kept[11] == 0
    drawn = prepared.targets[..., 1:]
    found = torch.bincount(drawn[drawn != NONE], minlength=V).double()
    wanted = counts.double() ** 0.75
    wanted[11] = 0
    # those that are the neighbour are left out, so the shares are compared where that seldom happens
    assert found[0] == found[11] == 0
    ratio = found[5:8] / found[8]
    torch.testing.assert_close(ratio, wanted[5:8] / wanted[8], rtol=0.06, atol=0)
    assert not bool((drawn == prepared.targets[..., :1]).any())


def test_without_counts_all_tokens_are_alike() -> None:
    prepared = objective(negatives=3).prepare(Batch(torch.randint(V, (16, 64), generator=generator())), generator(2))
    drawn = prepared.targets[..., 1:]
    found = torch.bincount(drawn[drawn != NONE], minlength=V).double()
    assert float(found.max() / found.min()) < 1.15


def test_related_tokens_come_to_lie_near_one_another() -> None:
    """Tokens 0–5 and 6–11 occur among their own kind only."""
    training = {
        "objective": {"kind": "skip_gram", "window": 2},
        "batch": 8,
        "context": 24,
        "steps": 60,
        "precision": "float32",
        "optimiser": {"learning_rate": 0.05, "weight_decay": 0.0},
        "schedule": {"kind": "constant", "warmup": 0},
    }
    trainer = Trainer(network(), parse(TrainingSettings, training), vocabulary=Vocabulary(V))
    kinds, draws = torch.arange(8)[:, None] % 2 * 6, generator(3)
    losses = [trainer.step(kinds + torch.randint(6, (8, 24), generator=draws)) for _ in range(60)]
    assert losses[-1] < losses[0]
    vectors = torch.nn.functional.normalize(trainer.network.embed.weight.detach(), dim=-1)
    near = vectors @ vectors.t()
    alike = (torch.arange(V)[:, None] < 6) == (torch.arange(V) < 6)
    assert float(near[alike].mean()) > float(near[~alike].mean()) + 0.5


def test_nothing_to_ask_is_no_mistake() -> None:
    made = objective(special=(3,))
    prepared = made.prepare(Batch(torch.full((2, 5), 3)), generator())
    found = made.loss(network(), prepared)
    assert float(found.sum.detach()) == 0 and float(found.weight) == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"form": "decoder"}, "model.form is decoder with 0 blocks"),
        ({"depth": 2}, "with 2 blocks"),
        ({"head": {"kind": "language_model"}}, "a second table"),
        ({"norm": "layernorm"}, r"without model\.norm$"),
        ({"embed_norm": "rmsnorm"}, r"without model\.embed_norm$"),
        ({"embed_scale": 2.0}, r"without model\.embed_scale$"),
        ({"position": "sinusoidal"}, r"without model\.position$"),
        ({"segments": 2}, r"without model\.segments$"),
        ({"queries": True}, r"without model\.queries$"),
        ({"scaling": {"width": 4}}, r"without model\.scaling$"),
        ({"driver": {"kind": "memory_tokens"}}, r"without model\.driver$"),
        ({"block": {"channel": "ffn"}}, r"without model\.block$"),
        ({"linear": {"all": "low_rank"}}, r"without model\.linear$"),
        ({"head": HEAD | {"bias": True, "softcap": 3.0}}, r"without model\.head\.bias, model\.head\.softcap$"),
        ({"head": HEAD | {"scale": 2.0}}, r"without model\.head\.scale$"),
        ({"head": HEAD | {"transform": "gelu", "norm": "rmsnorm"}}, r"model\.head\.transform, model\.head\.norm$"),
    ],
)
def test_models_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as error:
        SkipGramSettings().check(network(**changes).settings)
    assert re.search(message, error.value.what)


def test_sizes_are_free() -> None:
    SkipGramSettings().check(network(width=12, vocabulary=30, context=7).settings)
