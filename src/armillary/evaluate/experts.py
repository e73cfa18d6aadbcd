"""How evenly a network uses its experts: the picks of every router, by layer and by task.

Shares are of picks, weights aside. A load of 1 is even; expert e's part of the load is E times its share.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from armillary.base.errors import InputError
from armillary.data.batch import Batch
from armillary.nn.network import Network
from armillary.nn.taps import Taps


@dataclass(frozen=True)
class ExpertLoad:
    """picks: by task and expert, [tasks, E] int64; a task without a token has a row of zeros."""

    picks: Tensor

    @property
    def load(self) -> float:
        """The picks of the busiest expert over the mean of all."""
        return _load(self.picks.sum(0))

    @property
    def by_task(self) -> list[float | None]:
        """The load of each task's own picks; None for a task without a token."""
        return [_load(row) if int(row.sum()) else None for row in self.picks]

    @property
    def parity(self) -> float | None:
        """The largest over the smallest share of an expert among tasks, of the expert where it is largest: 1
        where all tasks use experts alike, infinite where a task leaves out what another uses; None with
        fewer than two tasks."""
        there = self.picks[self.picks.sum(1) > 0].double()
        if len(there) < 2:
            return None
        shares = there / there.sum(1, keepdim=True)
        used = shares[:, shares.amax(0) > 0]
        return float((used.amax(0) / used.amin(0)).max())

    def to_data(self) -> dict[str, Any]:
        return {"load": self.load, "by_task": self.by_task, "parity": self.parity, "picks": self.picks.tolist()}


def _load(picks: Tensor) -> float:
    total = int(picks.sum())
    return float(picks.max()) * len(picks) / total if total else 1.0


@torch.no_grad()
def expert_load(network: Network, batches: Iterable[Tensor | Batch]) -> dict[str, ExpertLoad]:
    """The load of every router on some text, by the path of its module.

    batches: ids [B, T] int64, or batches whose `tasks` say what rows or tokens are for; a token whose task
    is not known counts as task 0. Raises InputError for a network without routers.
    """
    found: dict[str, Tensor] = {}
    was_training = network.training
    network.eval()
    try:
        for given in batches:
            batch = given if isinstance(given, Batch) else Batch(given)
            taps = Taps(["*.router"])
            ids = batch.ids.to(network.device)
            side = {}
            if "tasks" in network.takes and batch.tasks is not None:
                side = {"tasks": batch.tasks.to(network.device)}
            documents = None if batch.documents is None else batch.documents.to(network.device)
            network.hidden(ids, documents=documents, side=side, taps=taps)
            tasks = torch.zeros_like(ids) if batch.tasks is None else batch.tasks.to(network.device)
            tasks = (tasks if tasks.dim() == 2 else tasks[:, None].expand_as(ids)).clamp(min=0).flatten()
            for name, gates in taps.seen.items():
                picked = (gates > 0).flatten(0, 1).long()
                counts = picked.new_zeros(int(tasks.max()) + 1, picked.shape[1]).index_add_(0, tasks, picked)
                path = name.removesuffix(".router")
                found[path] = _sum(found[path], counts.cpu()) if path in found else counts.cpu()
    finally:
        network.train(was_training)
    if not found:
        raise InputError("this network has no routers", hint="a channel of kind moe, or a mixer of kind moa, has one")
    return {path: ExpertLoad(picks) for path, picks in found.items()}


def _sum(a: Tensor, b: Tensor) -> Tensor:
    """Of tables with different numbers of tasks."""
    small, large = (a, b) if len(a) < len(b) else (b, a)
    total = large.clone()
    total[: len(small)] += small
    return total
