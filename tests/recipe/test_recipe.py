"""The recipe: loading with overrides, round trips, contradictions, and the schema for editors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.base import files
from armillary.base.errors import SettingsError
from armillary.base.settings import parse
from armillary.nn.channels.gated import GatedSettings
from armillary.nn.mechanism import mixers
from armillary.nn.mixers.attention import AttentionSettings
from armillary.nn.positions.rope import RopeSettings
from armillary.recipe import Recipe, library
from armillary.recipe.schedules.wsd import WarmupStableDecaySettings

DESIGN = """\
data: {sources: [{path: corpus/, weight: 1.0}], heldout: 0.02}
tokenizer: {kind: bpe, size: 8192}
model:
  width: 256
  depth: 6
  pattern: [state, state, look]   # names from `blocks`, cycled to the depth
  blocks:
    state: {mixer: {kind: retention}, channel: {kind: gated}}
    look:  {mixer: {kind: attention, heads: 8, kv_heads: 2, position: {kind: rope}}, channel: {kind: gated}}
training: {objective: causal, context: 512, batch: 16, steps: 2000, precision: bf16}
"""


@pytest.fixture
def design(tmp_path: Path) -> Path:
    file = tmp_path / "design.yaml"
    file.write_text(DESIGN)
    return file


def test_a_whole_recipe(design: Path) -> None:
    recipe = Recipe.load(design)
    assert recipe.name == "design"
    look = AttentionSettings(heads=8, kv_heads=2, position=RopeSettings())
    assert [block.mixer == look for block in recipe.model.layers()] == [False, False, True] * 2
    assert recipe.model.layers()[0].channel == GatedSettings()
    assert recipe.training.objective.kind == "causal" and recipe.training.accumulate == 1
    assert recipe.data.sources[0].path == "corpus/"


def test_overrides(design: Path) -> None:
    recipe = Recipe.load(
        design,
        "model.width=512",
        "data.sources.0.path=x",
        "data.sources.1.path=y",
        "model.block={mixer: attention, channel: gated}",
        "model.block.mixer.heads=16",
        "training.micro_batch=4",
        "training.schedule=wsd",
        "training.schedule.decay=0.3",
        "training.compile=no",
        "training.optimiser.learning_rate=3e-4",
        "training.optimiser.clip=null",
        "training.sample_prompts=[def, '']",
        "name=café au lait",
    )
    assert recipe.model.width == 512 and recipe.model.blocks is None and recipe.model.pattern is None
    assert recipe.model.block is not None and recipe.model.block.mixer == AttentionSettings(heads=16)
    assert [source.path for source in recipe.data.sources] == ["x", "y"]
    assert recipe.training.accumulate == 4
    assert recipe.training.schedule == WarmupStableDecaySettings(decay=0.3)
    assert recipe.training.compile == "no"
    assert recipe.training.optimiser.learning_rate == 3e-4 and recipe.training.optimiser.clip is None
    assert recipe.training.sample_prompts == ("def", "") and recipe.name == "café au lait"
    assert Recipe.load(recipe, "seed=3") == recipe.derive(seed=3)
    assert Recipe.load(recipe.to_data()) == recipe
    assert Recipe.load({"training": recipe.training, "data": {"sources": [recipe.data.sources[0]]}}).training.steps


def test_a_saved_recipe_can_be_overridden_in_the_other_spelling(design: Path, tmp_path: Path) -> None:
    Recipe.load(design).save(tmp_path / "recipe.yaml")
    again = Recipe.load(tmp_path, "model.block={mixer: retention}")
    assert again.model.block is not None and again.model.blocks is None
    assert again.name == "design"


MISTAKES: list[tuple[str, str, str, str]] = [
    # what is added to the recipe, its line, the path of the mistake, what is said
    ("seeds: 3", ":1", "seeds", "did you mean 'seed'"),
    ("extend: quick", ":1", "extend", "did you mean 'extends'"),
    ("width: 64", ":1", "width", "did you mean 'model.width'"),
    ("learning_rate: 1e-3", ":1", "learning_rate", "did you mean 'training.optimiser.learning_rate'"),
    ("training:\n  steps: 10\n  bacth: 3", ":3", "training.bacth", "did you mean 'batch'"),
    ("training:\n  steps: '8'", ":2", "training.steps", "should be a valid integer, found '8'"),
    ("training:\n  steps: 1e3", ":2", "training.steps", "should be a valid integer, found 1000.0"),
    ("training:\n  tensorboard: yes", ":2", "training.tensorboard", "should be a valid boolean, found 'yes'"),
    ("training: {objective: clausal}", ":1", "training.objective", "did you mean 'causal'"),
    ("training: {compile: atuo}", ":1", "training.compile", "did you mean 'auto'"),
    ("training: {device: gpu}", ":1", "training.device", "auto, cpu, cuda"),
    ("training: {guards: {spike: 1}}", ":1", "training.guards.spike", "greater than 1"),
    ("training: {optimiser: {betas: [0.9, 1.0]}}", ":1", "training.optimiser.betas.1", "less than 1"),
    ("training: {optimiser: {learning_rate: .nan}}", ":1", "training.optimiser.learning_rate", "finite number"),
    ("training:\n  batch: 6\n  micro_batch: 4", ":3", "training.micro_batch", "not divide batch: 6\n  one of 1, 2"),
    ("training:\n  steps: 10\n  schedule:\n    warmup: 20", ":4", "training.schedule.warmup", "training.steps: 10"),
    ("training:\n  context: 2048", ":2", "training.context", "longer than model.context: 1024"),
    ("model:\n  context: 64", "", "training.context", "set model.context=512"),
    ("model:\n  vocabulary: 500", ":2", "model.vocabulary", "of 500 is smaller than the tokenizer's, 8192"),
    ("tokenizer: byte\nmodel:\n  vocabulary: 261", ":1", "tokenizer", "expected a mapping"),
    ("tokenizer: {kind: byte}\nmodel:\n  vocabulary: 261", ":3", "model.vocabulary", "than the tokenizer's, 262"),
    ("training:\n  objective: masked", ":2", "training.objective", "needs an encoder"),
    ("model:\n  form: encoder", "", "training.objective", "encoder"),
    ("model:\n  block: {mixer: attention}\n  pattern: [a]", ":1", "model", "either block, or blocks"),
    ("model:\n  blocks: {a: {mixer: attention}}\n  pattern: [a, b]", ":1", "model", "the pattern names 'b'"),
    ("model:\n  block: {mixer: {kind: atention}}", ":2", "model.block.mixer", "did you mean 'attention'"),
    ("model:\n  block:\n    mixer:\n      kind: attention\n      head: 3", ":5", "model.block.mixer.head", "'heads'"),
    ("data:\n  sources:\n    - path: a\n    - weight: 2", ":4", "data.sources.1.path", "required"),
    ("data:\n  sources:\n    - {path: a, weight: 0}", ":3", "data.sources.0.weight", "greater than 0"),
    ("name: 12", ":1", "name", "should be text, found 12\n  quotes make it text"),
    ("name: a/b", ":1", "name", "'a/b' cannot name a folder"),
    ("name: ..", ":1", "name", "'..' cannot name a folder"),
    ("seed: -1", ":1", "seed", "greater than or equal to 0"),
    ("training: 3", ":1", "training", "expected a mapping"),
    ("model: [1]", ":1", "model", "expected a mapping"),
]  # fmt: skip


@pytest.mark.parametrize("text, line, key, words", MISTAKES)
def test_a_mistake_names_its_line_and_key(tmp_path: Path, text: str, line: str, key: str, words: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text + "\n")
    with pytest.raises(SettingsError) as caught:
        Recipe.load(file)
    assert ".".join(caught.value.path) == key
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{file}{line} ({key}): ")


@pytest.mark.parametrize("text, line, key, words", MISTAKES)
def test_plain_data_is_answered_with_the_key(text: str, line: str, key: str, words: str) -> None:
    data = json.loads(json.dumps(Recipe.load({}).to_data() and _plain(text)))
    with pytest.raises(SettingsError) as caught:
        Recipe.load(data)
    assert caught.value.where is None and ".".join(caught.value.path) == key


def _plain(text: str) -> Any:
    from armillary.recipe.source import read_text

    return read_text(text, "x").plain()


@pytest.mark.parametrize(
    "text, key, words",
    [
        ("model.widht=3", "model.widht", "did you mean 'width'"),
        ("width=3", "width", "did you mean 'model.width'"),
        ("model.width='3'", "model.width", "should be a valid integer, found '3'"),
        ("model.block.mixer=atention", "model.block.mixer", "did you mean 'attention'"),
        ("training.schedule.decay=0.1", "training.schedule.decay", "unknown key 'decay'"),
        ("training.context=4096", "training.context", "longer than model.context"),
        ("training.steps.a=3", "training.steps.a", "'training.steps' is the value 2000 and has no keys"),
        ("data.sources.2.path=x", "data.sources.2", "there is no item '2'"),
    ],
)
def test_a_mistaken_override_is_quoted(design: Path, text: str, key: str, words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Recipe.load(design, "seed=1", text)
    assert caught.value.where == f"override '{text}'"
    assert ".".join(caught.value.path) == key and words in str(caught.value)


KEYS = {
    "seed": st.integers(0, 2**63 - 1),
    "name": st.from_regex(r"\A[a-zA-Z][\w é.-]{0,9}\Z").map(json.dumps),
    "data.heldout": st.floats(0, 0.9),
    "data.sources.0.path": st.text(min_size=1).map(json.dumps),
    "tokenizer.size": st.integers(300, 10_000),
    "tokenizer.special": st.lists(st.text(), max_size=2).map(json.dumps),
    "model.width": st.sampled_from([64, 128, 256]),
    "model.depth": st.integers(1, 4),
    "model.block": st.sampled_from(["{mixer: attention, channel: gated}", "{mixer: {kind: retention}}", "null"]),
    "model.overrides.0.mixer": st.sampled_from(["attention", "{kind: attention, heads: 2, position: alibi}"]),
    "model.norm": st.sampled_from(["layernorm", "{kind: rmsnorm, epsilon: 1e-6}", "null"]),
    "training.batch": st.sampled_from([4, 8]),
    "training.micro_batch": st.sampled_from([1, 2, 4, "null"]),
    "training.schedule": st.sampled_from(["cosine", "{kind: wsd, shape: sqrt}", "constant", "null"]),
    "training.schedule.warmup": st.integers(0, 50) | st.floats(0, 0.5),
    "training.optimiser.learning_rate": st.floats(1e-12, 1e3),
    "training.optimiser.betas": st.tuples(*[st.floats(0, 0.99)] * 2).map(lambda pair: json.dumps(pair)),
    "training.optimiser.clip": st.just("null") | st.floats(0.1, 10),
    "training.sample_prompts": st.lists(st.text(), max_size=2).map(json.dumps),
    "training.compile": st.sampled_from(["yes", "no", "auto"]),
}  # fmt: skip


@st.composite
def overrides(draw: st.DrawFn) -> list[str]:
    keys = draw(st.lists(st.sampled_from(sorted(KEYS)), unique=True, max_size=6))
    return [f"{key}={draw(KEYS[key])}" for key in keys]


def _valid(texts: list[str]) -> Recipe:
    """json.dumps writes what YAML lists and quotes read, but for characters beyond the first 65,536."""
    return Recipe.load({}, *[re.sub(r"\\u[dD][89a-fA-F]..", "?", text) for text in texts])


@settings(max_examples=30)
@given(overrides())
def test_yaml_and_json_read_back_as_the_same(texts: list[str]) -> None:
    recipe = _valid(texts)
    for written in (recipe.to_yaml(), recipe.to_yaml(comments=True)):
        assert parse(Recipe, _plain(written)) == recipe
        assert parse(Recipe, yaml.safe_load(written)) == recipe
    assert parse(Recipe, json.loads(json.dumps(recipe.to_data()))) == recipe
    assert parse(Recipe, json.loads(recipe.model_dump_json())) == recipe
    assert parse(Recipe, recipe.to_data(defaults=False)) == recipe
    assert parse(Recipe, _plain(recipe.to_yaml())).fingerprint == recipe.fingerprint


def test_save_is_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "deep" / "recipe.yaml"
    recipe = Recipe.load({}, "seed=5", "name=mine")
    recipe.save(file)
    assert Recipe.load(file) == recipe

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        recipe.derive(seed=6).save(str(file))
    assert Recipe.load(file) == recipe and list(file.parent.iterdir()) == [file]


def test_the_fingerprint_is_of_the_content_and_not_of_the_name(design: Path) -> None:
    recipe = Recipe.load(design)
    assert recipe.fingerprint == recipe.derive(name="other").fingerprint
    assert recipe.fingerprint != Recipe.load(design, "training.optimiser.epsilon=1e-7").fingerprint
    assert re.fullmatch("[0-9a-f]{64}", recipe.fingerprint)


def test_keys_left_out_or_null_are_the_defaults() -> None:
    assert Recipe.load({}) == Recipe() == Recipe.load({"training": None, "model": {"width": None}, "seed": None})
    assert Recipe.load({}, "training.optimiser=").training.optimiser.clip == 1.0


def test_every_key_is_described() -> None:
    from armillary.base.settings import Settings

    def undescribed(settings: Settings, path: str) -> list[str]:
        found = []
        for name, info in type(settings).model_fields.items():
            value = getattr(settings, name)
            found += [] if info.description else [f"{path}{name}"]
            found += undescribed(value, f"{path}{name}.") if isinstance(value, Settings) else []
        return found

    assert undescribed(Recipe.load("quick"), "") == []


def test_the_schema_for_editors() -> None:
    schema = Recipe.schema_for_editors()
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == {"extends", *Recipe.model_fields}
    assert schema["properties"]["seed"]["description"] == Recipe.model_fields["seed"].description
    assert schema["$defs"]["any-mixer"]["anyOf"][0] == {"enum": mixers.names()}
    assert json.loads(json.dumps(schema)) == schema


@pytest.mark.parametrize("name", library.names())
def test_packaged_recipes_are_valid(name: str) -> None:
    assert Recipe.load(name).name == name
