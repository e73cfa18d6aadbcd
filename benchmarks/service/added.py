"""What a server adds to the time of the first token: `armillary serve` in a process of its own, asked from outside,
against the same model's engine asked directly in another.

The time is from before a request is written until its first event with a token has been read; the engine's is from a
prompt's ids to the first token. Both processes stay throughout, and one is idle while the other is asked: alone they
are asked in turn, beside running answers in rounds. The request comes on a connection that stands, or on a new one,
whose making then counts, too.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import statistics
import string
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from service.direct import LASTING, Direct
from service.process import Process

PAIRS, ROUNDS, ASKED = 60, 5, 12  # alone; beside: rounds, and what is asked in each
SLOTS = 8
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
KINDS = {"standing": (COMPLETIONS, False), "new": (COMPLETIONS, True), "chat": (CHAT, False)}  # path, new connection
FIRST = re.compile(rb'"text":|"content":"[^"]|"delta":{}')  # the token may have no text
SECONDS = 'armillary_first_token_seconds_sum{model="tiny"}'


class Client:
    """One HTTP/1.1 client, as thin as can be."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._standing = self._connected()

    def _connected(self) -> socket.socket:
        made = socket.create_connection(("127.0.0.1", self.port))
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made

    def first(self, path: str, text: str, new: bool = False) -> float:
        """Seconds to the first event with a token."""
        asked = request(path, text, 1, temperature=0)
        begun = time.perf_counter()
        connection = self._connected() if new else self._standing
        connection.sendall(asked)
        data, took = b"", None
        while not data.endswith(b"\r\n0\r\n\r\n"):
            got = connection.recv(65536)
            now = time.perf_counter()
            assert got, data
            data += got
            if took is None and FIRST.search(data):
                took = now - begun
        assert took is not None and data.startswith(b"HTTP/1.1 200"), data
        if new:
            connection.close()
        return took

    @contextlib.contextmanager
    def beside(self, count: int) -> Iterator[None]:
        """While so many streams run, each read by a thread."""
        made = [self._connected() for _ in range(count)]
        begun, ended = [threading.Event() for _ in made], list[int]()

        def read(place: int) -> None:
            made[place].sendall(request(COMPLETIONS, "x" * 32, LASTING, temperature=1.0, seed=place))
            with contextlib.suppress(OSError):
                while got := made[place].recv(65536):
                    if b'"text"' in got:
                        begun[place].set()
                    if b"[DONE]" in got:
                        ended.append(place)

        threads = [threading.Thread(target=read, args=(place,)) for place in range(count)]
        for thread in threads:
            thread.start()
        for event in begun:
            event.wait()
        yield
        assert not ended, "the other answers ended too early"
        for one in made:
            one.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        for one in made:
            one.close()


def request(path: str, text: str, tokens: int, **options: object) -> bytes:
    """A streamed answer of exactly so many tokens."""
    body = {"model": "tiny", "max_tokens": tokens, "min_tokens": tokens, "stream": True, **options}
    body |= {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    return f"{head}\r\n\r\n".encode() + data


def measured(model: Path, beside: int, threads: int | None = None) -> dict[str, float]:
    """Figures in ms. The model's template gives a chat's text as it is, so that all read as many tokens."""
    draw = random.Random(0)

    def text() -> str:
        return "".join(draw.choices(string.ascii_letters, k=32))

    server, direct = Process(model, slots=SLOTS, threads=threads), Direct(model, SLOTS, threads)

    def over(path: str, new: bool) -> tuple[float, float]:
        """Seconds of a request, and of those between submission and the first token in the server's engine."""
        before = server.metrics().get(SECONDS, 0.0)
        took = client.first(path, text(), new)
        return took, server.metrics()[SECONDS] - before

    def rows(kind: str, count: int, pause: float) -> list[tuple[float, float]]:
        """The first one is not counted: it finds the processor's caches full of the other process."""
        found = []
        for _ in range(count + 1):
            time.sleep(draw.uniform(0.0, pause))  # wherever in a step it comes
            found.append((direct.ask(prompt=text()), 0.0) if kind == "direct" else over(*KINDS[kind]))
        return found[1:]

    try:
        client = Client(server.port)
        alone: dict[str, list[tuple[float, float]]] = {name: [] for name in [*KINDS, "direct"]}
        for place in range(PAIRS):
            for name, row in alone.items():
                row += rows(name, 1, 0.0) if place else []
        among: dict[str, list[tuple[float, float]]] = {name: [] for name in alone}
        for _ in range(ROUNDS):
            with client.beside(beside):
                for name in KINDS:
                    among[name] += rows(name, ASKED, 0.02)
            server.quiet()
            direct.ask(beside=beside)
            among["direct"] += rows("direct", ASKED, 0.02)
            direct.ask(end=True)
    finally:
        server.end()
        direct.end()
    figures = {}
    for words, found in (("", alone), (f"beside {beside} streams, ", among)):
        took = {name: 1000 * statistics.median(whole for whole, _ in row) for name, row in found.items()}
        around = {name: 1000 * statistics.median(whole - part for whole, part in row) for name, row in found.items()}
        figures |= {
            f"{words}first token asked directly ms": took["direct"],
            f"{words}first token over HTTP ms": took["standing"],
            f"{words}server adds ms": took["standing"] - took["direct"],
            f"{words}server adds ms, new connection": took["new"] - took["direct"],
            f"{words}server adds ms, chat": took["chat"] - took["direct"],
            f"{words}around its engine ms": around["standing"],
            f"{words}around its engine ms, new connection": around["new"],
            f"{words}around its engine ms, chat": around["chat"],
        }
    return figures
