"""Evaluate a model on held-out text: bits per byte and perplexity with intervals, speed, memory, baselines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from armillary.base.errors import DataError, InputError, UnsupportedError
from armillary.base.files import write_atomic
from armillary.data.corpus import MANIFEST, Corpus
from armillary.data.readers import Reader
from armillary.data.settings import STDLIB, SourceSettings
from armillary.data.shards import TokenStore
from armillary.evaluate.baselines import Baseline, baselines
from armillary.evaluate.environment import environment, peak_memory
from armillary.evaluate.intervals import Interval, bits_per_byte, difference, perplexity
from armillary.evaluate.perplexity import DocumentScore, score_documents
from armillary.evaluate.throughput import throughput
from armillary.nn.network import Network
from armillary.recipe import Recipe
from armillary.text.tokenizer import Tokenizer

Progress = Callable[[str, float], None]  # what is being done, and how far it is (0 to 1)
Ids = NDArray[np.integer[Any]]

EVALUATION = "evaluation.json"
LONGEST_CONTEXT = 2048  # where neither the caller nor a recipe says how long windows are
ENCODED = 256  # texts given to the tokenizer at once


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
    limit: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure how well a model predicts text.

    data: a run folder or a prepared corpus (its held-out documents), a file or folder of text, a list
    of texts, or an opened Corpus; context: tokens in a window (by default that of the training, else
    the model's, at most 2048); batch: windows at once; baselines: also score the baselines on the same
    documents, trained on the training text of the corpus (or of another one given here); limit: stop
    after the first documents with this many tokens, in an order drawn once for all.

    A corpus of another tokenizer is decoded and encoded again, so that its bytes stay the same.

    Raises DataError (no text), InputError, UnsupportedError (no tokenizer, not a language model).
    """
    began = time.perf_counter()
    report = progress or (lambda stage, fraction: None)
    network, tokenizer = model.network, model.tokenizer
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}", hint="give at least 1 token, or leave it out")
    context = context or _context(network, model.recipe)
    held = _held_out(data, tokenizer)
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
    sizes = [held.bytes(i) for i in chosen]
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
        compared = _baselines(corpus, [held.text(i) for i in chosen], report)
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


def corpus_folder(folder: Path) -> Path | None:
    """Where the prepared corpus of a run folder (or a corpus folder itself) lies, or None."""
    for place in (folder, folder / "data", folder / "corpus"):
        if (place / MANIFEST).is_file():
            return place
    return None


def _context(network: Network, recipe: Recipe | None) -> int:
    longest = network.settings.context
    return min(longest, recipe.training.context if recipe is not None else LONGEST_CONTEXT)


# -- the held-out documents


class _HeldOut:
    """Held-out documents as ids, bytes and text; `given` tokens at the start of each are not predicted."""

    name: str
    given: int
    corpus: Corpus | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def ids(self, number: int) -> Ids:
        raise NotImplementedError

    def bytes(self, number: int) -> int:
        raise NotImplementedError

    def text(self, number: int) -> bytes:
        raise NotImplementedError

    def length(self, number: int) -> int:
        return max(0, len(self.ids(number)) - self.given)

    def first(self, limit: int | None) -> tuple[list[int], bool]:
        """Numbers of the documents to score, and whether some were left out.

        Files lie in the order of their names, so a part of them is drawn at random (seeded).
        """
        if limit is None:
            return list(range(len(self))), False
        chosen: list[int] = []
        total = 0
        for number in np.random.default_rng(0).permutation(len(self)).tolist():
            if total >= limit:
                break
            chosen.append(number)
            total += self.length(number)
        return sorted(chosen), len(chosen) < len(self)


class _Texts(_HeldOut):
    """Texts encoded with the model's tokenizer."""

    def __init__(self, texts: Sequence[bytes], tokenizer: Tokenizer, name: str) -> None:
        if not any(texts):
            raise DataError("there is no text to evaluate on", where=name, hint="give a file, folder or list with text")
        self.name = name
        self._texts = [text for text in texts if text]
        start = list(dict.fromkeys(i for i in (tokenizer.eos, tokenizer.begin) if i is not None))
        self.given = max(1, len(start))
        self._ids: list[Ids] = []
        for begin in range(0, len(self._texts), ENCODED):
            part = [text.decode("utf-8") for text in self._texts[begin : begin + ENCODED]]
            self._ids += [np.array(start + ids, np.int64) for ids in tokenizer.encode_batch(part)]
        # without a boundary token the first token is given, and its bytes are not the model's achievement
        self._free = [0] * len(self._ids)
        if not start:
            self._free = [len(tokenizer.token_bytes(int(ids[0]))) if len(ids) else 0 for ids in self._ids]

    def __len__(self) -> int:
        return len(self._texts)

    def ids(self, number: int) -> Ids:
        return self._ids[number]

    def bytes(self, number: int) -> int:
        return max(0, len(self._texts[number]) - self._free[number])

    def text(self, number: int) -> bytes:
        return self._texts[number]


class _Stored(_HeldOut):
    """The held-out documents of a corpus that was encoded with the model's tokenizer."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus, self._store = corpus, corpus.heldout
        self.name = str(corpus.folder)
        self.given = len(corpus.manifest.boundary)

    def __len__(self) -> int:
        return len(self._store)

    def ids(self, number: int) -> Ids:
        return self._store.document(number)

    def bytes(self, number: int) -> int:
        return int(self._store.document_bytes[number])

    def text(self, number: int) -> bytes:
        assert self.corpus is not None
        return _decoded(self.corpus, self._store, number)


def _held_out(data: str | Path | Sequence[str] | Corpus, tokenizer: Tokenizer) -> _HeldOut:
    if isinstance(data, Corpus):
        return _of_corpus(data, tokenizer)
    if isinstance(data, (str, Path)):
        if str(data) != STDLIB and (place := corpus_folder(Path(data))) is not None:
            return _of_corpus(Corpus.open(place), tokenizer)
        if (Path(data) / "recipe.yaml").is_file():
            raise DataError(
                "this run folder holds no prepared corpus",
                where=str(data),
                hint="name a file or folder of text to evaluate on",
            )
        reader = Reader(SourceSettings(path=str(data)))
        texts = [text for text, _ in reader.documents()]
        if not texts:
            names = reader.skipped.names
            raise DataError(
                "there is no text in it" + (f"; skipped: {'; '.join(names[:5])}" if names else ""), where=str(data)
            )
        return _Texts(texts, tokenizer, str(data))
    many = list(data)
    for number, text in enumerate(many):
        if not isinstance(text, str):
            raise InputError(f"text {number} is {type(text).__name__}", hint="pass a list of str, a path or a Corpus")
    try:
        return _Texts([text.encode("utf-8") for text in many], tokenizer, f"{len(many)} texts")
    except UnicodeEncodeError as error:
        raise InputError(f"a text holds a character that UTF-8 cannot write ({error.reason})") from None


def _of_corpus(corpus: Corpus, tokenizer: Tokenizer) -> _HeldOut:
    if not len(corpus.heldout):
        raise DataError("the corpus holds nothing out", where=str(corpus.folder), hint="set data.heldout above 0")
    if tokenizer.fingerprint == corpus.manifest.tokenizer:
        return _Stored(corpus)
    texts = _Texts(
        [_decoded(corpus, corpus.heldout, i) for i in range(len(corpus.heldout))], tokenizer, str(corpus.folder)
    )
    texts.corpus = corpus
    return texts


def _decoded(corpus: Corpus, store: TokenStore, number: int) -> bytes:
    """The source text of a stored document, exactly."""
    ids = store.document(number)[len(corpus.manifest.boundary) :]
    return corpus.tokenizer.decode(ids.tolist()).encode("utf-8")


def _training_texts(corpus: Corpus) -> Iterator[bytes]:
    for number in range(len(corpus.train)):
        yield _decoded(corpus, corpus.train, number)


# -- parts


def _baselines(corpus: Corpus | None, heldout: list[bytes], report: Progress) -> list[Baseline]:
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
        return baselines(list(_training_texts(corpus)), heldout, told)
    except ValueError as error:
        raise InputError(f"the baselines cannot be computed: {error}", where=str(corpus.folder)) from error


def _fingerprints(
    held: _HeldOut, chosen: Sequence[int], tokenizer: Tokenizer, recipe: Recipe | None
) -> dict[str, str]:
    """sha256 of the tokenizer, of the held-out text and, where known, of the recipe and corpus."""
    import hashlib

    digest = hashlib.sha256()
    for number in chosen:
        digest.update(hashlib.sha256(held.text(number)).digest())
    found = {"tokenizer": tokenizer.fingerprint, "documents": digest.hexdigest()}
    if recipe is not None:
        found["recipe"] = recipe.fingerprint
    if held.corpus is not None:
        found["corpus"] = held.corpus.fingerprint
    return found
