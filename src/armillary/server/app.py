"""The application: which path leads where, who may come in, and what is said when something is wrong.

Everything needs a key where keys are set; open are only `/live`, which says whether the engine makes progress, and
`/ready` (also called `/health`), whether requests are taken.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import struct
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http import HTTPStatus
from threading import Thread
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from armillary.server import chat, completions, responses
from armillary.server.answering import Context
from armillary.server.body import read, read_as_it_is
from armillary.server.errors import HTTPError, explained, shutting_down
from armillary.server.hosted import Hosted
from armillary.server.items import Kept, ResponsesRequest
from armillary.server.limits import Client, Door, Load
from armillary.server.metrics import Metrics
from armillary.server.openapi import document
from armillary.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from armillary.server.tracing import Tracing, carried

if TYPE_CHECKING:
    from armillary.server.upstream import Upstream

log = logging.getLogger("armillary.server")
STUCK = 30.0  # seconds without a step, while there is work, after which the server is not alive
FAILING = 3  # steps in a row
WORKERS = 32  # requests whose texts are prepared at a time
SHORT = 512  # characters or ids of a text that a request brings
SWITCH = 0.0001  # seconds after which a thread that wants to go on is let in; Python's own 0.005 is a token's time
ENDING = 10.0  # seconds for models to end what they are in the middle of
LEFT = 499  # in place of a status, when the client left before there was one


class Server:
    """models: what is served; door: keys and rates; upstream: another server that answers in their place;
    tracing: where traces of requests go."""

    def __init__(
        self,
        models: Sequence[Hosted],
        door: Door | None = None,
        upstream: Upstream | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.upstream, self.tracing = upstream, tracing
        self.models: Mapping[str, Hosted] = {hosted.name: hosted for hosted in models}
        self.door, self.metrics = door or Door(), Metrics()
        self.context, self.kept = Context(self.door, self.metrics), Kept()
        self.draining = self.ended = False
        self._asked: set[asyncio.Task[Any] | None] = set()  # requests that nothing was said to yet
        self._prepared = 0  # how many of them are complete
        self._workers = ThreadPoolExecutor(WORKERS, "armillary-text")
        posts: list[tuple[str, type[BaseModel], Any]] = [
            ("/v1/chat/completions", ChatRequest, self._chat),
            ("/v1/responses", ResponsesRequest, self._responses),
            ("/v1/completions", CompletionRequest, self._completions),
            ("/v1/embeddings", EmbeddingRequest, self._embeddings),
            ("/tokenize", TokenizeRequest, self._tokenize),
            ("/detokenize", DetokenizeRequest, self._detokenize),
        ]
        if upstream is not None:  # what it is sure to have; and a response goes on from another only at its place
            passed = {"/v1/chat/completions", "/v1/completions", "/v1/embeddings"}
            posts = [(path, form, call) for path, form, call in posts if path in passed]
        others = [
            ("GET", "/v1/models", self._list),
            ("GET", "/v1/models/{name:path}", self._model),
            ("GET", "/v1/responses/{id}", self._response),
            ("DELETE", "/v1/responses/{id}", self._forget),
            ("GET", "/metrics", self._metrics),
            ("GET", "/openapi.json", self._openapi),
        ]
        if upstream is not None:
            others = [one for one in others if "responses" not in one[1]]
        self.document = document(
            [(path, form) for path, form, _ in posts], [(method, path) for method, path, _ in others]
        )
        self._methods: dict[str, set[str]] = {}
        for method, path in [("POST", path) for path, _, _ in posts] + [(method, path) for method, path, _ in others]:
            self._methods.setdefault(path, set()).update({method} | ({"HEAD"} if method == "GET" else set()))
        routes = [Route(path, self._post(path, form, call), methods=["POST"]) for path, form, call in posts]
        self._posts = {route.path: route for route in routes}
        self._generating = {path.encode(): path for path in self._posts if path.startswith("/v1/")}
        routes += [Route(path, self._plain(path, call), methods=[method]) for method, path, call in others]
        # many tools look for /health before they send anything
        for path, call in (("/live", self._live), ("/ready", self._ready), ("/health", self._ready)):
            routes.append(Route(path, call, methods=["GET"]))
        self._inner = Starlette(
            routes=routes,
            exception_handlers={HTTPException: self._lost, HTTPError: self._wrong, Exception: self._wrong},
            lifespan=self._lifespan,
        )

    # -- around every request

    def _post(self, path: str, form: type[BaseModel], call: Any) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request, client: Client) -> Response:
            self.door.admit(client)
            if path.startswith("/v1/"):
                self._admit()
            if self.upstream is not None:
                given = await read_as_it_is(request, form)
                return self.upstream.post(self.context, client, path.removeprefix("/v1"), given, self._marks(request))
            asked = await read(request, form)
            hosted = self.models.get(getattr(asked, "model", ""))
            if hosted is not None and path.startswith("/v1/"):  # who will be turned away costs no more than this
                hosted.admit()
            # templates, tokenizers and grammars take their time: others are not to wait for it
            work: Callable[[], Response] = partial(call, asked, client, self._marks(request))
            if _short(asked):
                return work()  # takes less than going to another thread and back
            self._prepared += 1
            try:
                return await asyncio.get_running_loop().run_in_executor(self._workers, work)
            finally:
                self._prepared -= 1

        return self._guarded(path, handle)

    def _admit(self) -> None:
        """Before a body is read: where no model has room, nobody is let in, whatever is asked."""
        for hosted in self.models.values():
            try:
                hosted.admit()
                return
            except HTTPError as error:
                problem = error
        if self.models:
            raise problem

    def refused(self, target: bytes, headers: Sequence[tuple[bytes, bytes]]) -> bytes | None:
        """The answer to a POST that finds no room, from `_post`'s rules but before anything is made of it: in a flood
        most are told so, and what that costs is taken from those who are answered. None: it goes its way.

        target: as it was sent; headers: by lower names.
        """
        route = self._generating.get(target)
        if route is None or self.draining or self.upstream is not None or self.tracing is not None:
            return None
        try:
            self._admit()
        except HTTPError as error:
            problem = error
        else:
            return None
        given = {name: value.decode("latin-1") for name, value in reversed(headers)}  # the first of a name counts
        try:
            client = self.door.enter(given.get(b"authorization"))
            self.door.admit(client)
        except HTTPError:
            return None
        marks = _marked(given.get(b"x-request-id", ""))
        body = json.dumps(problem.body(), ensure_ascii=False, separators=(",", ":")).encode()
        said = problem.headers() | marks | {"content-length": str(len(body)), "content-type": "application/json"}
        self.metrics.rejections.labels(problem.code or "").inc()
        self._over(route, problem.status, 0.0, {"client": client.name, "id": marks["x-request-id"]})
        lines = "".join(f"{name}: {value}\r\n" for name, value in said.items())
        return f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}\r\n{lines}\r\n".encode() + body

    def _over(self, route: str | None, status: int, seconds: float, state: Mapping[str, Any]) -> None:
        """A request is counted and logged."""
        self.metrics.requests.labels(route or "other", status).inc()
        seen = {"route": route or "other", "status": status, "seconds": round(seconds, 4)}
        log.info("request", extra=seen | {name: state.get(name) for name in ("client", "id", "finish", "failed")})

    def _plain(self, path: str, call: Any) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request, client: Client) -> Response:
            if self.upstream is not None and path.startswith("/v1/"):
                asked = request.scope["path"].removeprefix("/v1")
                return await self.upstream.get(asked, self._marks(request), request.state.trace)
            response: Response = call(request, client)
            return response

        return self._guarded(path, handle)

    def _guarded(self, path: str, handle: Any) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            self._asked.add(task := asyncio.current_task())
            try:
                client = self.door.enter(request.headers.get("authorization"))
                request.state.client = client.name
                if self.draining and request.method == "POST":
                    raise shutting_down()
                response: Response = await handle(request, client)
                return response
            except asyncio.CancelledError:
                if not self.ended:
                    raise
                return self._problem(shutting_down(), request)
            except Exception as error:
                problem = explained(error)
                if problem.status == 500:
                    log.exception("a request failed", extra={"route": path})
                return self._problem(problem, request)
            finally:
                self._asked.discard(task)

        return guarded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application: every request is counted and logged once it is over, with what was sent."""
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        started, status = time.monotonic(), LEFT
        state = scope.setdefault("state", {})
        state["trace"] = carried(scope["headers"])
        traced = self.tracing and self.tracing.begin(scope["method"], scope["path"], state["trace"])
        if traced:
            state["trace"] = traced.headers()

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        straight = self._posts.get(scope["path"]) if scope["method"] == "POST" else None
        try:
            if straight is None:
                await self._inner(scope, receive, noted)
            else:  # what is asked for most goes past the framework's layers: `_guarded` says what is wrong itself
                scope["route"] = straight
                response = await straight.endpoint(Request(scope, receive, noted))
                await response(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", None)
            self._over(route, status, time.monotonic() - started, state)
            if traced:
                traced.end(route, None if status == LEFT else status, state)

    def _marks(self, request: Request) -> dict[str, str]:
        """Headers of every answer: the id that the client gave its request, or a new one."""
        if not hasattr(request.state, "id"):
            request.state.id = _marked(request.headers.get("x-request-id", ""))["x-request-id"]
        return {"x-request-id": request.state.id}

    def _problem(self, problem: HTTPError, request: Request) -> Response:
        headers = problem.headers() | self._marks(request)
        if problem.status == 401:
            headers["www-authenticate"] = "Bearer"
        if problem.status in (429, 503):
            self.metrics.rejections.labels(problem.code or "").inc()
        return JSONResponse(problem.body(), problem.status, headers=headers)

    async def _wrong(self, request: Request, error: Exception) -> Response:
        return self._problem(explained(error), request)

    async def _lost(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = {404: f"there is no {request.url.path[:200]}", 405: f"{request.method} is not for this path"}
        problem = HTTPError(error.status_code, what.get(error.status_code, str(error.detail)))
        response = self._problem(problem, request)
        response.headers.update(error.headers or {})
        route = request.scope.get("route")
        if error.status_code == 405 and route is not None:  # all methods of the path, not of one route alone
            response.headers["allow"] = ", ".join(sorted(self._methods.get(route.path, route.methods)))
        return response

    def _hosted(self, name: str) -> Hosted:
        found = self.models.get(name)
        if found is None:
            base, _, adapter = name.rpartition(":")
            known = f"known are {', '.join(self.models)}"
            what = f"there is no model '{name[:200]}'"
            if base in self.models:
                what = f"the model '{base[:100]}' has no adapter '{adapter[:100]}'"
            raise HTTPError(404, what, param="model", code="model_not_found", hint=known)
        return found

    # -- routes

    def _chat(self, asked: ChatRequest, client: Client, marks: dict[str, str]) -> Response:
        return chat.answer(self.context, self._hosted(asked.model), client, asked, marks)

    def _responses(self, asked: ResponsesRequest, client: Client, marks: dict[str, str]) -> Response:
        return responses.answer(self.context, self._hosted(asked.model), client, asked, self.kept, marks)

    def _response(self, request: Request, client: Client) -> Response:
        found = self.kept.get(client.name, request.path_params["id"])
        if found is None:
            raise _no_response()
        return JSONResponse(found[0], headers=self._marks(request))

    def _forget(self, request: Request, client: Client) -> Response:
        id = request.path_params["id"]
        if not self.kept.forget(client.name, id):
            raise _no_response()
        return JSONResponse({"id": id, "object": "response", "deleted": True}, headers=self._marks(request))

    def _completions(self, asked: CompletionRequest, client: Client, marks: dict[str, str]) -> Response:
        return completions.answer(self.context, self._hosted(asked.model), client, asked, marks)

    def _embeddings(self, asked: EmbeddingRequest, client: Client, marks: dict[str, str]) -> Response:
        hosted = self._hosted(asked.model)
        rows = hosted.alone(asked.input)
        longest = max(len(row) for row in rows)
        if longest > hosted.network.settings.context:
            raise HTTPError(
                400,
                f"an input has {longest} tokens, and {hosted.network.settings.context} is the most",
                param="input",
                code="context_length_exceeded",
            )
        if not all(rows):
            raise HTTPError(400, "there is an empty input", param="input")
        features = hosted.network.settings.width
        if asked.dimensions not in (None, features):
            raise HTTPError(400, f"vectors of this model have {features} dimensions", param="dimensions")
        tokens = sum(len(row) for row in rows)
        hosted.load.admit(len(rows), tokens, 0.0)
        self.door.admit_tokens(client, tokens)
        hosted.load.answers += len(rows)
        try:
            vectors = hosted.embed(rows)
        finally:
            hosted.load.answers -= len(rows)
        data = [
            {"object": "embedding", "index": index, "embedding": _coded(vector, asked.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        body = {"object": "list", "data": data, "model": hosted.name, "usage": usage}
        return Embedded(body, hosted.name, tokens, marks | client.headers())

    def _tokenize(self, asked: TokenizeRequest, client: Client, marks: dict[str, str]) -> Response:
        hosted = self._hosted(asked.model)
        if asked.messages is not None:
            ids = list(hosted.conversation(asked.messages).plain)
        else:
            ids = hosted.tokenizer.encode(asked.text or "")
        return JSONResponse({"ids": ids, "count": len(ids)}, headers=marks)

    def _detokenize(self, asked: DetokenizeRequest, client: Client, marks: dict[str, str]) -> Response:
        hosted = self._hosted(asked.model)
        if any(id >= hosted.tokenizer.size for id in asked.ids):
            raise HTTPError(400, f"an id is outside the vocabulary of {hosted.tokenizer.size}", param="ids")
        return JSONResponse({"text": hosted.tokenizer.decode(asked.ids)}, headers=marks)

    def _list(self, request: Request, client: Client) -> Response:
        data = [_described(hosted) for hosted in self.models.values()]
        return JSONResponse({"object": "list", "data": data}, headers=self._marks(request))

    def _model(self, request: Request, client: Client) -> Response:
        return JSONResponse(_described(self._hosted(request.path_params["name"])), headers=self._marks(request))

    def _metrics(self, request: Request, client: Client) -> Response:
        for name, hosted in self.models.items():
            if hosted.generates and hosted.parent is None:
                engine = hosted.engine
                self.metrics.running.labels(name).set(len(engine.scheduler.running))
                self.metrics.waiting.labels(name).set(len(engine.scheduler.waiting))
                self.metrics.failures.labels(name).set(engine.failures)
                for kind in ("held", "cached", "free"):
                    self.metrics.state.labels(name, kind).set(getattr(engine.memory, kind))
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _openapi(self, request: Request, client: Client) -> Response:
        return JSONResponse(self.document)

    # -- health

    def _stuck(self) -> str | None:
        for hosted in self.models.values():
            if not hosted.generates or hosted.parent is not None:
                continue
            engine = hosted.engine
            if engine.failing >= FAILING:
                return f"{hosted.name}: {engine.failing} steps in a row failed"
            if engine.busy and time.monotonic() - engine.progressed > STUCK:
                return f"{hosted.name}: no step for {STUCK:g} s while there is work"
        return None

    async def _live(self, request: Request) -> Response:
        problem = self._stuck()
        return JSONResponse({"live": problem is None, "problem": problem}, 200 if problem is None else 503)

    async def _ready(self, request: Request) -> Response:
        problem = "shutting down" if self.draining else self._stuck()
        if problem is None and self.upstream is not None:
            problem = await self.upstream.problem()
        return JSONResponse({"ready": problem is None, "problem": problem}, 200 if problem is None else 503)

    # -- life

    @property
    def under_way(self) -> int:
        return self._prepared + sum(load.answers for load in self._loads)

    @property
    def _loads(self) -> list[Load]:
        loads = [hosted.load for hosted in self.models.values() if hosted.parent is None]
        return loads if self.upstream is None else [*loads, self.upstream.load]

    def drain(self) -> None:
        """Take no more requests."""
        self.draining = True
        for load in self._loads:
            load.draining = True

    async def end(self) -> None:
        """Who still waits is told that the server shuts down. What does not end by itself is left behind."""
        self.drain()
        self.ended = True
        passed = set() if self.upstream is None else self.upstream.asked
        for task in filter(None, [*self._asked, *passed]):
            task.cancel()
        closing = [Thread(target=hosted.close, daemon=True) for hosted in self.models.values()]
        for thread in closing:
            thread.start()
        until = time.monotonic() + ENDING
        while any(thread.is_alive() for thread in closing) and time.monotonic() < until:
            await asyncio.sleep(0.01)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        for hosted in self.models.values():
            hosted.warm()
        before = sys.getswitchinterval()  # the engine's thread and this one wait for each other at every token
        sys.setswitchinterval(min(before, SWITCH))
        yield
        sys.setswitchinterval(before)
        await self.end()
        if self.upstream is not None:
            await self.upstream.close()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)
        self.dismiss()

    def dismiss(self) -> None:
        """No more texts are prepared."""
        self._workers.shutdown(wait=False, cancel_futures=True)


class Embedded(JSONResponse):
    """Vectors, and for logs and traces what they took."""

    def __init__(self, body: Any, model: str, tokens: int, headers: dict[str, str]) -> None:
        super().__init__(body, headers=headers)
        self.seen = {"model": model, "prompt": tokens}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"] |= self.seen
        await super().__call__(scope, receive, send)


def _short(asked: BaseModel) -> bool:
    """Whether a request's text is prepared in a moment: one short one, as it is or in ids, with no grammar."""
    return (
        isinstance(asked, CompletionRequest)
        and len(asked.prompt) <= SHORT
        and (isinstance(asked.prompt, str) or isinstance(asked.prompt[0], int))
        and asked.regex is None
        and asked.grammar is None
    )


def _marked(given: str) -> dict[str, str]:
    """The id that a client gave its request, or a new one."""
    fine = 0 < len(given) <= 128 and given.isascii() and given.isprintable()
    return {"x-request-id": given if fine else uuid.uuid4().hex}


def _no_response() -> HTTPError:
    return HTTPError(404, "there is no such response", param="id", code="response_not_found")


def _described(hosted: Hosted) -> dict[str, Any]:
    found = {"id": hosted.name, "object": "model", "created": hosted.created, "owned_by": "armillary"}
    return found if hosted.parent is None else found | {"parent": hosted.parent.name}


def _coded(vector: list[float], encoding: str) -> Any:
    return vector if encoding == "float" else base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
