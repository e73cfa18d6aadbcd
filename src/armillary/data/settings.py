"""What text a model learns from and how it is prepared: the `data` part of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from armillary.base.settings import Settings

STDLIB = "python:stdlib"


class SourceSettings(Settings):
    """One place that text comes from: a file, a folder, or `python:stdlib`.

    `python:stdlib` is the standard library of the running interpreter (its *.py files, tests left out).
    Patterns are shell patterns; one without a slash is matched against file and folder names, one
    with a slash against the path inside the source, where `*` also crosses slashes.
    """

    path: str = Field(min_length=1, description="a file, a folder, or python:stdlib")
    weight: float = Field(1.0, gt=0, description="share of the training rows, relative to the other sources")
    format: Literal["auto", "text", "jsonl", "parquet", "dataset"] = Field(
        "auto", description="auto goes by each file's name; dataset is a folder written by datasets.save_to_disk"
    )
    field: str = Field("text", description="the key or column that holds the text (JSONL, Parquet, dataset)")
    include: tuple[str, ...] = Field((), description="patterns of files (or dataset splits) to read; by default all")
    exclude: tuple[str, ...] = Field((), description="patterns of files and folders to leave out")
    split: Literal["hash", "train", "heldout"] = Field(
        "hash", description="hash: each document's content decides its side; or all of it on one side"
    )
    task: int | None = Field(
        None, ge=0, description="what its text is for, as models that route by task hear it; by default its place here"
    )


class DataSettings(Settings):
    """The corpus: its sources, what is held out, and how it is cut and packed."""

    sources: tuple[SourceSettings, ...] = Field((), description="where the text comes from")
    heldout: float = Field(0.02, ge=0, lt=1, description="share of documents kept away from training, by content hash")
    isolate: bool = Field(False, description="documents packed into one window do not see each other")
    max_document: int | None = Field(
        None,
        ge=256,
        description="bytes after which a document is cut; by default 1 MiB, for text files at most 1/64 of the source",
    )
    tokenizer_sample: int = Field(2**25, ge=1024, description="bytes of training text that the tokenizer learns from")
    shard_tokens: int = Field(2**25, ge=1, description="tokens after which a shard is closed; finished ones survive")
    workers: int = Field(0, ge=0, description="processes that tokenise; 0: one per core")

    def tasks(self) -> tuple[int, ...]:
        """What the text of each source is for."""
        return tuple(place if source.task is None else source.task for place, source in enumerate(self.sources))
