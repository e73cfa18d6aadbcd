"""The load client of the campaigns: whatever way answers are cut into packets, it makes the same of them."""

from __future__ import annotations

import asyncio
import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from service.load import Call, Seen, ask, closed_loop, open_loop, summary


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


EVENTS = [
    b'data: {"choices": [{"text": "a"}]}\n\n',
    b'data: {"choices": [{"text": "0\\r\\n\\r\\n"}]}\n\ndata: {"choices": [{"text": ""}]}\n\n',
    b'data: {"choices": [], "usage": {"completion_tokens": 3}}\n\n',
    b"data: [DONE]\n\n",
]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
STREAM = HEAD + b"".join(map(chunk, EVENTS)) + b"0\r\n\r\n"
REFUSED = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 2\r\nContent-Length: 5\r\n\r\nlater"
CALL = Call({"model": "tiny", "stream": True})


class Canned:
    """Answers every request with the same packets; leaves: ends the connection after an answer."""

    def __init__(self, *packets: bytes, leaves: bool = False) -> None:
        self.packets, self.leaves, self.connections = packets, leaves, 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
                for packet in self.packets:
                    writer.write(packet)
                    await asyncio.sleep(0.002 if len(self.packets) > 1 else 0)
                if self.leaves:
                    break
        except asyncio.IncompleteReadError:
            pass
        writer.close()

    def asked(self, work):
        """What the work with the port gives."""

        async def whole():
            server = await asyncio.start_server(self.answer, "127.0.0.1", 0)
            async with server:
                return await work(server.sockets[0].getsockname()[1])

        return asyncio.run(whole())


def test_an_answer_is_the_same_however_it_is_cut() -> None:
    for cut in range(1, len(STREAM)):
        seen = Seen(CALL, 0.0, _came=[(1.0, STREAM[:cut]), (2.0, STREAM[cut:])]).read()
        assert (seen.status, seen.text, len(seen.events), seen.tokens) == (200, "a0\r\n\r\n", 3, 3)
        assert seen.complete
        first = cut >= len(HEAD) + len(chunk(EVENTS[0]))  # an event is there when the last of its chunk is
        assert seen.events[0] == (1.0 if first else 2.0)


@pytest.mark.parametrize("cut", range(1, len(STREAM), 7))
def test_it_knows_where_an_answer_ends(cut) -> None:
    canned = Canned(STREAM[:cut], STREAM[cut:])
    seen = canned.asked(lambda port: ask(port, CALL))
    assert (seen.complete, seen.error, seen.text) == (True, "", "a0\r\n\r\n")


def test_connections_are_used_again() -> None:
    canned = Canned(STREAM)
    found = canned.asked(lambda port: closed_loop(port, itertools.repeat(CALL), 3, 0.05))
    assert len(found) > 3
    assert all(one.complete for one in found)
    assert canned.connections == 3


def test_arrivals_are_those_of_the_seed_and_refusals_are_told() -> None:
    canned = Canned(REFUSED)
    found = canned.asked(lambda port: open_loop(port, itertools.repeat(CALL), 100, 0.3, seed=1))
    again = canned.asked(lambda port: open_loop(port, itertools.repeat(CALL), 100, 0.3, seed=1))
    assert [round(one.due - found[0].due, 6) for one in found] == [round(one.due - again[0].due, 6) for one in again]
    assert {(one.status, one.body, one.headers["retry-after"], one.complete) for one in found} == {
        (429, b"later", "2", False)
    }
    assert summary(found)["complete"] == 0


@pytest.mark.parametrize("packet", [b"", STREAM[:60], STREAM[:-5], REFUSED[:-1]])
def test_an_answer_that_breaks_off_is_none(packet) -> None:
    canned = Canned(packet, leaves=True)
    seen = canned.asked(lambda port: ask(port, CALL))
    assert not seen.complete
    assert seen.error == "the connection was closed"


def test_who_leaves_has_no_answer() -> None:
    canned = Canned(STREAM[:90])
    seen = canned.asked(lambda port: ask(port, Call({"model": "tiny"}, leave=0.05)))
    assert (seen.error, seen.complete) == ("left", False)


def test_nobody_there() -> None:
    seen = asyncio.run(ask(1, CALL))
    assert "Connect" in seen.error
    assert not seen.complete
