"""The recipe: one frozen tree that says what is trained, on what, and how.

Files are read by `source`, found and extended by `library`, merged by `merge`, raised from older
versions by `migrate` and written by `write`; here they come together, and keys that contradict each
other across rooms are found.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from armillary.base.errors import SettingsError, nearest
from armillary.base.files import write_atomic
from armillary.base.settings import Settings, json_schema, parse
from armillary.data.settings import DataSettings
from armillary.nn.network import ModelSettings
from armillary.recipe import library
from armillary.recipe.merge import Site, override
from armillary.recipe.migrate import SCHEMA_VERSION
from armillary.recipe.source import Node
from armillary.recipe.training import TrainingSettings
from armillary.recipe.write import to_yaml
from armillary.text.tokenizer import TokenizerSettings

_NAME = re.compile(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]{0,127}\Z")


class Recipe(Settings):
    """A whole model and run. Every key has a default."""

    schema_version: int = Field(SCHEMA_VERSION, description="of the keys in this file; older ones are understood")
    name: str = Field("recipe", description="what the run and its card are called; by default the name of the file")
    seed: int = Field(0, ge=0, lt=2**63, description="of the first weights, the order of the data, and samples")
    data: DataSettings = Field(DataSettings(), description="what is read, and what is held out")
    tokenizer: TokenizerSettings = Field(TokenizerSettings(), description="how text becomes tokens")
    model: ModelSettings = Field(ModelSettings(), description="the network")
    training: TrainingSettings = Field(TrainingSettings(), description="how it is trained")

    @model_validator(mode="after")
    def _coherent(self) -> Recipe:
        if self.schema_version != SCHEMA_VERSION:
            raise SettingsError(
                f"this Armillary writes schema version {SCHEMA_VERSION}, found {self.schema_version}",
                path=("schema_version",),
            )
        if not _NAME.match(self.name):
            hint = "no /, \\ or line breaks, and no dot in front"
            raise SettingsError(f"'{self.name}' cannot name a folder", path=("name",), hint=hint)
        if self.training.context > self.model.context:
            raise SettingsError(
                f"sequences of {self.training.context} tokens are longer than model.context: {self.model.context}",
                path=("training", "context"),
                hint=f"set model.context={self.training.context}, or make the sequences shorter",
            )
        vocabulary, size = self.model.vocabulary, self.tokenizer.vocabulary
        if vocabulary is not None and vocabulary < size:
            raise SettingsError(
                f"a vocabulary of {vocabulary} is smaller than the tokenizer's, {size}",
                path=("model", "vocabulary"),
                hint="leave it out, and it comes from the tokenizer",
            )
        self.training.objective.check(self.model)
        return self

    @classmethod
    def load(cls, source: Recipe | str | Path | Mapping[str, Any], *overrides: str) -> Recipe:
        """A recipe from a file, a run folder, a name, plain data or another recipe, then `model.width=512` and so on.

        Raises SettingsError with the file and line, or the override, of what is wrong.
        """
        site = Site(cls)
        node, file = library.load(source.to_data() if isinstance(source, Recipe) else source, site)
        for text in overrides:
            node = override(node, text, site)
        if file is not None and node.get("name") is None:
            node = Node(node.value | {"name": Node(file.stem.lstrip(".") or "recipe", str(file))}, node.place)
        try:
            return parse(cls, node.plain())
        except SettingsError as error:
            hint = error.hint
            if error.what.startswith("unknown key"):
                hint = _suggestion(error.path, hint)
            raise SettingsError(error.what, path=error.path, where=node.locate(error.path), hint=hint) from None

    def save(self, path: str | Path) -> None:
        """Write the whole recipe, defaults too, as YAML: the old file or the new one, never a part."""
        write_atomic(Path(path), self.to_yaml())

    def to_yaml(self, *, comments: bool = False) -> str:
        """The whole recipe as YAML; with `comments`, each key beside what it means."""
        return to_yaml(self, comments=comments)

    @property
    def fingerprint(self) -> str:
        """sha256 of all that the recipe says except its name."""
        data = {key: value for key, value in self.to_data().items() if key != "name"}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    @classmethod
    def schema_for_editors(cls) -> dict[str, Any]:
        """JSON Schema of a recipe's file, for editors to complete and check."""
        schema = json_schema(cls)
        extends = {"type": ["string", "null"], "description": "name or path of the recipe that this one builds on"}
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            **schema,
            "title": "Armillary recipe",
            "properties": {"extends": extends, **schema["properties"]},
        }


def _suggestion(path: tuple[str, ...], hint: str | None) -> str | None:
    """A better hint for an unknown key: `extends`, or the same key where it does belong."""
    key = path[-1]
    if len(path) == 1:
        hint = nearest(key, [*Recipe.model_fields, "extends"])
    if hint is not None and hint.startswith("known"):
        found = [".".join(place) for place in _keys(Recipe().to_data()) if place[-1] == key]
        if found:
            return f"did you mean '{found[0]}'?"
    return hint


def _keys(data: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in data.items():
        yield (*above, key)
        if isinstance(value, Mapping):
            yield from _keys(value, (*above, key))
