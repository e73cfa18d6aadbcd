"""Files that survive a crash: written aside, flushed, then renamed; and paths that stay inside their folder."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from armillary.base.errors import ArmillaryError, InputError


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def explained(action: str, path: Path) -> Iterator[None]:
    """Turn the operating system's refusals (full disk, no permission) into one clear message."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some space and run again; what was there before is untouched"
            raise ArmillaryError(f"the disk is full while {action}", where=str(path), hint=hint) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ArmillaryError(f"no permission while {action}", where=str(path)) from error
        raise


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a whole file so that a reader or a crash sees either the old content or the new."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    with explained("writing", path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
        sync_folder(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name; it appears as `path` only when the block succeeds.

    A folder already there is replaced only at the very end, and put back if that fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with explained("writing", path):
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield temporary
            for folder, _, files in os.walk(temporary):
                for file in files:
                    with open(os.path.join(folder, file), "rb") as handle:
                        os.fsync(handle.fileno())
                sync_folder(Path(folder))
            os.chmod(temporary, 0o755)
            if path.exists():
                old = path.with_name(f".{path.name}.old-{os.getpid()}")
                os.replace(path, old)
                try:
                    os.replace(temporary, path)
                except BaseException:
                    os.replace(old, path)
                    raise
                shutil.rmtree(old)
            else:
                os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def confined(root: Path, name: str) -> Path:
    """`root / name`, refused when it would leave `root` (absolute paths, `..`, links)."""
    base = root.resolve()
    target = (base / name).resolve()
    if not target.is_relative_to(base):
        raise InputError(f"'{name}' leads outside {root}", hint="name a file inside this folder")
    return target
