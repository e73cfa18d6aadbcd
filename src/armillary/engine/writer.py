"""Tokens to text as they come, holding back what may still turn into a text that ends the answer."""

from __future__ import annotations

from collections.abc import Sequence

from armillary.text import StreamDecoder


class Writer:
    """Text of one answer; `stopped` once a stop text has come, which is left out."""

    __slots__ = ("decoder", "held", "stopped", "stops")

    def __init__(self, decoder: StreamDecoder, stops: Sequence[str]) -> None:
        self.decoder, self.stops = decoder, [stop for stop in stops if stop]
        self.held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        return self._settle(self.decoder.push(token), last=False)

    def close(self) -> str:
        return "" if self.stopped else self._settle(self.decoder.finish(), last=True)

    def _settle(self, text: str, last: bool) -> str:
        if not self.stops:
            return text
        self.held += text
        found = [at for at in (self.held.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.stopped = True
            text, self.held = self.held[: min(found)], ""
            return text
        waiting = 0 if last else max((overlap(self.held, stop) for stop in self.stops), default=0)
        cut = len(self.held) - waiting
        text, self.held = self.held[:cut], self.held[cut:]
        return text


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    return next((size for size in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:size])), 0)
