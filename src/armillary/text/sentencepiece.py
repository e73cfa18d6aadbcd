"""SentencePiece models, read without their library (Kudo & Richardson 2018, SentencePiece).

A model is one protocol-buffer message: pieces with scores and kinds, how it was trained, and how it
normalises. Only the fields that decide an encoding are read; a message that ends early or is none
raises TokenizerError, whatever its bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from armillary.base.errors import TokenizerError
from armillary.base.files import explained

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2
_LONGEST = 256 * 2**20  # bytes; the largest in use take five megabytes
_SPACES = "▁"

Value = int | bytes | float


@dataclass
class SentencePiece:
    """pieces: text, score and kind of every entry, by id; charsmap: compiled rules of normalising."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    kind: int = UNIGRAM
    unknown: int = 0
    byte_fallback: bool = False
    suffix: bool = False  # spaces stand behind a word
    charsmap: bytes = b""
    dummy_prefix: bool = True
    squeeze: bool = True  # several spaces become one, none at the ends
    escape: bool = True  # a space becomes ▁

    @property
    def vocabulary(self) -> list[tuple[str, float]]:
        return [(piece, score) for piece, score, _ in self.pieces]

    def of_kind(self, kind: int) -> list[str]:
        return [piece for piece, _, found in self.pieces if found == kind]


def read_model(path: Path) -> SentencePiece:
    """The model in a file. Raises TokenizerError for one that is damaged or of an unknown kind."""
    with explained("reading", path):
        if path.stat().st_size > _LONGEST:
            raise TokenizerError("this file is too large for a tokenizer", where=str(path))
        data = path.read_bytes()
    try:
        found = _model(data)
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise TokenizerError(f"not a SentencePiece model: {error}", where=str(path)) from None
    if not found.pieces or not 0 <= found.unknown < len(found.pieces):
        raise TokenizerError("a SentencePiece model without pieces, or without one for the unknown", where=str(path))
    if found.kind not in (UNIGRAM, BPE) or found.suffix:
        raise TokenizerError(
            "of SentencePiece models unigram and byte-pair ones are read, with spaces before their words",
            where=str(path),
        )
    return found


def inner_of(model: SentencePiece) -> Tokenizer:
    """A tokenizer of the `tokenizers` library that encodes as the SentencePiece library does."""
    user = model.of_kind(USER)
    inner = Tokenizer(piece_model(model))
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.squeeze:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.escape:
        steps.append(normalizers.Replace(" ", _SPACES))
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(_SPACES))
    inner.normalizer = normalizers.Sequence(steps)
    if user:  # each is whole, wherever it stands
        longest_first = "|".join(_escaped(piece) for piece in sorted(user, key=len, reverse=True))
        inner.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), behavior="isolated")
    inner.decoder = decoder(model.dummy_prefix)
    return inner


def decoder(strip: bool) -> decoders.Decoder:
    """▁ as spaces and <0xNN> as bytes; strip: without the space that was put before the text."""
    steps = [decoders.Replace(_SPACES, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if strip else steps)


def piece_model(model: SentencePiece) -> models.Model:
    """The entries alone, with merges in the order of their scores."""
    if model.kind == UNIGRAM:
        return models.Unigram(model.vocabulary, unk_id=model.unknown, byte_fallback=model.byte_fallback)
    vocabulary = {piece: index for index, (piece, _, _) in enumerate(model.pieces)}
    return models.BPE(
        vocab=vocabulary,
        merges=_merges(model, vocabulary),
        unk_token=model.pieces[model.unknown][0],
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        ignore_merges=bool(model.of_kind(USER)),
    )


def _merges(model: SentencePiece, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    normal = {piece for piece, _, kind in model.pieces if kind == NORMAL}
    ranked = []
    for index, (piece, score, kind) in enumerate(model.pieces):
        if kind != NORMAL:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                ranked.append((-score, index, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _escaped(text: str) -> str:
    return "".join(f"\\x{{{ord(letter):x}}}" for letter in text)


def _model(data: bytes) -> SentencePiece:
    found = SentencePiece()
    for number, value in _fields(data):
        if number == 1:
            piece, score, kind = "", 0.0, NORMAL
            for part, inner in _fields(_bytes(value)):
                if part == 1:
                    piece = _bytes(inner).decode("utf-8")
                elif part == 2:
                    score = _float(inner)
                elif part == 3:
                    kind = _int(inner)
            found.pieces.append((piece, score, kind))
        elif number == 2:
            for part, inner in _fields(_bytes(value)):
                if part == 3:
                    found.kind = _int(inner)
                elif part == 24:
                    found.suffix = bool(_int(inner))
                elif part == 35:
                    found.byte_fallback = bool(_int(inner))
                elif part == 40:
                    found.unknown = _int(inner)
        elif number == 3:
            for part, inner in _fields(_bytes(value)):
                if part == 2:
                    found.charsmap = _bytes(inner)
                elif part == 3:
                    found.dummy_prefix = bool(_int(inner))
                elif part == 4:
                    found.squeeze = bool(_int(inner))
                elif part == 5:
                    found.escape = bool(_int(inner))
    return found


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """Number and value of every field of a message: whole numbers, bytes, and floats of 4 or 8 bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            size, at = _varint(data, at)
        if size is None or size > len(data) - at:
            raise ValueError("a field of no known kind" if size is None else "it ends inside a field")
        part = data[at : at + size]
        at += size
        yield number, part if wire == 2 else struct.unpack("<f" if size == 4 else "<d", part)[0]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("a number that does not end")
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _bytes(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where text should be")
    return value


def _int(value: Value) -> int:
    if not isinstance(value, int):
        raise ValueError("something else where a number should be")
    return value


def _float(value: Value) -> float:
    if not isinstance(value, float) or value != value:
        raise ValueError("something else where a score should be")
    return value
