"""A prepared corpus on disk: its manifest, its tokenizer, and its training and held-out token stores.

A folder holds `manifest.json`, the tokenizer's files and the shards. The manifest is written last, so a
folder that has one is whole.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from armillary.base.errors import DataError, SettingsError
from armillary.base.settings import Settings, parse
from armillary.data.settings import DataSettings
from armillary.data.shards import Shard, TokenStore, Width, rebuild
from armillary.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from armillary.data.loader import Loader

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
Split = Literal["train", "heldout"]


class SourceRecord(Settings):
    """What was read from one source: documents and bytes of text (UTF-8), and what was left out."""

    path: str
    split: Literal["hash", "train", "heldout"]
    documents: int = Field(ge=0)
    bytes: int = Field(ge=0)
    empty: int = Field(ge=0, description="documents without text")
    skipped: int = Field(ge=0, description="files and records that are not text or not readable")
    skipped_names: tuple[str, ...] = Field((), description="the first of them, with the reason")
    train: tuple[Shard, ...] = ()
    heldout: tuple[Shard, ...] = ()


class Manifest(Settings):
    """Everything needed to read a corpus, and to know whether it is the one that settings ask for."""

    schema_version: int = SCHEMA_VERSION
    key: str = Field(description="sha256 of settings, tokenizer and the names, sizes and ages of the inputs")
    tokenizer: str = Field(description="fingerprint of the tokenizer")
    width: Width = Field(description="type of the token ids")
    boundary: tuple[int, ...] = Field(description="the tokens that every document begins with")
    heldout_below: int = Field(ge=0, description="a document is held out when its hash (64 bits) is below this")
    sources: tuple[SourceRecord, ...]

    @property
    def fingerprint(self) -> str:
        """sha256 of the prepared content (tokenizer and shards): equal wherever and whenever it was prepared."""
        digest = hashlib.sha256(self.tokenizer.encode())
        for source in self.sources:
            for shard in (*source.train, *source.heldout):
                digest.update(f"\n{shard.name} {shard.sha256} {shard.index_sha256}".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class CorpusSource:
    """One source of a corpus: what was read and its two token stores (either may be empty)."""

    record: SourceRecord
    train: TokenStore
    heldout: TokenStore


class Corpus:
    """A prepared corpus, opened: `train` and `heldout` over all sources, `sources` one by one.

    `manifest` says what was read and left out; `fingerprint` names the content. Build one with `prepare`.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.train = self._store(manifest.sources, "train", "the training text")
        self.heldout = self._store(manifest.sources, "heldout", "the held-out text")
        self.sources = tuple(
            CorpusSource(
                record,
                self._store([record], "train", f"the training text of {record.path}"),
                self._store([record], "heldout", f"the held-out text of {record.path}"),
            )
            for record in manifest.sources
        )

    @classmethod
    def open(cls, folder: str | Path) -> Corpus:
        """Open a prepared corpus; every file's size is checked. Raises DataError."""
        folder = Path(folder)
        return cls(folder, read_manifest(folder))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.load(self.folder)
        if tokenizer.fingerprint != self.manifest.tokenizer:
            raise DataError(
                "the tokenizer is not the one that the corpus was prepared with",
                where=str(self.folder),
                hint=rebuild(self.folder),
            )
        return tokenizer

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def loader(
        self, settings: DataSettings, *, context: int, batch: int, seed: int, rank: int = 0, ranks: int = 1
    ) -> Loader:
        """Training windows from all sources in the proportions of `settings` (see `Loader`)."""
        from armillary.data.loader import Loader

        if len(settings.sources) != len(self.sources):
            raise DataError(
                f"the corpus has {len(self.sources)} sources, the settings {len(settings.sources)}",
                where=str(self.folder),
                hint="prepare the data again with these settings",
            )
        used = [
            (source.train, wanted.weight, task)
            for source, wanted, task in zip(self.sources, settings.sources, settings.tasks(), strict=True)
            if source.record.split != "heldout"
        ]
        return Loader(
            [store for store, _, _ in used],
            [weight for _, weight, _ in used],
            context=context,
            batch=batch,
            seed=seed,
            isolate=settings.isolate,
            rank=rank,
            ranks=ranks,
            tasks=[task for _, _, task in used],
        )

    def heldout_tasks(self, settings: DataSettings) -> list[int]:
        """What each held-out document is for, by the sources that the documents come from."""
        pairs = zip(self.sources, settings.tasks(), strict=True)
        return [task for source, task in pairs for _ in range(len(source.heldout))]

    def verify(self) -> None:
        """Read every shard and the tokenizer and compare checksums. Raises DataError that names what differs."""
        self.train.verify()
        self.heldout.verify()
        assert self.tokenizer

    def _store(self, records: Sequence[SourceRecord], split: Split, name: str) -> TokenStore:
        shards = [shard for record in records for shard in (record.train if split == "train" else record.heldout)]
        return TokenStore(self.folder, shards, self.manifest.width, name=name)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a corpus; DataError when it is missing, damaged or of another version."""
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            "there is no prepared corpus here", where=str(folder), hint="prepare one first: armillary data RECIPE"
        ) from None
    except ValueError:
        raise DataError("the manifest is damaged", where=str(path), hint=rebuild(folder)) from None
    if not isinstance(data, dict) or not {"schema_version", "key", "sources"} <= data.keys():
        raise DataError("this is not the manifest of a prepared corpus", where=str(path), hint="choose another folder")
    version = data["schema_version"]
    if version != SCHEMA_VERSION:
        raise DataError(
            f"the corpus has version {version} of its layout, this program reads {SCHEMA_VERSION}",
            where=str(path),
            hint=rebuild(folder),
        )
    try:
        return parse(Manifest, data)
    except SettingsError as error:
        raise DataError(f"the manifest is damaged ({error})", where=str(path), hint=rebuild(folder)) from None
