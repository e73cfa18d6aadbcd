"""10. Soak: everything the server is asked for, mixed, one request in five broken off, for a long time. What it takes
of the machine may not grow with what it has done.

The server keeps something of what it was asked, each kind up to a bound: states (`--memory`), the last conversations,
responses, compiled grammars, words that the tokenizer knows. All of them are filled before anything is measured. What
the process then takes is also what its busiest moment needed: so the first third of the time does not count. At
rest, before and afterwards, it takes what it keeps and no more: if that grows, something leaks.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from armillary.base.memory import EVERY
from armillary.engine.constraints import KEPT as GRAMMARS
from armillary.server.app import WORKERS as THREADS
from armillary.server.hosted import WORDS as REMEMBERED
from armillary.server.items import KEPT as RESPONSES
from armillary.server.turns import ENTRIES as CONVERSATIONS
from service.load import Call, Seen, ask, completion
from service.process import KEYS, Figures, Process, Reach, serving, warm

WORKERS, LEAVING = 6, 0.2
WORDS = ["the", "model", "reads", "what", "was", "written", "and", "says", "which", "word", "comes", "next"]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]


class Sample(NamedTuple):
    """What the process takes at a time."""

    at: float
    rss: float
    threads: int
    descriptors: int
    filled: float
    requests: int


def run(model: Path, tiny: bool, minutes: float) -> tuple[Figures, Reach]:
    seconds = 5.0 if tiny else 60 * minutes
    with serving(model, "--memory", "0.0625", keys=True) as server:
        said = server.said()
        warm(server, 1 if tiny else 20)
        if not tiny:
            asyncio.run(fill(server))
        full_rss, before = server.rss, _at_rest(server, tiny)
        samples, seen = asyncio.run(_mixed(server, seconds))
        took = server.quiet()
        left = sum(server.under_way().values())
        same, full = int(server.said() == said), server.filled()
        after = _at_rest(server, tiny)
        status = server.end()
    kept = [one for one in samples if one.at - samples[0].at > seconds / 3]
    each = (kept[-1].requests - kept[0].requests) / (kept[-1].at - kept[0].at)
    statuses = Counter(one.status for one in seen if one.error != "left")
    wrong = [one for one in seen if one.error != "left" and one.status not in _expected(one)]
    wrong += [one for one in seen if one.status == 200 and not one.complete and one.error != "left"]
    for one in wrong[:5]:
        print(f"  unexpected: {one.call.path} {one.status} {one.error} {one.body[:200]!r}")
    figures: Figures = {
        "minutes": seconds / 60,
        "requests": len(seen),
        "broken off": sum(one.error == "left" for one in seen),
        **{f"status {status}": count for status, count in sorted(statuses.items()) if status},
        "unexpected answers": len(wrong),
        "RSS MiB at rest before": before,
        "RSS MiB at rest afterwards": after,
        "RSS MiB when stores are full": full_rss,
        "RSS MiB after a third": kept[0].rss,
        "RSS MiB at the end": kept[-1].rss,
        "RSS slope MiB per hour": 3600 * _slope(kept, "rss"),
        "RSS slope bytes per request": 2**20 * _slope(kept, "rss") / each,
        "threads": max(one.threads for one in kept),
        "threads slope per hour": 3600 * _slope(kept, "threads"),
        "descriptors": max(one.descriptors for one in kept),
        "descriptors slope per hour": 3600 * _slope(kept, "descriptors"),
        "most of the memory for states": max(one.filled for one in samples),
        "of it afterwards": full,
        "seconds until all is quiet": took,
        "left afterwards": left,
        "the same answer as before": same,
        "exit status": status,
    }
    reach: Reach = {
        "unexpected answers": (0, "max"),
        "broken off": (len(seen) // 10, "min"),
        "RSS slope bytes per request": (256, "max"),
        "threads slope per hour": (1, "max"),
        "descriptors slope per hour": (1, "max"),
        # at its cap, where what was kept has to give way, and not beyond
        "of it afterwards": (0.75, "min"),
        "most of the memory for states": (1.0, "max"),
        "left afterwards": (0, "max"),
        "the same answer as before": (1, "min"),
        "exit status": (0, "max"),
    }
    return figures, reach


def _at_rest(server: Process, tiny: bool) -> float:
    """RSS in MiB when nothing is going on, and what is free in the heap has been given back."""
    if not tiny:
        time.sleep(EVERY + 5)
    return server.rss


def _slope(samples: list[Sample], name: str) -> float:
    """Per second, by least squares."""
    times = [one.at for one in samples]
    values = [float(getattr(one, name)) for one in samples]
    middle, mean = sum(times) / len(times), sum(values) / len(values)
    above = sum((t - middle) * (v - mean) for t, v in zip(times, values, strict=True))
    return above / sum((t - middle) ** 2 for t in times)


async def fill(server: Process) -> None:
    """Bring every store that is bounded by number to its bound, with things as large as the traffic's largest: words
    that the tokenizer remembers, compiled grammars, responses, and conversations, which are bounded by tokens, too.
    (States that are kept fill by `warm`.)"""
    draw = random.Random(3)
    long = " ".join(draw.choices(WORDS, k=150))  # as long as the traffic's; one beginning, so that it is read once
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(2 * REMEMBERED)]
    # each thread that prepares texts remembers words of its own
    calls = [Call({"model": "tiny", "text": " ".join(words)}, "/tokenize", server.key) for _ in range(8 * THREADS)]
    base: dict[str, Any] = {"model": "tiny", "max_tokens": 1}
    for place in range(GRAMMARS):
        calls.append(Call(base | {"prompt": "x", "regex": f"[a-f]{{{place + 1}}}"}, "/v1/completions", server.key))
    for place in range(RESPONSES):
        body = {"model": "tiny", "input": f"{long} {place}", "max_output_tokens": 1}
        calls += [Call(body, "/v1/responses", key) for key in KEYS.values()]
    for place in range(CONVERSATIONS):
        messages = [{"role": "user", "content": f"{long} {place}"}]
        calls.append(Call(base | {"messages": messages}, "/v1/chat/completions", server.key))
    # threads that prepare texts begin when all the others are busy
    slow = Call({"model": "tiny", "input": long}, "/v1/embeddings", server.key)
    await asyncio.gather(*(ask(server.port, slow) for _ in range(THREADS)))
    left = iter(calls)

    async def one() -> None:
        for call in left:
            found = await ask(server.port, call)
            assert found.status == 200, (call.path, found.status, found.error, found.body[:200])

    await asyncio.gather(*(one() for _ in range(WORKERS)))


async def _mixed(server: Process, seconds: float) -> tuple[list[Sample], list[Seen]]:
    samples, seen, end = list[Sample](), list[Seen](), time.monotonic() + seconds

    async def one(draw: random.Random) -> None:
        talk: list[dict[str, str]] = []
        while time.monotonic() < end:
            call = _call(draw, talk)
            if draw.random() < LEAVING:
                call.leave = draw.choice((0.01, 0.1, 0.5)) * draw.random()
            found = await ask(server.port, call)
            seen.append(found)
            if (
                call.path == "/v1/chat/completions"
                and found.complete
                and found.body
                and "messages" in (call.body or {})
            ):
                content = json.loads(found.body)["choices"][0]["message"]["content"]
                talk = [*(call.body or {})["messages"], {"role": "assistant", "content": content or "well"}]
                talk = talk if len(str(talk)) < 2500 else []
            await asyncio.sleep(draw.expovariate(20))

    async def watch() -> None:
        while True:
            filled = await asyncio.to_thread(server.filled)
            count = len(seen)
            samples.append(Sample(time.monotonic(), server.rss, server.threads, server.descriptors, filled, count))
            await asyncio.sleep(min(1.0, seconds / 20))

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(one(random.Random(10 + worker)) for worker in range(WORKERS)))
    watching.cancel()
    return samples, seen


def _call(draw: random.Random, talk: list[dict[str, str]]) -> Call:
    key = KEYS[draw.choice("ab")]
    text = " ".join(draw.choices(WORDS, k=draw.choice((3, 20, 150))))
    few = draw.choice((1, 8, 40))
    base: dict[str, Any] = {"model": "tiny", "max_tokens": few}
    chat = base | {"messages": [*talk, {"role": "user", "content": text}]}
    say, form = "/v1/chat/completions", {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}}
    kinds: list[tuple[int, str, dict[str, Any]]] = [
        (25, "/v1/completions", completion([draw.randrange(32, 256) for _ in range(draw.choice((4, 60, 700)))], few)),
        (25, say, chat),
        (10, say, chat | {"stream": True}),
        (5, say, chat | {"stream": True, "n": 3, "logprobs": True, "top_logprobs": 5}),
        (6, say, chat | {"response_format": form, "max_tokens": 60}),
        (4, say, chat | {"tools": TOOLS, "tool_choice": "required", "max_tokens": 80}),
        (5, "/v1/responses", {"model": "tiny", "input": text, "max_output_tokens": few}),
        (5, "/v1/embeddings", {"model": "tiny", "input": [text, "x"]}),
        (5, "/tokenize", {"model": "tiny", "text": text}),
        (3, say, chat | {"temperature": "hot"}),
        (3, "/v1/completions", base | {"prompt": "x", "regex": "(("}),
        (2, "/v1/completions", base | {"prompt": "x" * 20_000}),
        (2, "/nowhere", {}),
    ]
    _, path, body = draw.choices(kinds, [weight for weight, _, _ in kinds])[0]
    return Call(body, path, key)


def _expected(one: Seen) -> set[int]:
    """Who asks wrongly is to be told so; too much at once may be turned away."""
    body = one.call.body or {}
    if one.call.path == "/nowhere":
        return {404}
    wrong = body.get("temperature") == "hot" or "regex" in body or body.get("prompt") == "x" * 20_000
    return {400} if wrong else {200, 429}
