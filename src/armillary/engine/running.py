"""An answer under way: its request, how far it has come, and what its next token is chosen with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from armillary.engine.adapter import Adapter
from armillary.engine.choosing import Choosers
from armillary.engine.prefix import Match
from armillary.engine.request import Answer
from armillary.engine.sampling import Chooser
from armillary.engine.scheduler import Plan, Work
from armillary.engine.scheduler import Sequence as Progress
from armillary.engine.writer import Writer
from armillary.nn.network import Network

AHEAD = 64
BEFORE_STOP = 4  # where a text may end the answer, and what comes behind it is for nothing


@dataclass(eq=False, slots=True)
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
    def ahead(self) -> int:
        """How many of its tokens may be made before one is looked at."""
        if not self.answer.request.whole:
            return 1
        return BEFORE_STOP if self.writer is not None and self.writer.stops else AHEAD

    @property
    def origin(self) -> tuple[object, ...]:
        """Sequences that may go on from one another; an adapter goes by its numbers."""
        return (*self.answer.request.origin, None if self.adapter is None else self.adapter.digest)


class Together:
    """What one call of the network computes, by places: sequences of one adapter that take a token (and guesses) each,
    pieces of prompts, or both. While the same answers go on step after step it stays as it is; plan: the one that
    then holds; ahead: how many steps may be made in one go.

    scored: the scores of every token are looked at, not only of the last ones.
    """

    def __init__(self, works: list[Work], runs: Mapping[Progress, Running]) -> None:
        self.works = sorted(works, key=lambda one: one.sequence.slot)
        self.runs = [runs[one.sequence] for one in self.works]
        self.rows = [one.sequence.slot for one in self.works]
        self.network = self.runs[0].network
        self.plain = all(one.count == 1 and one.sequence.decoding for one in self.works)
        self.scored = any(one.drafts for one in self.works) or any(
            run.answer.request.prompt_logprobs and run.progress.computed < run.chooser.begun for run in self.runs
        )
        self.plan: Plan | None = None
        self.ahead = min(run.ahead for run in self.runs)
        self._texts = [run.chooser.ids for run in self.runs]
        self._choosers: Choosers | None = None

    @property
    def choosers(self) -> Choosers:
        if self._choosers is None:
            self._choosers = Choosers([run.chooser for run in self.runs])
        return self._choosers

    def chunks(self) -> list[list[int]]:
        """The tokens of each row."""
        if self.plain:
            return [ids[-1:] for ids in self._texts]
        found = []
        for one, run in zip(self.works, self.runs, strict=True):
            known = run.ids[one.sequence.computed : one.sequence.computed + one.count]
            found.append(known + run.drafts[: one.count - len(known)])
        return found


def joins(answers: Sequence[Running], prompts: Sequence[Running]) -> bool:
    """Whether there is a call of the engine's own network that pieces of the prompts can go along with."""
    return any(run.network is None for run in answers) and all(run.network is None for run in prompts)
