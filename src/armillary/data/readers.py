"""Readers: files of many kinds as one stream of documents, in an order that only the names decide.

Nothing here grows with the corpus: files are walked, read and cut as they come. What is not text
(binary or mis-encoded files and records) is named, skipped and counted; a file that promises
a structure and breaks it (JSONL, Parquet, a saved dataset) is a DataError with its place.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import json
import os
import stat
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import IO, Any

from armillary.base.errors import ArmillaryError, DataError, nearest
from armillary.base.files import confined
from armillary.data.settings import STDLIB, SourceSettings

JSONL = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
STDLIB_EXCLUDED = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
DEFAULT_INCLUDE = {"jsonl": tuple(f"*{ending}" for ending in JSONL), "parquet": ("*.parquet",)}
LONGEST_DOCUMENT = 2**20
SHORTEST_CUT = 2**12
CUTS = 64  # a text source is cut so that this many documents could share it
LONGEST_LINE = 2**28
BLOCK = 2**20
NAMES_KEPT = 200
BOM = codecs.BOM_UTF8


@dataclass(frozen=True)
class SourceFile:
    """One file of a source: where it lies, its name inside the source, how it is read, its size and age."""

    path: Path
    name: str
    kind: str
    size: int
    modified: int


@dataclass
class Skipped:
    """What was left out and why: a count, and the first names."""

    count: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        self.count += 1
        if len(self.names) < NAMES_KEPT:
            self.names.append(f"{name}: {reason}")


class Reader:
    """The documents of one source.

    `files()` walks it; `documents()` yields (UTF-8 bytes of one document, its name) and sets `consumed`
    (bytes of files read so far), `skipped` and `empty` as it goes. `avoid` is a folder that is never
    entered (where the prepared corpus is written). Raises DataError.
    """

    def __init__(self, settings: SourceSettings, *, max_document: int | None = None, avoid: Path | None = None) -> None:
        self.settings = settings
        self.max_document = max_document
        self.avoid = os.path.realpath(avoid) if avoid is not None else None
        self.root, self.include, self.exclude = _place(settings)
        self.consumed = 0
        self.empty = 0
        self.skipped = Skipped()

    def files(self) -> Iterator[SourceFile]:
        """Every file to read, in the order of their names."""
        if not self.root.exists():
            raise DataError(
                "there is no such file or folder", where=str(self.root), hint=f"relative paths start at {Path.cwd()}"
            )
        if self._is_dataset():
            yield from _dataset_files(self.root, self.include)
        elif self.root.is_dir():
            yield from self._walk(self.root, "", set())
        else:
            yield self._file(self.root, self.root.name, self.root.stat())

    def survey(self) -> tuple[str, int]:
        """(digest of every file's name, size and time of change; bytes in total), without reading contents."""
        digest, total = hashlib.sha256(), 0
        for file in self.files():
            digest.update(f"{file.name}|{file.size}|{file.modified}|{file.kind}\n".encode())
            total += file.size
        return digest.hexdigest(), total

    def documents(self) -> Iterator[tuple[bytes, str]]:
        text_limit = self._text_limit()
        record_limit = self.max_document or LONGEST_DOCUMENT
        self.consumed, self.empty, self.skipped = 0, 0, Skipped()
        for file in self.files():
            before = self.consumed
            found = self._text(file, text_limit) if file.kind == "text" else self._records(file, record_limit)
            try:
                for data, name in found:
                    if data.isspace() or not data:
                        self.empty += 1
                    else:
                        yield data, name
            except PermissionError:
                self.skipped.add(file.name, "no permission")
            except OSError as error:
                raise DataError(f"this file cannot be read: {error.strerror}", where=str(file.path)) from error
            self.consumed = before + file.size

    def _is_dataset(self) -> bool:
        kind = self.settings.format
        if kind == "auto":
            return any((self.root / name).is_file() for name in ("state.json", "dataset_dict.json")) and (
                (self.root / "dataset_info.json").is_file() or (self.root / "dataset_dict.json").is_file()
            )
        return kind == "dataset"

    def _text_limit(self) -> int:
        if self.max_document is not None:
            return self.max_document
        total = sum(file.size for file in self.files() if file.kind == "text")
        return min(max(total // CUTS, SHORTEST_CUT), LONGEST_DOCUMENT)

    def _walk(self, folder: Path, prefix: str, seen: set[tuple[int, int]]) -> Iterator[SourceFile]:
        status = os.stat(folder)
        seen.add((status.st_dev, status.st_ino))  # each real folder once: links cannot loop
        try:
            with os.scandir(folder) as entries:
                names = sorted((entry.name for entry in entries), key=os.fsencode)
        except PermissionError:
            self.skipped.add(_shown(prefix or "."), "no permission")
            return
        for plain in names:
            path, name = folder / plain, prefix + plain
            if plain.startswith(".") or _matches(name, self.exclude):
                continue
            try:
                status = os.stat(path)
            except OSError:
                self.skipped.add(_shown(name), "a link that leads nowhere")
                continue
            if stat.S_ISDIR(status.st_mode):
                new = (status.st_dev, status.st_ino) not in seen
                if new and (self.avoid is None or os.path.realpath(path) != self.avoid):
                    yield from self._walk(path, f"{name}/", seen)
            elif stat.S_ISREG(status.st_mode) and (not self.include or _matches(name, self.include)):
                yield self._file(path, _shown(name), status)

    def _file(self, path: Path, name: str, status: os.stat_result) -> SourceFile:
        kind: str = self.settings.format
        if kind == "auto":
            lower = name.lower()
            kind = "jsonl" if lower.endswith(JSONL) else "parquet" if lower.endswith(".parquet") else "text"
        return SourceFile(path, name, kind, status.st_size, status.st_mtime_ns)

    def _text(self, file: SourceFile, limit: int) -> Iterator[tuple[bytes, str]]:
        with open(file.path, "rb") as handle:
            if reason := _unreadable(handle):
                self.skipped.add(file.name, reason)
                return
            handle.seek(len(BOM) if handle.read(len(BOM)) == BOM else 0)
            for number, piece in enumerate(cut(iter(lambda: handle.read(BLOCK), b""), limit)):
                self.consumed += len(piece)
                yield piece, f"{file.name}#{number}" if number else file.name

    def _records(self, file: SourceFile, limit: int) -> Iterator[tuple[bytes, str]]:
        read = {"jsonl": self._jsonl, "parquet": self._parquet, "arrow": self._arrow}[file.kind]
        for record, name in read(file):
            data = _encoded(record)
            if data is None:
                self.skipped.add(name, "not valid UTF-8")
            else:
                for number, piece in enumerate(cut([data], limit)):
                    yield piece, f"{name}#{number}" if number else name

    def _jsonl(self, file: SourceFile) -> Iterator[tuple[str | bytes, str]]:
        start = self.consumed
        try:
            with open(file.path, "rb") as raw:
                zipped = raw.read(2) == b"\x1f\x8b"
                raw.seek(0)
                with gzip.open(raw) if zipped else contextlib.nullcontext(raw) as lines:
                    for number, line in enumerate(iter(partial(lines.readline, LONGEST_LINE), b""), 1):
                        self.consumed = start + raw.tell()
                        if number == 1:
                            line = line.removeprefix(BOM)
                        record = None if line.isspace() else self._record(line, file, number)
                        if record is not None:
                            yield record, f"{file.name}:{number}"
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"this gzip file is damaged: {error}", where=str(file.path)) from error

    def _record(self, line: bytes, file: SourceFile, number: int) -> str | None:
        """The text of one JSON line; None when there is none to read (counted)."""
        where = f"{file.path}:{number}"
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            raise DataError(f"this line is longer than {LONGEST_LINE} bytes", where=where)
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            self.skipped.add(f"{file.name}:{number}", "not valid UTF-8")
            return None
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"this line is not JSON: {error}", where=where, hint="one JSON object per line") from None
        if not isinstance(record, dict):
            raise DataError(f"this line is not a JSON object but {type(record).__name__}", where=where)
        key = self.settings.field
        if key not in record:
            raise DataError(f"this record has no '{key}'", where=where, hint=_field_hint(key, record))
        value = record[key]
        if value is None:
            self.empty += 1
            return None
        if not isinstance(value, str):
            kind = type(value).__name__
            raise DataError(f"'{key}' is not text but {kind}", where=where, hint=_field_hint("", record))
        return value

    def _parquet(self, file: SourceFile) -> Iterator[tuple[str | bytes, str]]:
        arrow = _pyarrow()
        import pyarrow.parquet as parquet

        start, row = self.consumed, 0
        try:
            with parquet.ParquetFile(file.path) as table:
                self._check_column(table.schema_arrow, file)
                total = max(table.metadata.num_rows, 1)
                for batch in table.iter_batches(batch_size=512, columns=[self.settings.field]):
                    yield from self._column(batch.column(0), file, row)
                    row += batch.num_rows
                    self.consumed = start + file.size * row // total
        except PermissionError:
            raise
        except (arrow.ArrowException, OSError) as error:
            raise DataError(f"this is not a readable Parquet file: {error}", where=str(file.path)) from error

    def _arrow(self, file: SourceFile) -> Iterator[tuple[str | bytes, str]]:
        """One file of a saved dataset: an Arrow stream (or, from other writers, an Arrow file)."""
        arrow = _pyarrow()
        row = 0
        try:
            with arrow.memory_map(os.fspath(file.path)) as mapped:
                for batch in _arrow_batches(arrow, mapped):
                    self._check_column(batch.schema, file)
                    yield from self._column(batch.column(self.settings.field), file, row)
                    row += batch.num_rows
        except PermissionError:
            raise
        except (arrow.ArrowException, OSError) as error:
            raise DataError(f"this is not a readable Arrow file: {error}", where=str(file.path)) from error

    def _check_column(self, schema: Any, file: SourceFile) -> None:
        arrow, name = _pyarrow(), self.settings.field
        if name not in schema.names:
            raise DataError(f"there is no column '{name}'", where=str(file.path), hint=_field_hint(name, schema.names))
        kind = schema.field(name).type
        kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
        if str(kind) not in ("string", "large_string", "string_view"):
            raise DataError(
                f"column '{name}' is not text but {kind}", where=str(file.path), hint=_field_hint("", schema.names)
            )

    def _column(self, column: Any, file: SourceFile, row: int) -> Iterator[tuple[str | bytes, str]]:
        arrow = _pyarrow()
        if arrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        # as bytes: what a writer called text may still not be UTF-8
        for number, value in enumerate(column.cast(arrow.large_binary()), row):
            if value.is_valid:
                yield value.as_py(), f"{file.name}:{number}"
            else:
                self.empty += 1


def cut(blocks: Iterable[bytes], limit: int) -> Iterator[bytes]:
    """Cut UTF-8 text, given in blocks, into pieces of at most `limit` bytes (limit >= 4).

    Pieces end after a blank line where there is one in their second half, else after a line, else after
    a space, else between two characters; joined they give the text back. No text is one empty piece.
    """
    waiting, whole = b"", True
    for block in blocks:
        waiting += block
        start = 0
        while len(waiting) - start > limit:
            stop = _cut_at(waiting, start, start + limit)
            yield waiting[start:stop]
            start, whole = stop, False
        waiting = waiting[start:]
    if waiting or whole:
        yield waiting


def _cut_at(data: bytes, start: int, stop: int) -> int:
    middle = (start + stop) // 2
    for mark in (b"\n\n", b"\n", b" "):
        if (found := data.rfind(mark, middle, stop)) >= 0:
            return found + len(mark)
    while data[stop] & 0xC0 == 0x80:  # inside a character
        stop -= 1
    return stop


def _unreadable(handle: IO[bytes]) -> str | None:
    """Why a file is not text, or None; leaves the handle at its start."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while block := handle.read(BLOCK):
            if b"\0" in block:
                return "binary (it holds NUL bytes)"
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return "not valid UTF-8"
    handle.seek(0)
    return None


def _encoded(record: str | bytes) -> bytes | None:
    try:
        if isinstance(record, str):
            return record.encode("utf-8")  # fails on the lone surrogates that JSON can spell
        record.decode("utf-8")
    except UnicodeError:
        return None
    return record


def _place(settings: SourceSettings) -> tuple[Path, tuple[str, ...], tuple[str, ...]]:
    """Root, patterns to read and patterns to leave out of one source."""
    if settings.path == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        return root, settings.include or ("*.py",), (*STDLIB_EXCLUDED, *settings.exclude)
    if settings.path.startswith("python:"):
        raise DataError(f"unknown source '{settings.path}'", hint=nearest(settings.path, [STDLIB]))
    return (
        Path(settings.path).expanduser(),
        settings.include or DEFAULT_INCLUDE.get(settings.format, ()),
        settings.exclude,
    )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    last = name.rpartition("/")[2]
    return any(fnmatchcase(name if "/" in pattern else last, pattern) for pattern in patterns)


def _shown(name: str) -> str:
    """A file name that JSON can hold, whatever bytes it is made of."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _field_hint(wanted: str, names: Iterable[str]) -> str:
    return f"set `field` of this source; {nearest(wanted, names)}"


def _dataset_files(root: Path, include: Sequence[str]) -> Iterator[SourceFile]:
    """The Arrow files of a folder written by `datasets.save_to_disk`: a dataset, or a dictionary of splits.

    Of a dictionary only `train` is read unless `include` names splits: the others are there to test with.
    """
    table = root / "dataset_dict.json"
    if not table.is_file():
        yield from _split_files(root, "")
        return
    splits = _json(table).get("splits")
    if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
        raise DataError("there is no list of `splits` in it", where=str(table))
    wanted = [split for split in splits if _matches(split, include or ("train",))]
    if not wanted:
        raise DataError(
            f"none of its splits is to be read ({', '.join(splits)})",
            where=str(root),
            hint=f"name them: include: [{splits[0] if splits else '…'}]",
        )
    for split in wanted:
        yield from _split_files(_inside(root, split), f"{split}/")


def _split_files(folder: Path, prefix: str) -> Iterator[SourceFile]:
    state = _json(folder / "state.json")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(
            "this dataset was saved by an old version, with a separate table of rows",
            where=str(folder),
            hint="load it and save it again with a current version of `datasets`",
        )
    files = state.get("_data_files")
    if not isinstance(files, list):
        raise DataError("there is no list `_data_files` in it", where=str(folder / "state.json"))
    for entry in files:
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise DataError("an entry of `_data_files` has no `filename`", where=str(folder / "state.json"))
        path = _inside(folder, name)
        if not path.is_file():
            raise DataError("this file of the dataset is missing", where=str(path))
        status = path.stat()
        yield SourceFile(path, prefix + name, "arrow", status.st_size, status.st_mtime_ns)


def _inside(folder: Path, name: str) -> Path:
    try:
        return confined(folder, name)
    except ArmillaryError as error:
        raise DataError(error.what, where=str(folder), hint=error.hint) from None


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            "there is no such file, so this is not a saved dataset", where=str(path), hint="set `format` of this source"
        ) from None
    except ValueError as error:
        raise DataError(f"this is not JSON: {error}", where=str(path)) from None
    if not isinstance(data, dict):
        raise DataError("this is not a JSON object", where=str(path))
    return data


def _arrow_batches(arrow: Any, mapped: Any) -> Iterator[Any]:
    import pyarrow.ipc as ipc

    magic = mapped.read(6)
    mapped.seek(0)
    if magic == b"ARROW1":
        file = ipc.open_file(mapped)
        for number in range(file.num_record_batches):
            yield file.get_batch(number)
    else:
        yield from ipc.open_stream(mapped)


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise DataError(
            "Parquet files and saved datasets are read with `pyarrow`, which is not installed",
            hint="pip install 'armillary[parquet]'",
        ) from None
    return pyarrow
