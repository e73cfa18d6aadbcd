"""Guesses for running answers: how many are asked for, of whom, and what is learnt from what came of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from armillary.engine.drafts import Drafter, Manner
from armillary.engine.odds import Odds
from armillary.engine.running import Running
from armillary.engine.sampling import Choice
from armillary.engine.scheduler import Work

AT_ONCE = 16  # tokens that are forced, at a time
MOST = 8  # at a time, of a drafter that does not say how many it makes


def force(run: Running, among: Iterable[Running], room: int) -> None:
    """What a constraint leaves no choice in is read in one piece, as guesses that are right; among: who goes on in the
    same step; room: tokens of it."""
    chooser, progress = run.chooser, run.progress
    if chooser.sieve is None or chooser.mark is not None:
        return
    room -= sum(1 + one.progress.drafts for one in among if one is not run and one.progress.stage == "running")
    most = min(AT_ONCE, room - 1, progress.limit - progress.known - 1)
    run.drafts = chooser.sieve.forced()[:most] if most > 0 else []
    progress.drafts = len(run.drafts)


class Guesses:
    """Those of one drafter."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.odds = Odds(getattr(drafter, "count", MOST))

    def make(self, going: Sequence[Running]) -> None:
        """For answers under way, as many as pay."""
        for run in going:
            progress = run.progress
            if run.drafts:
                continue
            most, least = self.odds.count(run.kind, len(going))
            most = min(most, progress.limit - progress.known - 1)
            if most > 0:
                started = time.perf_counter()
                run.drafts, run.sure = self._asked(run, most, least)
                # not the time of a draft that first has to read what came while nobody asked it
                if progress.known <= run.read + self.odds.most + 1:
                    self.odds.asked(len(run.drafts), time.perf_counter() - started)
                run.read, run.asked = progress.known, most if run.drafts else 0
                if not run.drafts:
                    self.odds.chances(run.kind).saw(most, 0, 0)
            progress.drafts = len(run.drafts)

    def _asked(self, run: Running, most: int, least: float) -> tuple[list[int], list[float]]:
        """Guesses, and what probabilities they are said to have."""
        write = getattr(self.drafter, "write", None)
        if write is None:
            return self.drafter.propose(run.ids, most), []
        power = self.odds.chances(run.kind).power
        manner = Manner(run.chooser.sampling, run.chooser.ahead(most), least, power)
        found: tuple[list[int], list[float]] = write(run.ids, most, manner)
        return found

    def came(self, run: Running, guessed: Sequence[int], given: Sequence[Choice]) -> None:
        """The tokens that were chosen where `guessed` had been; the last of them was not guessed."""
        right = len(given) - 1
        if run.asked:  # else a constraint has forced them
            run.answer.drafted += len(guessed)
            run.answer.accepted += right
            # an end cuts what is right short, and says nothing of the rest
            made = right if right < len(guessed) and given[-1].token == guessed[right] else len(guessed)
            chances = self.odds.chances(run.kind)
            chances.saw(run.asked, made, right)
            chances.learn(run.sure[:made], right)
            run.asked = 0

    def went(self, works: Sequence[Work], seconds: float) -> None:
        """A step in which guesses of some were checked, or none."""
        self.odds.went(sum(one.count for one in works), sum(one.drafts for one in works), seconds)
