"""8. Overload: three times as many requests as can be answered, arriving whether or not the server keeps up."""

from __future__ import annotations

import asyncio
import statistics
from pathlib import Path

from service.load import closed_loop, open_loop, prompts, quantile, summary
from service.process import SLOTS, Figures, Process, Reach, serving, warm

PROMPT, TOKENS, TIMES = 64, 32, 3.0
MOST = 4 * SLOTS  # answers that `armillary serve` has under way, waiting ones included


def run(model: Path, tiny: bool) -> tuple[Figures, Reach]:
    calm, seconds = (2.0, 3.0) if tiny else (15.0, 60.0)
    with serving(model, "--memory", "0.0625") as server:
        warm(server, 1 if tiny else 20)

        def peak(seed: int) -> dict[str, float]:
            return summary(asyncio.run(closed_loop(server.port, prompts(PROMPT, TOKENS, seed), 2 * SLOTS, calm)))

        first = peak(1)
        rate = TIMES * first["answers/s"]
        found, memory = asyncio.run(_flood(server, rate, seconds))
        last = peak(3)
        took = server.quiet()
        left = sum(server.under_way().values())
        ready = int(server.ready())
    capacity = (first["answers/s"] + last["answers/s"]) / 2  # before and after: machines drift
    tokens = (first["tokens/s"] + last["tokens/s"]) / 2
    during = summary(found)
    good = [one for one in found if one.complete]
    refused = [one for one in found if one.status == 429]
    others = [one for one in found if not one.complete and one.status != 429]
    quarter = len(memory) // 4
    grown = statistics.median(memory[-quarter:]) - statistics.median(memory[quarter : 2 * quarter])
    figures: Figures = {
        "capacity, answers/s": capacity,
        "arrivals/s": rate,
        "requests": len(found),
        "answered": len(good),
        "refused": len(refused),
        "neither answered nor refused": len(others),
        "refusals without Retry-After": sum("retry-after" not in one.headers for one in refused),
        "tokens/s over capacity": during["tokens/s"] / tokens,
        "TTFT p50 ms": during["TTFT p50 ms"],
        "TTFT p99 ms": during["TTFT p99 ms"],
        # with MOST under way none waits longer than it takes to answer so many
        "TTFT p99 over that of a full line": during["TTFT p99 ms"] / 1000 / (MOST / capacity),
        "refusal p50 ms": 1000 * quantile((one.latency for one in refused), 0.5),
        "refusal p99 ms": 1000 * quantile((one.latency for one in refused), 0.99),
        "client late p99 ms": during["late p99 ms"],
        "RSS MiB": memory[-1],
        "RSS grown MiB": grown,
        "seconds until all is quiet": took,
        "left afterwards": left,
        "ready afterwards": ready,
    }
    reach: Reach = {
        "neither answered nor refused": (0, "max"),
        "refusals without Retry-After": (0, "max"),
        "tokens/s over capacity": (0.95, "min"),
        "TTFT p99 over that of a full line": (1.25, "max"),
        "refusal p99 ms": (50, "max"),
        "client late p99 ms": (10, "max"),
        "RSS grown MiB": (4, "max"),
        "left afterwards": (0, "max"),
        "ready afterwards": (1, "min"),
    }
    return figures, reach


async def _flood(server: Process, rate: float, seconds: float) -> tuple[list, list[float]]:
    memory: list[float] = []

    async def watch() -> None:
        while True:
            memory.append(server.rss)
            await asyncio.sleep(0.25)

    watching = asyncio.create_task(watch())
    found = await open_loop(server.port, prompts(PROMPT, TOKENS, 2), rate, seconds, seed=8, width=2 * MOST)
    watching.cancel()
    return found, memory
