"""How requests come in and answers go out, by each of the readers that may be there."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import pytest
from server_parts import KEYS, Served, after_the_first, extending, hosted

from armillary.server import Door, Server
from armillary.server import connection as connections
from armillary.server.within import within

READERS = [connections.H11]
if connections.quickest is not connections.H11:
    READERS.append(connections.quickest)


@pytest.fixture(scope="module", params=READERS, ids=lambda reader: reader.__name__)
def read(request):
    running = Served(Server([hosted(slots=2, most=2)]), http=request.param)
    yield running
    running.close()


def asked(version: str = "1.1", **more) -> bytes:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 5, "min_tokens": 5, "stream": True} | more
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/{version}\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


def until(connection: socket.socket, end: bytes = b"") -> bytes:
    """What comes up to some bytes, or until the other side closes."""
    connection.settimeout(20)
    data = b""
    while not end or end not in data:
        try:
            got = connection.recv(65536)
        except ConnectionError:
            break
        if not got:
            break
        data += got
    return data


def test_the_reader_is_the_one_that_was_asked_for(read) -> None:
    assert read.inner.config.http_protocol_class.__name__ in ("H11", "HttpTools")


def test_the_head_comes_with_the_first_token(read, monkeypatch) -> None:
    """In one call of the system: what a stream begins with is written once."""
    written = []
    plain = connections.Joining.write
    inner = connections.Joining._flush

    def noted(self, data):
        written.append(bytes(data))
        return plain(self, data)

    monkeypatch.setattr(connections.Joining, "write", noted)
    with socket.create_connection(("127.0.0.1", read.port)) as one:
        one.sendall(asked())
        first = one.recv(65536)
        assert first.startswith(b"HTTP/1.1 200")
        assert b'"text"' in first
        if b"[DONE]" not in first:
            until(one, b"[DONE]")
    assert written[0].startswith(b"HTTP/1.1 200") and b'"text"' in written[1]
    assert inner is connections.Joining._flush


def test_the_head_does_not_wait_long(read) -> None:
    slots = read.server.models["tiny"].engine.slots
    plain = slots.extend
    slots.extend = lambda *given, **more: time.sleep(1.5) or plain(*given, **more)
    try:
        with socket.create_connection(("127.0.0.1", read.port)) as one:
            begun = time.monotonic()
            one.sendall(asked(max_tokens=1, min_tokens=1))
            head = until(one, b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200") and b'"text"' not in head
            assert time.monotonic() - begun < 1.2
            assert b"[DONE]" in until(one, b"[DONE]")
    finally:
        slots.extend = plain
    read.quiet()


def test_a_client_of_http_1_0_gets_no_chunks(read) -> None:
    with socket.create_connection(("127.0.0.1", read.port)) as one:
        one.sendall(asked("1.0"))
        head, _, body = until(one).partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    assert body.startswith(b"data: ") and body.endswith(b"data: [DONE]\n\n")
    lines = [line for line in body.split(b"\n") if line]
    assert all(line.startswith(b"data: ") for line in lines)


def test_requests_that_come_together_are_answered_one_after_the_other(read) -> None:
    with socket.create_connection(("127.0.0.1", read.port)) as one:
        one.sendall(asked() + asked(stream=False) + b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
        said = until(one, b'"problem"')
    assert said.count(b"HTTP/1.1 200") == 3
    assert said.index(b"[DONE]") < said.index(b'"usage"') < said.index(b'"live"')


@pytest.mark.parametrize("kind", ["one header", "many headers", "address", "trailers"])
def test_what_is_no_body_has_a_bound(read, kind) -> None:
    """Sent for as long as it is taken: the server closes long before 4 MB."""
    begins = {
        "one header": b"GET /live HTTP/1.1\r\nhost: x\r\nx-long: ",
        "many headers": b"GET /live HTTP/1.1\r\nhost: x\r\n",
        "address": b"GET /live?",
        "trailers": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n",
    }
    more = b"x-a: b\r\n" * 512 if kind in ("many headers", "trailers") else b"a" * 4096
    with socket.create_connection(("127.0.0.1", read.port)) as one:
        one.settimeout(20)
        one.sendall(begins[kind])
        taken = 0
        try:
            while taken < 4_000_000:
                taken += one.send(more)
                time.sleep(0.001)  # what is said meanwhile can be heard
        except ConnectionError:
            pass
    assert taken < 4_000_000
    with socket.create_connection(("127.0.0.1", read.port)) as one:  # others are served
        one.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b" 200 " in until(one, b"live")


def test_who_finds_no_room_is_told_before_his_body_is_read(read) -> None:
    long = asked(max_tokens=1500, min_tokens=1500)
    streams = [socket.create_connection(("127.0.0.1", read.port)) for _ in range(2)]
    for one in streams:
        one.sendall(long)
        until(one, b'"text"')
    with socket.create_connection(("127.0.0.1", read.port)) as late:
        late.sendall(asked().partition(b"\r\n\r\n")[0] + b"\r\n\r\n")  # no body comes
        said = until(late, b"overloaded")
        assert said.startswith(b"HTTP/1.1 429") and b"retry-after" in said
    for one in streams:
        one.close()
    read.quiet()


def answers(data: bytes) -> list[tuple[bytes, dict[bytes, bytes], bytes]]:
    """Status, headers and body of each that has a length."""
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        first, *lines = head.split(b"\r\n")
        headers = {name.lower(): value for name, value in (line.split(b": ", 1) for line in lines)}
        length = int(headers[b"content-length"])
        found.append((first, headers, data[:length]))
        data = data[length:]
    return found


def test_refusals_are_the_same_whoever_says_them(monkeypatch, caplog) -> None:
    """Said by the connection or by the application: status, headers, body, what is counted and logged, for requests
    of all kinds; and the connection goes on."""
    one = Served(Server([hosted(slots=2, most=2)], Door(KEYS, requests_per_minute=600)))
    plain = Server.refused
    said = []
    monkeypatch.setattr(Server, "refused", lambda *given: said.append(plain(*given)) or said[-1])
    key = b"authorization: Bearer secret-of-a\r\n"

    def post(*headers: bytes, path: bytes = b"/v1/completions", body: bytes = b'{"x": 1}') -> bytes:
        lines = b"".join(header if header.endswith(b"\n") else header + b"\r\n" for header in headers)
        return b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n%b\r\n%b" % (path, len(body), lines, body)

    requests = [
        post(key, b"x-request-id: mine"),
        post(key, b"X-Request-ID: first", b"x-request-id: second"),
        post(key, b"x-request-id: \xe4"),
        post(key, path=b"/v1/chat/completions", body=b"nonsense" * 1000),
        post(key, b"transfer-encoding: chunked", body=b"").replace(b"content-length: 0\r\n", b"")
        + b"2\r\n{}\r\n0\r\nx: y\r\n\r\n",
        post(b"authorization: Bearer wrong"),
        post(),
        post(key, path=b"/v1/nowhere"),
        post(key, path=b"/v1/completions?a=b"),
        post(key, path=b"/detokenize", body=b'{"model": "tiny", "ids": [70]}'),
        b"GET /v1/models HTTP/1.1\r\nhost: x\r\n" + key + b"\r\n",
    ]
    counted = ("armillary_requests_total", "armillary_rejections_total")

    def seen() -> tuple[list, list, list]:
        before = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in samples()}
        caplog.clear()
        with socket.create_connection(("127.0.0.1", one.port)) as connection:
            data = b""
            for request in requests:
                for part in (request[:200], request[200:]):
                    connection.sendall(part)
                    time.sleep(0.01)
                data += until_whole(connection)
        found = [
            (first, {k: v for k, v in headers.items() if k != b"date"}, body) for first, headers, body in answers(data)
        ]
        logged = [
            [getattr(line, name) for name in ("route", "status", "client", "finish", "failed")]
            for line in caplog.records
        ]
        more = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in samples()}
        return found, logged, [(name, value - before.get(name, 0.0)) for name, value in more.items()]

    def samples() -> list[str]:
        return [line for line in one.server.metrics.text().decode().splitlines() if line.startswith(counted)]

    def until_whole(connection: socket.socket) -> bytes:
        connection.settimeout(20)
        data = connection.recv(65536)
        while len(answers(data)[-1][2]) < int(answers(data)[-1][1][b"content-length"]):
            data += connection.recv(65536)
        return data

    load = one.server.models["tiny"].load
    load.answers = load.most
    try:
        with caplog.at_level("INFO", "armillary.server"):
            quick = seen()
            told = [one for one in said if one is not None]
            assert len(told) == (5 if connections.quickest is not connections.H11 else 0)
            monkeypatch.setattr(Server, "refused", lambda *given: None)
            slow = seen()
    finally:
        load.answers = 0
        one.close()
    assert [first for first, _, _ in quick[0][:5]] == [b"HTTP/1.1 429 Too Many Requests"] * 5
    ids = [headers.pop(b"x-request-id") for _, headers, _ in quick[0]]
    others = [headers.pop(b"x-request-id") for _, headers, _ in slow[0]]
    assert ids[:2] == others[:2] == [b"mine", b"first"]
    assert {len(id) for id in (*ids[2:], *others[2:])} == {32}
    assert [list(headers) for _, headers, _ in quick[0]] == [list(headers) for _, headers, _ in slow[0]]
    assert quick == slow


def test_a_stream_that_fails_after_it_has_begun_says_so_in_it(read) -> None:
    engine = read.server.models["tiny"].engine

    def broken(*given, **more):
        raise RuntimeError("out of luck")

    try:
        with (
            extending(engine.slots, after_the_first(engine, broken)),
            socket.create_connection(("127.0.0.1", read.port)) as one,
        ):
            one.sendall(asked())
            said = until(one, b"[DONE]")
    finally:
        engine.failing = 0
    assert said.startswith(b"HTTP/1.1 200") and b'"text"' in said and b"generation_failed" in said


def test_within_sets_a_timer_only_to_wait(monkeypatch) -> None:
    timers = []
    plain = asyncio.timeout
    monkeypatch.setattr(asyncio, "timeout", lambda seconds: timers.append(seconds) or plain(seconds))

    async def at_once() -> int:
        return 1

    async def later(seconds: float) -> int:
        await asyncio.sleep(seconds)
        await asyncio.sleep(0)
        return 2

    async def wrong() -> None:
        await asyncio.sleep(0)
        raise ValueError("wrong")

    async def tries() -> None:
        assert await within(5, at_once()) == 1
        assert timers == []
        assert await within(5, later(0.01)) == 2
        assert timers == [5]
        with pytest.raises(TimeoutError):
            await within(0.01, later(5))
        with pytest.raises(ValueError, match="wrong"):
            await within(5, wrong())
        task = asyncio.create_task(_awaited(within(5, later(5))))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(tries())


async def _awaited(work):
    return await work
