"""Lines of metrics: cut back on resuming, clean JSON, patient with a full disk."""

from __future__ import annotations

import json
from pathlib import Path

from armillary.train.metrics import StepLines, read


def test_lines_beyond_the_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = StepLines(path)
    for step in (2, 4, 6):
        lines.add({"step": step, "loss": step / 3})
    with path.open("ab") as file:
        file.write(b'{"step": 8, "lo')
    kept = path.read_bytes().splitlines()[:2]
    StepLines(path, 4)
    assert path.read_bytes().splitlines() == kept
    assert [line["loss"] for line in read(path)] == [2 / 3, 4 / 3]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    StepLines(path).add({"step": 1, "loss": float("nan"), "norm": float("inf"), "name": "Über"})
    assert json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: 1 / 0) == {
        "step": 1,
        "loss": None,
        "norm": None,
        "name": "Über",
    }


def test_read_passes_over_what_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n[]\n{"loss": 1}\n{"step": 2}')
    assert read(path) == [{"step": 1}]
    assert read(tmp_path / "none") == []
