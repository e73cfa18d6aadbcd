"""Prepare a corpus: read the sources, split, learn the tokenizer, tokenise in parallel, write shards.

The same sources and settings give the same bytes, whatever the number of workers and however often
the work was interrupted. Finished shards are noted in `progress.jsonl`; a run that is killed goes on
behind them. The manifest is written last.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import heapq
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from armillary.base.errors import DataError, SettingsError, TokenizerError
from armillary.base.files import explained, write_atomic
from armillary.base.settings import parse
from armillary.data.corpus import MANIFEST, SCHEMA_VERSION, Corpus, Manifest, SourceRecord, Split, read_manifest
from armillary.data.readers import Reader
from armillary.data.settings import DataSettings
from armillary.data.shards import Shard, ShardWriter, Tokens, Width, check_content, check_sizes, token_type, width_for
from armillary.data.workers import Encoder, cores
from armillary.text.tokenizer import Tokenizer, TokenizerSettings, train_tokenizer

Progress = Callable[[str, float], None]  # what is being done, and how far it is (0 to 1)
SPLITS: tuple[Split, ...] = ("train", "heldout")

JOURNAL = "progress.jsonl"
LOCK = ".lock"
SHARDS = re.compile(r"^(train|heldout)-\d+-\d+\.(bin|idx)$")
ASIDE = re.compile(r"^\.((train|heldout)-\d+-\d+|progress|manifest|tokenizer|tokenizer_config)\..+$")  # not yet renamed
HASHES = 2**64
BATCH_BYTES = 2**19  # text given to a worker at a time
BATCH_DOCUMENTS = 1024
ALONE_BYTES = 2**21  # corpora up to this size are done before a worker has started


def prepare(
    settings: DataSettings,
    tokenizer_settings: TokenizerSettings | None,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """The corpus that `settings` describe, prepared in `folder` unless it is there already.

    The tokenizer is learnt from the training side by `tokenizer_settings`, or given. A folder that
    holds a corpus of other settings or inputs keeps it: the new one goes into a sub-folder named
    after what it was made from (`corpus.folder` says where). Only one process prepares in a folder at
    a time; the others wait and then use the result.

    Raises DataError (no text, nothing on one side, damaged or changing inputs), TokenizerError.
    """
    if not settings.sources:
        raise DataError("no sources of text are given", hint="set data.sources: [{path: …}]")
    report = progress or (lambda stage, fraction: None)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise DataError("this is a file, not a folder to prepare data in", where=str(folder))
    readers = [Reader(source, max_document=settings.max_document, avoid=folder) for source in settings.sources]
    digest, total = _survey(readers)
    key = _key(settings, tokenizer_settings, tokenizer, digest)
    if (target := _finished(folder, key)) is not None:
        return Corpus.open(target)
    with explained("writing", folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, report):
        if (target := _finished(folder, key)) is not None:
            return Corpus.open(target)
        target = folder if not (folder / MANIFEST).exists() else _sub(folder, key)
        with explained("writing", target):
            target.mkdir(exist_ok=True)
        journal = _Journal.resume(target, key)
        _clean(target, shards=journal is None)
        if journal is None:
            threshold, sample = _first_readings(settings, readers, total, report, learn=tokenizer is None)
            if tokenizer is None:
                tokenizer = _learn(tokenizer_settings, sample, report)
            del sample
            tokenizer.save(target)
            journal = _Journal.begin(target, key, Tokenizer.load(target), threshold)
        tokenizer = Tokenizer.load(target)  # the very one that the corpus will be read with
        manifest = _tokenise(settings, readers, tokenizer, journal, total, report)
        if _survey(readers)[0] != digest:
            raise DataError(
                "the sources changed while they were being read", hint="run again when nothing writes to them"
            )
        write_atomic(target / MANIFEST, json.dumps(manifest.to_data(), indent=1) + "\n")
        (target / JOURNAL).unlink()
    report("ready", 1.0)
    return Corpus.open(target)


def content_hash(data: bytes) -> int:
    """The 64 bits of a document's sha256 that decide its side; equal documents share it."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


# -- what is asked for, and where it goes


def _survey(readers: Sequence[Reader]) -> tuple[str, int]:
    digest, total = hashlib.sha256(), 0
    for reader in readers:
        one, size = reader.survey()
        digest.update(one.encode())
        total += size
    return digest.hexdigest(), total


def _key(
    settings: DataSettings, tokenizer_settings: TokenizerSettings | None, tokenizer: Tokenizer | None, inputs: str
) -> str:
    """What decides the bytes of a corpus; weights, tasks, isolation and workers do not."""
    if tokenizer is not None:
        how: Any = {"fingerprint": tokenizer.fingerprint, "config": tokenizer.config}
    elif tokenizer_settings is not None:
        how = tokenizer_settings.to_data()
    else:
        raise DataError("neither a tokenizer nor settings to learn one are given")
    data = settings.derive(workers=0, isolate=False).to_data()
    for source in data["sources"]:
        del source["weight"], source["task"]
    asked = {"schema_version": SCHEMA_VERSION, "data": data, "tokenizer": how, "inputs": inputs}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _sub(folder: Path, key: str) -> Path:
    return folder / f"corpus-{key[:12]}"


def _finished(folder: Path, key: str) -> Path | None:
    """Where the corpus of this key lies whole, or None."""
    for place in (folder, _sub(folder, key)):
        if (place / MANIFEST).exists() and read_manifest(place).key == key:
            return place
    return None


def _clean(folder: Path, *, shards: bool) -> None:
    """Remove what a killed preparation had not renamed yet, and its shards if asked; nothing that is not ours."""
    for path in folder.iterdir():
        if (ASIDE.match(path.name) or (shards and SHARDS.match(path.name))) and path.is_file():
            path.unlink()


@contextlib.contextmanager
def _locked(folder: Path, report: Progress) -> Iterator[None]:
    """Hold the folder alone; the system lets go of the lock when a process dies."""
    with explained("locking", folder):
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another process that prepares this data", 0.0)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


# -- first reading: which side, and what the tokenizer learns from


@dataclass(frozen=True)
class _Document:
    data: bytes
    hash: int
    split: Split


@dataclass
class _Seen:
    """What a first reading saw."""

    train: int = 0
    heldout: int = 0
    smallest: int = HASHES  # hashes of the documents whose side the hash decides
    largest: int = -1
    sample: list[tuple[int, int, bytes]] = field(default_factory=list)  # (-rank, order, text), a heap


def _first_readings(
    settings: DataSettings, readers: Sequence[Reader], total: int, report: Progress, *, learn: bool
) -> tuple[int, list[bytes]]:
    """(hash below which a document is held out, sample of training texts in the order of the sources).

    Where the chosen share leaves one side empty, the document with the smallest hash is held out, or
    the one with the largest kept for training. Raises DataError when even so a side stays empty.
    """
    threshold = round(settings.heldout * HASHES)
    seen = _first_reading(settings, readers, threshold, total, report, learn)
    if not (seen.train and seen.heldout) and settings.heldout > 0 and seen.smallest < seen.largest:
        threshold = seen.largest if not seen.train else seen.smallest + 1
        seen = _first_reading(settings, readers, threshold, total, report, learn)
    where = ", ".join(str(reader.root) for reader in readers)
    if not seen.train and not seen.heldout:
        skipped = [name for reader in readers for name in reader.skipped.names]
        raise DataError(
            "there is no text in the sources" + (f"; skipped: {'; '.join(skipped[:5])}" if skipped else ""),
            where=where,
            hint="check `path`, `include` and `exclude` of data.sources",
        )
    if not seen.train or not seen.heldout:
        side, count = ("train on", seen.heldout) if not seen.train else ("hold out", seen.train)
        raise DataError(
            f"there is nothing to {side}: the sources hold {count} document(s), and all are on the other side",
            where=where,
            hint="give more text, or change data.heldout, data.max_document or the `split` of a source",
        )
    return threshold, [text for _, _, text in sorted(seen.sample, key=lambda item: item[1])]


def _first_reading(
    settings: DataSettings, readers: Sequence[Reader], threshold: int, total: int, report: Progress, learn: bool
) -> _Seen:
    seen, held = _Seen(), 0
    meter = _Meter(readers, "reading", total, report)
    for reader in readers:
        for document in _documents(reader, threshold):
            meter.tell()
            if reader.settings.split == "hash":
                seen.smallest, seen.largest = min(seen.smallest, document.hash), max(seen.largest, document.hash)
            if document.split == "heldout":
                seen.heldout += 1
            else:
                seen.train += 1
                if learn:
                    # a uniform sample: the documents with the smallest second hash, as many as fit
                    rank = content_hash(b"sample" + document.hash.to_bytes(8, "big"))
                    heapq.heappush(seen.sample, (-rank, seen.train, document.data))
                    held += len(document.data)
                    while held > settings.tokenizer_sample and len(seen.sample) > 1:
                        held -= len(heapq.heappop(seen.sample)[2])
            if not learn and seen.train and seen.heldout:
                return seen  # nothing else to find out
    return seen


def _documents(reader: Reader, threshold: int) -> Iterator[_Document]:
    forced = reader.settings.split
    for data, _ in reader.documents():
        value = content_hash(data)
        if forced == "hash":
            yield _Document(data, value, "heldout" if value < threshold else "train")
        else:
            yield _Document(data, value, forced)


class _Meter:
    """Tells how far through the files one reading is, every half percent."""

    def __init__(self, readers: Sequence[Reader], stage: str, total: int, report: Progress) -> None:
        self.readers, self.stage, self.total, self.report = readers, stage, max(total, 1), report
        self.next = 0.0
        for reader in readers:
            reader.consumed = 0

    def tell(self) -> None:
        fraction = min(sum(reader.consumed for reader in self.readers) / self.total, 1.0)
        if fraction >= self.next:
            self.next = fraction + 0.005
            self.report(self.stage, fraction)


def _learn(settings: TokenizerSettings | None, sample: Sequence[bytes], report: Progress) -> Tokenizer:
    assert settings is not None
    report("learning the tokenizer", 0.0)
    tokenizer = train_tokenizer(settings, (text.decode("utf-8") for text in sample))
    report("learning the tokenizer", 1.0)
    return tokenizer


def _boundary(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens every document begins with: the end of the one before, and the beginning where it has its own."""
    found = tuple(dict.fromkeys(id for id in (tokenizer.eos, tokenizer.begin) if id is not None))
    if not found:
        raise TokenizerError(
            "the tokenizer has no token that marks the end of a document", hint="name eos_token in its configuration"
        )
    return found


# -- second reading: tokens


class _Journal:
    """Which shards are finished, one JSON line each behind a line that says what they belong to."""

    def __init__(self, folder: Path, head: dict[str, Any], lines: Sequence[tuple[int, Split, Shard]]) -> None:
        self.folder, self.head = folder, head
        self.threshold = int(head["heldout_below"])
        self.done: dict[tuple[int, Split], list[Shard]] = {}
        for source, split, shard in lines:
            self.done.setdefault((source, split), []).append(shard)
        content = [head, *(self._line(*line) for line in lines)]
        write_atomic(folder / JOURNAL, "".join(json.dumps(line) + "\n" for line in content))

    @classmethod
    def begin(cls, folder: Path, key: str, tokenizer: Tokenizer, threshold: int) -> _Journal:
        head = {"key": key, "tokenizer": tokenizer.fingerprint, "heldout_below": threshold}
        return cls(folder, head, [])

    @classmethod
    def resume(cls, folder: Path, key: str) -> _Journal | None:
        """The journal of an interrupted preparation of the same key, with the shards that are still good."""
        try:
            rows = (folder / JOURNAL).read_text("utf-8").splitlines()
            head = json.loads(rows[0])
            tokenizer = Tokenizer.load(folder)
            if head["key"] != key or head["tokenizer"] != tokenizer.fingerprint:
                return None
            width = width_for(tokenizer.size)
        except (FileNotFoundError, IndexError, ValueError, KeyError, TypeError, TokenizerError):
            return None
        good: list[tuple[int, Split, Shard]] = []
        broken: set[tuple[int, Split]] = set()  # behind a bad shard nothing counts: documents go in order
        for row in rows[1:]:
            try:
                line = json.loads(row)
                source, split, shard = int(line["source"]), line["split"], parse(Shard, line["shard"])
            except (ValueError, KeyError, TypeError, SettingsError):
                break  # the line that was being written when the process died
            try:
                check_sizes(folder, shard, width)
                check_content(folder, shard)
            except DataError:
                broken.add((source, split))
            if (source, split) not in broken:
                good.append((source, split, shard))
        return cls(folder, head, good)

    def add(self, source: int, split: Split, shard: Shard) -> None:
        self.done.setdefault((source, split), []).append(shard)
        path = self.folder / JOURNAL
        with explained("writing", path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(self._line(source, split, shard)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def shards(self, source: int, split: Split) -> tuple[Shard, ...]:
        return tuple(self.done.get((source, split), ()))

    @staticmethod
    def _line(source: int, split: Split, shard: Shard) -> dict[str, Any]:
        return {"source": source, "split": split, "shard": shard.to_data()}


class _Output:
    """The shards of one side of one source, closed one after another as they fill."""

    def __init__(self, journal: _Journal, source: int, split: Split, width: Width, limit: int) -> None:
        self.journal, self.source, self.split, self.width, self.limit = journal, source, split, width, limit
        self.behind = sum(shard.documents for shard in journal.shards(source, split))  # documents done before
        self.writer: ShardWriter | None = None

    def add(self, ids: Tokens, source_bytes: int) -> None:
        if self.writer is None:
            number = len(self.journal.shards(self.source, self.split))
            name = f"{self.split}-{self.source:02d}-{number:05d}"
            self.writer = ShardWriter(self.journal.folder, name, self.width)
        self.writer.add(ids, source_bytes)
        if self.writer.tokens >= self.limit:
            self.close()

    def close(self) -> None:
        if self.writer is not None:
            self.journal.add(self.source, self.split, self.writer.close())
            self.writer = None

    def abandon(self) -> None:
        if self.writer is not None:
            self.writer.abandon()


def _tokenise(
    settings: DataSettings,
    readers: Sequence[Reader],
    tokenizer: Tokenizer,
    journal: _Journal,
    total: int,
    report: Progress,
) -> Manifest:
    width, boundary = width_for(tokenizer.size), _boundary(tokenizer)
    workers = settings.workers or (cores() if total > ALONE_BYTES else 1)
    meter = _Meter(readers, "tokenising", total, report)
    with Encoder(tokenizer, journal.folder, width, workers) as encoder:
        records = tuple(
            _tokenise_source(number, reader, encoder, boundary, width, journal, settings.shard_tokens, meter)
            for number, reader in enumerate(readers)
        )
    return Manifest(
        key=journal.head["key"],
        tokenizer=tokenizer.fingerprint,
        width=width,
        boundary=boundary,
        heldout_below=journal.threshold,
        sources=records,
    )


def _tokenise_source(
    number: int,
    reader: Reader,
    encoder: Encoder,
    boundary: tuple[int, ...],
    width: Width,
    journal: _Journal,
    limit: int,
    meter: _Meter,
) -> SourceRecord:
    outputs: dict[Split, _Output] = {split: _Output(journal, number, split, width, limit) for split in SPLITS}
    behind = {split: output.behind for split, output in outputs.items()}
    documents = size = 0

    def batches() -> Iterator[tuple[list[Split], list[bytes]]]:
        nonlocal documents, size
        splits: list[Split] = []
        texts: list[bytes] = []
        held = 0
        for document in _documents(reader, journal.threshold):
            meter.tell()
            documents, size = documents + 1, size + len(document.data)
            if behind[document.split]:  # in a finished shard
                behind[document.split] -= 1
                continue
            splits.append(document.split)
            texts.append(document.data)
            held += len(document.data)
            if held >= BATCH_BYTES or len(texts) >= BATCH_DOCUMENTS:
                yield splits, texts
                splits, texts, held = [], [], 0
        if texts:
            yield splits, texts

    try:
        start = np.asarray(boundary, token_type(width))
        for (splits, sizes), ids in encoder.map(((b[0], [len(t) for t in b[1]]), b[1]) for b in batches()):
            for split, source_bytes, tokens in zip(splits, sizes, ids, strict=True):
                outputs[split].add(np.concatenate((start, tokens)), source_bytes)
        for output in outputs.values():
            output.close()
    finally:
        for output in outputs.values():
            output.abandon()
    return SourceRecord(
        path=reader.settings.path,
        split=reader.settings.split,
        documents=documents,
        bytes=size,
        empty=reader.empty,
        skipped=reader.skipped.count,
        skipped_names=tuple(reader.skipped.names),
        train=journal.shards(number, "train"),
        heldout=journal.shards(number, "heldout"),
    )
