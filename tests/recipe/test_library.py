"""Finding recipes by name and path, and following `extends`."""

from __future__ import annotations

from pathlib import Path

import pytest

import armillary
from armillary.base.errors import SettingsError
from armillary.recipe import Recipe, library


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and packaged recipes `base` and `other`."""
    packaged = tmp_path / "packaged"
    packaged.mkdir()
    (packaged / "base.yaml").write_text("name: said\nseed: 1\ntraining: {steps: 100, batch: 4}\n")
    (packaged / "other.yaml").write_text("extends: base\nseed: 2\n")
    monkeypatch.setattr(library, "folder", lambda: packaged)
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_a_name_is_a_file_here_or_a_packaged_recipe(home: Path) -> None:
    assert Recipe.load("base").seed == 1
    assert Recipe.load("other").training.steps == 100
    (home / "base.yaml").write_text("seed: 5\n")
    assert Recipe.load("base").seed == 5
    assert Recipe.load("other").seed == 2  # a packaged recipe looks beside itself


def test_paths_and_run_folders(home: Path) -> None:
    (home / "runs" / "demo").mkdir(parents=True)
    (home / "runs" / "demo" / "recipe.yaml").write_text("seed: 7\n")
    for source in ("runs/demo", Path("runs/demo"), "runs/demo/recipe.yaml", home / "runs" / "demo" / "recipe.yaml"):
        assert Recipe.load(source).seed == 7
    (home / "demo").symlink_to("runs/demo")
    assert Recipe.load("demo").seed == 7
    (home / "data.json").write_text('{"seed": 8, "training": {"steps": 10}}')
    assert Recipe.load("data.json").seed == 8


def test_extends_looks_beside_the_file_first(home: Path) -> None:
    (home / "sub").mkdir()
    (home / "sub" / "mine.yaml").write_text("extends: base\ntraining: {batch: 8}\n")
    assert Recipe.load("sub/mine.yaml").derive(name="x") == Recipe.load("base", "training.batch=8").derive(name="x")
    (home / "sub" / "base.yaml").write_text("seed: 9\n")
    assert Recipe.load("sub/mine.yaml").seed == 9
    (home / "sub" / "up.yaml").write_text("extends: ../top.yaml\n")
    (home / "top.yaml").write_text("extends: sub/base.yaml\nname: top\n")
    assert Recipe.load(home / "sub" / "up.yaml").seed == 9
    (home / "none.yaml").write_text("extends: null\nseed: 3\n")
    assert Recipe.load("none").seed == 3


def test_a_file_may_bear_the_name_of_what_it_extends(home: Path) -> None:
    (home / "base.yaml").write_text("extends: base\ntraining: {batch: 2}\n")
    found = Recipe.load("base")
    assert (found.seed, found.training.batch, found.training.steps) == (1, 2, 100)


def test_a_mapping_may_extend(home: Path) -> None:
    assert Recipe.load({"extends": "other", "training": {"batch": 2}}).training.steps == 100


def test_the_name_is_the_files_unless_written(home: Path) -> None:
    (home / "mine.yaml").write_text("extends: base\n")
    assert Recipe.load("mine").name == "mine"
    assert Recipe.load("base").name == "said"
    assert Recipe.load("mine", "name=called").name == "called"
    assert Recipe.load({"extends": "base"}).name == "recipe"
    (home / ".yaml").write_text("seed: 1\n")
    assert Recipe.load("./.yaml").name == "yaml"


def test_circles_are_refused_with_their_trail(home: Path) -> None:
    (home / "a.yaml").write_text("seed: 1\nextends: b\n")
    (home / "b.yaml").write_text("extends: ./sub/../c.yaml\n")
    (home / "c.yaml").write_text("\n\nextends: a.yaml\n")
    (home / "sub").mkdir()
    with pytest.raises(SettingsError, match="extends itself") as caught:
        Recipe.load("a")
    assert caught.value.where is not None and caught.value.where.endswith("c.yaml:3")
    assert caught.value.hint is not None and caught.value.hint.count("→") == 3
    (home / "self.yaml").write_text("extends: self.yaml\n")
    with pytest.raises(SettingsError, match=r"self.yaml:1 \(extends\): this recipe extends itself"):
        Recipe.load("self")


def test_what_is_not_there_is_named(home: Path) -> None:
    with pytest.raises(SettingsError, match="no recipe called 'bose'\n  did you mean 'base'"):
        Recipe.load("bose")
    with pytest.raises(SettingsError, match="no recipe at nowhere.yaml\n  recipes by name: base, other"):
        Recipe.load("nowhere.yaml")
    (home / "empty").mkdir()
    with pytest.raises(SettingsError, match="empty/: this folder holds no recipe.yaml"):
        Recipe.load("empty/")
    (home / "mine.yaml").write_text("seed: 1\nextends: othr\n")
    with pytest.raises(SettingsError, match=r"mine.yaml:2 \(extends\): there is no recipe called 'othr'\n.*'other'"):
        Recipe.load("mine")
    (home / "mine.yaml").write_text("extends: [base, other]\n")
    with pytest.raises(SettingsError, match="name or path of one recipe"):
        Recipe.load("mine")


def test_a_mistake_in_what_is_extended_names_that_file(home: Path) -> None:
    (home / "packaged.yaml").write_text("training:\n  stepz: 3\n")
    (home / "mine.yaml").write_text("extends: packaged\ntraining:\n  batch: 3\n")
    with pytest.raises(SettingsError, match=r"^packaged.yaml:2 \(training.stepz\): unknown key 'stepz'"):
        Recipe.load("mine")


def test_packaged_recipes_lie_in_the_wheel_or_beside_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (library.folder() / "quick.yaml").is_file() and "quick" in library.names()
    package = tmp_path / "site-packages" / "armillary"
    (package / "recipes").mkdir(parents=True)
    monkeypatch.setattr(armillary, "__file__", str(package / "__init__.py"))
    assert library.folder() == package / "recipes"
