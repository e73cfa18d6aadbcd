"""An answer under way: its request, how far it has come, and what its next token is chosen with."""

from __future__ import annotations

from dataclasses import dataclass, field

from armillary.engine.adapter import Adapter
from armillary.engine.prefix import Match
from armillary.engine.request import Answer
from armillary.engine.sampling import Chooser
from armillary.engine.scheduler import Sequence as Progress
from armillary.engine.writer import Writer
from armillary.nn.network import Network


@dataclass(eq=False)
class Running:
    """What the engine knows of one answer; match: where it goes on from; followers: copies that wait for it to have
    read their prompt."""

    answer: Answer
    progress: Progress
    chooser: Chooser
    writer: Writer | None
    adapter: Adapter | None = None
    match: Match = field(default_factory=Match)
    drafts: list[int] = field(default_factory=list)
    sure: list[float] = field(default_factory=list)  # their probabilities, if they are told
    asked: int = 0  # guesses that were asked for when `drafts` were made
    read: int = 0  # tokens that were known when somebody was last asked for guesses
    followers: list[Running] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return self.chooser.ids

    @property
    def kind(self) -> str:
        """Answers whose guesses are right about as often."""
        return "greedy" if self.chooser.greedy else "drawn"

    @property
    def network(self) -> Network | None:
        """With the adapter that was asked for; None: the engine's own."""
        return None if self.adapter is None else self.adapter.network

    @property
    def origin(self) -> tuple[object, ...]:
        """Sequences that may go on from one another; an adapter goes by its numbers."""
        return (*self.answer.request.origin, None if self.adapter is None else self.adapter.digest)
