"""A load client of our own: requests that arrive when they are due, whether or not the server keeps up.

`python benchmarks/service/load.py 8000 MODEL --rate 5 --seconds 30 --prompt 128 --tokens 64`: to a port of this
machine, with the key in ARMILLARY_API_KEY if there is one.

What the words mean here, for each answer (other tools differ):

- due: when an open-loop request is to arrive (a Poisson process from a seed), or when a closed-loop one is sent. All
  times count from here: a client that is `late` makes figures worse, never better.
- TTFT, time to first token: from due to the first event that carries a token, whether or not its text is empty.
- ITL, inter-token latency: between neighbouring events that carry tokens. All gaps of all answers are pooled.
- TPOT, time per output token: (last event − first event) / (tokens − 1), one figure per answer.
- latency: from due to the end of the answer; of a refusal, to the end of its body.
- throughput: tokens of answers that were complete, over the time from the first due to the last end.

The client takes part in the load that it measures, on the same machine. So while a loop runs it only sends bytes that
were made before, on connections that stay open and are used again, and notes what comes and when; what that means is
read afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import gc
import itertools
import json
import os
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from armillary.base.events import Events

WITHIN = 120.0  # seconds for one answer
IDLE = 10.0  # seconds after which a connection is not used again: the server ends those that are silent


@dataclass
class Call:
    """A request; leave: seconds after which its client goes, if it does."""

    body: dict[str, Any] | None
    path: str = "/v1/completions"
    key: str | None = None
    leave: float | None = None

    @functools.cached_property
    def data(self) -> bytes:
        """As it is sent."""
        data = json.dumps(self.body).encode() if self.body is not None else b""
        kind = f"content-type: application/json\r\ncontent-length: {len(data)}\r\n" if data else ""
        key = f"authorization: Bearer {self.key}\r\n" if self.key else ""
        head = f"{'POST' if data else 'GET'} {self.path} HTTP/1.1\r\nhost: 127.0.0.1\r\n{kind}{key}\r\n"
        return head.encode() + data


@dataclass
class Seen:
    """What came of it; times in seconds of the monotonic clock. complete: it ended as it should."""

    call: Call
    due: float
    sent: float = 0.0
    end: float = 0.0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    text: str = ""
    events: list[float] = field(default_factory=list)
    tokens: int = 0
    complete: bool = False
    error: str = ""
    _came: list[tuple[float, bytes]] = field(default_factory=list)  # bytes, and when

    @property
    def ttft(self) -> float:
        return self.events[0] - self.due

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.events)]

    @property
    def latency(self) -> float:
        return self.end - self.due

    def read(self) -> Seen:
        """Make of the bytes that came what they mean; itself."""
        came, self._came = self._came, []
        whole = b"".join(data for _, data in came)
        head, end, _ = whole.partition(b"\r\n\r\n")
        if not end:
            return self
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(first.split()[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        left, pieces = len(head) + len(end), list[tuple[float, bytes]]()
        for at, data in came:
            if len(data) > left:
                pieces.append((at, data[left:]))
            left = max(0, left - len(data))
        if self.headers.get("transfer-encoding") == "chunked":
            pieces = list(_unchunked(pieces))
        if "event-stream" in self.headers.get("content-type", ""):
            self._read_events(pieces)
        else:
            self.body = b"".join(data for _, data in pieces)
            self.complete = self.status == 200 and not self.error
        return self

    def _read_events(self, pieces: Iterable[tuple[float, bytes]]) -> None:
        events, done, wrong = Events(), False, ""
        for at, data in pieces:
            for event in events.push(data):
                if event == "[DONE]":
                    done = True
                    continue
                found = json.loads(event)
                if "error" in found:
                    wrong = found["error"]["message"]
                elif found.get("choices"):
                    delta = found["choices"][0].get("delta", {})
                    self.text += found["choices"][0].get("text") or delta.get("content") or ""
                    self.events += [] if "role" in delta else [at]  # a chat begins with an event of no token
                if found.get("usage"):
                    self.tokens = found["usage"]["completion_tokens"]
        self.error = self.error or wrong
        self.complete = done and not self.error


def _unchunked(pieces: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """What is in the chunks of a body, each with the time at which the last of it came."""
    held = b""
    for at, data in pieces:
        held, out = held + data, b""
        while (end := held.find(b"\r\n")) >= 0 and len(held) >= end + 4 + (size := int(held[:end], 16)):
            out, held = out + held[end + 2 : end + 2 + size], held[end + 4 + size :]
        if out:
            yield at, out


class Link(asyncio.Protocol):
    """One connection, for one request at a time."""

    def __init__(self) -> None:
        self.seen: Seen | None = None
        self.done: asyncio.Future[None] | None = None
        self.free_since = 0.0
        self._length: int | None = None  # bytes of the answer, head and all, if that is known; 0: until its last chunk
        self._count = 0
        self._end = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def begin(self, seen: Seen) -> asyncio.Future[None]:
        """Send a request; the future is done when its answer has ended, however it did."""
        self.seen, self._length, self._count, self._end = seen, None, 0, b""
        self.done = asyncio.get_running_loop().create_future()
        seen.sent = time.monotonic()
        if self.transport.is_closing():
            self._ended("the connection was closed")
        else:
            self.transport.write(seen.call.data)
        return self.done

    def data_received(self, data: bytes) -> None:
        seen, now = self.seen, time.monotonic()
        if seen is None:  # a 408 on a connection that nothing was asked on
            self.transport.abort()
            return
        seen._came.append((now, data))
        self._count += len(data)
        self._end = (self._end + data)[-7:]
        if self._length is None:
            self._length = _length(seen)
        if (self._end == b"\r\n0\r\n\r\n") if self._length == 0 else self._count == self._length:
            self._ended()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended(repr(exc) if exc is not None else "the connection was closed")

    def give_up(self, why: str) -> None:
        """End the request that is under way, if one is, and the connection."""
        self._ended(why)
        self.transport.abort()

    def _ended(self, error: str = "") -> None:
        if self.seen is None:
            return
        assert self.done is not None
        self.seen.end, self.seen.error = time.monotonic(), error
        self.seen, self.free_since = None, time.monotonic()
        if not self.done.done():
            self.done.set_result(None)


def _length(seen: Seen) -> int | None:
    """Bytes of an answer, from its head; None: the head is not complete; 0: its last chunk says where it ends."""
    head, end, _ = b"".join(data for _, data in seen._came).partition(b"\r\n\r\n")
    if not end:
        return None
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(head) + 4 + int(line.partition(b":")[2])
    return 0


class Links:
    """Connections to a port of this machine that are kept and used again, the latest first."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._free: list[Link] = []
        self._all: list[Link] = []

    async def open(self, count: int) -> None:
        """So many, before they are needed."""
        self._free += await asyncio.gather(*(self._new() for _ in range(count)))

    async def ask(self, seen: Seen) -> None:
        """Send a request at once, and return when its answer has ended; what goes wrong is in `error`."""
        link = self._take()
        if link is None:
            try:
                link = await self._new()
            except OSError as error:
                seen.sent = seen.end = time.monotonic()
                seen.error = repr(error)
                return
        await link.begin(seen)
        if not link.transport.is_closing():
            self._free.append(link)

    def _take(self) -> Link | None:
        while self._free:
            link = self._free.pop()
            if not link.transport.is_closing() and time.monotonic() - link.free_since < IDLE:
                return link
            link.transport.abort()
        return None

    async def _new(self) -> Link:
        _, link = await asyncio.get_running_loop().create_connection(Link, "127.0.0.1", self.port)
        self._all.append(link)
        link.free_since = time.monotonic()
        return link

    def close(self) -> None:
        for link in self._all:
            link.give_up(f"no answer within {WITHIN:g} s")


def completion(ids: Sequence[int], tokens: int, **options: Any) -> dict[str, Any]:
    """A streamed completion of exactly so many tokens."""
    body = {"model": "tiny", "prompt": list(ids), "temperature": 0.8, "max_tokens": tokens, "min_tokens": tokens}
    return body | {"stream": True, "stream_options": {"include_usage": True}} | options


async def ask(port: int, call: Call, due: float | None = None) -> Seen:
    """Send one request to this machine, on a connection of its own, and read its answer; what goes wrong is in
    `error`."""
    now = time.monotonic()
    seen, link = Seen(call, due or now, sent=now), Link()
    within = WITHIN if call.leave is None else call.leave
    try:
        async with asyncio.timeout(within):
            await asyncio.get_running_loop().create_connection(lambda: link, "127.0.0.1", port)
            await link.begin(seen)
    except TimeoutError:
        seen.error = "left" if call.leave is not None else f"no answer within {within:g} s"
    except OSError as error:
        seen.error = repr(error)
    if link.seen is not None:  # still under way
        link.give_up(seen.error)
    elif hasattr(link, "transport"):
        link.transport.abort()
    seen.end = seen.end or time.monotonic()
    return seen.read()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Without pauses in which Python looks for cycles: with PyTorch loaded, one takes a tenth of a second."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def open_loop(
    port: int, calls: Iterable[Call], rate: float, seconds: float, seed: int = 0, width: int = 0
) -> list[Seen]:
    """Poisson arrivals, `rate` per second on average, until the last answer has ended; width: connections that are
    open before the first."""
    draw, due, calls = random.Random(seed), 0.0, iter(calls)
    planned = list[tuple[float, Call]]()
    while (due := due + draw.expovariate(rate)) < seconds:
        call = next(calls)
        _ = call.data  # made now
        planned.append((due, call))
    links, tasks, found = Links(port), list[asyncio.Task[None]](), list[Seen]()
    await links.open(width)
    with _undisturbed():
        begun = time.monotonic() + 0.05
        for after, call in planned:
            if (wait := begun + after - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            seen = Seen(call, begun + after)
            found.append(seen)
            tasks.append(asyncio.create_task(links.ask(seen)))
        await asyncio.wait(tasks, timeout=WITHIN) if tasks else None
        links.close()
        await asyncio.gather(*tasks)
    return [seen.read() for seen in found]


async def closed_loop(port: int, calls: Iterable[Call], width: int, seconds: float) -> list[Seen]:
    """`width` requests under way at all times; after `seconds` no more are sent."""
    found, calls, links = list[Seen](), iter(calls), Links(port)
    await links.open(width)
    with _undisturbed():
        end = time.monotonic() + seconds

        async def one() -> None:
            while time.monotonic() < end:
                found.append(Seen(next(calls), time.monotonic()))
                await links.ask(found[-1])

        tasks = [asyncio.create_task(one()) for _ in range(width)]
        await asyncio.wait(tasks, timeout=seconds + WITHIN)
        links.close()
        await asyncio.gather(*tasks)
    return [seen.read() for seen in found]


def prompts(length: int, tokens: int, seed: int, *, model: str = "tiny", key: str | None = None) -> Iterable[Call]:
    """Completions of prompts of random ids that never come twice."""
    draw = random.Random(seed)
    while True:
        yield Call(completion([draw.randrange(32, 256) for _ in range(length)], tokens, model=model), key=key)


def quantile(values: Iterable[float], share: float) -> float:
    """The value below which so great a share lies; nan of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def summary(found: Sequence[Seen]) -> dict[str, float]:
    """Figures of a run, as defined above; times in milliseconds."""
    good = [one for one in found if one.complete and one.events]
    span = max((one.end for one in found), default=float("nan")) - min((one.due for one in found), default=0.0)
    figures: dict[str, float] = {"requests": len(found), "complete": len(good), "seconds": span}
    figures |= {"tokens/s": sum(one.tokens for one in good) / span, "answers/s": len(good) / span}
    parts = {"TTFT": [one.ttft for one in good], "ITL": [gap for one in good for gap in one.gaps]}
    parts["TPOT"] = [(one.events[-1] - one.events[0]) / max(1, one.tokens - 1) for one in good]
    parts |= {"latency": [one.latency for one in good], "late": [one.sent - one.due for one in found]}
    for name, row in parts.items():
        figures |= {f"{name} {word} ms": 1000 * quantile(row, share) for word, share in (("p50", 0.5), ("p99", 0.99))}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description="open-loop load on a server of this machine")
    parser.add_argument("port", type=int)
    parser.add_argument("model")
    for name, kind, usual in (
        ("rate", float, 5.0),
        ("seconds", float, 30.0),
        ("prompt", int, 128),
        ("tokens", int, 64),
    ):
        parser.add_argument(f"--{name}", type=kind, default=usual)
    asked = parser.parse_args()
    calls = prompts(asked.prompt, asked.tokens, 0, model=asked.model, key=os.environ.get("ARMILLARY_API_KEY"))
    for name, value in summary(asyncio.run(open_loop(asked.port, calls, asked.rate, asked.seconds))).items():
        print(f"{name:<16} {value:.4g}")


if __name__ == "__main__":
    main()
