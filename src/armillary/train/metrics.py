"""`metrics.jsonl`, `samples.jsonl`: lines of JSON that belong to a step; and the same in TensorBoard on demand."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from armillary.base.errors import SettingsError
from armillary.base.files import write_atomic


class StepLines:
    """Appends lines with a `step`; `steps_done` is where the run goes on, and lines beyond it are dropped.

    So a resumed run's file equals that of a run that was never interrupted. A full disk does not end
    a run: lines wait in memory, and `notice` hears of it once.
    """

    def __init__(self, path: Path, steps_done: int = 0, *, notice: Callable[[str], None] = lambda text: None) -> None:
        self.path, self._notice = path, notice
        self._waiting: list[bytes] = []
        self._complained = False
        kept = [line for line in _lines(path) if _step(line) is not None and (_step(line) or 0) <= steps_done]
        if path.exists() or kept:
            write_atomic(path, b"".join(kept))

    def add(self, line: Mapping[str, Any]) -> None:
        """Write one line; numbers that are not finite become null, which JSON can say."""
        clean = {name: None if isinstance(v, float) and v - v != 0 else v for name, v in line.items()}
        self._waiting.append(json.dumps(clean, ensure_ascii=False).encode() + b"\n")
        self.flush()

    def flush(self) -> None:
        """Write the lines that wait for room, if any."""
        if not self._waiting:
            return
        try:
            with open(self.path, "ab") as file:
                start = file.tell()
                try:
                    file.write(b"".join(self._waiting))
                    file.flush()
                except OSError:
                    os.truncate(self.path, start)
                    raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if not self._complained:
                self._complained = True
                self._notice("the disk is full: metrics wait in memory until there is room")
            return
        self._waiting.clear()
        self._complained = False


def read(path: str | Path) -> list[dict[str, Any]]:
    """All whole lines of such a file."""
    return [json.loads(line) for line in _lines(Path(path)) if _step(line) is not None]


class Board:
    """TensorBoard events of every number in a line; raises SettingsError when TensorBoard is not installed."""

    def __init__(self, folder: Path, steps_done: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise SettingsError(
                "TensorBoard is not installed",
                path=("training", "tensorboard"),
                hint="pip install 'armillary[tensorboard]', or set training.tensorboard=false",
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=steps_done + 1 if steps_done else None)

    def add(self, line: Mapping[str, Any]) -> None:
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, line["step"])

    def text(self, step: int, prompt: str, text: str) -> None:
        self._writer.add_text("sample", prompt + text, step)

    def close(self) -> None:
        self._writer.close()


def _lines(path: Path) -> Iterator[bytes]:
    if path.exists():
        yield from (line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n"))


def _step(line: bytes) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None
