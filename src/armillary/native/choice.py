"""The choice of the next token of each row, by one call of the C library; its plain form is engine/sampling.py's."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, addressof, c_double, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum

import torch
from torch import Tensor

from armillary.native.library import function

TOP = 20  # alternatives, at the most
SPLIT = 1 << 16  # scores from which a second thread brings more than it costs


class Problem(IntEnum):
    """What became of a row; the order is that of choice.c."""

    FINE = 0
    NOT_FINITE = 1
    NOTHING_LEFT = 2


class Ends(IntEnum):
    """What happens to the scores of the tokens that end an answer; the order is that of choice.c."""

    LEAVE = 0
    FORBID = 1
    FORBID_UNLESS_ALL = 2
    ADD_TO = 3


class Row(Structure):
    """row_t of choice.c: what is asked, and what was chosen."""

    _fields_ = (
        ("logits", c_void_p),
        ("scores", c_void_p),
        ("draw", c_double),
        ("top_p", c_double),
        ("temperature", c_float),
        ("least", c_float),
        ("repetition", c_float),
        ("presence", c_float),
        ("frequency", c_float),
        ("end_amount", c_float),
        ("end_rule", c_int32),
        ("tops", c_int32),
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
        ("token", c_int64),
        ("logprob", c_float),
        ("problem", c_int32),
        ("top_ids", c_int32 * TOP),
        ("top_logprobs", c_float * TOP),
    )


def choose_rows(logits: Tensor, rows: Sequence[Row], places: Sequence[int]) -> None:
    """Tokens for rows `places` of logits [n, V], float32 or bf16 on the CPU, the numbers of a row side by side. What
    pointers name has to be there until then, and every id that a row names has to lie in the vocabulary."""
    width, count = logits.shape[1], len(rows)
    start, step = logits.data_ptr(), logits.stride(0) * logits.element_size()
    for row, place in zip(rows, places, strict=True):
        row.logits = start + place * step
    call = function("choose_rows", [c_void_p, c_int64, c_int64, c_int32, c_int32], c_int32)
    threads = min(count, torch.get_num_threads()) if count * width >= SPLIT else 1
    pointers = (c_void_p * count)(*map(addressof, rows))
    if call(pointers, count, width, logits.dtype == torch.bfloat16, threads):
        raise MemoryError("no memory for the choice of tokens")
