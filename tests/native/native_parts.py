"""What tests of the native steps share: threads, and two ways of taking the same steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partialmethod

import pytest
import torch
from torch import Tensor

from armillary.engine import replay
from armillary.engine.slots import Slots
from armillary.native.tape import Program

TEXTS = [[1, 2, 3, 4, 5], [9, 8, 7, 9, 9], [7, 7, 7, 7, 7]]


@contextmanager
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three threads in every step, whatever would be quickest."""
    monkeypatch.setattr(replay, "chosen_threads", lambda *given: torch.get_num_threads())
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def ways(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Threads at once; and one after another between barriers, in both orders: a missing wait shows without fail."""
    yield "at once"
    for way in ("in turn", "back"):
        monkeypatch.setattr(Program, "run", partialmethod(Program.run_in_turn, back=way == "back"))
        yield way


def one_by_one(slots: Slots, texts: Sequence[Sequence[int]] = TEXTS) -> list[Tensor]:
    """The scores of each text, a token at a time and alone."""
    return [torch.cat([slots.extend([row], [[id_]]).clone()[:, 0] for id_ in ids]) for row, ids in enumerate(texts)]


def check_bits(make: Callable[[], Slots], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither threads nor neighbours nor what is read together change a bit."""
    single = one_by_one(make())
    with three_threads(monkeypatch):
        for way in ways(monkeypatch):
            together = make()
            assert together.replay is not None and together.replay.tape.threads == 3
            found = together.extend([0, 1, 2], TEXTS, last=False)
            assert all(torch.equal(found[row], single[row]) for row in range(3)), way


class Beside:
    """Takes every step twice; worst: the largest difference of scores so far."""

    def __init__(self, slots: Slots, other: Slots) -> None:
        self.slots, self.other, self.worst = slots, other, 0.0

    def step(self, rows: list[int], chunks: list[list[int]], last: bool = True, plain: bool = False) -> None:
        """plain: not by the tape, unless only the tape sees the weights."""
        found, expected = (_extend(slots, rows, chunks, last, plain) for slots in (self.slots, self.other))
        for at, chunk in enumerate(chunks):
            count = 1 if last else len(chunk)
            self.worst = max(self.worst, float((found[at, :count] - expected[at, :count]).abs().max()))


def _extend(slots: Slots, rows: list[int], chunks: list[list[int]], last: bool, plain: bool) -> Tensor:
    taped = slots.replay
    if taped is None or not plain or taped.other:
        return slots.extend(rows, chunks, last=last).clone()
    taped.settle()
    slots.replay = None
    try:
        return slots.extend(rows, chunks, last=last).clone()
    finally:
        slots.replay = taped
