"""What is kept of sequences, so that later ones with the same beginning go on from there.

States of tokens that stand on their own are kept whole and go on from anywhere; of the others snapshots are taken
where a prompt pauses.
"""

from __future__ import annotations

from armillary.base.errors import InputError
from armillary.engine.prefix import TOKEN, Prefixes, least
from armillary.engine.request import Request
from armillary.engine.running import Running
from armillary.engine.scheduler import Memory
from armillary.engine.slots import Slots

APART = 1024  # tokens between snapshots in a long prompt
BRANCH = 32  # tokens beyond a match from which a common beginning is worth a snapshot


def memory_for(slots: Slots, total: int | None, draft: int, keep: bool) -> Memory:
    """Of so many bytes in all, those of a draft's states included; by default what the slots can come to and half as
    much again, besides the draft's. Raises InputError where the draft leaves nothing."""
    memory = Memory(0, slots.fixed, slots.each)
    if total is not None:
        if draft and total <= draft:
            raise InputError(
                f"the draft's states can come to {draft} bytes, and there are {total} for all",
                hint="more memory, fewer slots, or no draft",
            )
        memory.total = total - draft
        return memory
    each = memory.of(slots.capacity)
    if keep:  # and what a few beginnings of each take besides
        each += TOKEN * slots.capacity + 4 * least(state for _, _, state in slots.state.each())
    memory.total = each * slots.count * 3 // 2
    return memory


class Recall:
    """keeps: False where nothing may be gone on from."""

    def __init__(self, slots: Slots, memory: Memory, keeps: bool) -> None:
        self.slots, self.memory, self.keeps = slots, memory, keeps
        self.prefixes = Prefixes(slots.divisible)

    def stops(self, request: Request) -> tuple[int, ...]:
        """Where a prompt has to pause, so that others can go on from there."""
        if not self.keeps or self.slots.divisible:
            return ()
        prompt = len(request.ids)
        wanted = {at for at in request.boundaries if 0 < at < prompt} | set(range(APART, prompt, APART))
        return tuple(sorted(wanted))

    def match(self, run: Running) -> int:
        """Tokens that an answer need not compute: `run.match` says where they are."""
        if not self.keeps or run.answer.request.source is not None:
            return 0
        # prompt tokens whose own scores are asked for have to be computed
        most = 0 if run.answer.request.prompt_logprobs else len(run.ids) - 1
        run.match = self.prefixes.match(run.ids, most, run.origin)
        common = min(run.match.common, most)
        if not self.slots.divisible and common >= run.match.length + BRANCH:
            run.progress.stops = tuple(sorted({*run.progress.stops, common}))
        return run.match.length

    def paused(self, run: Running) -> None:
        """After a chunk: others may go on from the end of a prompt and from where it paused."""
        at = run.progress.computed
        if self.keeps and (at in run.progress.stops or at == run.chooser.begun):
            self.remember(run, run.progress.slot)

    def remember(self, run: Running, slot: int) -> None:
        """All that was computed of an answer, which stands in a slot."""
        if not self.keeps or run.progress.computed == 0 or run.answer.request.source is not None:
            return
        ids = run.ids[: run.progress.computed]
        snapshot = None if self.slots.divisible else self.slots.snapshot(slot)
        self.prefixes.insert(ids, lambda start, stop: self.slots.entries(slot, start, stop), snapshot, run.origin)
        self.shrink(max(0, self.memory.held + self.prefixes.nbytes - self.memory.total))

    def shrink(self, size: int) -> None:
        """Give back so many bytes."""
        self.prefixes.shrink(size)
        self.memory.cached = self.prefixes.nbytes
