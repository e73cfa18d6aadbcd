"""Sources of the data as tasks of a router: from the recipe to the log, to held-out text, and to generation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import armillary as arm
from armillary.base.errors import InputError
from armillary.data.batch import Batch
from armillary.data.corpus import Corpus
from armillary.evaluate.experts import ExpertLoad, expert_load
from armillary.nn.network import Network
from armillary.recipe import Recipe
from armillary.train import Trainer, train


@pytest.fixture(scope="module")
def run(recipe: Callable[..., Recipe], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    block = {
        "mixer": {"kind": "attention", "heads": 2},
        "channel": {"kind": "task_moe", "experts": 4, "hidden": 16, "tasks": 2, "capacity": 1.0},
    }
    data = recipe({"block": block}, steps=4, samples_every=4).to_data()
    (source,) = data["data"]["sources"]
    parts = [{"include": ["?.txt"], "task": 1}, {"include": ["1?.txt"], "task": 0}, {"include": ["2?.txt"], "task": 1}]
    data["data"]["sources"] = [source | part for part in parts]
    return train(Recipe.load(data), tmp_path_factory.mktemp("tasks") / "run")


def test_the_log_says_how_experts_are_used(run: Any) -> None:
    for line in run.metrics:
        assert 1 <= line["expert_load"] <= 2, "of four experts each token picks two"
        assert 1 <= line["task_load"] <= 2 and line["task_parity"] >= 1
        assert 0 <= line["dropped_picks"] < 0.5
    assert math.isfinite(run.metrics[-1]["heldout_loss"])


def test_rows_and_held_out_documents_know_their_task(run: Any) -> None:
    settings, (folder,) = run.recipe.data, {path.parent for path in run.folder.rglob("manifest.json")}
    corpus = Corpus.open(folder)
    loader = corpus.loader(settings, context=8, batch=12, seed=0)
    batch = loader.batch(3)
    assert batch.tasks is not None and set(batch.tasks.tolist()) == {0, 1}
    for ids, task in zip(batch.ids, batch.tasks.tolist(), strict=True):
        homes = {
            wanted
            for source, wanted in zip(corpus.sources, settings.tasks(), strict=True)
            if _holds(source.train, ids.tolist())
        }
        assert task in homes
    sizes = [len(source.heldout) for source in corpus.sources]
    assert corpus.heldout_tasks(settings) == [1] * sizes[0] + [0] * sizes[1] + [1] * sizes[2]


def _holds(store: Any, row: list[int]) -> bool:
    every = store.read(0, store.tokens).tolist()
    return any(every[start : start + len(row)] == row for start in range(len(every)))


def test_a_model_is_told_the_task_or_goes_by_the_mean(run: Any) -> None:
    model = arm.load(run.folder, device="cpu", dtype="float32")
    ids = torch.arange(6)[None].expand(2, -1)
    told = model(ids, side={"tasks": torch.tensor([0, 1])})
    assert not torch.equal(told[0], told[1])
    for task in (0, 1):
        side = {"tasks": torch.tensor([task])}
        state = model.init_state(1)
        pieces = [model.extend(ids[:1, :4], state, side=side), model.extend(ids[:1, 4:], state, side=side)]
        torch.testing.assert_close(torch.cat(pieces, 1)[0], told[task], rtol=1e-4, atol=1e-4)
    unknown = model(ids, side={"tasks": torch.tensor([-1, -1])})
    assert torch.equal(model(ids), unknown)
    both = model.generate(["a dog", "a dog"], max_new_tokens=3, temperature=0, side={"tasks": torch.tensor([0, 1])})
    alone = model.generate(["a dog"], max_new_tokens=3, temperature=0, side={"tasks": torch.tensor([1])})
    assert both[1].ids == alone[0].ids


def test_a_batch_that_does_not_say_is_refused(run: Any) -> None:
    trainer = Trainer(arm.load(run.folder, device="cpu", dtype="float32").network, run.recipe.training)
    with pytest.raises(InputError, match="does not say what its rows are for"):
        trainer.step(torch.zeros(4, 9, dtype=torch.int64))


def test_load_is_reported_by_layer_and_task(run: Any) -> None:
    network: Network = arm.load(run.folder, device="cpu", dtype="float32").network
    ids = torch.randint(0, 200, (4, 16), generator=torch.Generator().manual_seed(0))
    batches = [Batch(ids, tasks=torch.tensor([0, 0, 1, 1])), Batch(ids[:1], tasks=torch.tensor([0]))]
    found = expert_load(network, batches)
    assert list(found) == ["blocks.0.channel", "blocks.1.channel"]
    for load in found.values():
        assert load.picks.shape == (2, 4) and load.picks.sum(1).tolist() == [2 * 48, 2 * 32]
    even, apart = ExpertLoad(torch.tensor([[2, 2], [3, 3]])), ExpertLoad(torch.tensor([[3, 1], [0, 0], [1, 3]]))
    assert (even.load, even.by_task, even.parity) == (1.0, [1.0, 1.0], 1.0)
    assert (apart.load, apart.by_task, apart.parity) == (1.0, [1.5, None, 1.5], 3.0)
    assert ExpertLoad(torch.tensor([[4, 0]])).parity is None
    assert ExpertLoad(torch.tensor([[4, 0], [2, 2]])).parity == math.inf
