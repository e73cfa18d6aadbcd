"""The scheduler as a state machine, driven at random, without a network; expected values are its invariants.

Bytes add up, places are never shared, nobody waits for ever, every sequence ends exactly once, and
when all is over nothing is held.
"""

from __future__ import annotations

import copy

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from armillary.base.errors import InputError
from armillary.engine.scheduler import Memory, Plan, Scheduler, Sequence

SLOTS, EACH, FIXED, PAGE = 3, 2, 10, 4


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory(400, FIXED, EACH, PAGE)
        self.scheduler = Scheduler(
            SLOTS, self.memory, overcommit=2.0, patience=50.0, reuse=self.reuse, shrink=self.shrink
        )
        self.now = 0.0
        self.live: list[Sequence] = []
        self.ended: list[Sequence] = []
        self.plan: Plan | None = None

    def reuse(self, sequence: Sequence) -> int:
        return min(sequence.known - 1, sequence.number % 3)

    def shrink(self, size: int) -> None:
        self.memory.cached = max(0, self.memory.cached - size)

    def end(self, sequence: Sequence) -> None:
        assert sequence in self.live, "a sequence ended twice"
        self.live.remove(sequence)
        self.ended.append(sequence)

    @rule(
        prompt=st.integers(1, 60),
        more=st.integers(1, 30),
        key=st.sampled_from("ab"),
        priority=st.integers(0, 2),
        wait=st.one_of(st.none(), st.floats(1, 40)),
        stops=st.lists(st.integers(1, 59), max_size=3, unique=True),
        drafts=st.integers(0, 3),
    )
    def submit(self, prompt, more, key, priority, wait, stops, drafts) -> None:
        sequence = Sequence(
            known=prompt,
            limit=prompt + more,
            key=key,
            priority=priority,
            deadline=None if wait is None else self.now + wait,
            stops=tuple(sorted(at for at in stops if at < prompt)),
            drafts=drafts,
        )
        self.scheduler.check(sequence)
        self.scheduler.submit(sequence, self.now)
        self.live.append(sequence)

    @rule()
    def too_large(self) -> None:
        with pytest.raises(InputError, match="bytes of state"):
            self.scheduler.check(Sequence(known=300, limit=400))

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 50))
    def cancel(self, pick) -> None:
        sequence = self.live[pick % len(self.live)]
        self.scheduler.finish(sequence)
        self.end(sequence)

    @rule(size=st.integers(0, 100))
    def keep(self, size) -> None:
        self.memory.cached += min(size, self.memory.free)

    @rule(budget=st.integers(1, 40))
    def step(self, budget) -> None:
        self.now += 1
        before = {one: one.stage for one in self.live}
        self.plan = self.scheduler.plan(self.now, budget)
        self.apply(self.plan, budget, before)

    @precondition(lambda self: self.plan is not None)
    @rule(budget=st.integers(1, 40), later=st.sampled_from([0.1, 1.0, 30.0]))
    def again(self, budget, later) -> None:
        """A plan that holds once more is just the one that would be made."""
        self.now += later
        twin = copy.deepcopy(self.scheduler, {id(self): self})
        if self.scheduler.again(self.plan, self.now):
            plan = twin.plan(self.now, budget)
            assert not plan.admitted + plan.preempted + plan.expired
            assert told(plan) == told(self.plan)
            before = {one: one.stage for one in self.live}
            self.apply(Plan(self.plan.work), budget, before)

    def apply(self, plan: Plan, budget: int, before: dict[Sequence, str]) -> None:
        for sequence in plan.expired:
            assert sequence.deadline is not None
            assert sequence.deadline < self.now
            self.end(sequence)
        for sequence in plan.preempted:
            assert before[sequence] == "running"
            sequence.computed = 0
        assert not set(plan.preempted) & set(plan.admitted), "who made way came back in the same step"
        for sequence in plan.admitted:
            assert sequence.stage == "running"
        assert len({one.sequence for one in plan.work}) == len(plan.work)
        assert sum(one.count for one in plan.work if one.sequence.missing > 1) <= budget + len(plan.work)
        for one in plan.work:
            sequence = one.sequence
            assert sequence.stage == "running"
            assert 0 < one.count <= sequence.missing + one.drafts
            crossed = [at for at in sequence.stops if sequence.computed < at < sequence.computed + one.count]
            assert not crossed or one.drafts, "a step went past where it had to end"
            assert self.memory.of(sequence.computed + one.count) <= sequence.held
            ready = one.finishes
            sequence.computed += one.count - one.drafts
            if ready:
                sequence.known += 1
                if sequence.known == sequence.limit:
                    self.scheduler.finish(sequence)
                    self.end(sequence)

    @invariant()
    def bytes_add_up(self) -> None:
        assert self.memory.held == sum(one.held for one in self.scheduler.running)
        assert self.memory.free + self.memory.held + self.memory.cached == self.memory.total
        assert self.memory.free >= 0

    @invariant()
    def places(self) -> None:
        taken = [one.slot for one in self.scheduler.running]
        assert len(set(taken)) == len(taken) <= SLOTS
        assert all(0 <= slot < SLOTS for slot in taken)
        assert {one for one in self.live if one.stage == "running"} == set(self.scheduler.running)
        assert {one for one in self.live if one.stage == "waiting"} == set(self.scheduler.waiting)

    def teardown(self) -> None:
        """Left alone, everything ends, and then nothing is held."""
        for _ in range(3000):
            if not self.live:
                break
            self.now += 1
            before = {one: one.stage for one in self.live}
            self.apply(self.scheduler.plan(self.now, 8), 8, before)
        assert not self.live, "somebody waits for ever"
        assert self.memory.held == 0
        assert len(self.scheduler._open) == SLOTS


def told(plan: Plan) -> list[tuple[int, int, int]]:
    return [(one.sequence.number, one.count, one.drafts) for one in plan.work]


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def drain(scheduler: Scheduler, plan: Plan) -> dict[str, int]:
    """Apply a plan; returns tokens by key."""
    found: dict[str, int] = {}
    for one in plan.work:
        found[one.sequence.key] = found.get(one.sequence.key, 0) + one.count
        ready = one.finishes
        one.sequence.computed += one.count
        one.sequence.known += ready
    return found


def test_decoding_never_waits_for_a_prompt() -> None:
    scheduler = Scheduler(4, Memory(10**6, 0, 1))
    short, long = Sequence(known=2, limit=100), Sequence(known=4000, limit=4001)
    scheduler.submit(short, 0)
    drain(scheduler, scheduler.plan(0, 16))
    scheduler.submit(long, 1)
    for step in range(20):
        plan = scheduler.plan(2 + step, 16)
        assert [one.count for one in plan.work] == [1, 16]
        drain(scheduler, plan)


def test_keys_share_the_places() -> None:
    """One key floods the line; another's first request is next all the same."""
    scheduler = Scheduler(1, Memory(10**6, 0, 1))
    flood = [Sequence(known=10, limit=11, key="flood") for _ in range(20)]
    for one in flood:
        scheduler.submit(one, 0)
    drain(scheduler, scheduler.plan(0, 100))
    scheduler.finish(flood[0])
    late = Sequence(known=10, limit=11, key="late")
    scheduler.submit(late, 1)
    drain(scheduler, scheduler.plan(2, 100))
    scheduler.finish(next(iter(scheduler.running)))
    plan = scheduler.plan(3, 100)
    assert late in plan.admitted or late.stage == "done"


def test_patience_lifts_whoever_waits() -> None:
    scheduler = Scheduler(1, Memory(10**6, 0, 1), patience=10)
    low = Sequence(known=5, limit=6, key="low")
    scheduler.submit(low, 0)
    served = None
    for now in range(60):
        high = Sequence(known=5, limit=6, key="high", priority=2)
        scheduler.submit(high, now)
        plan = scheduler.plan(now, 100)
        drain(scheduler, plan)
        if low in scheduler.running:
            served = now
            break
        for one in list(scheduler.running):
            scheduler.finish(one)
    assert served is not None
    assert 20 <= served <= 40  # two steps of patience make up for two of priority


def test_what_is_kept_is_not_given_up_for_a_sequence_that_does_not_fit_all_the_same() -> None:
    memory = Memory(100, 0, 1, page=1, cached=40)

    def shrink(size: int) -> None:
        memory.cached = max(0, memory.cached - size)

    scheduler = Scheduler(2, memory, shrink=shrink)
    scheduler.submit(Sequence(known=59, limit=60), 0)
    drain(scheduler, scheduler.plan(0, 100))
    scheduler.submit(Sequence(known=80, limit=90), 1)
    assert not scheduler.plan(2, 100).admitted
    assert memory.cached == 40


def going(scheduler: Scheduler, *sequences: Sequence) -> Plan:
    """The plan of the first step in which each of them takes one token."""
    for one in sequences:
        scheduler.submit(one, 0)
    drain(scheduler, scheduler.plan(0, 1000))
    plan = scheduler.plan(1, 1000)
    drain(scheduler, plan)
    return plan


def test_a_plan_holds_until_something_changes() -> None:
    """Somebody comes, somebody leaves, a deadline passes, an answer has come to its limit, or a new plan was made."""

    def made(**more) -> tuple[Scheduler, Plan, Sequence]:
        scheduler = Scheduler(3, Memory(10**6, 0, 1))
        one, other = Sequence(known=5, limit=100, **more), Sequence(known=7, limit=50)
        return scheduler, going(scheduler, one, other), other

    scheduler, plan, _ = made()
    for _ in range(3):
        assert scheduler.again(plan, 10**6)
        drain(scheduler, plan)
    scheduler.submit(Sequence(known=1, limit=2), 0)
    assert not scheduler.again(plan, 2)
    scheduler, plan, other = made()
    scheduler.finish(other)
    assert not scheduler.again(plan, 2)
    scheduler, plan, _ = made(deadline=5)
    assert scheduler.again(plan, 4)
    assert not scheduler.again(plan, 6)
    scheduler, plan, other = made()
    while scheduler.again(plan, 2):
        drain(scheduler, plan)
    assert other.known == other.limit
    scheduler, plan, _ = made()
    assert scheduler.plan(2, 1000).more
    assert not scheduler.again(plan, 2)


def test_a_plan_holds_as_long_as_its_bytes() -> None:
    scheduler = Scheduler(2, Memory(400, FIXED, EACH, PAGE), overcommit=1000.0)
    one = Sequence(known=5, limit=40)
    plan = going(scheduler, one)
    while scheduler.again(plan, 2):
        drain(scheduler, plan)
    assert scheduler.memory.of(one.known - 1) <= one.held < scheduler.memory.of(one.known)
    assert one.known < one.limit


def test_whoever_may_take_a_place_is_looked_at_in_every_step() -> None:
    def plan(priority: int, slots: int) -> Plan:
        scheduler = Scheduler(slots, Memory(100, 0, 1, page=1))
        scheduler.submit(Sequence(known=60, limit=80), 0)
        drain(scheduler, scheduler.plan(0, 1000))
        scheduler.submit(Sequence(known=30, limit=40, priority=priority), 0)
        return scheduler.plan(1, 1000)

    assert plan(priority=0, slots=1).more, "there is no place"
    assert plan(priority=1, slots=1).admitted, "the other one makes way"
    assert not plan(priority=0, slots=2).more, "there is a place, and may be bytes"


def test_tokens_of_a_plan_that_was_carried_out_again_count() -> None:
    """As if each step had been planned by itself: who was served more waits longer."""
    served = []
    for repeats in (True, False):
        scheduler = Scheduler(3, Memory(10**6, 0, 1))
        plan = going(scheduler, *(Sequence(known=5, limit=100, key=key) for key in "aab"))
        for _ in range(9):
            if repeats:
                assert scheduler.again(plan, 2)
            else:
                plan = scheduler.plan(2, 1000)
            drain(scheduler, plan)
        scheduler.submit(Sequence(known=1, limit=2, key="c"), 3)
        served.append(scheduler.served)
    assert served[0] == served[1]
    assert served[0]["a"] == 2 * served[0]["b"] == 2 * (5 + 1 + 9)
