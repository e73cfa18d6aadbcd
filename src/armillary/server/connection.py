"""A connection that cannot be held open by a client that does not write or does not read.

uvicorn waits for a request's headers as long as anything of them comes, and for what it sent to be read
as long as the connection stands. Here both have a time; a body has one of its own (see `body`). And when
connections take half the descriptors that the process may have, who has been silent longest makes way for
who comes: otherwise nobody could come until such a time is over.

`httptools` reads requests where it is installed, else `h11`, which is written in Python and takes 0.2 ms more of
each request.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application

    Protocol = H11Protocol
else:
    Protocol = object

HEAD = 65536  # bytes of a request that are no body
_LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def descriptors() -> int:
    """How many the process may have: files, pipes, connections of clients and of our own."""
    found = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if found == resource.RLIM_INFINITY else found


class Connection(Protocol):
    """What both readers share.

    headers: seconds from the first byte of a request, or from the connection's begin, to the last of its headers;
    reads: seconds that a client may leave what was sent unread.
    """

    headers_within = 20.0
    reads_within = 30.0
    since = 0.0  # of the loop's clock: when it began to wait for the request that it waits for
    _coming: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _ending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transport = cast(asyncio.Transport, Joining(transport, self.loop))
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


class Joining:
    """A transport that holds the head of an answer until more of it is written, or the loop comes round: both leave
    in one call of the system, and arrive together."""

    def __init__(self, inner: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._inner, self._loop, self._held = inner, loop, b""

    def write_now(self, data: bytes) -> None:
        """What is complete."""
        self._flush()
        self._inner.write(data)

    def write(self, data: bytes) -> None:
        if self._held:
            data, self._held = self._held + data, b""
        elif data.startswith(b"HTTP/1."):
            self._held = data
            self._loop.call_soon(self._flush)
            return
        self._inner.write(data)

    def close(self) -> None:
        self._flush()
        self._inner.close()

    def _flush(self) -> None:
        data, self._held = self._held, b""
        if data and not self._inner.is_closing():
            self._inner.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class H11(Connection, H11Protocol):
    """A connection that `h11` reads."""


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Nothing, in place of the timer."""
    if timer is not None:
        timer.cancel()
    return None


try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
except ImportError:
    quickest: type[asyncio.Protocol] = H11
else:

    class _Refused:
        """In place of the cycle of a request that was answered as soon as its head was there: its body is dropped."""

        response_complete, more_body = True, False

        def __init__(self, scope: Any) -> None:
            self.scope, self.message_event = scope, asyncio.Event()

    class HttpTools(Connection, HttpToolsProtocol):  # type: ignore[misc]
        """A connection that `httptools` reads, which itself sets no bound to what is no body: headers, and the lines
        around and behind chunks of one. Who finds no room is told so here, before anything is made of the request."""

        _head = 0  # bytes since the last of a body, or since a request began

        def data_received(self, data: bytes) -> None:
            self._head += len(data)
            super().data_received(data)
            if self._head > HEAD and not self.transport.is_closing():
                self.send_400_response("The head of the request is too large.")

        def on_message_begin(self) -> None:
            self._head = 0
            super().on_message_begin()

        def on_body(self, body: bytes) -> None:
            self._head = 0
            super().on_body(body)

        def on_header(self, name: bytes, value: bytes) -> None:
            if self.cycle is None or self.cycle.scope is not self.scope:  # else it comes behind a body, and is dropped
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            if not self._refused():
                super().on_headers_complete()

        def _refused(self) -> bool:
            """Whether the request is answered already."""
            refuse: Callable[[bytes, Any], bytes | None] | None = getattr(self.app, "refused", None)
            parser = self.parser
            if (
                refuse is None
                or parser.get_method() != b"POST"
                or not (self.cycle is None or self.cycle.response_complete)  # else it stands in line
                or parser.get_http_version() != "1.1"
                or not parser.should_keep_alive()
                or parser.should_upgrade()
                or self.flow.write_paused
                or self.transport.is_closing()
            ):
                return False
            said = refuse(self.url, self.headers)
            if said is None:
                return False
            self.cycle = cast(Any, _Refused(self.scope))
            status, _, rest = said.partition(b"\r\n")
            lines = [b"%b: %b" % header for header in self.server_state.default_headers]
            cast(Joining, self.transport).write_now(b"\r\n".join([status, *lines, rest]))
            self.on_response_complete()
            return True

        def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
            if cycle.scope["http_version"] == "1.0":
                cycle.send = _unframed(cycle)  # type: ignore[method-assign]
            super()._start_asgi_task(cycle, app)

    class _Endless(int):
        """A length that is never reached."""

        def __lt__(self, other: object) -> bool:
            return False

        def __sub__(self, other: object) -> _Endless:
            return self

        def __ne__(self, other: object) -> bool:
            return False

        __hash__ = int.__hash__

    def _unframed(cycle: RequestResponseCycle) -> Any:
        """For a client of HTTP/1.0, which knows no chunks: a body of unknown length ends with the connection."""
        plain = cycle.send

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                names = [name.lower() for name, _ in message.get("headers", ())]
                if b"content-length" not in names:
                    cycle.chunked_encoding, cycle.expected_content_length = False, _Endless()
            await plain(message)

        return send

    quickest = HttpTools
