"""The bytes that each entry of a vocabulary stands for, read from the tokenizer's decoder.

Byte-level vocabularies (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners")
write each byte as one printable letter; SentencePiece ones (Kudo and Richardson 2018,
"SentencePiece") write ▁ for a space and <0xNN> for a byte; WordPiece ones mark what continues a word.
For all of these a text is the bytes of its tokens in a row, so it can be decoded one token at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Pieces:
    """Bytes of every token, by id; None where no token has that id.

    first: of a token that begins a text; rest: of one inside it; strip: how many spaces at the
    beginning of a text the tokenizer put there itself.
    """

    first: Sequence[bytes | None]
    rest: Sequence[bytes | None]
    strip: int


def byte_letters() -> dict[str, int]:
    """The printable letter that byte-level vocabularies write for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in plain}
    others = (byte for byte in range(256) if byte not in set(plain))
    return letters | {chr(256 + index): byte for index, byte in enumerate(others)}


def pieces_of(inner: tokenizers.Tokenizer) -> Pieces | None:
    """The bytes of every token, or None when the decoder does not work token by token."""
    vocabulary = inner.get_vocab(with_added_tokens=True)
    names: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for name, index in vocabulary.items():
        names[index] = name
    # An added token is spelled as it reads, unless the vocabulary has it as an entry of its own.
    added = frozenset(inner.get_added_tokens_decoder()) - frozenset(inner.get_vocab(with_added_tokens=False).values())
    spell = _speller(inner)
    if spell is None:
        return None
    rest = [None if name is None else spell.spell(name, False, i in added) for i, name in enumerate(names)]
    if not spell.differs:
        return Pieces(rest, rest, spell.strip)
    first = [None if name is None else spell.spell(name, True, i in added) for i, name in enumerate(names)]
    return Pieces(first, rest, spell.strip)


@dataclass(frozen=True)
class _Speller:
    """spell(token, begins the text, added by hand) -> bytes; differs: whether beginning matters."""

    spell: Callable[[str, bool, bool], bytes]
    differs: bool = False
    strip: int = 0


def _speller(inner: tokenizers.Tokenizer) -> _Speller | None:
    parts = _parts(_layout(inner.decoder))
    if not parts:
        if any(part["type"] == "ByteLevel" for part in _parts(_layout(inner.pre_tokenizer))):
            parts = [{"type": "ByteLevel"}]
        else:  # the library joins words with spaces
            return _Speller(lambda token, begins, _: ("" if begins else " ").encode() + token.encode(), differs=True)
    if [part["type"] for part in parts] == ["WordPiece"]:
        return _wordpiece(inner.decoder)
    return _bytewise(parts)


def _wordpiece(decoder: Any) -> _Speller:
    def spell(token: str, begins: bool, _: bool) -> bytes:
        text: str = decoder.decode([token] if begins else ["x", token])
        return (text if begins else text[1:]).encode("utf-8")

    return _Speller(spell, differs=True)


def _bytewise(parts: Sequence[Mapping[str, Any]]) -> _Speller | None:
    """Replacements, ▁, <0xNN> and byte letters, then at most one cut of leading spaces."""
    replacements: list[tuple[str, str]] = []
    marker, drops, fallback, letters, joined, strip = "", False, False, {}, False, 0
    for part in parts:
        kind = part["type"]
        if strip:
            return None
        if kind == "Fuse":
            joined = True
        elif joined and kind == "Strip" and part["content"] == " " and not part["stop"]:
            strip = part["start"]
        elif joined:
            return None
        elif kind == "Replace" and "String" in part["pattern"]:
            replacements.append((part["pattern"]["String"], part["content"]))
        elif kind == "ByteFallback":
            fallback = True
        elif kind == "Metaspace":
            marker, drops = part["replacement"], part["prepend_scheme"] != "never"
        elif kind == "ByteLevel":
            letters, joined = byte_letters(), True
        else:
            return None

    def spell(token: str, begins: bool, added: bool) -> bytes:
        if fallback and (byte := _BYTE.fullmatch(token)):
            return bytes.fromhex(byte[1])
        for old, new in replacements:
            token = token.replace(old, new)
        if marker:
            token = token.replace(marker, "" if begins and drops else " ")
        if letters and not added and all(letter in letters for letter in token):
            return bytes(letters[letter] for letter in token)
        return token.encode("utf-8")

    return _Speller(spell, differs=drops, strip=strip)


def _layout(part: Any) -> Any:
    """The library's own description of one of a tokenizer's parts."""
    return None if part is None else json.loads(part.__getstate__())


def _parts(node: Any) -> list[Mapping[str, Any]]:
    if node is None:
        return []
    if node["type"] == "Sequence":
        return [part for item in node.get("decoders") or node.get("pretokenizers") or [] for part in _parts(item)]
    return [node]
