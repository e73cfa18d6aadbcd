"""Reading YAML: scalars of the core schema, lines, and everything that is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from armillary.base.errors import SettingsError
from armillary.recipe.source import from_data, read, read_text, read_value, scalar

# YAML 1.2.2, section 10.3.2: what each plain scalar is in the core schema.
SCALARS: list[tuple[str, Any]] = [
    ("", None), ("~", None), ("null", None), ("NULL", None), ("nul", "nul"),
    ("true", True), ("False", False), ("TRUE", True),
    ("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("y", "y"), ("N", "N"),
    ("0", 0), ("-19", -19), ("+12", 12), ("0o14", 12), ("0xC", 12), ("012", 12), ("1_000", "1_000"),
    ("1e-3", 1e-3), ("1E3", 1000.0), ("12e03", 12000.0), ("-2E+05", -2e5), (".5", 0.5), ("5.", 5.0), ("+.5", 0.5),
    (".inf", math.inf), ("-.INF", -math.inf), ("+.inf", math.inf),
    ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("0b1", "0b1"), ("1e", "1e"), (".", "."), ("e3", "e3"), ("-", "-"),
    ("=", "="), ("<<", "<<"),
]  # fmt: skip


@pytest.mark.parametrize("text, value", SCALARS)
def test_plain_scalars(text: str, value: Any) -> None:
    found = scalar(text)
    assert found == value and type(found) is type(value)
    if text not in ("-", "="):  # alone in a file these two are punctuation
        in_file = read_text(f"key: {text}\n", "x").plain()["key"]
        assert in_file == value and type(in_file) is type(value)


def test_not_a_number_and_quotes() -> None:
    assert math.isnan(scalar(".nan"))  # type: ignore[arg-type]
    assert read_text("a: '1'\nb: \"true\"\nc: !!str 1\nd: !!float 1\ne: |\n  x\n  y\n", "x").plain() == {
        "a": "1", "b": "true", "c": "1", "d": 1.0, "e": "x\ny\n",
    }  # fmt: skip


TEXT = """\
# a comment
model:
  width: 64
  blocks:
    look: {mixer: attention,
           channel: gated}
sources:
  - path: a
    weight: 1
  - path: b
"""


@pytest.mark.parametrize(
    "path, line",
    [
        ((), ""), (("model",), ":2"), (("model", "width"), ":3"), (("model", "widht"), ":2"),
        (("model", "blocks", "look", "mixer"), ":5"), (("model", "blocks", "look", "channel"), ":6"),
        (("model", "blocks", "look", "channel", "kind"), ":6"), (("sources", "1", "path"), ":10"),
        (("sources", "0", "weight"), ":9"), (("sources", "7"), ":7"), (("nothing",), ""),
    ],
)  # fmt: skip
def test_every_value_knows_its_line(path: tuple[str, ...], line: str) -> None:
    assert read_text(TEXT, "a.yaml").locate(path) == f"a.yaml{line}"


def test_anchors_are_copies() -> None:
    node = read_text("a: &x {b: 1}\nc: *x\n", "f")
    assert node.plain() == {"a": {"b": 1}, "c": {"b": 1}}


def test_empty_text_is_an_empty_recipe() -> None:
    for text in ("", "# nothing\n", "null\n", "---\n"):
        assert read_text(text, "x").plain() == {}


REFUSED = [
    ("a: 1\nb: 2\na: 3\n", 3, "the key 'a' is written twice"),
    ("m:\n  x: 1\n  x: 1\n", 3, "first on line 2, again on line 3"),
    ("a: [1, 2\nb: 3\n", 2, "not valid YAML"),
    ("a:\n\t- 1\n", 2, "not valid YAML"),
    ("a: 1\n---\nb: 2\n", 2, "not valid YAML"),
    ("a: *nowhere\n", 1, "undefined alias"),
    ("- 1\n- 2\n", 1, "a recipe is a mapping"),
    ("just words\n", 1, "a recipe is a mapping"),
    ("x: 1\na: !!python/object/apply:os.system ['true']\n", 2, "has no meaning here"),
    ("a: !!binary aGk=\n", 1, "tag !!binary has no meaning"),
    ("a: !mine 3\n", 1, "has no meaning"),
    ("a: !!int word\n", 1, "has no meaning"),
    ("a: !!set {x}\n", 1, "has no meaning"),
    ("? [a, b]\n: 1\n", 1, "a key is a word or a number"),
    ("x: 0\na: &a [*a]\n", 2, "refers to itself"),
    ("a: " + "9" * 5000, 1, "too many digits"),
    ("x: 1\na: b\x00c\n", 2, "is not allowed"),
]


@pytest.mark.parametrize("text, line, words", REFUSED)
def test_what_is_refused_names_its_line(text: str, line: int, words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_text(text, "a.yaml")
    assert words in str(caught.value)
    assert caught.value.where == f"a.yaml:{line}"


def test_hostile_nesting_is_refused() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    with pytest.raises(SettingsError, match="more than 20,000 values"):
        read_text(bomb, "x")
    with pytest.raises(SettingsError, match="nested too deeply"):
        read_text("[" * 20_000, "x")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"absent.yaml: this recipe cannot be read \(No such file"):
        read(tmp_path / "absent.yaml")
    with pytest.raises(SettingsError, match="cannot be read"):
        read(tmp_path)
    file = tmp_path / "latin.yaml"
    file.write_bytes("a: 1\nname: caf\xe9\n".encode("latin-1"))
    with pytest.raises(SettingsError, match="latin.yaml:2: this is not UTF-8"):
        read(file)
    file.write_bytes(b"#" * 1_100_000)
    with pytest.raises(SettingsError, match="not a recipe"):
        read(file)
    file.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")  # as some editors on Windows write it
    assert read(file).plain() == {"a": 1, "b": 2}
    assert read(file).locate(("b",)) == f"{file}:2"


@pytest.mark.parametrize(
    "text, value",
    [
        ("512", 512), (" 1e-3 ", 1e-3), ("", None), ("text", "text"), ("no", "no"), ("'1'", "1"), ('"a: b"', "a: b"),
        ("[a, 2, [x]]", ["a", 2, ["x"]]), ("{kind: wsd, decay: 0.3}", {"kind": "wsd", "decay": 0.3}),
        ("a: b", "a: b"), ("# title", "# title"), ("x # y", "x # y"), ("- item", "- item"), ("*name", "*name"),
        ("C:\\data", "C:\\data"), ("a=b", "a=b"), ("!!python/name:os", "!!python/name:os"),
    ],
)  # fmt: skip
def test_values_on_the_command_line(text: str, value: Any) -> None:
    assert read_value(text, "override").plain() == value


@pytest.mark.parametrize("text", ["[INST] hi", "{{ a }} b", "'open", '"a" b', "[1, 2"])
def test_a_value_that_does_not_close_is_explained(text: str) -> None:
    with pytest.raises(SettingsError, match="not valid YAML.*\n.*needs quotes") as caught:
        read_value(text, "override 'x'")
    assert caught.value.where == "override 'x'"


def test_a_number_that_is_too_long_is_refused() -> None:
    for text in ("9" * 5000, f"[{'9' * 5000}]"):
        with pytest.raises(SettingsError, match="too many digits"):
            read_value(text, "override 'x'")


def test_data_becomes_nodes_and_back() -> None:
    data = {"a": {"b": [1, {"c": None}], "3": "x"}}
    assert from_data(data).plain() == data
    assert from_data({3: (1, 2)}).plain() == {"3": [1, 2]}
    assert from_data(data).locate(("a", "b")) is None
    old = read_text("a: 1\nb:\n  c: 2\n", "f")
    new = from_data({"b": {"c": 3, "d": 4}}, old=old)
    assert new.plain() == {"b": {"c": 3, "d": 4}}
    assert new.locate(("b", "c")) == "f:3" and new.locate(("b", "d")) == "f:2"
