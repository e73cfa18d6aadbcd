"""What was said earlier, as the tokens that it was said in.

A client sends a conversation back as text. Encoded anew, an answer may fall into other tokens than the
model chose, and then its state could not be gone on from. So the tokens of answers are kept for a while,
and take the place of the encoded text when their conversation comes back.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TOKENS = 1_000_000  # kept, of all conversations
ENTRIES = 4096


@dataclass(frozen=True)
class Spoken:
    """A prompt as text encodes it; `ids`: as it is given to the engine; `ends`: where its messages end in `ids`."""

    plain: tuple[int, ...]
    ids: tuple[int, ...]
    ends: tuple[int, ...]


class Turns:
    """Conversations by whose they are (`space`), the prompt of an answer and its text; safe to use from several
    threads."""

    def __init__(self, tokens: int = TOKENS, entries: int = ENTRIES) -> None:
        self._most, self._entries, self._tokens = tokens, entries, 0
        self._kept: OrderedDict[bytes, array[int]] = OrderedDict()  # a tuple takes nine times the memory
        self._lock = threading.Lock()

    def keep(self, space: str, spoken: Spoken, text: str, chosen: Sequence[int]) -> None:
        """An answer: its prompt, its text and the tokens chosen."""
        whole = array("i", (*spoken.ids, *chosen))
        with self._lock:
            key = _key(space, spoken.plain, text)
            self._tokens += len(whole) - len(self._kept.pop(key, ()))
            self._kept[key] = whole
            while self._kept and (self._tokens > self._most or len(self._kept) > self._entries):
                _, old = self._kept.popitem(last=False)
                self._tokens -= len(old)

    def find(self, space: str, plain: Sequence[int], text: str) -> tuple[int, ...] | None:
        """The tokens up to the end of that answer, prompt and all, if they are known."""
        with self._lock:
            key = _key(space, plain, text)
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
            return None if found is None else tuple(found)


def _key(space: str, plain: Sequence[int], text: str) -> bytes:
    made = hashlib.sha256()
    for part in (space.encode(), np.asarray(plain, np.int64).tobytes(), text.encode()):
        made.update(len(part).to_bytes(8, "little") + part)
    return made.digest()
