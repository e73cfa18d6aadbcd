"""Server-sent events from bytes as they come, cut anywhere."""

from __future__ import annotations

import codecs

LONGEST = 4 * 2**20  # characters of one event


class Events:
    """`push` bytes, get the data of the events that are complete; comments and names are passed over.

    Lines end with a line feed, a carriage return or both, as the HTML standard has it.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._line = ""
        self._data: list[str] = []
        self._returned = False  # the last line ended with a carriage return; a line feed may follow
        self._size = 0

    def push(self, data: bytes) -> list[str]:
        """Raises ValueError for an event without end."""
        found = []
        text = self._decoder.decode(data)
        if self._returned and text:
            text, self._returned = text.removeprefix("\n"), False
        self._returned = text.endswith("\r")
        lines = (self._line + text).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        self._line = lines.pop()
        for line in lines:
            if not line and self._data:
                found.append("\n".join(self._data))
                self._data, self._size = [], 0
            name, _, value = line.partition(":")
            if name == "data":
                self._data.append(value.removeprefix(" "))
                self._size += len(value)
        if self._size + len(self._line) > LONGEST:
            raise ValueError(f"an event has more than {LONGEST} characters")
        return found
