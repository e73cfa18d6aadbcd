"""The loader: batches of token windows whose order is a pure function of (seed, index).

Nothing is stored between batches, so resuming is asking for the next index, and ranks of
a data-parallel run are slices of the same global batch.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray

from armillary.base.errors import DataError, InputError
from armillary.data.batch import Batch
from armillary.data.order import Permutation
from armillary.data.shards import TokenStore


class Mixture:
    """Which source row i of a run comes from, and which of that source's rows it is.

    The first source takes floor(i·w) of the first i rows, the others share the rest in the same way.
    So any row is found on its own in O(1) memory, and among the first i rows every source has i·w_s,
    off by less than the number of sources; weights are exact fractions.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(weight) for weight in weights]
        self._shares = [(exact[s] / sum(exact[s:])).as_integer_ratio() for s in range(len(exact) - 1)]

    def __call__(self, row: int) -> tuple[int, int]:
        """(source, row of that source) of row `row` of the run."""
        for source, (numerator, denominator) in enumerate(self._shares):
            taken = row * numerator // denominator
            if (row + 1) * numerator // denominator > taken:
                return source, taken
            row -= taken
        return len(self._shares), row


class Loader:
    """Batches of windows cut from token stores.

    Window w of a store holds tokens [w·context, w·context + context + 1): `context` inputs and their
    targets. Each epoch of a source is a permutation of its windows; sources are mixed row by row in
    the proportions of `weights`, each going through its own epochs. `batch` rows make one global batch;
    rank r of `ranks` gets its equal share of those rows, neighbours in the batch. tasks: of each store, what
    its rows are for; by default its place.

    Raises DataError when a store is shorter than one window, InputError for sizes that do not fit.
    """

    def __init__(
        self,
        stores: TokenStore | Sequence[TokenStore],
        weights: Sequence[float] | None = None,
        *,
        context: int,
        batch: int,
        seed: int,
        isolate: bool = False,
        rank: int = 0,
        ranks: int = 1,
        tasks: Sequence[int] | None = None,
    ) -> None:
        self.stores = (stores,) if isinstance(stores, TokenStore) else tuple(stores)
        self.weights = tuple(weights) if weights is not None else (1.0,) * len(self.stores)
        if not self.stores or len(self.weights) != len(self.stores):
            raise InputError(f"{len(self.stores)} stores and {len(self.weights)} weights do not make a mixture")
        if not all(0 < weight < float("inf") for weight in self.weights):
            raise InputError(f"weights must be positive numbers, found {self.weights}")
        if context < 1 or batch < 1:
            raise InputError(f"context and batch must be at least 1, found {context} and {batch}")
        if not 0 <= rank < ranks or batch % ranks:
            raise InputError(
                f"a batch of {batch} rows cannot be shared by rank {rank} of {ranks}",
                hint="the batch must be a multiple of the number of ranks",
            )
        for store in self.stores:
            if store.tokens < context + 1:
                raise DataError(
                    f"{store.name} has {store.tokens} tokens, too few for one window of {context} and its target",
                    where=str(store.folder),
                    hint=f"the largest context that fits is {store.tokens - 1}"
                    if store.tokens > 1
                    else "give more text, or leave this source out",
                )
        self.context, self.batch_size, self.seed, self.isolate = context, batch, seed, isolate
        self.rows = batch // ranks
        self._first_row = rank * self.rows
        self._mixture = Mixture(self.weights)
        self.tasks = tuple(tasks) if tasks is not None else tuple(range(len(self.stores)))
        self._windows = [(store.tokens - 1) // context for store in self.stores]

    @property
    def tokens_per_batch(self) -> int:
        """Targets in one global batch, over all ranks."""
        return self.batch_size * self.context

    def epochs(self, index: int) -> tuple[float, ...]:
        """How often each source has been gone through when batches 0 … index - 1 are done."""
        return tuple(
            index * self.batch_size * weight / sum(self.weights) / windows
            for weight, windows in zip(self.weights, self._windows, strict=True)
        )

    def batch(self, index: int) -> Batch:
        """Batch `index`: ids [rows, context + 1] int64, and when isolating the document each token is from."""
        first = index * self.batch_size + self._first_row
        ids = np.empty((self.rows, self.context + 1), np.int64)
        documents = np.empty_like(ids) if self.isolate else None
        tasks = np.empty(self.rows, np.int64)
        for source, rows, windows in self._assigned(first):
            store = self.stores[source]
            for row, window in zip(rows, windows.tolist(), strict=True):
                start = window * self.context
                tasks[row] = self.tasks[source]
                ids[row] = store.read(start, start + self.context + 1)
                if documents is not None:
                    documents[row] = store.documents_of(start, start + self.context + 1)
        own = None if documents is None else torch.from_numpy(documents)
        return Batch(torch.from_numpy(ids), own, tasks=torch.from_numpy(tasks))

    def iterate(self, start: int = 0, *, ahead: int = 2) -> Iterator[Batch]:
        """Batches start, start + 1, … without end, read by a thread up to `ahead` in advance.

        The same batches as `batch(index)` gives. Close the iterator (or let go of it) to end the thread.
        """
        ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=max(ahead, 1))
        ended = threading.Event()

        def read() -> None:
            index = start
            while not ended.is_set():
                item: Batch | BaseException
                try:
                    item = self.batch(index)
                except BaseException as error:  # handed to the consumer, whatever it is
                    item = error
                while not ended.is_set():
                    with suppress(queue.Full):
                        ready.put(item, timeout=0.1)
                        break
                if isinstance(item, BaseException):
                    return
                index += 1

        thread = threading.Thread(target=read, name="loader", daemon=True)
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            ended.set()
            with suppress(queue.Empty):
                ready.get_nowait()  # a thread that waits for room goes on at once
            thread.join()

    def _assigned(self, first: int) -> Iterator[tuple[int, list[int], NDArray[np.int64]]]:
        """(source, rows of the batch, their windows) for this rank's rows, which begin at row `first` of the run."""
        dealt: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
        for row in range(self.rows):
            source, position = self._mixture(first + row)
            epoch, place = divmod(position, self._windows[source])
            rows, places = dealt.setdefault((source, epoch), ([], []))
            rows.append(row)
            places.append(place)
        for (source, epoch), (rows, places) in dealt.items():
            order = Permutation(self._windows[source], seed=self.seed, epoch=epoch, stream=source)
            yield source, rows, order(places)
