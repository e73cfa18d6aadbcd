"""How many tokens are guessed: as many as bring the most tokens a second, none where guesses do not pay.

What steps of so many tokens and guesses of so many take is measured as they come, and so is how often a guess turns
out right. A guess is worth making while what it brings (the chance that it and all before it are right) makes up for
what guessing and checking it take. Only how fast answers come depends on this, never what they are.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence

TRIED = 24  # times that guesses are made and checked before it is asked what they bring
PLAIN = 3  # steps without any that are taken to know how long those take
LASTING = 0.98  # what a guess that was checked counts for when the next one is
ALIKE = 8  # guesses for which it counts what is known of those a place before
CLEARLY = 1.02  # times as many tokens a second as without: what guesses must bring
EVERY, SELDOM = 128, 1024  # tokens without guesses, at first and at the most, after which some are tried again
AGAIN = 4  # times that they then are
HOLDS = 8  # steps with guesses for which their best number is taken to stay what it is
STALE = 256  # steps with guesses after which one goes without, so that its time stays known
OLD = 1024  # steps after which a time is forgotten
FEW = 5  # times from which on the middle one is taken, not the shortest: one may have been held up
LEARNS = 0.03  # how fast `Chances.power` is learnt


class Times:
    """Seconds of what is done with so many tokens, as the last few took, and between numbers that were seen, or
    beyond them, in proportion. More tokens take no less time. known: what is taken for some until it is seen."""

    def __init__(self, known: Mapping[int, float] | None = None) -> None:
        self._first = dict(known or {})
        self._seen: dict[int, deque[float]] = {}
        self._when: dict[int, int] = {}
        self._known: list[tuple[int, float]] | None = None

    def saw(self, count: int, seconds: float, when: int = 0) -> None:
        """when: a number that grows."""
        last = self._seen.get(count)
        if last is None:
            last = self._seen[count] = deque(maxlen=9)
        last.append(seconds)
        self._when[count], self._known = when, None

    def forget(self, before: int) -> None:
        """What was not seen again since then: something else may have held it up."""
        for count in [count for count, when in self._when.items() if when < before]:
            del self._seen[count], self._when[count]
            self._known = None

    def known(self) -> list[tuple[int, float]]:
        """Numbers, ascending, and their times."""
        if self._known is None:
            times = dict(self._first)
            for count, last in self._seen.items():
                times[count] = statistics.median(last) if len(last) >= FEW else min(last)
            self._known, least = [], math.inf
            for count in sorted(times, reverse=True):
                least = min(least, times[count])
                self._known.insert(0, (count, least))
        return self._known

    def often(self, count: int) -> int:
        """How often the time of so many was taken, as far as is remembered."""
        return len(self._seen.get(count, ()))

    def of(self, count: float) -> float:
        """Of so many; 0 when none was seen."""
        known = self.known()
        if not known:
            return 0.0
        below = [one for one in known if one[0] <= count]
        above = [one for one in known if one[0] > count]
        if not below:  # few take hardly less time than some more
            return above[0][1]
        first, took = max(below)
        if above:
            next_, more = above[0]
            return took + max(0.0, more - took) * (count - first) / (next_ - first)
        if len(below) == 1:
            return took
        # beyond what was seen, as it went from the fewest to the most
        fewest, least = below[0]
        return took + max(0.0, took - least) * (count - first) / (first - fewest)


class Chances:
    """Of guesses of one kind: how often the next one is made at all (a draft stops where it is not sure), and how
    often it is right if those before it were; by its place.

    power: the chance that a guess is right is about this power of the probability that the draft gives it: less than
    1 where tokens are not drawn, and the draft's likeliest is mostly the network's, too.
    """

    def __init__(self, most: int) -> None:
        self.made, self.right = ([[0.0, 0.0] for _ in range(most)] for _ in range(2))
        self.power = 0.5
        self.checked = self.rounds = self.trials = 0
        self.resting = 0  # tokens since guesses were last tried, while they do not pay
        self.rest = EVERY

    def saw(self, asked: int, made: int, right: int) -> None:
        self.rounds += 1
        self.checked += made > 0
        for place in range(min(asked, made + 1)):
            _count(self.made[place], place < made)
        for place in range(min(made, right + 1)):
            _count(self.right[place], place < right)

    def learn(self, probabilities: Sequence[float], right: int) -> None:
        """Of guesses that were checked, so many of them right."""
        for place, probability in enumerate(probabilities[: right + 1]):
            chance = max(probability, 1e-6) ** self.power
            self.power = min(2.0, max(0.05, self.power + LEARNS * (chance - (place < right))))

    def expected(self, count: int) -> tuple[float, float]:
        """Of so many that are asked for: how many are made, and how many of those are right to begin with."""
        reach, hold, made, right = 1.0, 1.0, 0.0, 0.0
        share = hit = 0.75  # of places of which nothing is known: as those before
        for place in range(count):
            share, hit = _share(self.made[place], share), _share(self.right[place], hit)
            reach, hold = reach * share, hold * share * hit
            made, right = made + reach, right + hold
        return made, right


class Odds:
    """most: guesses at a time, at the most."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.steps = Times()  # by tokens
        self.guesses = Times({0: 0.0})  # by how many were made at once
        self._chances: dict[str, Chances] = {}
        self._step = self._since = 0  # steps; those with guesses since one without
        self._found: dict[tuple[str, int], tuple[int, int, float]] = {}  # until when, and what `best` found

    def chances(self, kind: str) -> Chances:
        found = self._chances.get(kind)
        if found is None:
            found = self._chances[kind] = Chances(self.most)
        return found

    def count(self, kind: str, answers: int = 1) -> tuple[int, float]:
        """How many guesses to ask for now, of that kind, where so many answers go on together; and the chance that
        makes up for making one."""
        chances = self.chances(kind)
        if chances.checked < TRIED:
            return self.most, 0.0
        if self.steps.often(answers) < PLAIN or self._since > STALE:
            return 0, 0.0
        until, best, least = self._found.get((kind, answers), (0, 0, 0.0))
        if chances.rounds >= until:
            best, least = self.best(kind, answers)
            self._found[kind, answers] = chances.rounds + HOLDS, best, least
        if best:
            chances.resting, chances.rest = 0, EVERY
            return best, least
        chances.resting += 1
        if chances.resting < chances.rest:
            return 0, 0.0
        chances.trials += 1
        if chances.trials == AGAIN:  # what is found next takes them into account
            chances.resting, chances.rest, chances.trials = 0, min(SELDOM, 2 * chances.rest), 0
            del self._found[kind, answers]
        return min(2, self.most), 0.0

    def best(self, kind: str, answers: int = 1) -> tuple[int, float]:
        """The number of guesses that brings most, 0 for none; and the chance that makes up for one guess: the time
        that it takes, in tokens that could come in it."""
        for times in (self.steps, self.guesses):
            times.forget(self._step - OLD)
        chances, plain = self.chances(kind), self.steps.of(answers)
        if not plain:
            return 0, 0.0
        found, rate, took = 0, 0.0, 0.0
        bound = CLEARLY / plain
        for count in range(1, self.most + 1):
            made, right = chances.expected(count)
            seconds = self.steps.of(answers * (1 + made)) + answers * self.guesses.of(made)
            if (1 + right) / seconds > bound:
                found, rate, took = count, (1 + right) / seconds, (seconds - plain) / max(made, 0.1)
                bound = rate
        return found, min(0.9, max(0.0, took * rate))

    def asked(self, made: int, seconds: float) -> None:
        """Guesses were asked for, and so many made."""
        self.guesses.saw(made, seconds, self._step)

    def went(self, tokens: int, guesses: int, seconds: float) -> None:
        """A step of so many tokens, of which so many were guesses, and none of a prompt."""
        self._step += 1
        self.steps.saw(tokens, seconds, self._step)
        self._since = self._since + 1 if guesses else 0


def _count(shares: list[float], yes: bool) -> None:
    shares[0], shares[1] = shares[0] * LASTING + yes, shares[1] * LASTING + 1


def _share(counted: list[float], otherwise: float) -> float:
    """With some more that are as what is known of others."""
    return (counted[0] + ALIKE * otherwise) / (counted[1] + ALIKE)
