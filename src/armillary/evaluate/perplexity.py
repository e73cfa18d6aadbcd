"""How well a network predicts documents: negative log-likelihood per document, from strided windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from armillary.base.errors import InputError, UnsupportedError
from armillary.nn.network import Network

POOL = 64  # batches of windows gathered before they are sorted by length


@dataclass(frozen=True)
class DocumentScore:
    """One document. nats: sum of the negative log-likelihoods of its predicted tokens; tokens: how many they are."""

    nats: float
    tokens: int

    @property
    def bits(self) -> float:
        return self.nats / math.log(2)


@dataclass(frozen=True)
class Window:
    """Inputs are the document's tokens [start, stop); the targets of inputs from `first` on are scored."""

    document: int
    start: int
    first: int
    stop: int


def windows(document: int, length: int, *, context: int, stride: int, given: int = 1) -> Iterator[Window]:
    """Windows of at most `context` inputs that predict each of a document's tokens from `given` on once.

    Each predicted token has all tokens before it in view, or at least context - stride + 1 of them.
    """
    done = given - 1  # inputs whose targets are scored already
    start = 0
    while done < length - 1:
        stop = min(start + context, length - 1)
        if stop > done:
            yield Window(document, start, done, stop)
            done = stop
        start += stride


def score_documents(
    network: Network,
    documents: Iterable[Sequence[int] | ArrayLike],
    *,
    context: int,
    stride: int | None = None,
    batch: int = 8,
    given: int = 1,
    progress: Callable[[int], None] | None = None,
) -> list[DocumentScore]:
    """Negative log-likelihood of each document in nats, given its first `given` tokens.

    documents: token ids, each beginning with its boundary token(s); context: inputs in a window;
    stride: by how many tokens windows move on (by default half the context); batch: windows of full
    length computed at once (more when they are shorter); progress: called with the number of tokens
    predicted so far. A document that fits into one window is scored exactly; in a longer one every
    token is still predicted exactly once, with at least context - stride + 1 tokens in view.

    Raises InputError for settings or ids out of range, or a likelihood that is not finite, and
    UnsupportedError for a network that does not predict the next token.
    """
    if network.settings.form not in ("decoder", "prefix"):
        raise UnsupportedError(
            f"a network of the form '{network.settings.form}' does not predict a text token by token",
            hint="perplexity is measured on decoders",
        )
    stride = max(1, context // 2) if stride is None else stride
    if context < 1 or batch < 1 or given < 1:
        raise InputError(f"context {context}, batch {batch} and given {given} must be at least 1")
    if not 1 <= stride <= context:
        raise InputError(f"stride {stride} is not between 1 and the context, {context}")

    lengths: list[int] = []
    held: dict[int, NDArray[np.int64]] = {}  # documents with windows in the pool
    pool: list[Window] = []
    nats: dict[int, float] = {}
    done = 0

    def flush() -> None:
        nonlocal done
        # equal lengths side by side: little padding, and the same batches whatever the order of documents
        pool.sort(key=lambda window: (window.start - window.stop, window.document, window.start))
        begin = 0
        while begin < len(pool):
            longest = pool[begin].stop - pool[begin].start
            rows = pool[begin : begin + max(1, batch * context // longest)]
            for window, value in zip(rows, _score(network, rows, held), strict=True):
                nats[window.document] = nats.get(window.document, 0.0) + value
                done += window.stop - window.first
            if progress is not None:
                progress(done)
            begin += len(rows)
        pool.clear()
        held.clear()

    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            waiting = 0
            for number, tokens in enumerate(documents):
                ids = np.asarray(tokens).astype(np.int64)  # a copy: the source may be a mapped file
                _check(ids, number, network.settings.vocabulary or 0)
                lengths.append(len(ids))
                for window in windows(number, len(ids), context=context, stride=stride, given=given):
                    held[number] = ids
                    pool.append(window)
                    waiting += window.stop - window.start
                    if waiting >= POOL * batch * context:
                        flush()
                        waiting = 0
            flush()
    finally:
        network.train(was_training)
    scores = [DocumentScore(nats.get(i, 0.0), max(0, length - given)) for i, length in enumerate(lengths)]
    for number, score in enumerate(scores):
        if not math.isfinite(score.nats):
            raise InputError(
                f"the network gives no finite likelihood to document {number}",
                hint="its weights hold values that are not finite, or the precision is too low",
            )
    return scores


def _check(ids: NDArray[np.int64], number: int, vocabulary: int) -> None:
    if ids.ndim != 1:
        raise InputError(f"document {number} has shape {ids.shape}", hint="pass one list of token ids per document")
    if ids.size and (ids.min() < 0 or ids.max() >= vocabulary):
        raise InputError(
            f"document {number} holds the token id {int(ids.min() if ids.min() < 0 else ids.max())}, "
            f"the network has {vocabulary}",
            hint="the text was encoded with another tokenizer",
        )


def _score(network: Network, rows: Sequence[Window], held: dict[int, NDArray[np.int64]]) -> list[float]:
    """Nats of each window's scored targets. Rows are padded on the right, which a causal network does not see."""
    longest = max(window.stop - window.start for window in rows)
    ids = np.zeros((len(rows), longest + 1), np.int64)
    scored = np.zeros((len(rows), longest), bool)
    for row, window in enumerate(rows):
        ids[row, : window.stop - window.start + 1] = held[window.document][window.start : window.stop + 1]
        scored[row, window.first - window.start : window.stop - window.start] = True
    tokens = torch.from_numpy(ids).to(network.device)
    mask = torch.from_numpy(scored).to(network.device)
    side: dict[str, Tensor] | None = None
    if network.settings.form == "prefix":  # no prefix: every token is predicted
        side = {"prefix": torch.zeros(len(rows), dtype=torch.int64, device=network.device)}
    hidden = network.hidden(tokens[:, :-1], side=side)
    # the head sees only the positions that count
    found = network.token_nll(hidden[mask][None], tokens[:, 1:][mask][None])[0]
    values = found.double().cpu().numpy()
    counts = scored.sum(1)
    return np.add.reduceat(values, np.cumsum(counts) - counts).tolist()  # type: ignore[no-any-return]
