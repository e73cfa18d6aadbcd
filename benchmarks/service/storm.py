"""6. Disconnect storm: connections are reset at random points, and nothing of them may be left."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from pathlib import Path

from service.load import closed_loop, completion, prompts
from service.process import Figures, Process, Reach, serving

AT_ONCE = 24
POINTS = ("headers", "body", "sent", "whole", "reading")


def run(model: Path, tiny: bool) -> tuple[Figures, Reach]:
    count, cancelled = 40 if tiny else 200, 'armillary_answers_total{finish="cancelled",model="tiny"}'
    with serving(model, keys=True) as server:
        said = server.said()
        asyncio.run(closed_loop(server.port, prompts(64, 32, 0, key=server.key), 8, 2))
        server.quiet()
        descriptors, threads, before = server.descriptors, server.threads, server.metrics().get(cancelled, 0)
        asyncio.run(_storm(server, count))
        took = server.quiet(20, descriptors)
        left = server.under_way()
        figures: Figures = {f"{name} afterwards": value for name, value in left.items()}
        figures |= {
            "connections": count,
            "descriptors more than before": server.descriptors - descriptors,
            "threads more than before": server.threads - threads,
            "answers cut off": server.metrics().get(cancelled, 0) - before,
            "seconds until all is quiet": took,
            "the same answer as before": int(server.said() == said),
            "exit status": server.end(),
        }
    reach: Reach = {f"{name} afterwards": (0, "max") for name in left}
    reach |= {"descriptors more than before": (0, "max"), "the same answer as before": (1, "min")}
    # the control: a storm that meets no answer shows nothing
    reach |= {"answers cut off": (count // 4, "min"), "seconds until all is quiet": (5, "max")}
    return figures, reach | {"exit status": (0, "max")}


async def _storm(server: Process, count: int) -> None:
    draw, room = random.Random(6), asyncio.Semaphore(AT_ONCE)

    async def one(place: int) -> None:
        async with room:
            await _reset(server, POINTS[place % len(POINTS)], random.Random(draw.random()))

    await asyncio.gather(*(one(place) for place in range(count)))


async def _reset(server: Process, point: str, draw: random.Random) -> None:
    body = completion([draw.randrange(32, 256) for _ in range(draw.choice((8, 100, 1500)))], 300)
    data = json.dumps(body | {"stream": point != "whole"} | ({"stream_options": None} if point == "whole" else {}))
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {server.key}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    whole = (head + data).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    cut = {"headers": draw.randrange(len(head)), "body": len(head) + draw.randrange(len(data))}
    try:
        writer.write(whole[: cut.get(point, len(whole))])
        await writer.drain()
        if point == "reading":
            async with asyncio.timeout(10):
                await reader.read(draw.choice((1, 300, 10_000)))
        await asyncio.sleep(draw.choice((0.0, 0.01, 0.5)) * draw.random())
    except (OSError, TimeoutError):
        pass
    finally:
        lingering = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # close with a reset
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, lingering)
        writer.transport.abort()
