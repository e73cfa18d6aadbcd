"""A connection that cannot be held open by a client that does not write or does not read.

uvicorn waits for a request's headers as long as anything of them comes, and for what it sent to be read
as long as the connection stands. Here both have a time; a body has one of its own (see `body`). And when
connections take half the descriptors that the process may have, who has been silent longest makes way for
who comes: otherwise nobody could come until such a time is over.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import sys
from collections.abc import Callable

from uvicorn.protocols.http.h11_impl import H11Protocol

_LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def descriptors() -> int:
    """How many the process may have: files, pipes, connections of clients and of our own."""
    found = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if found == resource.RLIM_INFINITY else found


class Connection(H11Protocol):
    """headers: seconds from the first byte of a request, or from the connection's begin, to the last of its
    headers; reads: seconds that a client may leave what was sent unread."""

    headers_within = 20.0
    reads_within = 30.0
    since = 0.0  # of the loop's clock: when it began to wait for the request that it waits for
    _coming: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _ending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        given = transport.get_extra_info("socket")
        if given is not None and given.family in (socket.AF_INET, socket.AF_INET6):
            # what is written is sent: asyncio sees to that only where a listening socket names its protocol
            given.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._coming = self.loop.call_later(self.headers_within, self._late)
        self.since = self.loop.time()
        if len(self.connections) > self.most():
            there = [one for one in self.connections if isinstance(one, Connection) and not one.transport.is_closing()]
            if len(there) > self.most():
                min((one for one in there if one.silent), key=lambda one: one.since).transport.abort()

    @property
    def silent(self) -> bool:
        """Whether it has not sent (all of) a request that can be answered."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    @staticmethod
    def most() -> int:
        return descriptors() // 2

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self.since = self.loop.time()
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
