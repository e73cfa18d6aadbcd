"""Attention of the tape over blocks of queries, against its definition in float64; and a query gets the same bits
alone as beside others.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.native import available
from armillary.nn.tape import Tape

pytestmark = pytest.mark.skipif(not available(), reason="there is no C compiler here")


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


@pytest.mark.parametrize(("groups", "threads"), [(1, 1), (1, 3), (2, 3), (6, 1)])
@pytest.mark.parametrize("width", [64, 32, 48, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_attention_against_its_definition(way: str, dtype: torch.dtype, width: int, groups: int, threads: int) -> None:
    how, heads, most, slots = {"scale": width**-0.5, **WAYS[way]}, 6, 40, 3
    # a ring that is a little longer than the window and the tokens of a call, else room for all
    room = how["back"] + most + 1 if "back" in how else 240
    generator = torch.Generator().manual_seed(width + groups)
    q = torch.randn(most, heads * width, generator=generator) * 2
    k, v = (torch.randn(slots, groups, room, width, generator=generator).to(dtype) for _ in range(2))
    tape = Tape(most, 240, threads=threads)
    tape.close(tape.attend(tape.embed(q), k, v, heads, **how))

    def run(sequences: list[tuple[int, int, int]], rows: list[int]) -> Tensor:
        at = [slot for slot, _, count in sequences for _ in range(count)]
        places = [first + step for _, first, count in sequences for step in range(count)]
        # nothing is picked: the rows are read where they were computed
        tape.run(at, places, rows, [])
        return tape._logits.tensor.view(-1)[: len(rows) * heads * width].view(len(rows), heads, width).clone()

    for sequences in CALLS:
        rows = list(range(sum(count for _, _, count in sequences)))
        found, row = run(sequences, rows), 0
        for slot, first, count in sequences:
            for place in range(first, first + count):
                expected = looked(q[row].view(heads, width), k[slot], v[slot], place, how)
                # float32 sums; tiles round weights to bf16, each to within 2^-9 of its size
                close = 1e-5 if dtype == torch.float32 else 2.0**-8 * float(v.abs().max())
                assert (found[row].double() - expected).abs().max() < close
                assert torch.equal(run([(slot, place, 1)], [row])[0], found[row]), "alone against together"
                row += 1


@torch.no_grad()
def test_attention_leaves_alone_what_nobody_looks_at() -> None:
    """What lies in a slot beyond a sequence, and before its window, may be anything."""
    for dtype in (torch.float32, torch.bfloat16):
        k, v = (torch.randn(1, 2, 200, 64).to(dtype) for _ in range(2))
        k[:, :, :60], v[:, :, :60], k[:, :, 111:], v[:, :, 111:] = torch.nan, torch.inf, torch.inf, torch.nan
        tape = Tape(10, 200, threads=1)
        tape.close(tape.attend(tape.embed(torch.randn(10, 128)), k, v, 2, scale=0.1, back=41))
        tape.run([0] * 10, list(range(101, 111)), list(range(10)), [])
        assert tape._logits.tensor.view(-1)[: 10 * 128].isfinite().all()
