"""The ledger: what happened to a run, in order, each line sealed with the hash of the one before.

Lines are only ever added. Who changes, removes or reorders one breaks every later hash.
"""

from __future__ import annotations

import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from armillary.base.errors import DataError
from armillary.base.files import explained

FIRST = "0" * 64  # what the first line names as its predecessor


class Ledger:
    """`ledger.jsonl`: events with their facts.

    Opening it checks the whole chain; a last line that a crash left unfinished is dropped. Raises
    DataError with the number of the first line that does not follow from the one before it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        self.events = _checked(whole, self.path)
        self._last = _hash(whole.splitlines()[-1]) if self.events else FIRST
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))

    def add(self, event: str, **facts: Any) -> None:
        """Append an event, flushed to the disk before this returns."""
        entry = {
            "event": event,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            **facts,
            "previous": self._last,
        }
        line = json.dumps(entry, ensure_ascii=False).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with explained("writing", self.path), open(self.path, "ab") as file:
            start = file.tell()
            try:
                file.write(line + b"\n")
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(self.path, start)
                raise
        self._last = _hash(line)
        self.events.append(entry)

    def last(self, event: str) -> dict[str, Any] | None:
        """The latest event of this name."""
        return next((entry for entry in reversed(self.events) if entry["event"] == event), None)


def verify(path: str | Path) -> int:
    """How many lines the ledger has; raises DataError when one does not follow from the one before it."""
    return len(_checked(Path(path).read_bytes(), Path(path)))


def _checked(content: bytes, path: Path) -> list[dict[str, Any]]:
    previous, events = FIRST, []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            entry = json.loads(line)
            fits = entry["previous"] == previous and isinstance(entry["event"], str)
        except (ValueError, KeyError, TypeError):
            fits = False
        if not fits:
            raise DataError(
                "this line does not follow from the one before it: the ledger was changed",
                where=f"{path}, line {number}",
            )
        events.append(entry)
        previous = _hash(line)
    return events


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()
