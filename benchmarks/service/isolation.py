"""11. Isolation: what one tenant asked tells another nothing, by time or by log.

In every round, in an order drawn anew: tenant B goes on from what A has asked before, B asks something new, and A goes
on from its own: the control, which has to be quick, or there is nothing that could be told apart.
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
from pathlib import Path

from service.load import Call, ask, completion
from service.process import KEYS, Figures, Process, Reach, serving

LENGTH, MORE = 1500, 8  # tokens of a prompt; of those the last, which were not asked before
MARK = "HIDDENWORDS"  # in every text that is sent, and in no log


def run(model: Path, tiny: bool) -> tuple[Figures, Reach]:
    rounds = 4 if tiny else 60
    with serving(model, keys=True) as server:
        times = asyncio.run(_timed(server, rounds))
        asyncio.run(_chatty(server))
        shown = str(server.metrics())
        server.end()
        log = server.log.read_text(encoding="utf-8")
    ratios = {
        name: [math.log(one / new) for one, new in zip(times[name], times["new"], strict=True)]
        for name in ("another's", "own")
    }
    figures: Figures = {f"TTFT, {name} prompt, p50 ms": 1000 * statistics.median(row) for name, row in times.items()}
    for name, row in ratios.items():
        low, high = _interval(row)
        figures |= {f"TTFT, {name} over new": math.exp(statistics.median(row))}
        figures |= {f"TTFT, {name} over new, low": math.exp(low), f"TTFT, {name} over new, high": math.exp(high)}
    figures |= {
        "rounds": rounds,
        "log lines": log.count("\n"),
        "keys in logs and metrics": sum(secret in log + shown for secret in KEYS.values()),
        "prompts in logs and metrics": (log + shown).count(MARK),
    }
    reach: Reach = {
        "TTFT, another's over new, low": (0.95, "min"),
        "TTFT, another's over new, high": (1.05, "max"),
        "TTFT, own over new, high": (0.5, "max"),
        "log lines": (30, "min"),  # the control: there is something to look through
        "keys in logs and metrics": (0, "max"),
        "prompts in logs and metrics": (0, "max"),
    }
    return figures, reach


def _interval(values: list[float]) -> tuple[float, float]:
    """95 % of the median, by order statistics: no assumption about its distribution."""
    ordered, n = sorted(values), len(values)
    out = max(0, int(n / 2 - 0.98 * math.sqrt(n)) - 1)
    return ordered[out], ordered[n - 1 - out]


async def _timed(server: Process, rounds: int) -> dict[str, list[float]]:
    draw = random.Random(11)
    times: dict[str, list[float]] = {"another's": [], "own": [], "new": []}

    async def ttft(ids: list[int], key: str) -> float:
        seen = await ask(server.port, Call(completion(ids, 1), key=KEYS[key]))
        assert seen.complete, seen.error
        return seen.ttft

    def prompt() -> list[int]:
        return [draw.randrange(32, 256) for _ in range(LENGTH)]

    await ttft(prompt(), "a")
    for _ in range(rounds):
        asked, new = prompt(), prompt()
        await ttft(asked[:-MORE], "a")
        todo = [("another's", asked, "b"), ("own", asked, "a"), ("new", new, "b")]
        draw.shuffle(todo)
        for name, ids, key in todo:
            times[name].append(await ttft(ids, key))
    return times


async def _chatty(server: Process) -> None:
    """Requests of many kinds, right and wrong, whose words may be nowhere."""
    talk = [{"role": "user", "content": f"{MARK} is what I say"}]
    base = {"model": "tiny", "max_tokens": 4}
    bodies = [
        ("/v1/chat/completions", base | {"messages": talk}),
        ("/v1/chat/completions", base | {"messages": talk, "stream": True}),
        ("/v1/chat/completions", base | {"messages": talk, MARK: 1}),
        ("/v1/chat/completions", base | {"messages": talk, "model": MARK}),
        ("/v1/completions", base | {"prompt": MARK, "regex": f"{MARK}(("}),
        ("/v1/completions", base | {"prompt": MARK * 1000}),
        ("/v1/embeddings", {"model": "tiny", "input": MARK, "dimensions": 3}),
        ("/v1/responses", {"model": "tiny", "input": MARK, "previous_response_id": MARK}),
        ("/tokenize", {"model": "tiny", "text": MARK}),
        (f"/{MARK}", {}),
        (f"/v1/models?{MARK}={KEYS['a']}", {}),
    ]
    for path, body in bodies:
        for key in (*KEYS.values(), f"{KEYS['a']}x"):
            await ask(server.port, Call(body, path, key))
    for leave in (0.001, 0.02):
        await ask(
            server.port, Call(base | {"messages": talk, "max_tokens": 900}, "/v1/chat/completions", KEYS["a"], leave)
        )
