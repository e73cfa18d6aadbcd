"""Text from tokens as they come: only whole characters are given out.

A token may end in the middle of a UTF-8 sequence; its bytes wait until the sequence is complete or
turns out to be broken, exactly as decoding everything at once would have it. A character here is one
Unicode code point: an accent or an emoji's variant may follow in the next piece.
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from armillary.text.tokenizer import Tokenizer


class StreamDecoder:
    """`push` one id at a time, then `finish`; the pieces joined equal `Tokenizer.decode` of all ids.

    Each push takes time that does not grow with what came before. For the few foreign decoders
    whose text cannot be told token by token, everything comes with `finish`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pieces = tokenizer.pieces
        self._rest = () if self._pieces is None else self._pieces.rest
        self._waiting: list[int] = []
        self._held = b""  # the beginning of a character
        self._first, self._strip = True, 0
        self._begin()

    def push(self, id: int) -> str:
        """The characters that became certain with this token; special tokens give nothing.

        Raises TokenizerError for an id outside the vocabulary.
        """
        data = self._rest[id] if 0 <= id < len(self._rest) else None
        if data is None and self._pieces is not None:
            data = self._tokenizer.token_bytes(id)
        if self._tokenizer.is_special(id):
            return ""
        if self._pieces is None:
            self._waiting.append(id)
            return ""
        assert data is not None
        if self._first:
            data, self._first = self._pieces.first[id] or b"", False
        if self._strip:
            cut = min(self._strip, len(data) - len(data.lstrip(b" ")))
            data = data[cut:]
            self._strip = 0 if data else self._strip - cut
        if self._held:
            data = self._held + data
        elif data.isascii():
            return data.decode("ascii")
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return text

    def finish(self) -> str:
        """What is left, with a replacement character for a sequence that never became complete.

        The decoder is then as new.
        """
        rest = codecs.utf_8_decode(self._held, "replace", True)[0]
        if self._pieces is None:
            rest, self._waiting = self._tokenizer.decode(self._waiting), []
        self._begin()
        return rest

    def _begin(self) -> None:
        self._held, self._first = b"", True
        self._strip = 0 if self._pieces is None else self._pieces.strip
