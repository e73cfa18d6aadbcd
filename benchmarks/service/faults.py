"""9. Faults: signals during streams, a kill and a start on the same port, logs that cannot be written, a clock
that jumps. Steps that raise or are not finite, and tokenizers, grammars and plans that fail, are in the tests
(tests/server/test_faults.py, tests/engine/test_core.py)."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service.load import Call, Seen, ask, completion, quantile
from service.process import Figures, Process, Reach, serving

STREAMS = 6
JUMPS = """
import signal, time
real, moved = time.time, [0.0]
time.time = lambda: real() + moved[0]
signal.signal(signal.SIGUSR1, lambda *_: moved.__setitem__(0, moved[0] + 86400.0))
signal.signal(signal.SIGUSR2, lambda *_: moved.__setitem__(0, moved[0] - 2 * 86400.0))
"""  # what asks the C library itself sees the true time


def run(model: Path, tiny: bool) -> tuple[Figures, Reach]:
    figures: Figures = {}
    reach: Reach = {}
    for part in (_drained, _cut, _twice, _killed, _full, _jumps):
        found, goals = part(model, 300 if tiny else 1500)
        figures |= found
        reach |= goals
    return figures, reach


def _streams(server: Process, tokens: int, *then: tuple[float, Callable[[], Any]]) -> tuple[list[Seen], list[Any]]:
    """Streams, and what was found by calls made so many seconds after all of them have begun."""

    async def both() -> tuple[list[Seen], list[Any]]:
        calls = [Call(completion(range(40 + row, 72), tokens, temperature=0)) for row in range(STREAMS)]
        tasks = [asyncio.create_task(ask(server.port, call)) for call in calls]
        while server_running() < STREAMS:
            await asyncio.sleep(0.02)
        found = []
        for seconds, call in then:
            await asyncio.sleep(seconds)
            found.append(await asyncio.to_thread(call))
        return list(await asyncio.gather(*tasks)), found

    def server_running() -> float:
        return server.under_way()["running"]

    return asyncio.run(both())


def _complete(found: list[Seen], tokens: int) -> int:
    return sum(one.complete and one.tokens == tokens for one in found)


def _drained(model: Path, tokens: int) -> tuple[Figures, Reach]:
    """A signal to end: who is there is answered whole, who comes is sent away."""
    with serving(model) as server:
        end = (0.0, lambda: server.signal(signal.SIGTERM))
        late = (0.1, lambda: asyncio.run(ask(server.port, Call(completion([50], 1)))))
        found, (_, turned) = _streams(server, tokens, end, late)
        begun = time.monotonic()
        status = server.wait(10)
        figures = {
            "drain: streams": STREAMS,
            "drain: streams complete": _complete(found, tokens),
            "drain: new request, status": turned.status,
            "drain: new request, Retry-After": int("retry-after" in turned.headers),
            "drain: exit status": 99 if status is None else status,
            "drain: seconds from the last answer to the end": time.monotonic() - begun,
        }
    reach: Reach = {"drain: streams complete": (STREAMS, "min"), "drain: new request, Retry-After": (1, "min")}
    reach |= {"drain: exit status": (0, "max"), "drain: seconds from the last answer to the end": (2, "max")}
    return figures, reach


def _cut(model: Path, tokens: int) -> tuple[Figures, Reach]:
    """Answers that take longer than they may: each ends with an error that says why."""
    with serving(model, "--drain", "0.3") as server:
        found, _ = _streams(server, tokens, (0.0, lambda: server.signal(signal.SIGTERM)))
        begun = time.monotonic()
        status = server.wait(10)
        figures = {
            "time is up: streams that say so": sum("shutting down" in one.error for one in found),
            "time is up: exit status": 99 if status is None else status,
            "time is up: seconds to the end": time.monotonic() - begun,
        }
    reach: Reach = {"time is up: streams that say so": (STREAMS, "min"), "time is up: exit status": (0, "max")}
    return figures, reach | {"time is up: seconds to the end": (2, "max")}


def _twice(model: Path, tokens: int) -> tuple[Figures, Reach]:
    """A second signal does not wait."""
    with serving(model, "--drain", "600") as server:
        begun = [0.0]

        def again() -> float:
            begun[0] = time.monotonic()
            server.signal(signal.SIGTERM)
            status = server.wait(10)
            return 99 if status is None else status

        found, (_, status) = _streams(server, tokens, (0.0, lambda: server.signal(signal.SIGTERM)), (0.2, again))
        took = time.monotonic() - begun[0]
    figures = {"second signal: seconds to the end": took, "second signal: exit status": status}
    figures["second signal: streams cut off"] = STREAMS - _complete(found, tokens)
    reach: Reach = {"second signal: seconds to the end": (1, "max"), "second signal: exit status": (0, "max")}
    return figures, reach | {"second signal: streams cut off": (1, "min")}


def _killed(model: Path, tokens: int) -> tuple[Figures, Reach]:
    """kill -9 during streams, and a start on the same port at once."""
    with serving(model) as server:
        said, port = server.said(), server.port
        found, _ = _streams(server, tokens, (0.0, server.kill))
    with serving(model, port=port) as after:
        figures = {
            "kill -9: streams not taken for whole": STREAMS - _complete(found, tokens),
            "kill -9: seconds to serve again": after.took,
            "kill -9: the same answer as before": int(after.said() == said),
        }
    reach: Reach = {"kill -9: streams not taken for whole": (STREAMS, "min")}
    return figures, reach | {"kill -9: the same answer as before": (1, "min")}


def _full(model: Path, tokens: int) -> tuple[Figures, Reach]:
    """Logs go to a disk that is full: answers do not depend on it."""
    with serving(model) as other:
        said = other.said()
        port = other.port
    with serving(model, port=port, log=Path("/dev/full")) as server:
        found, _ = _streams(server, tokens)
        figures = {
            "full disk: streams complete": _complete(found, tokens),
            "full disk: the same answer as before": int(server.said() == said),
            "full disk: left afterwards": server.quiet() and sum(server.under_way().values()),
            "full disk: exit status": server.end(),
        }
    reach: Reach = {"full disk: streams complete": (STREAMS, "min"), "full disk: left afterwards": (0, "max")}
    return figures, reach | {"full disk: the same answer as before": (1, "min"), "full disk: exit status": (0, "max")}


def _jumps(model: Path, tokens: int) -> tuple[Figures, Reach]:
    """The clock goes a day ahead and then two back, during streams with a timeout."""
    with serving(model, startup=JUMPS) as server:
        jumps = [(0.1, lambda: server.signal(signal.SIGUSR1)), (0.2, lambda: server.signal(signal.SIGUSR2))]
        found, _ = _streams(server, tokens, *jumps)
        server.said()
        lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
        figures = {
            "clock: streams complete": _complete(found, tokens),
            # the control: its logs show that the clock did jump
            "clock: hours that logs say it is behind": (time.time() - lines[-1]["time"]) / 3600,
            "clock: longest gap between tokens ms": 1000 * quantile((gap for one in found for gap in one.gaps), 1),
            "clock: ready afterwards": int(server.ready()),
            "clock: exit status": server.end(),
        }
    reach: Reach = {"clock: streams complete": (STREAMS, "min"), "clock: exit status": (0, "max")}
    return figures, reach | {"clock: hours that logs say it is behind": (23, "min")}
