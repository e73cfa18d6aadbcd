"""Held-out documents, wherever they come from: a run or corpus folder, files of text, or texts in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from armillary.base.errors import DataError, InputError
from armillary.data.corpus import MANIFEST, Corpus
from armillary.data.readers import Reader
from armillary.data.settings import STDLIB, SourceSettings
from armillary.data.shards import TokenStore
from armillary.text.tokenizer import Tokenizer

Ids = NDArray[np.integer[Any]]
ENCODED = 256  # texts given to the tokenizer at once


def corpus_folder(folder: Path) -> Path | None:
    """Where the prepared corpus of a run folder (or a corpus folder itself) lies, or None."""
    for place in (folder, folder / "data", folder / "corpus"):
        if (place / MANIFEST).is_file():
            return place
    return None


class HeldOut:
    """Documents as ids, bytes of text and text; `given` tokens at the start of each are not predicted."""

    name: str
    given: int
    corpus: Corpus | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def ids(self, number: int) -> Ids:
        raise NotImplementedError

    def size(self, number: int) -> int:
        raise NotImplementedError

    def text(self, number: int) -> bytes:
        raise NotImplementedError

    def length(self, number: int) -> int:
        return max(0, len(self.ids(number)) - self.given)

    def first(self, limit: int | None) -> tuple[list[int], bool]:
        """Numbers of the documents to score, and whether some were left out.

        Files lie in the order of their names, so a part of them is drawn at random (seeded).
        """
        if limit is None or limit >= len(self):
            return list(range(len(self))), False
        return sorted(np.random.default_rng(0).permutation(len(self))[:limit].tolist()), True


class _Texts(HeldOut):
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

    def size(self, number: int) -> int:
        return max(0, len(self._texts[number]) - self._free[number])

    def text(self, number: int) -> bytes:
        return self._texts[number]


class _Stored(HeldOut):
    """The held-out documents of a corpus that was encoded with the model's tokenizer."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus, self._store = corpus, corpus.heldout
        self.name = str(corpus.folder)
        self.given = len(corpus.manifest.boundary)

    def __len__(self) -> int:
        return len(self._store)

    def ids(self, number: int) -> Ids:
        return self._store.document(number)

    def size(self, number: int) -> int:
        return int(self._store.document_bytes[number])

    def text(self, number: int) -> bytes:
        assert self.corpus is not None
        return decoded(self.corpus, self._store, number)


def held_out(data: str | Path | Sequence[str] | Corpus, tokenizer: Tokenizer) -> HeldOut:
    """The documents of `data` (see `evaluate`) in a model's tokens. Raises DataError, InputError."""
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


def _of_corpus(corpus: Corpus, tokenizer: Tokenizer) -> HeldOut:
    if not len(corpus.heldout):
        raise DataError("the corpus holds nothing out", where=str(corpus.folder), hint="set data.heldout above 0")
    if tokenizer.fingerprint == corpus.manifest.tokenizer:
        return _Stored(corpus)
    texts = _Texts(
        [decoded(corpus, corpus.heldout, i) for i in range(len(corpus.heldout))], tokenizer, str(corpus.folder)
    )
    texts.corpus = corpus
    return texts


def decoded(corpus: Corpus, store: TokenStore, number: int) -> bytes:
    """The source text of a stored document, exactly."""
    ids = store.document(number)[len(corpus.manifest.boundary) :]
    return corpus.tokenizer.decode(ids.tolist()).encode("utf-8")


def training_texts(corpus: Corpus) -> Iterator[bytes]:
    """The training side of a corpus, document by document."""
    for number in range(len(corpus.train)):
        yield decoded(corpus, corpus.train, number)
