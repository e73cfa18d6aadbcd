"""The choice of the next token of each row, by one call of the C library; its plain form is engine/choosing.py's."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from ctypes import Structure, addressof, c_double, c_float, c_int32, c_int64, c_void_p, sizeof
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from armillary.native.library import function, library, members

_SIZES = {torch.float32: 4, torch.bfloat16: 2}
_ARGUMENTS = [c_void_p] * 4 + [c_int64, c_void_p, c_int64, c_int64, c_int32, c_int32]
TOP = 20  # alternatives, at the most
SPLIT = 1 << 16  # scores from which a second thread brings more than it costs


class Problem(IntEnum):
    """What became of a row; as in choice.c."""

    FINE = 0
    NOT_FINITE = 1
    NOTHING_LEFT = 2


class Ends(IntEnum):
    """What happens to the scores of the tokens that end an answer; as in choice.c."""

    LEAVE = 0
    FORBID = 1
    FORBID_UNLESS_ALL = 2
    ADD_TO = 3


class Row(Structure):
    """row_t of choice.c: what is asked, and the likeliest tokens."""

    _fields_ = (
        ("scores", c_void_p),
        ("bits", c_void_p),
        ("top_p", c_double),
        ("temperature", c_float),
        ("least", c_float),
        ("repetition", c_float),
        ("presence", c_float),
        ("frequency", c_float),
        ("end_amount", c_float),
        ("end_rule", c_int32),
        ("tops", c_int32),
        ("tokens", c_int64),
        ("top_k", c_int64),
        ("biased", c_int64),
        ("seen", c_int64),
        ("counted", c_int64),
        ("ends", c_int64),
        ("biased_ids", c_void_p),
        ("seen_ids", c_void_p),
        ("counted_ids", c_void_p),
        ("end_ids", c_void_p),
        ("biases", c_void_p),
        ("counts", c_void_p),
        ("top_ids", c_int32 * TOP),
        ("top_logprobs", c_float * TOP),
    )


class Found(Structure):
    """found_t of choice.c: what came of it."""

    _fields_ = (("problem", c_double), ("token", c_double), ("logprob", c_double))


_MIRROR = (
    "choice_mirror",
    {
        "TOP": TOP,
        **Problem.__members__,
        **Ends.__members__,
        **members("row_t", Row),
        **members("found_t", Found),
    },
)


class Sheet(NamedTuple):
    """Where scores lie: address of the first row, bytes between rows, scores of a row, whether in bf16."""

    address: int
    step: int
    width: int
    bf16: bool


def sheet(logits: Tensor) -> Sheet | None:
    """Of logits [n, V] or [n, 1, V]; None where the C library cannot read them: it is not there, or they are not on
    the CPU, in float32 or bf16, the numbers of a row side by side.

    Right after a step nothing of PyTorch is in the processor's caches, and what takes a tenth of a microsecond in a
    loop takes ten: so it is asked as little as can be.
    """
    size = _SIZES.get(logits.dtype)
    strides = logits.stride()
    if size is None or strides[-1] != 1 or not logits.is_cpu or library() is None:
        return None
    return Sheet(logits.data_ptr(), strides[0] * size, logits.shape[-1], size == 2)


class Rows:
    """Rows whose tokens are chosen together, again and again: what the call takes lies in one place.

    places: of the rows among the scores; draws: uniform in [0, 1), to be written before each choice. What pointers of
    a row name has to be there when a choice is made, and every id that a row names has to lie in the vocabulary.
    """

    def __init__(self, rows: Sequence[Row], places: Sequence[int]) -> None:
        self.rows, count = list(rows), len(rows)
        self.draws, self._found = array("d", bytes(8 * count)), array("d", bytes(sizeof(Found) * count))
        self._given = array("q", map(addressof, rows)), array("q", places)
        self.given = [one.buffer_info()[0] for one in self._given]
        self._at = [*self.given, *(one.buffer_info()[0] for one in (self.draws, self._found))]
        self._call = function("choose_rows", _ARGUMENTS, c_int32, _MIRROR)

    def move(self, row: int, place: int) -> None:
        """A row has another place."""
        self._given[1][row] = place

    def choose(self, scores: Sheet) -> list[float]:
        """Of each row three numbers, one after another: problem, token, log-probability."""
        count, threads = len(self.rows), self.threads(scores.width)
        if self._call(*self._at, count, scores.address, scores.step, scores.width, scores.bf16, threads):
            raise MemoryError("no memory for the choice of tokens")
        return self._found.tolist()

    def threads(self, width: int) -> int:
        """That choose from so many scores a row."""
        count = len(self.rows)
        return min(count, torch.get_num_threads()) if count * width >= SPLIT else 1
