"""The same door in front of another OpenAI-compatible server: keys, rates, bounds and metrics are ours, answers
are the other's, handed on as they come.

What a request may say is checked as if we answered it, and a field that we do not know is refused here.
How many tokens a prompt has is only known behind us: four bytes of the body count as one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any
from urllib.parse import quote

import httpx
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from armillary.base.errors import InputError
from armillary.base.events import Events
from armillary.server.answering import Context, gone, sent
from armillary.server.errors import HTTPError, explained, shutting_down
from armillary.server.limits import Client, Load

PER_TOKEN = 4  # bytes
_HANDED_ON = ("content-type", "retry-after")


class Upstream:
    """url: of the other server, with /v1; key: ours there; most: requests under way at a time; silence:
    seconds in which it may say nothing."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        most: int = 64,
        silence: float = 300.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise InputError(f"'{url}' is no address of a server", hint="for example http://10.0.0.2:8000/v1")
        self.url, self.load = url.rstrip("/"), Load(most)
        self._headers = {"accept-encoding": "identity"}  # bytes are handed on as they come
        self._headers |= {} if key is None else {"authorization": f"Bearer {key}"}
        self._silence, self._transport = silence, transport
        self._made: httpx.AsyncClient | None = None
        self.asked: set[asyncio.Task[Any] | None] = set()  # requests under way

    @property
    def _client(self) -> httpx.AsyncClient:
        if self._made is None:  # made where its event loop runs
            self._made = httpx.AsyncClient(
                timeout=httpx.Timeout(self._silence, connect=10.0),
                limits=httpx.Limits(max_connections=self.load.most + 8),
                headers=self._headers,
                transport=self._transport,
                trust_env=False,
            )
        return self._made

    def post(self, context: Context, client: Client, path: str, asked: Any, marks: dict[str, str]) -> Response:
        return Passed(self, context, client, f"{self.url}{path}", asked, marks)

    async def get(self, path: str, marks: dict[str, str], trace: dict[str, str]) -> Response:
        if not {"", ".", ".."}.isdisjoint(path.split("/")[1:]):
            raise HTTPError(404, f"there is no {path[:200]}")  # nor a way to other places of that server
        with _reached():
            found = await self._client.get(f"{self.url}{quote(path)}", timeout=10.0, headers=trace)
        return Response(found.content, found.status_code, headers=_kept(found) | marks)

    async def problem(self) -> str | None:
        """Why no requests can be answered, or None."""
        try:
            with _reached():
                found = await self._client.get(f"{self.url}/models", timeout=5.0)
        except HTTPError as error:
            return error.what
        return None if found.is_success else f"the other server says {found.status_code}"

    async def close(self) -> None:
        if self._made is not None:
            await self._made.aclose()


class Passed(Response):
    """One request handed on; it ends when the client leaves."""

    def __init__(
        self, upstream: Upstream, context: Context, client: Client, url: str, asked: Any, marks: dict[str, str]
    ) -> None:
        self.upstream, self.context, self.client, self.url, self.marks = upstream, context, client, url, marks
        self.asked = json.dumps(asked, ensure_ascii=False).encode()
        self._model, self._stream = asked["model"], bool(asked.get("stream"))
        self.status_code, self.background = 200, None
        self._started, self._tokens, self._charged = False, 0, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        load, entered = self.upstream.load, 0
        self.upstream.asked.add(task := asyncio.current_task())
        leaving = work = None
        try:
            load.admit(1, 0, 0.0)
            self.context.door.admit_tokens(self.client, len(self.asked) // PER_TOKEN)
            entered = 1
            load.answers += entered
            leaving = asyncio.create_task(gone(receive))
            work = asyncio.create_task(self._work(scope, receive, send))
            done, _ = await asyncio.wait({leaving, work}, return_when=asyncio.FIRST_COMPLETED)
            for task in (leaving, work):
                task.cancel()
            await asyncio.gather(leaving, work, return_exceptions=True)
            if work in done:
                work.result()
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError):  # the server ends
                for one in filter(None, (leaving, work)):
                    one.cancel()
                await asyncio.gather(*filter(None, (leaving, work)), return_exceptions=True)
                error = shutting_down()
            problem = explained(error)
            if problem.status in (429, 503):
                self.context.metrics.rejections.labels(problem.code or "").inc()
            if self._started:  # all that is left is to say so
                body = f"data: {json.dumps(problem.body())}\n\n".encode()
                await sent(send, {"type": "http.response.body", "body": body, "more_body": False})
                return
            response = JSONResponse(problem.body(), problem.status, headers=problem.headers() | self.marks)
            await response(scope, receive, send)
        finally:
            self.upstream.asked.discard(task)
            load.answers -= entered
            self._charge()

    def _charge(self) -> None:
        """Before an answer is complete, so that who asks again at once finds it charged."""
        self.context.door.charge(self.client, self._tokens - self._charged)
        self._charged = self._tokens

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.setdefault("state", {})
        headers = {"content-type": "application/json", "x-request-id": self.marks["x-request-id"]}
        headers |= state.get("trace", {})
        client = self.upstream._client
        with _reached():
            async with client.stream("POST", self.url, content=self.asked, headers=headers) as found:
                marks = _kept(found) | self.marks | self.client.headers()
                if found.is_success:  # a name that the other server knows
                    state |= {"model": self._model, "stream": self._stream}
                if not found.headers.get("content-type", "").startswith("text/event-stream"):
                    data = await found.aread()
                    state["prompt"], self._tokens = _used(data)
                    state["generated"] = self._tokens
                    self._started = True
                    self._charge()
                    await Response(data, found.status_code, headers=marks)(scope, receive, send)
                    return
                head = [(name.encode(), value.encode()) for name, value in marks.items()]
                self._started = True
                await sent(send, {"type": "http.response.start", "status": found.status_code, "headers": head})
                events = Events()
                async for data in found.aiter_raw():
                    self._tokens += len(events.push(data))  # an event is about a token
                    await sent(send, {"type": "http.response.body", "body": data, "more_body": True})
                self._charge()
                await sent(send, {"type": "http.response.body", "body": b"", "more_body": False})


@contextlib.contextmanager
def _reached() -> Any:
    try:
        yield
    except httpx.TimeoutException:
        raise HTTPError(504, "the server behind this one did not answer in time", code="upstream_timeout") from None
    except httpx.HTTPError as error:
        what = type(error).__name__
        raise HTTPError(502, f"the server behind this one is not there: {what}", code="upstream_failed") from None


def _kept(found: httpx.Response) -> dict[str, str]:
    return {name: found.headers[name] for name in _HANDED_ON if name in found.headers}


def _used(data: bytes) -> tuple[int, int]:
    """Tokens of the prompt and of the answers, as the other server counts them."""
    try:
        usage = json.loads(data)["usage"]
        return int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return 0, 0
