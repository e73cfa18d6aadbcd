"""Who computes how many tokens next: one rule, without phases, and no tensor anywhere.

Every sequence has tokens that are known (its prompt and what was generated) and tokens that are
computed (in its state). A step gives out a budget of tokens until computed has caught up with known:
that is prefill, chunked prefill, decoding, the check of drafts, and the return of a sequence that had
to make way, all at once (the rule is vLLM's). Sequences that need one token go first, so that running
answers never wait for a long prompt; among prompts, and for a place, the order is priority, then the
key that was served least, then arrival.

Memory is counted in bytes. A sequence is admitted when what it may come to fits; with `overcommit`
above 1 it is admitted on a part of that, and when memory runs out the lowest and newest makes way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from armillary.base.errors import InputError

KEYS = 1024  # whose use is remembered after they left

Stage = Literal["waiting", "running", "done"]


@dataclass(eq=False, slots=True)
class Sequence:
    """The progress of one answer.

    known, computed: tokens; limit: the most that it can come to; stops: numbers of tokens at which a
    step has to end, ascending; whole: tokens that must be computed in one step from the first on;
    drafts: how many guesses stand behind the known tokens, to be checked.
    """

    known: int
    limit: int
    key: str = ""
    priority: int = 0
    deadline: float | None = None
    stops: tuple[int, ...] = ()
    whole: int = 0
    arrival: float = 0.0
    computed: int = 0
    drafts: int = 0
    stage: Stage = "waiting"
    slot: int = -1
    held: int = 0
    number: int = field(default_factory=itertools.count().__next__)

    @property
    def missing(self) -> int:
        return self.known - self.computed

    @property
    def decoding(self) -> bool:
        return self.missing == 1


@dataclass(eq=False, slots=True)
class Work:
    """`count` tokens of a sequence, `drafts` of them guesses."""

    sequence: Sequence
    count: int
    drafts: int = 0

    @property
    def finishes(self) -> bool:
        """Whether the last known token is computed, so that a next one can be chosen."""
        return self.count - self.drafts == self.sequence.missing


@dataclass
class Plan:
    """One step: what to compute, in this order: first `preempted` give up their places, then `admitted`
    take theirs. `expired` have missed their deadlines and are over.

    more: for how many further steps it stays the right one (`Scheduler.again`), until a deadline passes, at the
    moment `until`; made: after so many changes of who waits and who runs.
    """

    work: list[Work] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    expired: list[Sequence] = field(default_factory=list)
    more: int = 0
    until: float = math.inf
    made: int = 0


@dataclass
class Memory:
    """Bytes: `total` may be used, for sequences and for what is kept of earlier ones (`cached`).

    A sequence of n tokens takes fixed + n · each, in steps of `page` tokens.
    """

    total: int
    fixed: int
    each: int
    page: int = 64
    held: int = 0
    cached: int = 0

    def of(self, tokens: int) -> int:
        return self.fixed + -(-tokens // self.page) * self.page * self.each

    def room(self, held: int, most: int) -> int:
        """Tokens, up to `most`, for which so many bytes are enough."""
        if self.of(most) <= held:
            return most
        return (held - self.fixed) // (self.page * self.each) * self.page

    @property
    def free(self) -> int:
        return self.total - self.held - self.cached


class Scheduler:
    """`slots` sequences run at a time.

    reuse(sequence): called on admission, how many of its tokens are at hand already; shrink(bytes):
    give up so much of what is cached, as far as possible. patience: seconds of waiting that count as
    much as one priority, so that nobody waits for ever.
    """

    def __init__(
        self,
        slots: int,
        memory: Memory,
        *,
        overcommit: float = 1.0,
        patience: float = 30.0,
        reuse: Callable[[Sequence], int] = lambda sequence: 0,
        shrink: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.slots, self.memory, self.overcommit, self.patience = slots, memory, overcommit, patience
        self.reuse, self.shrink = reuse, shrink
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.served: dict[str, float] = {}
        self._open = sorted(range(slots), reverse=True)
        self._changes = 0
        self._repeated: tuple[Plan, int] | None = None  # how often a plan was carried out again, and is not counted yet

    def check(self, sequence: Sequence) -> None:
        """Raises InputError for a sequence that can never fit."""
        most = self.memory.of(sequence.limit)
        if most > self.memory.total:
            raise InputError(
                f"{sequence.limit} tokens need {most} bytes of state, and there are {self.memory.total}",
                hint="shorten the prompt or max_new_tokens, or give the engine more memory",
            )

    def submit(self, sequence: Sequence, now: float) -> None:
        """Put it in line (see `check`)."""
        self._change()
        sequence.arrival = now
        if not any(other.key == sequence.key for other in self.waiting + self.running):
            # a key that was away does not bring back what it did not use
            present = [self.served.get(other.key, 0.0) for other in self.waiting + self.running]
            self.served[sequence.key] = max(self.served.get(sequence.key, 0.0), min(present, default=0.0))
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """A sequence is over, for whatever reason; its place and bytes are free."""
        self._change()
        if sequence.stage == "running":
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.stage = "done"
        if len(self.served) > KEYS and not any(one.key == sequence.key for one in self.waiting + self.running):
            del self.served[sequence.key]

    def plan(self, now: float, budget: int) -> Plan:
        """The next step, of at most `budget` tokens beyond one for each sequence that decodes."""
        self._change()
        plan = Plan()
        for sequence in [*self.waiting, *self.running]:
            if sequence.deadline is not None:
                if now > sequence.deadline:
                    plan.expired.append(sequence)
                    self.finish(sequence)
                else:
                    plan.until = min(plan.until, sequence.deadline)
        self._admit(plan, now)
        self._share(plan, now, budget)
        plan.made, plan.more = self._changes, self._repeats(plan)
        return plan

    def again(self, plan: Plan, now: float) -> bool:
        """Whether a plan that was carried out, so that every sequence of it has come one token further, is the next
        one, too, and nothing has to be weighed anew; if so, it counts as given out once more."""
        if plan.made != self._changes or plan.more == 0 or now > plan.until:
            return False
        self.repeated(plan, 1)
        return True

    def repeated(self, plan: Plan, times: int) -> None:
        """It was carried out so many times more, of the `more` for which it holds."""
        plan.more -= times
        self._repeated = plan, times + (0 if self._repeated is None else self._repeated[1])

    def _change(self) -> None:
        """Plans made before no longer hold, and what was done by them is counted."""
        self._changes += 1
        if self._repeated is not None:
            plan, times = self._repeated
            self._repeated = None
            for one in plan.work:
                self.served[one.sequence.key] += times * one.count

    def _repeats(self, plan: Plan) -> int:
        """Steps after this one in which all that runs takes a token each, with the bytes that it has, and none of those
        that wait can take a place."""
        if len(plan.work) < len(self.running) or any(one.count != 1 for one in plan.work):
            return 0
        if self.waiting and (
            self._open or min(one.priority for one in self.running) < max(one.priority for one in self.waiting)
        ):
            return 0
        if not all(one.decoding for one in self.running):
            return 0
        rooms = (self.memory.room(one.held, one.limit - 1) - one.known for one in self.running)
        return max(0, min(rooms, default=0))

    # -- places

    def _admit(self, plan: Plan, now: float) -> None:
        while len(self.waiting) > len(plan.preempted):  # who made way in this step does not come back in it
            others = [one for one in self.waiting if one not in plan.preempted]
            sequence = min(others, key=lambda one: self._rank(one, now))
            need = self._expected(sequence)
            while (not self._open or not self._room(need)) and self._yield(plan, sequence, now):
                pass
            if not self._open or not self._room(need):
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)
            sequence.stage, sequence.slot, sequence.held = "running", self._open.pop(), need
            self.memory.held += need
            sequence.computed = self.reuse(sequence)
            plan.admitted.append(sequence)

    def _expected(self, sequence: Sequence) -> int:
        later = (sequence.limit - sequence.known) / self.overcommit
        return self.memory.of(min(sequence.limit, sequence.known + int(later) + 1))

    def _room(self, need: int) -> bool:
        if self.memory.free < need <= self.memory.free + self.memory.cached:  # else it would be for nothing
            self.shrink(need - self.memory.free)
        return self.memory.free >= need

    def _yield(self, plan: Plan, sequence: Sequence, now: float) -> bool:
        """Whether somebody of a lower priority made way for `sequence`."""
        lower = [one for one in self.running if one.priority < sequence.priority and one not in plan.admitted]
        if not lower:
            return False
        self._preempt(plan, self._last(lower))
        return True

    def _last(self, among: list[Sequence]) -> Sequence:
        return min(among, key=lambda one: (one.priority, -one.arrival, -one.number))

    def _preempt(self, plan: Plan, sequence: Sequence) -> None:
        if sequence in plan.admitted:  # it has not begun, so there is nothing to put away
            plan.admitted.remove(sequence)
        else:
            plan.preempted.append(sequence)
        self._release(sequence)
        sequence.stage = "waiting"
        self.waiting.append(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.memory.held -= sequence.held
        sequence.held = 0
        self._open.append(sequence.slot)
        self._open.sort(reverse=True)  # the lowest place is taken first: rows that work stand together

    def _grow(self, plan: Plan, sequence: Sequence, tokens: int) -> bool:
        """Room for so many tokens of a running sequence; others make way, or in the end it does itself."""
        more = self.memory.of(tokens) - sequence.held
        if more <= 0:
            return True
        while not self._room(more):
            last = self._last(self.running)
            self._preempt(plan, last)
            if last is sequence:
                return False
        sequence.held += more
        self.memory.held += more
        return True

    # -- tokens

    def _rank(self, sequence: Sequence, now: float) -> tuple[float, float, float, int]:
        waited = (now - sequence.arrival) / self.patience
        # whole steps of patience: otherwise arrival alone would decide, and keys would not be fair
        return (
            -(sequence.priority + int(waited)),
            self.served.get(sequence.key, 0.0),
            sequence.arrival,
            sequence.number,
        )

    def _share(self, plan: Plan, now: float, budget: int) -> None:
        decoding, prompts = list[Sequence](), list[Sequence]()
        for one in self.running:
            missing = one.known - one.computed
            if missing:
                (decoding if missing == 1 else prompts).append(one)
        prompts.sort(key=lambda one: self._rank(one, now))
        for sequence in decoding:
            drafts = min(sequence.drafts, sequence.limit - sequence.known) if sequence.drafts else 0
            if sequence.stage == "running" and self._grow(plan, sequence, sequence.known + drafts):
                self._give(plan, sequence, 1 + drafts, drafts)
        left = budget
        for index, sequence in enumerate(prompts):
            if sequence.stage != "running":
                continue
            most = left if index == len(prompts) - 1 else min(left, max(1, left // 2))
            count = min(sequence.missing, most)
            if sequence.computed < sequence.whole:
                count = max(count, sequence.whole - sequence.computed)
            stop = next((at for at in sequence.stops if at > sequence.computed), None)
            if stop is not None:
                count = min(count, stop - sequence.computed)
            if count > 0 and self._grow(plan, sequence, sequence.computed + count):
                self._give(plan, sequence, count, 0)
                left -= count
        plan.work = [one for one in plan.work if one.sequence.stage == "running"]

    def _give(self, plan: Plan, sequence: Sequence, count: int, drafts: int) -> None:
        plan.work.append(Work(sequence, count, drafts))
        self.served[sequence.key] = self.served.get(sequence.key, 0.0) + count
