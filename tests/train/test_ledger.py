"""The ledger's chain of hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from armillary.base.errors import DataError
from armillary.train import Ledger
from armillary.train.ledger import FIRST, verify


@pytest.fixture
def path(tmp_path: Path) -> Path:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for number in range(3):
        ledger.add("event", number=number, name="Über")
    return tmp_path / "ledger.jsonl"


def test_each_line_names_the_hash_of_the_one_before(path: Path) -> None:
    lines = path.read_bytes().splitlines()
    assert [json.loads(line)["previous"] for line in lines] == [
        FIRST,
        *(hashlib.sha256(line).hexdigest() for line in lines[:-1]),
    ]
    assert verify(path) == 3


def test_it_goes_on_where_it_was(path: Path) -> None:
    again = Ledger(path)
    again.add("more")
    last = again.last("event")
    assert verify(path) == 4 and last is not None and last["number"] == 2
    assert again.last("nothing") is None


@pytest.mark.parametrize(
    "change, line",
    [
        (lambda lines: [lines[0].replace(b'"number": 0', b'"number": 9'), *lines[1:]], 2),
        (lambda lines: lines[1:], 1),
        (lambda lines: [lines[0], lines[2]], 2),
        (lambda lines: [lines[1], lines[0], lines[2]], 1),
        (lambda lines: [lines[0], b"not json", lines[2]], 2),
        (lambda lines: [lines[0], b"[]", lines[2]], 2),
    ],
)
def test_changed_lines_are_found(path: Path, change: Callable[[list[bytes]], list[bytes]], line: int) -> None:
    path.write_bytes(b"".join(part + b"\n" for part in change(path.read_bytes().splitlines())))
    for act in (verify, Ledger):
        with pytest.raises(DataError, match=f"line {line}: this line does not follow"):
            act(path)


def test_an_unfinished_last_line_is_dropped(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"event": "ha')
    ledger = Ledger(path)
    assert path.read_bytes() == whole
    ledger.add("more")
    assert verify(path) == 4
