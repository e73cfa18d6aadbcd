"""Token shards: flat files of token ids on disk, written atomically and read through memory maps.

A shard is two files: `NAME.bin` holds token ids (uint16 or uint32, little-endian) one document after
another; `NAME.idx` holds one row per document, int64 [first token in the shard, UTF-8 bytes of the
source text]. A document never crosses shards. What belongs together is said by the manifest.
"""

from __future__ import annotations

import functools
import hashlib
import os
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from armillary.base.errors import DataError
from armillary.base.files import confined, explained, sync_folder, write_atomic
from armillary.base.settings import Settings

Tokens = NDArray[np.unsignedinteger]
Width = Literal["uint16", "uint32"]

INDEX = np.dtype("<i8")
INDEX_ROW = 2 * INDEX.itemsize
COUNTED = 2**24  # tokens counted at a time
OPEN_MAPS = 128  # shards mapped at a time by one store; each map holds a file descriptor


def width_for(vocabulary: int) -> Width:
    """The narrowest type that holds every id of a vocabulary."""
    return "uint16" if vocabulary <= 2**16 else "uint32"


def token_type(width: Width) -> np.dtype[np.unsignedinteger]:
    return np.dtype("<u2" if width == "uint16" else "<u4")


class Shard(Settings):
    """What the manifest says about one shard."""

    name: str = Field(pattern=r"^[a-z0-9-]+$")
    tokens: int = Field(ge=1)
    documents: int = Field(ge=1)
    sha256: str
    index_sha256: str

    def tokens_path(self, folder: Path) -> Path:
        return confined(folder, f"{self.name}.bin")

    def index_path(self, folder: Path) -> Path:
        return confined(folder, f"{self.name}.idx")


def check_sizes(folder: Path, shard: Shard, width: Width) -> None:
    """Raise DataError when a shard's files are missing or not as long as the manifest says."""
    expected = (
        (shard.tokens_path(folder), shard.tokens * token_type(width).itemsize),
        (shard.index_path(folder), shard.documents * INDEX_ROW),
    )
    for path, size in expected:
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            raise DataError("this shard is missing", where=str(path), hint=rebuild(folder)) from None
        if found != size:
            how = "truncated" if found < size else "too long"
            raise DataError(
                f"this shard is {how}: {found} bytes, not {size}", where=str(path), hint=rebuild(folder)
            ) from None


def check_content(folder: Path, shard: Shard) -> None:
    """Raise DataError when a shard's bytes are not those that were written (reads the whole shard)."""
    for path, expected in (
        (shard.tokens_path(folder), shard.sha256),
        (shard.index_path(folder), shard.index_sha256),
    ):
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise DataError("this shard is corrupt: its checksum differs", where=str(path), hint=rebuild(folder))


def rebuild(folder: Path) -> str:
    return f"delete {folder / 'manifest.json'} and prepare the data again; the same sources give the same shards"


class ShardWriter:
    """Writes one shard aside while its documents arrive; `close` makes it appear whole."""

    def __init__(self, folder: Path, name: str, width: Width) -> None:
        self.folder, self.name, self.tokens = folder, name, 0
        self._type = token_type(width)
        self._index: list[tuple[int, int]] = []
        self._digest = hashlib.sha256()
        self._partial = folder / f".{name}.partial"
        with explained("writing", self._partial):
            self._file: IO[bytes] = open(self._partial, "wb", buffering=2**20)  # noqa: SIM115 (until `close`)

    def add(self, tokens: Tokens, source_bytes: int) -> None:
        """Append one document: its tokens [T] and the UTF-8 length of its text."""
        data = tokens.astype(self._type, copy=False).tobytes()
        with explained("writing", self._partial):
            self._file.write(data)
        self._digest.update(data)
        self._index.append((self.tokens, source_bytes))
        self.tokens += len(tokens)

    def close(self) -> Shard:
        index = np.asarray(self._index, dtype=INDEX).tobytes()
        with explained("writing", self._partial):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            write_atomic(self.folder / f"{self.name}.idx", index)
            os.replace(self._partial, self.folder / f"{self.name}.bin")
            sync_folder(self.folder)
        return Shard(
            name=self.name,
            tokens=self.tokens,
            documents=len(self._index),
            sha256=self._digest.hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
        )

    def abandon(self) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)


class TokenStore:
    """Shards read as one long stream of tokens and as one list of documents, without loading them.

    len(store): documents; `tokens`: their total; ids are uint16 or uint32. Opening checks that every
    file has its size; `verify` reads everything and checks checksums. Both raise DataError.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], width: Width, *, name: str = "tokens") -> None:
        self.folder, self.shards, self.name = Path(folder), tuple(shards), name
        self.dtype = token_type(width)
        for shard in self.shards:
            check_sizes(self.folder, shard, width)
        self._first_token = [0]
        self._first_document = [0]
        for shard in self.shards:
            self._first_token.append(self._first_token[-1] + shard.tokens)
            self._first_document.append(self._first_document[-1] + shard.documents)
        # a cache per store, not per class: maps are let go with the store that opened them
        self._tokens_of = functools.lru_cache(OPEN_MAPS)(self._map_tokens)
        self._index_of = functools.lru_cache(OPEN_MAPS)(self._map_index)

    def __len__(self) -> int:
        return self._first_document[-1]

    @property
    def tokens(self) -> int:
        return self._first_token[-1]

    def document(self, number: int) -> Tokens:
        """Tokens [T] of one document, beginning with the boundary token; a read-only view of the file."""
        shard, local = self._locate(number)
        index, tokens = self._index_of(shard), self._tokens_of(shard)
        stop = int(index[local + 1, 0]) if local + 1 < len(index) else len(tokens)
        return tokens[int(index[local, 0]) : stop]

    @functools.cached_property
    def document_bytes(self) -> NDArray[np.int64]:
        """[documents] UTF-8 bytes of each document's source text."""
        return self._column(1)

    @functools.cached_property
    def document_starts(self) -> NDArray[np.int64]:
        """[documents] offset of each document's first token in the whole store."""
        starts = [self._index_of(i)[:, 0] + self._first_token[i] for i in range(len(self.shards))]
        return np.concatenate(starts) if starts else np.zeros(0, np.int64)

    def read(self, start: int, stop: int) -> Tokens:
        """Tokens [stop - start] of the stream, across shards where need be."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start}:{stop} of {self.tokens}")
        shard = bisect_right(self._first_token, start) - 1
        if start == stop:
            return np.zeros(0, self.dtype)
        parts = []
        while start < stop:
            base = self._first_token[shard]
            end = min(stop, self._first_token[shard + 1])
            parts.append(self._tokens_of(shard)[start - base : end - base])
            start, shard = end, shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def counts(self, size: int) -> NDArray[np.int64]:
        """How often each of `size` ids occurs."""
        found = np.zeros(size, np.int64)
        for start in range(0, self.tokens, COUNTED):
            found += np.bincount(self.read(start, min(self.tokens, start + COUNTED)), minlength=size)
        return found

    def documents_of(self, start: int, stop: int) -> NDArray[np.int64]:
        """[stop - start] number of the document that each token of the stream belongs to."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start}:{stop} of {self.tokens}")
        numbers = np.empty(stop - start, np.int64)
        shard, filled = bisect_right(self._first_token, start) - 1, 0
        while filled < len(numbers):
            base = self._first_token[shard]
            end = min(stop, self._first_token[shard + 1])
            first = start + filled
            starts = self._index_of(shard)[:, 0]
            inside = np.arange(first - base, end - base)
            low = int(np.searchsorted(starts, first - base, side="right")) - 1
            high = int(np.searchsorted(starts, end - base, side="left"))
            local = low + np.searchsorted(starts[low:high], inside, side="right") - 1
            numbers[filled : filled + len(inside)] = self._first_document[shard] + local
            filled, shard = filled + len(inside), shard + 1
        return numbers

    def verify(self) -> None:
        """Read every shard and compare its checksum; raises DataError that names the corrupt one."""
        for shard in self.shards:
            check_content(self.folder, shard)

    def _locate(self, document: int) -> tuple[int, int]:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        shard = bisect_right(self._first_document, document) - 1
        return shard, document - self._first_document[shard]

    def _column(self, column: int) -> NDArray[np.int64]:
        parts = [self._index_of(i)[:, column] for i in range(len(self.shards))]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _map_tokens(self, shard: int) -> Tokens:
        path = self.shards[shard].tokens_path(self.folder)
        # a plain view: slicing np.memmap itself costs ten times as much
        return np.memmap(path, dtype=self.dtype, mode="r").view(np.ndarray)

    def _map_index(self, shard: int) -> NDArray[np.int64]:
        path = self.shards[shard].index_path(self.folder)
        return np.memmap(path, dtype=INDEX, mode="r").view(np.ndarray).reshape(-1, 2)
