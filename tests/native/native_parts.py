"""What tests of the native steps share: forms of the library, threads, and ways of taking the same steps."""

from __future__ import annotations

import importlib
import platform
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
library = importlib.import_module("armillary.native.library")
NO_TILES = ("-mno-amx-tile",)
NARROW = (*NO_TILES, "-mno-avx512f")
# The same source, built without what other processors do not have.
FORMS: dict[str, tuple[str, ...]] = {"own": ()}
if platform.machine() in ("x86_64", "AMD64"):
    FORMS |= {
        "without tiles": NO_TILES,
        "256 bits": NARROW,
        "256 bits without dots": (*NARROW, "-mno-avxvnni"),
        "plain": ("-march=x86-64",),
    }
# Only products take dots of whole numbers; tiles only they and attention in bf16.
VECTORS = [form for form in FORMS if form in ("own", "256 bits", "plain")]


@contextmanager
def built(form: str) -> Iterator[None]:
    """The library in another form."""
    if form == "own":
        yield
        return
    flags, functions = library.FLAGS, dict(library._functions)
    library.FLAGS = (*(flag for flag in flags if form != "plain" or flag != "-march=native"), *FORMS[form])
    library.library.cache_clear()
    library._functions.clear()
    try:
        assert library.available(), form
        yield
    finally:
        library.FLAGS = flags
        library.library.cache_clear()
        library._functions.clear()
        library._functions.update(functions)


@contextmanager
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three threads in every step, whatever would be quickest."""
    monkeypatch.setattr(replay, "most_threads", lambda network: torch.get_num_threads())
    monkeypatch.setattr(replay, "chosen_threads", lambda tape: tape.threads)
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


class Walk:
    """Steps of one kind after another, and the scores that they gave."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.scores: list[Tensor] = []

    def step(self, rows: list[int], chunks: list[list[int]], last: bool = True, plain: bool = False) -> None:
        """plain: not by the tape, unless only the tape sees the weights."""
        found = _extend(self.slots, rows, chunks, last, plain)
        self.scores += [found[at, : 1 if last else len(chunk)] for at, chunk in enumerate(chunks)]


def worst(scores: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The largest difference."""
    return max(float((one - other).abs().max()) for one, other in zip(scores, others, strict=True))


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
