"""States against a plain model of them: a list of tokens per row."""

from __future__ import annotations

import mmap
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.base.errors import UnsupportedError
from armillary.nn.state import FixedState, SpanState, zeros


def span(rows: int, capacity: int) -> SpanState:
    return SpanState({"k": torch.zeros(rows, 2, capacity, 3), "where": torch.zeros(rows, 1, capacity).long()})


def part(values: list[list[int]], width: int) -> dict[str, torch.Tensor]:
    """One number per token, spread over the features; places beyond a row's tokens hold −1."""
    numbers = torch.tensor([row + [-1] * (width - len(row)) for row in values])
    return {"k": numbers[:, None, :, None].expand(-1, 2, -1, 3).float(), "where": numbers[:, None]}


def agrees(state: SpanState, rows: list[list[int]]) -> None:
    assert state.lengths.tolist() == [len(row) for row in rows]
    assert state.batch == len(rows)
    assert state.longest == max(len(row) for row in rows)
    if state.uniform is not None:
        assert {len(row) for row in rows} == {state.uniform}
    for b, row in enumerate(rows):
        assert state.tensors["where"][b, 0, : len(row)].tolist() == row
        assert bool((state.tensors["k"][b, :, : len(row)] == torch.tensor(row).float()[None, :, None]).all())


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(0, 3), st.booleans())
def test_any_sequence_of_operations_is_that_of_lists(seed: int, capacity: int, gradients: bool) -> None:
    draw = random.Random(seed)
    state, rows, token = span(3, capacity), [[], [], []], 0
    kept: tuple[SpanState, list[list[int]]] | None = None
    with torch.set_grad_enabled(gradients):
        for _ in range(10):
            action = draw.choice(["append", "append", "ragged", "ragged", "select", "join", "keep", "restore", "cut"])
            if action in ("append", "ragged"):
                width = draw.randint(1, 4)
                counts = [width if action == "append" else draw.randint(0, width) for _ in rows]
                added = []
                for count in counts:
                    added.append(list(range(token, token + count)))
                    token += count
                lengths = None if action == "append" and draw.random() < 0.5 else torch.tensor(counts)
                views = state.append(part(added, width), lengths)
                rows = [row + more for row, more in zip(rows, added, strict=True)]
                assert views["k"].shape[2] == max(len(row) for row in rows)
            elif action == "select":
                chosen = [draw.randrange(len(rows)) for _ in range(draw.randint(1, 4))]
                state, rows, kept = state.select(torch.tensor(chosen)), [list(rows[i]) for i in chosen], None
            elif action == "join":
                other = span(1, draw.randint(0, 5))
                other.append(part([[token]], 1), None)
                state, rows, kept = SpanState.join([state, other]), [*rows, [token]], None
                token += 1
            elif action == "keep":
                kept = (state.snapshot(), [list(row) for row in rows])
            elif action == "restore" and kept is not None:
                state.restore(kept[0])
                rows = [list(row) for row in kept[1]]
            elif action == "cut":
                cuts = [draw.randint(0, len(row) + 1) for row in rows]
                state.truncate(torch.tensor(cuts))
                rows = [row[:cut] for row, cut in zip(rows, cuts, strict=True)]
            agrees(state, rows)


def test_growth_is_by_doubling_and_room_asked_for_is_kept() -> None:
    state = span(1, 4)
    with torch.no_grad():
        address = state.tensors["k"].data_ptr()
        for t in range(4):
            state.append(part([[t]], 1))
        assert state.tensors["k"].data_ptr() == address and state.capacity == 4
        state.append(part([[4]], 1))
        assert state.capacity == 8
        assert state.nbytes == 8 * (2 * 3 * 4 + 8)


def test_states_of_any_room_can_be_joined() -> None:
    """Joining must not round their rooms up to different sizes."""
    one, two = span(1, 7), span(1, 8)
    with torch.no_grad():
        one.append(part([[1, 2]], 2))
        two.append(part([[3]], 1))
    joined = SpanState.join([one, two])
    agrees(joined, [[1, 2], [3]])
    assert joined.capacity == 8


def test_only_a_span_can_be_cut() -> None:
    with pytest.raises(UnsupportedError, match="a fixed state cannot be truncated\n.*snapshot"):
        FixedState({"m": torch.zeros(2, 3)}).truncate(torch.tensor([0, 0]))


def test_fixed_states_are_written_or_replaced() -> None:
    state = FixedState({"m": torch.zeros(2, 3)})
    first = state.tensors["m"]
    with torch.no_grad():
        state.put("m", torch.ones(2, 3))
    assert state.tensors["m"] is first and bool((first == 1).all())
    value = torch.full((2, 3), 2.0, requires_grad=True)
    state.put("m", value)
    assert state.tensors["m"] is value and bool((first == 1).all())


@pytest.mark.skipif(not hasattr(mmap, "MADV_NOHUGEPAGE"), reason="there are no large pages here")
def test_the_first_token_takes_no_memory_of_those_to_come() -> None:
    """Where the system has large pages, it is not asked for them: one would hold all of a row."""
    held = zeros((4, 4, 4096, 64), torch.bfloat16, "cpu")
    assert held.shape == (4, 4, 4096, 64) and not held.any()  # read, which takes nothing yet

    def resident() -> int:
        found, here = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            head = line.split()[0]
            if "-" in head and ":" not in head:
                low, high = (int(end, 16) for end in head.split("-"))
                here = low <= held.data_ptr() < high
            elif here and head == "Anonymous:":
                found = 1024 * int(line.split()[1])
        return found

    before = resident()
    held[1, :, 0] = 1
    assert 0 < resident() - before <= 4 * mmap.PAGESIZE
    held[2] = 1
    assert resident() - before >= held[2].nbytes
