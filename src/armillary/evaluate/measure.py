"""Evaluate a model on held-out text: bits per byte and perplexity with intervals, speed, memory, baselines."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from armillary.base.errors import DataError, InputError, UnsupportedError
from armillary.base.files import write_atomic
from armillary.data.corpus import Corpus
from armillary.evaluate.baselines import MAX_ORDER, ORDER, Baseline, baselines
from armillary.evaluate.environment import environment, peak_memory
from armillary.evaluate.heldout import HeldOut, held_out, training_texts
from armillary.evaluate.intervals import Interval, bits_per_byte, difference, perplexity
from armillary.evaluate.perplexity import DocumentScore, score_documents
from armillary.evaluate.throughput import throughput
from armillary.nn.network import Network
from armillary.recipe import Recipe
from armillary.text.tokenizer import Tokenizer

Progress = Callable[[str, float], None]  # what is being done, and how far it is (0 to 1)

EVALUATION = "evaluation.json"
LONGEST_CONTEXT = 2048  # where neither the caller nor a recipe says how long windows are


class Evaluated(Protocol):
    """What `evaluate` needs of a model."""

    @property
    def network(self) -> Network: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def recipe(self) -> Recipe | None: ...


@dataclass(frozen=True)
class Evaluation:
    """What was measured. Bits per byte are comparable between any models, perplexity (per token) only
    between models of one tokenizer.

    documents, bytes, tokens: of the held-out text (UTF-8 bytes; predicted tokens); truncated: whether
    `limit` left documents out; tokens_per_second: predicted while scoring; reading_speed and
    writing_speed: tokens per second of a prompt and of cached decoding at batch 1 (None for a network
    that does not generate); peak_memory: most bytes the process has held since it began; seconds: of
    the whole evaluation; scores and sizes: nats and bytes per document, in the order of the data.
    """

    bits_per_byte: Interval
    perplexity: Interval
    documents: int
    bytes: int
    tokens: int
    truncated: bool
    context: int
    tokens_per_second: float
    reading_speed: float | None
    writing_speed: float | None
    peak_memory: int
    seconds: float
    data: str
    parameters: int
    precision: str
    device: str
    fingerprints: dict[str, str]
    environment: dict[str, Any]
    baselines: tuple[Baseline, ...] = ()
    scores: tuple[DocumentScore, ...] = field(default=(), repr=False)
    sizes: tuple[int, ...] = field(default=(), repr=False)

    def difference(self, other: Evaluation) -> Interval:
        """Bits per byte of this model minus the other's, paired by document. Raises InputError for other documents."""
        if self.fingerprints["documents"] != other.fingerprints["documents"]:
            raise InputError("the two evaluations are of different documents", hint="evaluate both on the same data")
        return difference([s.nats for s in self.scores], [s.nats for s in other.scores], self.sizes)

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON, without the single documents."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("scores", "sizes")}
        data["bits_per_byte"] = self.bits_per_byte.to_data()
        data["perplexity"] = self.perplexity.to_data()
        data["baselines"] = [
            {"name": b.name, "bits_per_byte": b.bits_per_byte, "seconds": b.seconds} for b in self.baselines
        ]
        return data

    def save(self, folder: str | Path) -> Path:
        """Write `evaluation.json` into a folder, where the report and the card find it."""
        path = Path(folder) / EVALUATION
        write_atomic(path, json.dumps(self.to_data(), indent=1) + "\n")
        return path


def evaluate(
    model: Evaluated,
    data: str | Path | Sequence[str] | Corpus,
    *,
    context: int | None = None,
    batch: int = 8,
    baselines: bool | Corpus = False,
    order: int = ORDER,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure how well a model predicts text.

    data: a run folder or a prepared corpus (its held-out documents), a file or folder of text, a list
    of texts, or an opened Corpus; context: tokens in a window (by default that of the training, else
    the model's, at most 2048); batch: windows at once; baselines: also score the baselines on the same
    documents, trained on the training text of the corpus (or of another one given here); order: of the n-gram
    model among them, which sees order - 1 bytes; limit: score at most this many documents, drawn at random
    but always the same.

    A corpus of another tokenizer is decoded and encoded again, so that its bytes stay the same.

    Raises DataError (no text), InputError, UnsupportedError (no tokenizer, not a language model).
    """
    began = time.perf_counter()
    report = progress or (lambda stage, fraction: None)
    network, tokenizer = model.network, model.tokenizer
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}", hint="give at least 1 document, or leave it out")
    if not 1 <= order <= MAX_ORDER:
        raise InputError(f"an n-gram model of order {order} cannot be had", hint=f"give an order from 1 to {MAX_ORDER}")
    context = context or default_context(network, model.recipe)
    held = held_out(data, tokenizer)
    chosen, truncated = held.first(limit)
    expected = sum(held.length(i) for i in chosen)

    start = time.perf_counter()
    scores = score_documents(
        network,
        (held.ids(i) for i in chosen),
        context=context,
        batch=batch,
        given=held.given,
        progress=lambda done: report("scoring", min(1.0, done / max(1, expected))),
    )
    seconds = time.perf_counter() - start
    tokens = sum(score.tokens for score in scores)
    sizes = [held.size(i) for i in chosen]
    if tokens == 0 or sum(sizes) == 0:
        raise DataError("the held-out text is empty", where=held.name, hint="give text of at least a few words")
    report("measuring speed", 0.0)
    try:
        speed = throughput(network)
    except UnsupportedError:
        speed = None
    compared: list[Baseline] = []
    if baselines is not False:
        corpus = baselines if isinstance(baselines, Corpus) else held.corpus
        compared = _baselines(corpus, [held.text(i) for i in chosen], order, report)
    nats = [score.nats for score in scores]
    return Evaluation(
        bits_per_byte=bits_per_byte(nats, sizes),
        perplexity=perplexity(nats, [score.tokens for score in scores]),
        documents=len(chosen),
        bytes=sum(sizes),
        tokens=tokens,
        truncated=truncated,
        context=context,
        tokens_per_second=tokens / seconds,
        reading_speed=speed.reading if speed else None,
        writing_speed=speed.writing if speed else None,
        peak_memory=peak_memory(),
        seconds=time.perf_counter() - began,
        data=held.name,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        precision=str(network.dtype).removeprefix("torch."),
        device=str(network.device),
        fingerprints=_fingerprints(held, chosen, tokenizer, model.recipe),
        environment=environment(),
        baselines=tuple(compared),
        scores=tuple(scores),
        sizes=tuple(sizes),
    )


def default_context(network: Network, recipe: Recipe | None) -> int:
    """The length that a model was trained on, as far as that is known."""
    longest = network.settings.context
    return min(longest, recipe.training.context if recipe is not None else LONGEST_CONTEXT)


# -- parts


def _baselines(corpus: Corpus | None, heldout: list[bytes], order: int, report: Progress) -> list[Baseline]:
    if corpus is None:
        raise InputError(
            "baselines learn from training text, and here is none",
            hint="evaluate on a run folder or corpus, or pass baselines=Corpus.open(…)",
        )
    report("baselines", 0.0)
    done = 0

    def told(line: str) -> None:
        nonlocal done
        done += 1
        report(f"baselines: {line}", min(1.0, done / 3))

    try:
        return baselines(list(training_texts(corpus)), heldout, told, order=order)
    except ValueError as error:
        raise InputError(f"the baselines cannot be computed: {error}", where=str(corpus.folder)) from error


def _fingerprints(held: HeldOut, chosen: Sequence[int], tokenizer: Tokenizer, recipe: Recipe | None) -> dict[str, str]:
    """sha256 of the tokenizer, of the held-out text and, where known, of the recipe and corpus."""
    digest = hashlib.sha256()
    for number in chosen:
        digest.update(hashlib.sha256(held.text(number)).digest())
    found = {"tokenizer": tokenizer.fingerprint, "documents": digest.hexdigest()}
    if recipe is not None:
        found["recipe"] = recipe.fingerprint
    if held.corpus is not None:
        found["corpus"] = held.corpus.fingerprint
    return found
