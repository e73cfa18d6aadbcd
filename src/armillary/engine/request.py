"""What is asked of the engine, and what it answers: safe to use from any thread."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from armillary.base.errors import ArmillaryError, InputError
from armillary.engine.sampling import Choice, Sampling
from armillary.engine.steps import Mark, Step

Finish = Literal["stop", "end", "length", "cancelled", "deadline", "error"]


class GenerationError(ArmillaryError):
    """An answer ended before it was complete, through no fault of its request."""


@dataclass(frozen=True)
class Request:
    """One answer to be generated.

    ids: the prompt's tokens; source: of an encoder–decoder; key: who asks (places and steps are shared
    out fairly between keys); space: whose earlier sequences may be gone on from (what is kept for one
    space is never seen from another); priority: higher goes first; timeout: seconds from submission;
    boundaries: numbers of prompt tokens after which a message ends: other conversations may go on from
    there; side: named numbers that the network's mechanisms ask for; stream: keeps the draws of answers
    with the same seed apart; steps: constraints; mark: a watermark, by default the engine's;
    prompt_logprobs: give those of the prompt; adapter: the name of one that the engine holds; whole: nobody looks
    at it before it is complete, so that several of its tokens may be made in one go.
    """

    ids: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    source: tuple[int, ...] | None = None
    key: str = ""
    space: str = ""
    priority: int = 0
    timeout: float | None = None
    boundaries: tuple[int, ...] = ()
    side: Mapping[str, int] = field(default_factory=dict)
    stream: int = 0
    steps: tuple[Step, ...] = ()
    mark: Mark | None = None
    prompt_logprobs: bool = False
    adapter: str | None = None
    whole: bool = False

    @property
    def origin(self) -> tuple[object, ...]:
        """What the states of a prompt depend on besides its tokens and its adapter: only requests of one origin share
        them."""
        return (self.space, *sorted(self.side.items()))


class Piece(NamedTuple):
    """What came with one step: text that is certain, the tokens chosen, and at the end why it ended."""

    text: str = ""
    choices: tuple[Choice, ...] = ()
    finish: Finish | None = None


class Answer:
    """The progress of one request: iterate over it for pieces, or call `wait`.

    text, choices, finish: so far; submitted, begun_at (its place), first_at (token), done_at: moments of the
    monotonic clock, 0 while they are to come; reused: prompt tokens that were at hand from earlier sequences;
    prompt_choices: of every prompt token but the first, when asked for; drafted, accepted: guesses
    checked and right; listener: called with every piece, on the engine's thread.
    """

    def __init__(
        self,
        request: Request,
        drive: Callable[[Answer], bool],
        listener: Callable[[Piece], None] | None,
        halt: Callable[[], None],
    ) -> None:
        self.request = request
        self.choices = list[Choice]()
        self.prompt_choices: list[Choice] = []
        self.finish: Finish | None = None
        self.error: str | None = None
        self.inside = False  # whether the error speaks of our insides
        self.own = False  # whether the request itself is why: asked again, it would fail again
        self.reused = self.drafted = self.accepted = 0
        self.submitted = time.monotonic()
        self.begun_at = self.first_at = self.done_at = 0.0
        self.cancelled = False
        self._drive, self._listener, self._halt = drive, listener, halt
        self._texts = list[str]()
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()

    @property
    def failure(self) -> ArmillaryError:
        """Of an answer that ended in an error."""
        return (InputError if self.own else GenerationError)(self.error or "the engine failed")

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def cancel(self) -> None:
        """End it before the next step."""
        self.cancelled = True
        self._halt()

    def __iter__(self) -> Iterator[Piece]:
        """Pieces as they come; the last one has `finish`. Raises GenerationError when the engine failed, InputError
        when what was asked cannot be done."""
        while True:
            while self._pieces.empty() and self.finish is None and self._drive(self):
                pass
            piece = self._pieces.get()
            if piece.finish == "error":
                raise self.failure
            yield piece
            if piece.finish is not None:
                return

    def ready(self) -> Iterator[Piece]:
        """The pieces that are there already."""
        while not self._pieces.empty():
            yield self._pieces.get()

    def wait(self) -> Answer:
        """Until it is over; returns itself. Raises as iterating does."""
        for _ in self:
            pass
        return self

    def give(self, piece: Piece) -> None:
        """For the engine: the next piece."""
        if piece.choices and not self.first_at:
            self.first_at = time.monotonic()
        if piece.text:
            self._texts.append(piece.text)
        self.choices.extend(piece.choices)
        if piece.finish is not None:
            self.finish, self.done_at = piece.finish, time.monotonic()
        self._pieces.put(piece)
        if self._listener is not None:
            self._listener(piece)
        if piece.finish is not None:
            self._listener = None  # which may hold whoever holds this answer: a circle, with all its pieces
