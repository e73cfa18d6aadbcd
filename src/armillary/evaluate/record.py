"""What a run folder says about its run: the reading side of reports and cards.

`metrics.jsonl` holds one JSON object a line. Lines without `kind` (or with kind "train") describe an
update: step, loss (nats per token), bits_per_byte (an estimate on training text), learning_rate,
grad_norm, tokens_per_second, and, where known, tokens and seconds since the start. Others are
{"kind": "evaluation", step, heldout_bits_per_byte}, {"kind": "sample", step, prompt, text},
{"kind": "environment", …} and {"kind": "event", step, message}; unknown kinds are passed over.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from armillary.base.errors import ArmillaryError, DataError, InputError
from armillary.data.corpus import Corpus, Manifest, SourceRecord, read_manifest
from armillary.evaluate.heldout import corpus_folder
from armillary.recipe import Recipe

Line = dict[str, Any]
RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
EVALUATION = "evaluation.json"
KINDS = ("train", "evaluation", "sample", "event")


@dataclass(frozen=True)
class Record:
    """A run folder, read. What the folder lacks is None or empty."""

    folder: Path
    recipe: Recipe | None
    lines: dict[str, list[Line]] = field(default_factory=dict)
    evaluation: Line | None = None
    environment: Line | None = None
    manifest: Manifest | None = None
    corpus: Path | None = None

    @classmethod
    def read(cls, folder: str | Path) -> Record:
        """Raises InputError when the folder holds nothing to tell, DataError for a damaged file."""
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError("there is no such folder", where=str(folder), hint="name a run folder")
        recipe = Recipe.load(folder / RECIPE) if (folder / RECIPE).is_file() else None
        lines, environment = _metrics(folder / METRICS)
        evaluation = _object(folder / EVALUATION)
        if recipe is None and evaluation is None and not any(lines.values()):
            raise InputError(
                f"this is not a run folder: it has no {RECIPE}, {METRICS} or {EVALUATION}",
                where=str(folder),
                hint="name the folder that a training run wrote",
            )
        place = corpus_folder(folder)
        manifest = read_manifest(place) if place is not None else None
        return cls(folder, recipe, lines, evaluation, environment, manifest, place)

    @property
    def name(self) -> str:
        if self.recipe is not None and self.recipe.name != "recipe":
            return self.recipe.name
        return self.folder.resolve().name

    @property
    def steps(self) -> int | None:
        """The last update that was logged."""
        seen = [int(line["step"]) for line in self.lines["train"] + self.lines["evaluation"] if "step" in line]
        return max(seen, default=None)

    @property
    def trained_tokens(self) -> int | None:
        """Tokens the model was trained on: as logged, else updates × batch × context."""
        if (logged := self.last("tokens")) is not None:
            return int(logged)
        if self.steps is None or self.recipe is None:
            return None
        return self.steps * self.recipe.training.batch * self.recipe.training.context

    def last(self, key: str) -> Any:
        """The last value of `key` in the lines of updates, or None."""
        return next((line[key] for line in reversed(self.lines["train"]) if line.get(key) is not None), None)

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
            newest = max(weights, key=lambda path: (path.stat().st_mtime_ns, path.name)).parent
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


def _metrics(path: Path) -> tuple[dict[str, list[Line]], Line | None]:
    """Lines by kind, in the order of steps, and the last environment."""
    found: dict[str, list[Line]] = {kind: [] for kind in KINDS}
    environment: Line | None = None
    if not path.is_file():
        return found, None
    content = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, text in enumerate(content, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            if number == len(content):
                break  # the run was cut off while it wrote its last line
            raise DataError("this line is not a JSON object", where=f"{path}, line {number}")
        kind = line.get("kind", "train")
        if kind == "environment":
            environment = {key: value for key, value in line.items() if key != "kind"}
        elif kind in found:
            rows = found[kind]
            step = line.get("step")
            if kind != "event" and isinstance(step, int):
                # a resumed run goes back to its last checkpoint: what it does again replaces what was lost
                while rows and isinstance(rows[-1].get("step"), int) and rows[-1]["step"] > step:
                    rows.pop()
                if kind != "sample":
                    while rows and rows[-1].get("step") == step:
                        rows.pop()
            rows.append(line)
    return found, environment


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
