"""The latest result of each benchmark, out of benchmarks/results.jsonl, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results.jsonl"
RELIABILITY, CAMPAIGN = "reliability_", "campaign_"  # what records begin with that have pages of their own


def latest(path: Path = RESULTS) -> list[dict[str, Any]]:
    """The last record of each benchmark, in the order in which they first appear."""
    found: dict[str, dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                record = json.loads(line)
                found[record["benchmark"]] = record
    return list(found.values())


def judged(record: dict[str, Any], figure: str) -> tuple[str, str]:
    """(goal, whether it was reached) of one figure; empty where it has none."""
    goal = record.get("reach", {}).get(figure)
    if goal is None:
        return "", ""
    value, bound = record["figures"][figure], goal["bound"]
    least = goal["kind"] == "min"
    met = value >= bound if least else value <= bound
    return f"{'≥' if least else '≤'} {bound:g}", "reached" if met else "**missed**"


def measured(record: dict[str, Any]) -> list[str]:
    """Lines of a record: its figures beside their goals, the date and the machine."""
    rows = [[figure, shown(value), *judged(record, figure)] for figure, value in record["figures"].items()]
    when = record["time"].partition("T")[0]
    threads = f"{record['threads']} thread{'s' * (record['threads'] != 1)}"
    lines = table(["figure", "measured", "goal", ""], rows)
    return [*lines, "", f"{when}, {record['processor']}, {threads}, PyTorch {record['torch']}."]


def shown(value: Any) -> str:
    """A figure with three or four meaning digits."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a Markdown table; bars inside cells are escaped."""
    lines = [list(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return [f"| {' | '.join(line)} |" for line in lines]
