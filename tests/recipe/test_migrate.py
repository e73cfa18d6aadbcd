"""Schema versions, with migrations made up for the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from armillary.base.errors import SettingsError
from armillary.recipe import Recipe, migrate
from armillary.recipe import recipe as recipe_module


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> None:
    """A world at version 3: 1 → 2 renamed training.updates to steps, 2 → 3 doubled what batch means."""

    def rename(data: dict[str, Any]) -> dict[str, Any]:
        if "updates" in data.get("training", {}):
            data["training"]["steps"] = data["training"].pop("updates")
        return data

    def double(data: dict[str, Any]) -> dict[str, Any]:
        if "batch" in data.get("training", {}):
            data["training"]["batch"] *= 2
        return data

    monkeypatch.setattr(migrate, "MIGRATIONS", {1: rename, 2: double})
    monkeypatch.setattr(migrate, "SCHEMA_VERSION", 3)
    monkeypatch.setattr(recipe_module, "SCHEMA_VERSION", 3)


def test_versions_are_raised_one_by_one(third: None) -> None:
    old = {"schema_version": 1, "training": {"updates": 7, "batch": 4}}
    assert migrate.migrate(old) == {"schema_version": 3, "training": {"steps": 7, "batch": 8}}
    assert old == {"schema_version": 1, "training": {"updates": 7, "batch": 4}}
    assert migrate.migrate({"schema_version": 2, "training": {"batch": 4}})["training"]["batch"] == 8
    present = {"schema_version": 3, "training": {"batch": 4}}
    assert migrate.migrate(present) == present
    assert migrate.migrate({"training": {"batch": 4}}) == {"training": {"batch": 4}}


def test_each_file_is_raised_before_it_is_merged(third: None, tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("schema_version: 1\ntraining: {updates: 7, batch: 4}\n")
    (tmp_path / "new.yaml").write_text("extends: old\nschema_version: 3\ntraining: {batch: 4}\n")
    old, new = Recipe.load(tmp_path / "old.yaml"), Recipe.load(tmp_path / "new.yaml")
    assert (old.training.steps, old.training.batch, old.schema_version) == (7, 8, 3)
    assert (new.training.steps, new.training.batch) == (7, 4)


def test_migrated_values_keep_their_lines(third: None, tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text("schema_version: 1\ntraining:\n  updates: 7\n  bach: 4\n")
    with pytest.raises(SettingsError, match=r"old.yaml:4 \(training.bach\): unknown key"):
        Recipe.load(file)


@pytest.mark.parametrize("version, words", [
    (2, "has schema version 2; this Armillary reads versions up to 1"),
    (0, "a whole number from 1 up, found 0"), ("'1'", "found '1'"), ("1.0", "found 1.0"), ("true", "found True"),
])  # fmt: skip
def test_versions_that_cannot_be_are_refused(tmp_path: Path, version: object, words: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"seed: 1\nschema_version: {version}\n")
    with pytest.raises(SettingsError, match=words) as caught:
        Recipe.load(file)
    assert caught.value.where == f"{file}:2" and caught.value.path == ("schema_version",)


def test_there_is_a_migration_from_every_older_version() -> None:
    assert sorted(migrate.MIGRATIONS) == list(range(1, migrate.SCHEMA_VERSION))
