"""A connection that cannot be held open by a client that does not write or does not read.

uvicorn waits for a request's headers as long as anything of them comes, and for what it sent to be read
as long as the connection stands. Here both have a time; a body has one of its own (see `body`).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from uvicorn.protocols.http.h11_impl import H11Protocol

_LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class Connection(H11Protocol):
    """headers: seconds from the first byte of a request, or from the connection's begin, to the last of its
    headers; reads: seconds that a client may leave what was sent unread."""

    headers_within = 20.0
    reads_within = 30.0
    _coming: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _ending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio sets this by itself for sockets that were made with the protocol's number, and for no others; without,
        # a token waits for the client to acknowledge the one before, which takes its system up to 40 ms
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._coming = self.loop.call_later(self.headers_within, self._late)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._coming = _cancelled(self._coming)
        elif self._coming is None and (self.cycle is None or self.cycle.response_complete):
            self._coming = self.loop.call_later(self.headers_within, self._late)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.reads_within, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread = _cancelled(self._unread)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._aborted_later()

    def connection_lost(self, exc: Exception | None) -> None:
        self._coming, self._unread = _cancelled(self._coming), _cancelled(self._unread)
        self._ending = _cancelled(self._ending)
        super().connection_lost(exc)

    def _late(self) -> None:
        self._coming = None
        if not self.transport.is_closing():
            self.transport.write(_LATE)
            self.transport.close()
            self._aborted_later()

    def _aborted_later(self) -> None:
        """Closing waits until everything is read, which may be never."""
        self._ending = _cancelled(self._ending)
        abort: Callable[[], None] = self.transport.abort
        self._ending = self.loop.call_later(self.reads_within, abort)


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Nothing, in place of the timer."""
    if timer is not None:
        timer.cancel()
    return None
