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

Requests go out as HTTP/1.0 on connections of their own: a body is then all that comes until the end.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from armillary.base.events import Events

WITHIN = 120.0  # seconds for one answer


@dataclass
class Call:
    """A request; leave: seconds after which its client goes, if it does."""

    body: dict[str, Any] | None
    path: str = "/v1/completions"
    key: str | None = None
    leave: float | None = None


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

    @property
    def ttft(self) -> float:
        return self.events[0] - self.due

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.events)]

    @property
    def latency(self) -> float:
        return self.end - self.due


def completion(ids: Sequence[int], tokens: int, **options: Any) -> dict[str, Any]:
    """A streamed completion of exactly so many tokens."""
    body = {"model": "tiny", "prompt": list(ids), "temperature": 0.8, "max_tokens": tokens, "min_tokens": tokens}
    return body | {"stream": True, "stream_options": {"include_usage": True}} | options


async def ask(port: int, call: Call, due: float | None = None) -> Seen:
    """Send one request to this machine and read its answer; what goes wrong is in `error`."""
    seen = Seen(call, due or time.monotonic(), sent=time.monotonic())
    try:
        async with asyncio.timeout(WITHIN if call.leave is None else call.leave):
            await _asked(port, call, seen)
    except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError) as error:
        seen.error = "left" if call.leave is not None and isinstance(error, TimeoutError) else repr(error)
    seen.end = time.monotonic()
    return seen


async def _asked(port: int, call: Call, seen: Seen) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    try:
        data = json.dumps(call.body).encode() if call.body is not None else b""
        kind = f"content-type: application/json\r\ncontent-length: {len(data)}\r\n" if data else ""
        key = f"authorization: Bearer {call.key}\r\n" if call.key else ""
        head = f"{'POST' if data else 'GET'} {call.path} HTTP/1.0\r\nhost: 127.0.0.1\r\n{kind}{key}\r\n"
        writer.write(head.encode() + data)
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        seen.status = int(first.split()[1])
        seen.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if "event-stream" in seen.headers.get("content-type", ""):
            await _streamed(reader, seen)
        else:
            seen.body, seen.complete = await reader.read(-1), seen.status == 200
    finally:
        writer.transport.abort()


async def _streamed(reader: asyncio.StreamReader, seen: Seen) -> None:
    events = Events()
    while data := await reader.read(2**16):
        now = time.monotonic()
        for event in events.push(data):
            if event == "[DONE]":
                seen.complete = not seen.error
                continue
            found = json.loads(event)
            if "error" in found:
                seen.error = found["error"]["message"]
            elif found.get("choices"):
                delta = found["choices"][0].get("delta", {})
                seen.text += found["choices"][0].get("text") or delta.get("content") or ""
                seen.events += [] if "role" in delta else [now]  # a chat begins with an event of no token
            if found.get("usage"):
                seen.tokens = found["usage"]["completion_tokens"]


async def open_loop(port: int, calls: Iterable[Call], rate: float, seconds: float, seed: int = 0) -> list[Seen]:
    """Poisson arrivals, `rate` per second on average, until the last answer has ended."""
    draw, tasks, due = random.Random(seed), list[asyncio.Task[Seen]](), time.monotonic()
    end, calls = due + seconds, iter(calls)
    while (due := due + draw.expovariate(rate)) < end:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(ask(port, next(calls), due)))
    return list(await asyncio.gather(*tasks))


async def closed_loop(port: int, calls: Iterable[Call], width: int, seconds: float) -> list[Seen]:
    """`width` requests under way at all times; after `seconds` no more are sent."""
    found, end, calls = list[Seen](), time.monotonic() + seconds, iter(calls)

    async def one() -> None:
        while time.monotonic() < end:
            found.append(await ask(port, next(calls)))

    await asyncio.gather(*(one() for _ in range(width)))
    return found


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
