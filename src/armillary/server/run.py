"""One process that serves: sockets, signals, logs."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import uvicorn

from armillary.base.errors import InputError
from armillary.base.memory import settle
from armillary.server.app import Server
from armillary.server.connection import HEAD, descriptors, quickest

_EXTRAS = ("route", "status", "client", "id", "seconds", "finish", "failed")
LEAVING = 2  # seconds in which clients may read what was said to them before the end
AT_ONCE = 0.3  # seconds for the same after a second signal
_FRAMES = 6  # of an exception, the innermost


def check_address(host: str, keys: bool) -> None:
    """Raises InputError for an address that others can reach, unless keys are set."""
    if keys or host == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise InputError(
            f"{host} can be reached from other machines, and no key is set",
            hint="set ARMILLARY_API_KEYS, or serve on 127.0.0.1",
        )


def run(server: Server, host: str, port: int, drain: float, started: Callable[[int], None]) -> None:
    """Serve until a signal: the first ends politely, within `drain` seconds, the second at once.

    started: called with the port, once requests are taken. Raises InputError when the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise InputError(f"cannot listen on {host}, port {port}: {error.strerror}") from None
    if server.models:
        # PyTorch loads it with the first prompt that is read by operators of ours, which takes a second and makes
        # 100,000 objects: before they settle, and before anybody waits
        import torch._dynamo  # noqa: F401

    settle()
    with asyncio.Runner(loop_factory=_quickest_loop()) as runner:
        runner.run(_serve(server, listening, drain, started))
    server.dismiss()


def _quickest_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where it is installed: right after a step the code of Python's own is in no cache of the processor."""
    try:
        import uvloop
    except ImportError:
        return None
    made: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return made


def leave() -> None:
    """End the process. Python would wait for every thread, and a template or an engine may never come back."""
    end = time.monotonic() + 1
    threads = [one for one in threading.enumerate() if one is not threading.main_thread() and not one.daemon]
    while any(one.is_alive() for one in threads) and time.monotonic() < end:
        time.sleep(0.01)
    if any(one.is_alive() for one in threads):
        logging.shutdown()
        os._exit(0)


def config(server: Server) -> uvicorn.Config:
    return uvicorn.Config(
        server,
        http=quickest,
        proxy_headers=False,  # nothing here goes by who is said to ask
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_keep_alive=30,
        backlog=min(2048, descriptors() // 8),  # asyncio accepts as many at once, and there must be room for them
        timeout_graceful_shutdown=LEAVING,
        h11_max_incomplete_event_size=HEAD,
    )


async def _serve(server: Server, listening: socket.socket, drain: float, started: Callable[[int], None]) -> None:
    inner = uvicorn.Server(config(server))
    inner.capture_signals = _uncaught  # type: ignore[method-assign]
    loop, signals = asyncio.get_running_loop(), 0

    def stop() -> None:
        nonlocal signals
        signals += 1
        if signals == 1:
            server.drain()
            loop.create_task(_drained(server, inner, drain))
        elif signals == 2:
            loop.create_task(_at_once(server))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)

    async def announce() -> None:
        while not inner.started:
            await asyncio.sleep(0.01)
        started(listening.getsockname()[1])

    told = asyncio.create_task(announce())
    try:
        await inner.serve([listening])
    finally:
        told.cancel()


async def _drained(server: Server, inner: uvicorn.Server, drain: float) -> None:
    end = time.monotonic() + drain
    while server.under_way and time.monotonic() < end:
        await asyncio.sleep(0.02)
    await server.end()
    await asyncio.sleep(0.1)
    inner.should_exit = True


async def _at_once(server: Server) -> None:
    """Answers under way get their error, as far as that is done in a moment; nothing else is waited for."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(server.end(), AT_ONCE)
    await asyncio.sleep(0.05)  # what was said to clients goes out
    logging.shutdown()
    os._exit(0)


@contextlib.contextmanager
def _uncaught() -> Iterator[None]:
    """In place of uvicorn's own signal handlers."""
    yield


class Lines(logging.Formatter):
    """Logs as one JSON object per line: no prompt, no key. Of an exception its kind and place are told, not its words,
    and of what others log the first line, which holds no values."""

    def format(self, record: logging.LogRecord) -> str:
        found: dict[str, Any] = {"time": round(record.created, 3), "level": record.levelname.lower()}
        ours = record.name.partition(".")[0] == "armillary"
        found["event"] = record.getMessage() if ours else record.getMessage().partition("\n")[0]
        found |= {name: getattr(record, name) for name in _EXTRAS if hasattr(record, name)}
        if record.exc_info and record.exc_info[0] is not None:
            found["error"] = record.exc_info[0].__name__
            places = traceback.walk_tb(record.exc_info[2])
            found["at"] = [f"{Path(frame.f_code.co_filename).name}:{line}" for frame, line in places][-_FRAMES:]
        return json.dumps(found, ensure_ascii=False)


def log_to(stream: TextIO) -> None:
    """All that is logged in this process goes there in such lines: the server's, the engine's, and what others warn
    of, which would be written with its values otherwise."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Lines())
    logging.getLogger().addHandler(handler)
    logging.getLogger("armillary.server").setLevel(logging.INFO)
    # of what no line shows, most is asked of the system anew for each
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
