"""The held-out text during training: every token asked once, the mean that the network gives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from armillary.base.settings import parse
from armillary.nn.network import ModelSettings, build
from armillary.objectives.base import Prepared, Vocabulary
from armillary.objectives.causal import CausalSettings
from armillary.train.distributed import World
from armillary.train.heldout import HeldOut, bits_per_byte, share


class Store:
    """Documents in memory."""

    def __init__(self, lengths: Sequence[int]) -> None:
        draw = np.random.default_rng(0)
        self.documents = [draw.integers(0, 31, length).astype(np.uint16) for length in lengths]
        self.document_bytes = np.array([3 * length for length in lengths])

    def __len__(self) -> int:
        return len(self.documents)

    def document(self, number: int) -> np.ndarray:
        return self.documents[number]


def test_windows_follow_each_other_and_stay_within_the_limit() -> None:
    store = Store([10, 7, 30, 5, 12])
    held = HeldOut.take(store, window=9, tokens=24, isolate=True, seed=0)  # type: ignore[arg-type]
    assert held is not None and held.documents is not None
    assert held.ids.shape == (3, 9) and held.tokens_per_byte == pytest.approx(1 / 3)
    assert torch.equal(held.ids[1:, 0], held.ids[:-1, -1])
    flat = np.concatenate([held.ids[:, :-1].reshape(-1).numpy(), held.ids[-1, -1:].numpy()])
    numbers = np.concatenate([held.documents[:, :-1].reshape(-1).numpy(), held.documents[-1, -1:].numpy()])
    begin = 0
    for number in dict.fromkeys(numbers.tolist()):  # whole documents one after another, the last one cut
        part = flat[numbers == number]
        assert np.array_equal(part, store.documents[number][: len(part)])
        begin += len(part)
    assert begin == len(flat)
    again = HeldOut.take(store, window=9, tokens=24, isolate=False, seed=0)  # type: ignore[arg-type]
    assert again is not None and again.documents is None and torch.equal(again.ids, held.ids)
    tasks = [4, 2, 0, 1, 3]
    told = HeldOut.take(store, window=9, tokens=24, isolate=True, seed=0, tasks=tasks)  # type: ignore[arg-type]
    assert told is not None and told.tasks is not None and told.documents is not None
    assert torch.equal(told.tasks, torch.tensor(tasks)[told.documents]) and held.tasks is None


def test_too_little_text() -> None:
    assert HeldOut.take(Store([]), window=9, tokens=24, isolate=False, seed=0) is None  # type: ignore[arg-type]
    assert HeldOut.take(Store([4, 4]), window=9, tokens=24, isolate=False, seed=0) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_the_loss_is_the_mean_over_all_windows(batch: int) -> None:
    """Oracle: cross-entropy of the logits; dropout is off and the mode is put back."""
    block = {"mixer": {"kind": "attention", "heads": 2}, "channel": "ffn", "dropout": 0.5}
    net = build(parse(ModelSettings, {"width": 8, "depth": 1, "vocabulary": 31, "block": block}), seed=0)
    held = HeldOut.take(Store([20, 20]), window=8, tokens=35, isolate=False, seed=0)  # type: ignore[arg-type]
    assert held is not None
    objective = CausalSettings().build(Vocabulary(31))
    net.train()
    loss = held.loss(net, objective, batch=batch, seed=0, world=World())
    assert net.training
    net.eval()
    logits = net(held.ids[:, :-1]).detach()
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 31), held.ids[:, 1:].reshape(-1))
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_processes_share_the_windows_and_none_stays_away() -> None:
    ids = torch.arange(12).reshape(3, 4)
    prepared = Prepared(ids, ids + 1, torch.ones(3, 4))
    parts = [share(prepared, World(rank, 4), torch.device("cpu")) for rank in range(4)]
    assert torch.equal(torch.cat([part.ids for part in parts[:3]]), ids)
    assert all(float(part.weights.sum()) == 4 for part in parts[:3])
    assert parts[3].ids.shape == (1, 4) and float(parts[3].weights.sum()) == 0


def test_bits_per_byte() -> None:
    # ln 2 nats are one bit; a token of four bytes spreads it over four
    assert bits_per_byte(float(np.log(2)), 0.25) == pytest.approx(0.25)
