"""What a run folder says about its run: the reading side of reports and cards.

`metrics.jsonl` holds one JSON object a line: step, loss (nats per token), bits_per_byte (an estimate on
training text), learning_rate, grad_norm, tokens_per_second, tokens and seconds since the start, memory;
heldout_bits_per_byte where the held-out text was looked at. `samples.jsonl` holds step, prompt and text;
`ledger.jsonl` events with their time and facts (an `environment` among them is shown). Keys that are
missing or not known are passed over.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from armillary.base.errors import ArmillaryError, DataError, InputError
from armillary.data.corpus import Corpus, Manifest, SourceRecord, read_manifest
from armillary.evaluate.heldout import corpus_folder
from armillary.recipe import Recipe

Line = dict[str, Any]
RECIPE = "recipe.yaml"
METRICS, SAMPLES, LEDGER = "metrics.jsonl", "samples.jsonl", "ledger.jsonl"
EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Record:
    """A run folder, read. What the folder lacks is None or empty."""

    folder: Path
    recipe: Recipe | None
    metrics: list[Line] = field(default_factory=list)
    samples: list[Line] = field(default_factory=list)
    events: list[Line] = field(default_factory=list)
    evaluation: Line | None = None
    manifest: Manifest | None = None
    corpus: Path | None = None

    @classmethod
    def read(cls, folder: str | Path) -> Record:
        """Raises InputError when the folder holds nothing to tell, DataError for a damaged file."""
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError("there is no such folder", where=str(folder), hint="name a run folder")
        recipe = Recipe.load(folder / RECIPE) if (folder / RECIPE).is_file() else None
        metrics, samples = _forward(_lines(folder / METRICS)), _lines(folder / SAMPLES)
        evaluation = _object(folder / EVALUATION)
        if recipe is None and evaluation is None and not metrics:
            raise InputError(
                f"this is not a run folder: it has no {RECIPE}, {METRICS} or {EVALUATION}",
                where=str(folder),
                hint="name the folder that a training run wrote",
            )
        place = corpus_folder(folder)
        manifest = read_manifest(place) if place is not None else None
        return cls(folder, recipe, metrics, samples, _lines(folder / LEDGER), evaluation, manifest, place)

    @property
    def name(self) -> str:
        if self.recipe is not None and self.recipe.name != "recipe":
            return self.recipe.name
        return self.folder.resolve().name

    @property
    def steps(self) -> int | None:
        """The last update that was logged."""
        return max((line["step"] for line in self.metrics if isinstance(line.get("step"), int)), default=None)

    @property
    def environment(self) -> Line | None:
        """Where the run was trained, if its ledger says so."""
        found = [event["environment"] for event in self.events if isinstance(event.get("environment"), dict)]
        return found[-1] if found else None

    @property
    def trained_tokens(self) -> int | None:
        """Tokens the model was trained on: as logged, else updates × batch × context."""
        if (logged := self.last("tokens")) is not None:
            return int(logged)
        if self.steps is None or self.recipe is None:
            return None
        return self.steps * self.recipe.training.batch * self.recipe.training.context

    def last(self, key: str) -> Any:
        """The last value of `key` in the metrics, or None."""
        return next((line[key] for line in reversed(self.metrics) if line.get(key) is not None), None)

    @functools.cached_property
    def parameters(self) -> int | None:
        """As measured, else counted on a build of the recipe without storage."""
        if self.evaluation is not None and isinstance(self.evaluation.get("parameters"), int):
            return int(self.evaluation["parameters"])
        if self.recipe is None:
            return None
        from armillary.nn.network import build
        from armillary.text.tokenizer import Tokenizer

        settings = self.recipe.model
        if settings.vocabulary is None:
            places = [place for place in (self.folder, self.corpus) if place is not None]
            found = next((place for place in places if (place / "tokenizer.json").is_file()), None)
            if found is None:
                return None
            settings = settings.derive(vocabulary=Tokenizer.load(found).size)
        return sum(parameter.numel() for parameter in build(settings, device="meta").parameters())

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """sha256 of what the run consists of, recomputed from its files."""
        found: dict[str, str] = {}
        if self.recipe is not None:
            found["recipe"] = self.recipe.fingerprint
        if self.manifest is not None:
            found["tokenizer"] = self.manifest.tokenizer
            found["corpus"] = self.manifest.fingerprint
        recorded = (self.evaluation or {}).get("fingerprints")
        if isinstance(recorded, dict):
            found |= {str(name): str(value) for name, value in recorded.items() if name not in found}
        weights = [path for path in self.folder.rglob("*.safetensors") if path.is_file()]
        if weights:
            newest = max(weights, key=lambda path: _natural(path.parent)).parent
            for path in sorted(newest.glob("*.safetensors")):
                with open(path, "rb") as file:
                    found[str(path.relative_to(self.folder))] = hashlib.file_digest(file, "sha256").hexdigest()
        return found

    @functools.cached_property
    def sources(self) -> list[Source]:
        if self.manifest is None or self.corpus is None:
            return []
        try:
            corpus = Corpus(self.corpus, self.manifest)
        except ArmillaryError:  # shards may be gone from a folder that was handed on; the manifest still counts
            corpus = None
        if corpus is None:
            return [Source(record, None) for record in self.manifest.sources]
        return [Source(source.record, int(source.heldout.document_bytes.sum())) for source in corpus.sources]


@dataclass(frozen=True)
class Source:
    """One source of the data; heldout_bytes is None when the shards are not there."""

    record: SourceRecord
    heldout_bytes: int | None

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in (*self.record.train, *self.record.heldout))

    @property
    def heldout(self) -> int:
        return sum(shard.documents for shard in self.record.heldout)


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key that sorts step-1000 behind step-999."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _lines(path: Path) -> list[Line]:
    if not path.is_file():
        return []
    found: list[Line] = []
    content = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, text in enumerate(content, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict):
            found.append(line)
        elif number < len(content):  # else the run was cut off while it wrote its last line
            raise DataError("this line is not a JSON object", where=f"{path}, line {number}")
    return found


def _forward(lines: list[Line]) -> list[Line]:
    """Without the lines of a run that went on from an earlier checkpoint and did the same steps again."""
    found: list[Line] = []
    for line in lines:
        step = line.get("step")
        while isinstance(step, int) and found and isinstance(found[-1].get("step"), int) and found[-1]["step"] >= step:
            found.pop()
        found.append(line)
    return found


def _object(path: Path) -> Line | None:
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"this is not JSON ({error})", where=str(path), hint="evaluate again") from None
    if not isinstance(data, dict):
        raise DataError("this is not a JSON object", where=str(path), hint="evaluate again")
    return data
