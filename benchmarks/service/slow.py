"""7. Slow clients: headers and bodies that trickle, readers that never read, more connections than descriptors.

Each kind is paired with its own control in turns: trickling with nobody else there, and those that never read with
clients that ask for the same and read it. What is compared are the times between tokens of four ordinary streams:
TPOT, the mean of an answer, and the 99th percentile of all gaps. (The median of the gaps says nothing: a busy server
sends tokens together.)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from service.load import Call, Seen, ask, closed_loop, prompts, summary
from service.process import Figures, Process, Reach, serving, warm

STREAMS, TRICKLING, READERS = 4, 40, 3
LARGE = {  # some MB of events: more than the system's buffers hold
    "model": "tiny",
    "messages": [{"role": "user", "content": "go on"}],
    "stream": True,
    "n": 3,
    "max_tokens": 1900,
    "min_tokens": 1900,
    "logprobs": True,
    "top_logprobs": 20,
}


def run(model: Path, tiny: bool) -> tuple[Figures, Reach]:
    # who does not read is cut off 30 s after the system's buffers, some MB, are full
    rounds, seconds, longer = (1, 2.0, 2.0) if tiny else (2, 40.0, 60.0)
    cut: list[str] = []
    seen: dict[str, list[Seen]] = {name: [] for name in ("alone", "trickling", "readers", "never read")}
    with serving(model, "--memory", "0.0625", keys=True, slots=16) as server:
        warm(server, 1 if tiny else 20)
        for others in (nobody, reading):  # what memory is usual
            asyncio.run(_measured(server, others, 1 if tiny else 10, []))
        usual = most = server.rss
        for _ in range(rounds):
            for name, others, lasting in (
                ("alone", nobody, seconds),
                ("trickling", trickling, seconds),
                ("readers", reading, longer),
                ("never read", deaf, longer),
            ):
                found, peak = asyncio.run(_measured(server, others, lasting, cut))
                seen[name] += found
                most = max(most, peak) if others in (trickling, deaf) else most
        server.quiet(60)
        left = sum(server.under_way().values())
    each = (most - usual) / (2 * TRICKLING + READERS)
    words = ("TPOT p50", "ITL p99")
    figures: Figures = {
        f"{word} {name} ms": summary(found)[f"{word} ms"] for name, found in seen.items() for word in words
    }
    reach: Reach = {}
    for word in words:
        for name, control in (("trickling", "alone"), ("never read", "readers")):
            key = f"{word}, {name} over {control}"
            figures[key] = figures[f"{word} {name} ms"] / figures[f"{word} {control} ms"]
            reach[key] = (1.5, "max")
    figures |= {"usual RSS MiB": usual, "RSS MiB per slow connection": each, "left afterwards": left}
    # the control: connections that are not cut off were not slow enough
    figures |= {
        f"{name} cut off": cut.count(word) for name, word in (("trickling", "trickling"), ("never read", "deaf"))
    }
    figures |= _exhausted(model)
    reach |= {"trickling cut off": (TRICKLING, "min"), "never read cut off": (READERS, "min")}
    reach |= {"RSS MiB per slow connection": (1.0, "max"), "left afterwards": (0, "max")}
    return figures, reach | {"seconds until served again": (2, "max"), "the same answer as before": (1, "min")}


Others = Callable[[Process, list[str]], Awaitable[None]]


async def _measured(server: Process, others: Others, seconds: float, cut: list[str]) -> tuple[list[Seen], float]:
    """Ordinary streams beside others, and the most memory meanwhile; cut: who of the others the server got rid of."""
    task, peak = asyncio.ensure_future(others(server, cut)), 0.0

    async def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, server.rss)
            await asyncio.sleep(0.2)

    watching = asyncio.create_task(watch())
    await asyncio.sleep(min(2.0, seconds / 4))
    found = await closed_loop(server.port, prompts(32, 200, 7, key=server.key), STREAMS, seconds)
    for one in (task, watching):
        one.cancel()
    await asyncio.gather(task, watching, return_exceptions=True)
    assert all(one.complete for one in found), [one.error for one in found if not one.complete][:3]
    return found, peak


async def nobody(server: Process, cut: list[str]) -> None:
    return


async def trickling(server: Process, cut: list[str]) -> None:
    """Half send headers, half a body, a byte per second; who is cut off comes again."""
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {server.key}\r\n"
    body = f"{head}content-type: application/json\r\ncontent-length: 1000000\r\n\r\n"

    async def one(begin: str) -> None:
        while True:
            with contextlib.suppress(OSError):
                async with _connection(server.port) as (_, writer):
                    writer.write(begin.encode())
                    while not writer.transport.is_closing():
                        await asyncio.sleep(1)
                        writer.write(b"x")
                    cut.append("trickling")
            await asyncio.sleep(0.1)

    await asyncio.gather(*(one(begin) for begin in (head, body) for _ in range(TRICKLING)))


async def reading(server: Process, cut: list[str]) -> None:
    async def one() -> None:
        while True:
            await ask(server.port, Call(LARGE, "/v1/chat/completions", server.key))

    await asyncio.gather(*(one() for _ in range(READERS)))


async def deaf(server: Process, cut: list[str]) -> None:
    """Ask for much and read nothing of it, until the server has had enough."""
    data = json.dumps(LARGE).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {server.key}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"

    async def one() -> None:
        while True:
            with contextlib.suppress(OSError):
                async with _connection(server.port, 4096) as (connection, writer):
                    writer.write(head.encode() + data)
                    writer.transport.pause_reading()  # type: ignore[attr-defined]
                    while not _ended(server.port, connection):
                        await asyncio.sleep(0.5)
                    cut.append("deaf")
            await asyncio.sleep(0.1)

    await asyncio.gather(*(one() for _ in range(READERS)))


def _ended(port: int, connection: socket.socket) -> bool:
    """Whether the server has closed its end of a connection: while something waits to be read the client is not told,
    so it is looked up in the system's table, where 01 is an open one."""
    ours = connection.getsockname()[1]
    return f"0100007F:{port:04X} 0100007F:{ours:04X} 01" not in Path("/proc/net/tcp").read_text(encoding="ascii")


@contextlib.asynccontextmanager
async def _connection(
    port: int, buffer: int | None = None
) -> AsyncIterator[tuple[socket.socket, asyncio.StreamWriter]]:
    connection = socket.socket()
    if buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    _, writer = await asyncio.open_connection(sock=connection)
    try:
        yield connection, writer
    finally:
        writer.transport.abort()


def _exhausted(model: Path) -> Figures:
    """More silent connections than the process may have descriptors: who comes is served at once nevertheless."""
    with serving(model, files=128) as server:
        said = server.said()
        silent = []
        for _ in range(160):
            connection = socket.create_connection(("127.0.0.1", server.port), 5)
            connection.sendall(b"GET /live HTTP/1.1\r\n")
            silent.append(connection)
        begun = time.monotonic()
        again = server.said()
        took = time.monotonic() - begun
        for connection in silent:
            connection.close()
        return {"seconds until served again": took, "the same answer as before": int(again == said)}
