"""Files: whole or not at all, whatever goes wrong and whenever; and names that stay inside."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from armillary.base import files
from armillary.base.errors import ArmillaryError, InputError
from armillary.base.files import confined, explained, new_folder, write_atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.txt"
    write_atomic(path, "first – ü")
    assert path.read_text(encoding="utf-8") == "first – ü"
    write_atomic(path, b"\x00second")
    assert path.read_bytes() == b"\x00second" and names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("at", ["fsync", "replace", "chmod"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "old")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, at, full)
    with pytest.raises(ArmillaryError, match="the disk is full while writing") as caught:
        write_atomic(path, "new")
    assert caught.value.where == str(path) and caught.value.hint
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_refusals_are_explained_and_other_errors_are_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(ArmillaryError, match="no permission while reading"), explained("reading", tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(OSError, match="odd"), explained("reading", tmp_path):
        raise OSError(errno.EIO, "odd")


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "run"
    with new_folder(target) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("1")
        assert not target.exists()
    assert (target / "inner" / "a").read_text() == "1"
    assert target.stat().st_mode & 0o777 == 0o755
    with new_folder(target) as folder:
        (folder / "b").write_text("2")
        assert names(target) == ["inner"]
    assert names(target) == ["b"] and names(tmp_path) == ["run"]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "run"
    with new_folder(target) as folder:
        (folder / "a").write_text("old")

    def fails_midway() -> None:
        with new_folder(target) as folder:
            (folder / "a").write_text("new")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fails_midway()
    assert (target / "a").read_text() == "old" and names(tmp_path) == ["run"]


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "run"
    with new_folder(target) as folder:
        (folder / "a").write_text("old")
    real, calls = os.replace, []

    def second_fails(source: object, destination: object) -> None:
        calls.append(destination)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, destination)  # type: ignore[arg-type]

    monkeypatch.setattr(files.os, "replace", second_fails)
    with pytest.raises(ArmillaryError, match="disk is full"), new_folder(target) as folder:
        (folder / "a").write_text("new")
    assert (target / "a").read_text() == "old" and names(tmp_path) == ["run"]


def test_a_reader_never_sees_a_part_and_a_kill_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "0" * 200_000)
    code = (
        "import sys; from pathlib import Path; from armillary.base.files import write_atomic\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1; write_atomic(Path(sys.argv[1]), str(n % 10) * 200_000)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(files.__file__).parents[2])}
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], env=environment)
    try:
        seen: set[str] = set()
        end = time.monotonic() + 20
        while len(seen) < 4 and time.monotonic() < end:
            text = path.read_text()
            assert len(text) == 200_000 and len(set(text)) == 1
            seen.add(text[0])
        assert len(seen) >= 4
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    text = path.read_text()
    assert len(text) == 200_000 and len(set(text)) == 1


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "x/../../a", "link/a", ".."])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match="leads outside"):
        confined(root, name)


@pytest.mark.parametrize("name", ["a", "x/y", "x/../a", "..a"])
def test_a_name_inside_the_folder_is_taken(tmp_path: Path, name: str) -> None:
    assert confined(tmp_path, name).is_relative_to(tmp_path.resolve())
