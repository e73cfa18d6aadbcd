"""The held-out text during training: a fixed part of it, packed into windows like the training text.

This follows the run cheaply; the full measurement, per document and with intervals, is `evaluate`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from armillary.base.errors import InputError, UnsupportedError
from armillary.data.batch import Batch
from armillary.data.order import Permutation
from armillary.data.shards import TokenStore
from armillary.nn.network import Network
from armillary.objectives.base import Objective, Prepared
from armillary.train.distributed import World


@dataclass(frozen=True)
class HeldOut:
    """ids: [N, T] windows of held-out text; documents: [N, T] or None; tokens_per_byte: of that text; tasks:
    [N, T], what each token's document is for, or None."""

    ids: torch.Tensor
    documents: torch.Tensor | None
    tokens_per_byte: float
    tasks: torch.Tensor | None = None

    @classmethod
    def take(
        cls,
        store: TokenStore,
        *,
        window: int,
        tokens: int,
        isolate: bool,
        seed: int,
        tasks: Sequence[int] | None = None,
    ) -> HeldOut | None:
        """Whole documents in a random but fixed order until there are `tokens`; None when they do not
        fill one window. Neighbouring windows share a token, so that each is predicted once. tasks: of
        every document of the store."""
        if not len(store):
            return None
        order = Permutation(len(store), seed=seed, epoch=0)
        parts: list[np.ndarray] = []
        numbers: list[np.ndarray] = []
        read, size = 0, 0
        for place in range(len(store)):
            number = int(order(place))
            part = np.asarray(store.document(number)).astype(np.int64)
            parts.append(part)
            numbers.append(np.full(len(part), number))
            read += len(part)
            size += int(store.document_bytes[number])
            if read >= max(tokens, window):
                break
        if read < window or not size:
            return None
        count = max(1, min(tokens // (window - 1), (read - 1) // (window - 1)))
        places = np.arange(count)[:, None] * (window - 1) + np.arange(window)
        ids = torch.from_numpy(np.concatenate(parts)[places])
        owners = np.concatenate(numbers)[places]
        documents = torch.from_numpy(owners) if isolate else None
        given = None if tasks is None else torch.from_numpy(np.asarray(tasks, np.int64)[owners])
        return cls(ids, documents, read / size, given)

    @torch.no_grad()
    def loss(self, network: Network, objective: Objective, *, batch: int, seed: int, world: World) -> float:
        """Mean nats of the targets; the same questions every time. Processes share the windows."""
        generator = torch.Generator().manual_seed(seed)
        was_training = network.training
        network.eval()
        total = torch.zeros(2, device=network.device)
        rows = max(1, batch) * world.size
        try:
            # Compiled blocks would be compiled again for evaluation, which costs more than it saves.
            with torch.compiler.set_stance("force_eager"):
                for start in range(0, len(self.ids), rows):
                    end = start + rows
                    documents = None if self.documents is None else self.documents[start:end]
                    tasks = None if self.tasks is None else self.tasks[start:end]
                    windows = Batch(self.ids[start:end], documents, tasks=tasks)
                    prepared = told(objective.prepare(windows, generator), windows, network)
                    found = objective.loss(network, share(prepared, world, network.device))
                    total += torch.stack([found.sum.float(), found.weight.to(network.device).float()])
        finally:
            network.train(was_training)
        world.add(total)
        nats, weight = total.tolist()
        return nats / weight if weight else math.nan


def told(prepared: Prepared, batch: Batch, network: Network) -> Prepared:
    """With the side tensor `tasks`, for a network that takes it; prepare keeps rows and their order.

    Raises InputError when nobody says what the rows are for, UnsupportedError for an encoder–decoder.
    """
    if "tasks" not in network.takes:
        return prepared
    if batch.tasks is None:
        raise InputError(
            "the network routes by task, and the batch does not say what its rows are for",
            hint="pass a Batch with tasks, [B] int64",
        )
    if network.settings.encoder is not None:
        raise UnsupportedError("an encoder–decoder cannot be trained on tasks", hint="use another channel mixer")
    tasks = batch.tasks if batch.tasks.dim() == 1 else batch.tasks[:, : prepared.ids.shape[1]]
    side = {**prepared.inputs.get("side", {}), "tasks": tasks}
    return dataclasses.replace(prepared, inputs={**prepared.inputs, "side": side})


def bits_per_byte(loss: float, tokens_per_byte: float) -> float:
    """nats per token → bits per byte of the text that the tokens stand for."""
    return loss / math.log(2) * tokens_per_byte


def share(prepared: Prepared, world: World, device: torch.device) -> Prepared:
    """This process's rows; one that has none left computes the first row with weight 0, because
    every process must take part in gathering the parameters."""
    from armillary.train.trainer import take

    rows = len(prepared.ids)
    own = torch.arange(world.rank, rows, world.size)
    if len(own):
        return take(prepared, own, rows, device)
    first = take(prepared, torch.zeros(1, dtype=torch.int64), rows, device)
    return Prepared(first.ids, first.targets, torch.zeros_like(first.weights), first.inputs)
