"""Attention of the tape against its definition in float64, in every form of the library that this processor has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from native_parts import FORMS, built
from torch import Tensor

from armillary.native import available
from armillary.native.tape import tiles
from armillary.nn.tape import Tape

pytestmark = pytest.mark.skipif(not available(), reason="there is no C compiler here")
DOTS = "256 bits without dots"  # which attention has none of


def looked(q: Tensor, k: Tensor, v: Tensor, place: int, how: dict[str, Any]) -> Tensor:
    """Attention of one query [H, K] at `place` over a ring [G, room, K] by its definition, float64; where a place
    was overwritten by a later one nothing is asked of it."""
    first = max(0, place - how.get("back", place))
    slots = torch.arange(first, place + 1) % k.shape[1]
    heads = torch.arange(len(q)) // (len(q) // len(k))
    keys, values = k[:, slots].double()[heads], v[:, slots].double()[heads]
    scores = (keys @ q.double()[:, :, None])[..., 0] * how["scale"]
    if "softcap" in how:
        scores = how["softcap"] * torch.tanh(scores / how["softcap"])
    if "slopes" in how:
        distance = place - torch.arange(first, place + 1)
        scores = scores - torch.tensor(how["slopes"], dtype=torch.float64)[:, None] * distance
    if "sinks" in how:
        scores = torch.cat([scores, how["sinks"].double()[:, None]], 1)
        values = torch.cat([values, torch.zeros_like(values[:, :1])], 1)
    return (scores.softmax(1)[:, None] @ values)[:, 0]


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"back": 37},
    "narrow": {"back": 3},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -3.0])},
    "slopes": {"slopes": [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.0]},
    "softcap": {"softcap": 1.5},
    "all": {
        "back": 70,
        "softcap": 3.0,
        "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -3.0]),
        "slopes": [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.0],
    },
}
# Of each call: the slot, the first place and the number of tokens of each sequence.
CALLS: list[list[tuple[int, int, int]]] = [
    [(0, 0, 1)],
    [(0, 0, 9), (2, 63, 3)],
    [(0, 60, 20), (1, 5, 1), (2, 130, 1)],
    [(1, 127, 1), (2, 128, 1)],
    [(0, 191, 40)],
]


HEADS, MOST, SLOTS = 6, 40, 3
GRIDS = [(width, *how) for how in ((1, 1), (1, 3), (2, 3), (6, 1)) for width in (64, 32, 48, 6)]
# Of other forms: whole vectors, stripes of several widths, and columns that are left over.
FEW = [(64, 1, 3), (48, 2, 3), (6, 6, 1)]


@cache
def given(way: str, dtype: torch.dtype, width: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [MOST, HEADS, K]; keys and values in a ring that is a little longer than the window and the tokens of a
    call, or with room for all."""
    room = WAYS[way]["back"] + MOST + 1 if "back" in WAYS[way] else 240
    generator = torch.Generator().manual_seed(width + groups)
    q = torch.randn(MOST, HEADS, width, generator=generator) * 2
    k, v = (torch.randn(SLOTS, groups, room, width, generator=generator).to(dtype) for _ in range(2))
    return q, k, v


@cache
def exact(way: str, dtype: torch.dtype, width: int, groups: int) -> list[Tensor]:
    """Of each call's rows."""
    q, k, v = given(way, dtype, width, groups)
    how = {"scale": width**-0.5, **WAYS[way]}
    rows = [tokens(sequences) for sequences in CALLS]
    return [
        torch.stack([looked(q[row], k[slot], v[slot], place, how) for row, (slot, place) in enumerate(each)])
        for each in rows
    ]


def tokens(sequences: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Slot and place of each."""
    return [(slot, place) for slot, first, count in sequences for place in range(first, first + count)]


def attending(q: Tensor, k: Tensor, v: Tensor, threads: int, **how: Any) -> Callable[..., Tensor]:
    """What gives attention [rows, H, K] of the first queries, or of those named, at slots and places."""
    heads, width = q.shape[1:]
    tape = Tape(len(q), 240, threads=threads)
    tape.close(tape.attend(tape.embed(q.flatten(1)), k, v, heads, **how))

    def run(at: list[tuple[int, int]], rows: Sequence[int] | None = None) -> Tensor:
        slots, places = zip(*at, strict=True)
        # nothing is picked: the rows are read where they were computed
        tape.run(slots, places, range(len(at)) if rows is None else rows, [])
        return tape._logits.tensor.view(-1)[: len(at) * heads * width].view(len(at), heads, width).clone()

    return run


@pytest.mark.parametrize(
    ("form", "width", "groups", "threads"),
    [(form, *how) for form in FORMS if form != DOTS for how in (GRIDS if form == "own" else FEW)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_attention_against_its_definition(
    way: str, dtype: torch.dtype, form: str, width: int, groups: int, threads: int
) -> None:
    """And every query gives the same bits alone as among others."""
    q, k, v = given(way, dtype, width, groups)
    expected = exact(way, dtype, width, groups)
    with built(form):
        run = attending(q, k, v, threads, scale=width**-0.5, **WAYS[way])
        rounded = dtype == torch.bfloat16 and form == "own" and tiles() and width % 32 == 0
    # float32 sums; tiles round weights to bf16, each to within 2^-9 of its size
    close = 2.0**-8 * float(v.abs().max()) if rounded else 1e-5
    for sequences, right in zip(CALLS, expected, strict=True):
        rows = tokens(sequences)
        found = run(rows)
        assert (found.double() - right).abs().max() < close
        for row, token in enumerate(rows):
            assert torch.equal(run([token], [row])[0], found[row]), "alone against together"


@pytest.mark.parametrize("form", [form for form in FORMS if form != DOTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_attention_leaves_alone_what_nobody_looks_at(dtype: torch.dtype, form: str) -> None:
    """What lies in a slot beyond a sequence, and before its window, may be anything."""
    generator = torch.Generator().manual_seed(1)
    k, v = (torch.randn(1, 2, 200, 64, generator=generator).to(dtype) for _ in range(2))
    k[:, :, :60], v[:, :, :60], k[:, :, 111:], v[:, :, 111:] = torch.nan, torch.inf, torch.inf, torch.nan
    with built(form):
        run = attending(torch.randn(10, 2, 64, generator=generator), k, v, 1, scale=0.1, back=41)
    assert run([(0, place) for place in range(101, 111)]).isfinite().all()


@pytest.mark.parametrize("form", [form for form in FORMS if form != DOTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_what_is_no_number_reaches_only_those_who_look_at_it(dtype: torch.dtype, form: str) -> None:
    """Of the tokens of one call those before it do not, nor those whose window begins behind it."""
    generator = torch.Generator().manual_seed(2)
    k, v = (torch.randn(1, 2, 200, 64, generator=generator).to(dtype) for _ in range(2))
    q = torch.randn(30, 4, 64, generator=generator)
    places = range(95, 125)
    for back in (200, 41):
        for spoilt, place, value in ((v, 106, torch.nan), (v, 128 - 64, torch.inf), (k, 110, torch.nan)):
            with built(form):
                clean = attending(q, k, v, 2, scale=0.1, back=back)([(0, place) for place in places])
                kept = spoilt[0, 1, place, 5].clone()
                spoilt[0, 1, place, 5] = value
                found = attending(q, k, v, 2, scale=0.1, back=back)([(0, place) for place in places])
                spoilt[0, 1, place, 5] = kept
            for row, own in enumerate(places):
                right = clean[row].clone()
                if 0 <= own - place <= back:
                    assert not found[row, 2:, 5].isfinite().any()
                    columns = slice(None) if spoilt is k else 5
                    right[2:, columns] = found[row, 2:, columns]
                assert torch.equal(found[row].nan_to_num(), right.nan_to_num()), (back, value, own)
