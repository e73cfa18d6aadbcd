"""A server on a port of this machine, with a tiny model, and the clients that people use."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai
import uvicorn

from armillary.engine.core import Engine
from armillary.engine.slots import Slots
from armillary.nn.network import ModelSettings, build
from armillary.server import Hosted, Load, Server
from armillary.server.run import config
from armillary.text import TokenizerSettings, train_tokenizer

KEYS = {"secret-of-a": "a", "secret-of-b": "b"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "How the weather will be",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 4},
                    "days": {"type": "integer", "minimum": 0, "maximum": 9},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
ASK_TOOLS = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "will it rain?"}],
    "tools": TOOLS,
    "temperature": 1.5,
    "max_tokens": 700,
}
BLOCKS = {
    "look": {"mixer": {"kind": "attention", "heads": 2, "position": "rope"}, "channel": "gated"},
    "state": {"mixer": "retention", "channel": "gated"},
}


def hosted(slots: int = 4, most: int = 16, context: int = 2048) -> Hosted:
    tokenizer = train_tokenizer(TokenizerSettings(kind="byte"), [])
    settings = ModelSettings(
        width=16, depth=2, vocabulary=tokenizer.size, context=context, blocks=BLOCKS, pattern=["look", "state"]
    )
    network = build(settings, seed=4).eval()
    return Hosted("tiny", network, tokenizer, Engine(network, tokenizer, slots=slots).start(), Load(most))


class Served:
    """A server on a thread of its own."""

    def __init__(self, server: Server, buffer: int | None = None, http: type | None = None) -> None:
        self.server = server
        self.listening = socket.socket()
        if buffer is not None:  # of each connection, for what is to be read
            self.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        self.listening.bind(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        given = config(server)
        given.http = http or given.http
        self.inner = uvicorn.Server(given)
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.thread.start()
        while not self.inner.started:
            assert self.thread.is_alive(), "the server did not start"
            time.sleep(0.01)

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        await self.inner.serve([self.listening])

    def client(self, key: str = "secret-of-a", **options) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options)

    def close(self) -> None:
        self.inner.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    def quiet(self, seconds: float = 20) -> None:
        """Wait until nothing is under way and nothing is held."""
        end = time.monotonic() + seconds
        engines = [one.engine for one in self.server.models.values()]
        while time.monotonic() < end:
            if not self.server.under_way and not any(engine.busy for engine in engines):
                break
            time.sleep(0.02)
        assert self.server.under_way == 0
        for engine in engines:
            assert not engine.busy
            assert engine.memory.held == 0
            assert not engine.scheduler.running


@contextmanager
def extending(slots: Slots, extend: Callable[..., Any]) -> Iterator[None]:
    """All steps go through this, those of answers, too."""
    slots.extend, slots.go_on_together = extend, lambda *given: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del slots.extend, slots.go_on_together


def after_the_first(engine: Engine, broken: Callable[..., Any]) -> Callable[..., Any]:
    """For `Slots.extend`: it works until an answer has a token."""
    plain = engine.slots.extend

    def extend(*given: Any, **more: Any) -> Any:
        begun = any(run.answer.choices for run in engine._runs.values())
        return (broken if begun else plain)(*given, **more)

    return extend
