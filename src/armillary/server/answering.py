"""From a request's answers to what goes over the wire: whole, or piece by piece.

An answer belongs to the connection that asked for it: it begins in `__call__` of its response and is
cancelled when that ends, however it ends. Nothing depends on a generator being started or finished.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from armillary.engine.constraints import Constraint
from armillary.engine.request import Answer, Piece, Request
from armillary.server.errors import HTTPError, explained, shutting_down
from armillary.server.hosted import Hosted
from armillary.server.limits import Client, Door
from armillary.server.metrics import Metrics
from armillary.server.turns import Spoken
from armillary.server.within import begun, within

log = logging.getLogger("armillary.server")
HELD = 0.25  # seconds that the head of a stream waits for its first token
ALIVE = 15.0  # seconds between comments that keep a silent stream open
READS = 30.0  # seconds that a client may take to read what was sent
LEFT, SILENT = "the client left", "nothing was said for a while"  # among the pieces
Pieces: TypeAlias = "asyncio.Queue[tuple[int, Piece] | Awaitable[None] | Exception | str]"
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class Post:
    """Brings pieces from engines' threads to a loop, which is woken when a step has given out all of them: waking it
    costs a call of the system, and woken by the first of them it would take turns with a step that is not done."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._bag: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._called = False

    def put(self, take: Callable[[Any], None], item: Any) -> None:
        """From any thread; the loop calls `take`, which may not fail."""
        self._bag.append((take, item))

    def wake(self) -> None:
        """From any thread, behind what was put."""
        if self._bag and not self._called:  # else it was before the bag is emptied that all was put into it
            self._called = True
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is there any more
                self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False
        while self._bag:
            take, item = self._bag.popleft()
            take(item)


@dataclass
class Context:
    """What answers need of the server."""

    door: Door
    metrics: Metrics
    _post: Post | None = None

    def post(self, loop: asyncio.AbstractEventLoop) -> Post:
        """Of the loop that this runs on."""
        if self._post is None or self._post.loop is not loop:
            self._post = Post(loop)
        return self._post


@dataclass
class Job:
    """The answers of one HTTP request. groups: the copies for each prompt; spoken: the conversation that they
    answer, if it is one."""

    hosted: Hosted
    client: Client
    groups: list[list[Request]]
    spoken: Spoken | None = None

    @property
    def prompt_tokens(self) -> int:
        return sum(len(group[0].ids) for group in self.groups)

    def heard(self, answers: Sequence[Answer]) -> None:
        """The answers are complete: when their conversation comes back, it is known in which tokens they were."""
        for answer in answers:
            if self.spoken is not None and answer.finish in ("end", "length"):
                chosen = [choice.token for choice in answer.choices]
                self.hosted.turns.keep(self.client.name, self.spoken, answer.text, chosen)


class Answered(Response):
    """A response that computes. whole(answers) gives the JSON; or first(), piece(place, piece, answer) and
    last(answers) the events of a stream; place: number of the answer. failed(problem): the events of an answer
    that failed in a stream; done: whether a stream ends with a mark of its own."""

    def __init__(
        self,
        context: Context,
        job: Job,
        *,
        whole: Callable[[list[Answer]], Any] | None = None,
        first: Callable[[], list[Any]] | None = None,
        piece: Callable[[int, Piece, Answer], list[Any]] | None = None,
        last: Callable[[list[Answer]], list[Any]] | None = None,
        failed: Callable[[HTTPError], list[Any]] = lambda problem: [problem.body()],
        done: bool = True,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.context, self.job = context, job
        self.failed, self.done = failed, done
        self.whole, self.first, self.piece, self.last = whole, first, piece, last
        self.given = headers or {}
        self.status_code, self.background = 200, None
        self._started, self._charged = False, 0
        self._unread: dict[int, int] = {}  # prompt tokens by the number of the first answer to them
        self._pieces: Pieces = asyncio.Queue()
        self._answers = list[Answer]()
        self._send: Send | None = None  # while a stream waits for nothing but its next token
        self._said = 0.0  # when something was last sent, by the loop's clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        job, answers, pieces = self.job, self._answers, self._pieces
        post = self.context.post(asyncio.get_running_loop())
        load, count = job.hosted.load, sum(len(group) for group in job.groups)
        entered, leaving = 0, None
        try:
            engine = job.hosted.engine
            load.admit(count, job.prompt_tokens, engine.pace.token)
            self.context.door.admit_tokens(job.client, job.prompt_tokens)
            entered = count
            load.answers += entered
            engine.after.add(post.wake)
            for group in job.groups:
                first = len(answers)
                self._unread[first] = len(group[0].ids)  # the copies of an answer are read with the first
                load.waiting_tokens += self._unread[first]
                places = range(first, first + len(group))
                answers += engine.submit_copies(group, [self._listener(post, place) for place in places])
            leaving = asyncio.create_task(gone(receive))
            leaving.add_done_callback(lambda _: pieces.put_nowait(LEFT))
            await (self._stream if self.whole is None else self._one)(scope, receive, send)
        except Exception as error:
            if self._started:
                raise
            problem = explained(error)
            if problem.code == "internal_error":
                log.exception("an answer failed")
            if problem.status in (429, 503):
                self.context.metrics.rejections.labels(problem.code or "").inc()
            response = JSONResponse(problem.body(), problem.status, headers=problem.headers() | self.given)
            await response(scope, receive, send)
        finally:
            if leaving is not None:
                leaving.cancel()
            load.answers -= entered
            load.waiting_tokens -= sum(self._unread.values())
            state = scope.setdefault("state", {})
            state |= {"answers": answers, "finish": [answer.finish or "cancelled" for answer in answers]}
            state |= {"model": job.hosted.name, "prompt": job.prompt_tokens, "stream": self.whole is None}
            for answer in answers:
                answer.cancel()
                self.context.metrics.answered(job.hosted.name, answer)
            self._charge(answers)

    def _charge(self, answers: Sequence[Answer]) -> None:
        """Before an answer is complete, so that who asks again at once finds it charged."""
        tokens = sum(len(answer.choices) for answer in answers)
        self.context.door.charge(self.job.client, tokens - self._charged)
        self._charged = tokens

    def _listener(self, post: Post, place: int) -> Callable[[Piece], None]:
        """For the engine's thread."""
        if self.whole is None:
            return lambda piece: post.put(self._heard, (place, piece))
        known = False

        def listen(piece: Piece) -> None:  # what lies between the first token and the last nobody waits for
            nonlocal known
            if not known or piece.finish is not None:
                known = True
                post.put(self._pieces.put_nowait, (place, piece))

        return listen

    def _heard(self, got: tuple[int, Piece]) -> None:
        """A token of a stream is sent at once, where nothing else is to be said first: waking the task would take
        longer than that."""
        place, piece = got
        if self._send is None or piece.finish is not None:
            self._pieces.put_nowait(got)
            return
        assert self.piece is not None
        self._read(place)
        left: Awaitable[None] | Exception | None = None
        try:
            events = self.piece(place, piece, self._answers[place])
            if events:
                left = begun(self._send(_body(events)))
                self._said = asyncio.get_running_loop().time()
        except Exception as error:
            left = error
        if left is not None:
            self._send = None
            self._pieces.put_nowait(left)

    async def _one(self, scope: Scope, receive: Receive, send: Send) -> None:
        answers, open_ = self._answers, len(self._answers)
        while open_:
            got = await self._pieces.get()
            if got is LEFT:
                return
            place, piece = cast("tuple[int, Piece]", got)
            self._read(place)
            open_ -= piece.finish is not None
        problems = [found for found in map(problem_of, answers) if found is not None]
        if problems:
            raise problems[0]
        assert self.whole is not None
        self.job.heard(answers)
        self._charge(answers)
        self._started = True
        await JSONResponse(self.whole(list(answers)), headers=self._marks())(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The head leaves with the first token, so that both arrive at once, and a stream whose answers fail before it
        has a status that says so; but it does not wait long."""
        assert self.first is not None and self.piece is not None and self.last is not None
        loop, pieces, answers, events = asyncio.get_running_loop(), self._pieces, self._answers, self.first()
        open_, self._said = len(answers), loop.time()
        silent = loop.call_later(HELD, pieces.put_nowait, SILENT)
        try:
            while open_:
                self._send = send if self._started and pieces.empty() else None
                waiting, got = len(events), await pieces.get()
                self._send = None
                while True:
                    if got is LEFT:
                        return
                    if isinstance(got, Exception):
                        raise got
                    if got is SILENT:
                        if not self._started or loop.time() - self._said >= ALIVE:
                            events, waiting = await self._tell(send, events, b": alive\n\n"), 0
                        silent = loop.call_at(self._said + ALIVE, pieces.put_nowait, SILENT)
                    elif isinstance(got, tuple):
                        place, piece = got
                        self._read(place)
                        open_ -= piece.finish is not None
                        problem = None if piece.finish is None else problem_of(answers[place])
                        if problem is not None and not (self._started or open_ or any(one.choices for one in answers)):
                            raise problem
                        events += self._failed(scope, problem) if problem else self.piece(place, piece, answers[place])
                    else:
                        await within(READS, cast("Awaitable[None]", got))
                    if pieces.empty():
                        break
                    got = pieces.get_nowait()
                if open_ and len(events) > waiting:
                    events = await self._tell(send, events)
        finally:
            self._send = None
            silent.cancel()
        self.job.heard(answers)
        self._charge(answers)
        end = b"data: [DONE]\n\n" if self.done else b""
        await self._tell(send, [*events, *self.last(list(answers))], end, more=False)

    async def _tell(self, send: Send, events: Sequence[Any], end: bytes = b"", more: bool = True) -> list[Any]:
        """Send events, before the first the head; nothing is left to tell."""
        if not self._started:
            head = [(name.encode(), value.encode()) for name, value in self._marks().items()]
            head += [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            self._started = True
            await sent(send, {"type": "http.response.start", "status": 200, "headers": head})
        await sent(send, _body(events, end, more))
        self._said = asyncio.get_running_loop().time()
        return []

    def _failed(self, scope: Scope, problem: HTTPError) -> list[Any]:
        """The status of a stream is sent before it is known how it ends: what fails is noted apart."""
        scope["state"]["failed"] = problem.code
        self.context.metrics.broken.labels(self.job.hosted.name, problem.code or "").inc()
        return self.failed(problem)

    def _read(self, place: int) -> None:
        """Something came of an answer: its prompt is no longer in line."""
        self.job.hosted.load.waiting_tokens -= self._unread.pop(place, 0)

    def _marks(self) -> dict[str, str]:
        return self.given | self.job.client.headers()


def used(prompt: int, generated: int) -> dict[str, Any]:
    """Tokens of a request, or so far."""
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


class Form:
    """An event of which only one text differs from token to token, so that the rest is written once."""

    def __init__(self, event: Callable[[str], Any]) -> None:
        mark = "\0"  # which no other text of an event holds
        self._before, _, self._after = written(event(mark)).partition(_ENCODER.encode(mark))

    def written(self, text: str) -> str:
        return f"{self._before}{_ENCODER.encode(text)}{self._after}"


def written(event: Any) -> str:
    """An event as it stands in a stream, named by its type where it has one; a text is one already (`Form`)."""
    if isinstance(event, str):
        return event
    name = f"event: {event['type']}\n" if "type" in event else ""
    return f"{name}data: {_ENCODER.encode(event)}\n\n"


def _body(events: Sequence[Any], end: bytes = b"", more: bool = True) -> Message:
    return {"type": "http.response.body", "body": "".join(map(written, events)).encode() + end, "more_body": more}


async def sent(send: Send, message: Message) -> None:
    """A client that does not read is given up."""
    await within(READS, send(message))


async def gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return


def problem_of(answer: Answer) -> HTTPError | None:
    """Why an answer is none, whole or in a stream."""
    if answer.finish == "error" and answer.own:
        named = next((step.name for step in answer.request.steps if isinstance(step, Constraint)), None)
        return HTTPError(400, answer.error or "what was asked cannot be done", param=named, code="invalid_constraint")
    if answer.finish == "error":
        said = None if answer.inside else answer.error
        return HTTPError(500, said or "the engine failed", code="generation_failed")
    if answer.finish == "deadline":
        return HTTPError(408, "the answer was not complete within its timeout", param="timeout", code="timeout")
    if answer.finish == "cancelled":
        return shutting_down()
    return None


def now() -> int:
    return int(time.time())
