"""Products of the tape in every form that this processor has, against float64 over exactly the numbers held.

The forms are the same source, built without what other processors do not have. What a row gives is the
same bits whoever stands beside it. Whole numbers are exact, so forms agree bit for bit in int8; so do those
with fused multiplication in the other kinds, but for bf16 in tiles, where a number of a row is split in two.
"""

from __future__ import annotations

import mmap
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from native_parts import FORMS, built
from torch import Tensor

from armillary.native import available
from armillary.native import tape as native
from armillary.nn import tape as writer
from armillary.nn.tape import Tape

pytestmark = pytest.mark.skipif(not available(), reason="there is no C compiler here")
KINDS = ("float32", "bf16", "float16", "int8", "int4")
FUSED = [form for form in FORMS if form != "plain"]
# inputs, outputs, columns that one thread must have together
SHAPES = [(64, 48, None), (200, 112, 7), (40, 13, None), (7, 5, None), (1, 33, None), (160, 288, 24)]
ROWS = 40


@cache
def given(inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of very different sizes, weights and a bias."""
    generator = torch.Generator().manual_seed(inputs)
    x = torch.randn(ROWS, inputs, generator=generator) * torch.logspace(-2, 2, ROWS)[:, None]
    weight = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
    return x, weight, torch.randn(outputs, generator=generator)


@cache
@torch.no_grad()
def found(form: str, weights: Any, shape: tuple[int, int, int | None], bias: bool = True) -> dict[int, Tensor]:
    """The first so many rows' products, by their number."""
    inputs, outputs, unit = shape
    x, weight, shift = given(inputs, outputs)
    with built(form):
        tape = Tape(ROWS, 1, weights=weights, threads=2)
        product = tape.product(tape.pick(tape.embed(x)), weight, shift if bias else None, unit=unit, factor=0.5)
        tape.close(product)
        counts = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 20, 24, 31, 32, 33, ROWS)
        return {
            count: tape.run([0] * count, [0] * count, list(range(count)), list(range(count))).clone()
            for count in counts
        }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_against_the_numbers_they_hold(form: str, weights: str, shape: tuple[int, int, int | None]) -> None:
    inputs, outputs, _ = shape
    x, weight, bias = given(inputs, outputs)
    taken, lost = x.double(), 0.0
    if weights in ("int8", "int4"):
        scale = x.abs().amax(1, keepdim=True)
        taken = (x * (127 / scale)).round().double() * (scale / 127).double()
    elif weights == "bf16" and form == "own" and native.tiles():
        lost = 2.0**-17  # of a number, behind the two of 8 bits that stand for it
    numbers = native.as_held(weight, weights)  # type: ignore[arg-type]
    expected = 0.5 * (taken @ numbers.T) + bias.double()
    # a sum of n float32 terms is off by at most n roundings of their sizes, and three more of scales and bias
    bound = ((inputs + 3) * 2.0**-24 + lost) * (taken.abs() @ numbers.abs().T + bias.abs().double())
    for count, rows in found(form, weights, shape).items():
        assert ((rows.double() - expected[:count]).abs() <= bound[:count]).all(), count


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_row_does_not_depend_on_its_neighbours(form: str, weights: str, shape: tuple[int, int, int | None]) -> None:
    made = found(form, weights, shape)
    for count, rows in made.items():
        assert torch.equal(rows, made[ROWS][:count]), count


@pytest.mark.parametrize("shape", SHAPES)
def test_forms_agree_bit_for_bit(shape: tuple[int, int, int | None]) -> None:
    for weights in KINDS:
        forms = list(FORMS) if weights == "int8" else FUSED
        if weights == "bf16" and native.tiles():
            forms = forms[1:]
        for form in forms:
            alike = torch.equal(found(form, weights, shape, False)[ROWS], found(forms[0], weights, shape, False)[ROWS])
            assert alike, (weights, form)


@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_poisoned_rows_stay_alone(form: str, weights: Any) -> None:
    x, weight = torch.randn(20, 64), torch.randn(24, 64)
    spoilt = x.clone()
    spoilt[1, 5], spoilt[17, 60] = torch.nan, torch.inf
    with built(form):
        tape = Tape(40, 1, weights=weights, threads=1)
        tape.close(tape.product(tape.pick(tape.embed(torch.cat([x, spoilt]))), weight))
        clean, poisoned = (
            tape.run([0] * 20, [0] * 20, list(range(start, start + 20)), list(range(20))).clone() for start in (0, 20)
        )
    others = [row for row in range(20) if row not in (1, 17)]
    assert not poisoned[1].isfinite().any() and not poisoned[17].isfinite().any()
    assert torch.equal(poisoned[others], clean[others])


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_every_number_of_16_bits(form: str) -> None:
    """All that there are, read as weights; and float32 numbers between them, written as states: as PyTorch has them."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    finite, width = torch.where(numbers.isfinite(), numbers, 0).view(-1, 16), 16
    between = (
        numbers.float().repeat(3) * torch.tensor([1 + 2.0**-11, 1 + 2.0**-12, 1 - 2.0**-11]).repeat_interleave(2**16)
    ).view(-1, width)
    written = torch.zeros(1, 1, len(between), width, dtype=torch.float16)
    with built(form):
        tape = Tape(width, 1, weights="float16", threads=1)
        tape.close(tape.product(tape.pick(tape.embed(torch.eye(width))), finite))
        read = tape.run([0] * width, [0] * width, list(range(width)), list(range(width))).clone()
        tape = Tape(len(between), len(between), threads=1)
        x = tape.embed(between)
        tape.append(written, x)
        tape.close(tape.pick(x))
        every = list(range(len(between)))
        tape.run([0] * len(between), every, every, [0])
    assert torch.equal(read, finite.float().T)
    expected = between.half()
    assert torch.equal(written[0, 0].isnan(), expected.isnan())
    assert torch.equal(written[0, 0].nan_to_num(0), expected.nan_to_num(0))


@torch.no_grad()
def test_where_tiles_are_refused_vectors_take_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "tiles", lambda: False)
    shape = (200, 112, 7)
    x, weight, bias = given(*shape[:2])
    for weights in KINDS:
        tape = Tape(ROWS, 1, weights=weights, threads=2)  # type: ignore[arg-type]
        tape.close(tape.product(tape.pick(tape.embed(x)), weight, bias, unit=7, factor=0.5))
        rows = tape.run([0] * ROWS, [0] * ROWS, list(range(ROWS)), list(range(ROWS)))
        assert torch.equal(rows, found("without tiles" if "without tiles" in FORMS else "own", weights, shape)[ROWS])


@torch.no_grad()
def test_tiles_are_handed_back() -> None:
    """PyTorch's own products in bf16 set the same tiles up for themselves."""
    x, weight = torch.randn(300, 320).bfloat16(), torch.randn(96, 320).bfloat16()
    tape = Tape(9, 1, weights="bf16", threads=1)
    tape.close(tape.product(tape.pick(tape.embed(x.float())), weight))
    before = torch.nn.functional.linear(x, weight)
    first = tape.run([0] * 9, [0] * 9, list(range(9)), list(range(9))).clone()
    assert torch.equal(torch.nn.functional.linear(x, weight), before)
    assert torch.equal(tape.run([0] * 9, [0] * 9, list(range(9)), list(range(9))), first)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="there are no large pages here")
def test_weights_ask_for_large_pages() -> None:
    part = native.Memory().take(100)
    lines = Path("/proc/self/smaps").read_text().splitlines()
    flags: list[str] = []
    for line in lines:
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            low, high = (int(end, 16) for end in line.split()[0].split("-"))
            here = low <= part.data_ptr() < high
        elif line.startswith("VmFlags:") and here:
            flags = line.split()[1:]
    assert "hg" in flags and "sh" not in flags  # asked for, and not shared: those are governed otherwise


def test_weights_lie_in_lines_of_the_cache_and_apart() -> None:
    memory = native.Memory()
    parts = [memory.take(size) for size in (100, 64, 1, native.Memory.PIECE + 5, 70)]
    for at, part in enumerate(parts):
        assert part.data_ptr() % 64 == 0
        part.fill_(at)
    assert [len(part) for part in parts] == [100, 64, 1, native.Memory.PIECE + 5, 70]
    assert all(bool((part == at).all()) for at, part in enumerate(parts))
