"""Text from tokens as they come: only whole characters are given out.

A token may end in the middle of a UTF-8 sequence; its bytes wait until the sequence is complete or
turns out to be broken, exactly as decoding everything at once would have it.
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from armillary.text.tokenizer import Tokenizer


class StreamDecoder:
    """`push` one id at a time, then `finish`; the pieces joined equal `Tokenizer.decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._first = True

    def push(self, id: int) -> str:
        """The characters that became certain with this token; special tokens give nothing."""
        if self._tokenizer.is_special(id):
            return ""
        data = self._tokenizer.token_bytes(id)
        if self._first and data:
            self._first = False
            if self._tokenizer.strips_leading_space and data.startswith(b" "):
                data = data[1:]
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is left: a replacement character for a sequence that never became complete."""
        return self._decoder.decode(b"", True)
