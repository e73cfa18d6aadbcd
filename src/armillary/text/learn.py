"""Vocabularies learned from text: byte pairs, unigram pieces, or the bare bytes.

All work on bytes (written as letters) that are split where words begin, and every vocabulary holds
all 256 bytes, so that any text can be written and comes back exactly. Sources: Sennrich, Haddow and
Birch 2016, "Neural Machine Translation of Rare Words with Subword Units"; Kudo 2018, "Subword
Regularization"; Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from armillary.base.errors import TokenizerError
from armillary.text.pieces import byte_letters

BYTES = 256
_PART = 2**16  # characters: long texts are cut into parts, so that all cores have work
_BATCH = 64  # parts given to the library at once
_SAMPLE = 2**25  # characters kept in case unigram training has to start again
_EVERYTHING = 10**6  # more pieces than the library considers: nothing is pruned
_CHANCE_STEP = 1e-4  # between the scores that the library makes up
_DIGITS = 4  # of a unigram score, in nats: sums differ from run to run in the fourteenth

Progress = Callable[[int], None]


def learn(
    kind: Literal["bpe", "unigram", "byte"],
    size: int,
    special: Sequence[str],
    texts: Iterable[str],
    progress: Progress | None = None,
) -> Tokenizer:
    """A vocabulary of exactly `size` entries (byte: 256 and the special tokens, from no text).

    The special tokens have the first ids. progress is called with the bytes read so far. The same
    texts give the same vocabulary, in any order and with any number of threads.
    Raises TokenizerError when there is no text, or size is too small or more than the texts support.
    """
    for token in special:
        _check_special(token)
    smallest = len(special) + BYTES
    if kind == "byte":
        return _finished(models.BPE({t: i for i, t in enumerate([*special, *_alphabet()])}, []), special, regex=False)
    if size < smallest:
        raise TokenizerError(
            f"a vocabulary of {size} is too small for {BYTES} bytes and {len(special)} special tokens",
            hint=f"tokenizer.size must be at least {smallest}",
        )
    reader = _Reader(texts, progress, keep=_SAMPLE if kind == "unigram" else 0)
    inner, supported = _pairs(reader, size, special) if kind == "bpe" else _unigram(reader, size, special)
    if supported < size:
        raise TokenizerError(
            f"the text supports a vocabulary of {supported}, but tokenizer.size is {size}",
            hint=f"set tokenizer.size={supported} or less, or give more text",
        )
    return inner


def _pairs(reader: _Reader, size: int, special: Sequence[str]) -> tuple[Tokenizer, int]:
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=_added(special),
        initial_alphabet=_alphabet(),
        show_progress=False,
    )
    inner = _empty(models.BPE(), regex=True)
    inner.train_from_iterator(reader.batches(), trainer=trainer)
    reader.check()
    return _finished(inner.model, special, regex=True), inner.get_vocab_size()


def _unigram(reader: _Reader, size: int, special: Sequence[str]) -> tuple[Tokenizer, int]:
    letters = byte_letters()
    wanted = size - len(special) - BYTES
    scores = _unigram_scores(reader, reader.batches(), size, special)
    if len(scores.keys() - letters.keys()) < wanted:
        # The library prunes below what was asked when many pieces are rare; all that it finds
        # without pruning is what the text supports, and the best of them are taken.
        scores = _unigram_scores(reader, reader.kept(), _EVERYTHING, special)
    # Bytes that need no piece of their own have scores by chance, a little above the lowest: put
    # all such below every other piece.
    least = min(scores.values())
    chance = least + (BYTES + 1) * _CHANCE_STEP
    entries = [(token, scores[token] if scores[token] > chance else least - 1) for token in letters]
    longer = sorted(scores.keys() - letters.keys(), key=lambda token: (-scores[token], token))
    entries += [(token, scores[token]) for token in longer[:wanted]]
    entries.sort(key=lambda entry: (-entry[1], entry[0]))
    model = models.Unigram([*((token, 0.0) for token in special), *entries])
    return _finished(model, special, regex=True), len(special) + BYTES + len(longer)


def _unigram_scores(
    reader: _Reader, batches: Iterator[list[str]], size: int, special: Sequence[str]
) -> dict[str, float]:
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=_added(special), initial_alphabet=_alphabet(), show_progress=False
    )
    inner = _empty(models.Unigram(), regex=True)
    inner.train_from_iterator(batches, trainer=trainer)
    reader.check()  # before the scores, which are not numbers when there was no text
    vocabulary = json.loads(inner.to_str())["model"]["vocab"]
    return {token: round(score, _DIGITS) for token, score in vocabulary if token not in special}


def _empty(model: models.Model, *, regex: bool) -> Tokenizer:
    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    inner.decoder = decoders.ByteLevel()
    return inner


def _finished(model: models.Model, special: Sequence[str], *, regex: bool) -> Tokenizer:
    inner = _empty(model, regex=regex)
    inner.add_special_tokens(_added(special))
    return inner


def _added(special: Sequence[str]) -> list[AddedToken]:
    return [AddedToken(token, special=True, normalized=False) for token in special]


def _alphabet() -> list[str]:
    return sorted(byte_letters(), key=byte_letters().__getitem__)


def _check_special(token: str) -> None:
    """Typed text can only become a token that fits between two splits: special tokens must not."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(token)
    if len(split) < 2 or not token.isascii() or not token.isprintable() or " " in token:
        raise TokenizerError(
            f"the special token {token!r} could be mistaken for text", hint="write it like <|name|>, without spaces"
        )


class _Reader:
    """Texts in batches of parts, checked and counted on the way; keep: characters to be read again."""

    def __init__(self, texts: Iterable[str], progress: Progress | None, keep: int) -> None:
        self._texts, self._progress, self._room = texts, progress, keep
        self._kept: list[str] = []
        self.read = 0

    def batches(self) -> Iterator[list[str]]:
        parts = self._parts()
        while batch := list(itertools.islice(parts, _BATCH)):
            yield batch

    def kept(self) -> Iterator[list[str]]:
        """What was kept of the texts, once more."""
        for start in range(0, len(self._kept), _BATCH):
            yield self._kept[start : start + _BATCH]

    def check(self) -> None:
        if not self.read:
            raise TokenizerError("there is no text to learn a vocabulary from", hint="check data.sources")

    def _parts(self) -> Iterator[str]:
        for text in self._texts:
            data = utf8(text)
            for start in range(0, len(text), _PART):
                part = text[start : start + _PART]
                if self._room > 0:
                    self._kept.append(part)
                    self._room -= len(part)
                yield part
            self.read += len(data)
            if self._progress is not None:
                self._progress(self.read)


def utf8(text: str) -> bytes:
    """The text as UTF-8. Raises TokenizerError for what is not text or holds half a character."""
    if not isinstance(text, str):
        raise TokenizerError(f"expected text, found {type(text).__name__}", hint="pass a str")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"character {error.start} is half of a surrogate pair (U+{ord(text[error.start]):04X})",
            hint="decode the text properly first; UTF-8 cannot hold it",
        ) from None
