"""Writing YAML: read back alike by our reader (YAML 1.2) and by PyYAML's (YAML 1.1), with and without comments."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from armillary.base.registry import Registry
from armillary.base.settings import Choice, Settings, parse
from armillary.recipe.source import read_text
from armillary.recipe.write import scalar, to_yaml

tools: Registry[Tool] = Registry("tool", "armillary.base", default="saw")


class Tool(Choice):
    choices: ClassVar[Registry[Any]] = tools


@tools.register
class Saw(Tool):
    kind: ClassVar[str] = "saw"
    teeth: int = Field(7, description="more of them cut finer")
    spare: Tool | None = None


@tools.register
class Hand(Tool):
    kind: ClassVar[str] = "hand"


class Empty(Settings):
    pass


class Box(Settings):
    words: str = Field("", description="what is written on it")
    factor: float = Field(1.0, description="a factor, and a description that goes on and on " + "and on " * 20)
    lines: tuple[str, ...] = ()
    tool: Tool = Field(Hand(), description="what is in it")
    tools: tuple[Tool, ...] = Field((), description="what else is in it")
    named: dict[str, Tool] = Field({}, description="by name")
    numbered: dict[int, float] = Field({})
    grid: tuple[tuple[int, ...], ...] = ()
    table: dict[str, tuple[str, ...]] = Field({})
    empty: Empty = Field(Empty())
    maybe: int | bool | None = Field(None, description="perhaps")


texts = st.text() | st.text("abcnoyesNULL01.e-+:~_ /xf#'\"[]{}&*!|>%@`,\n\t\\\x85\u2028\ufeff\ud83d😀é")
kinds = st.recursive(
    st.just(Hand()) | st.builds(Saw, teeth=st.integers()),
    lambda inner: st.builds(Saw, teeth=st.integers(), spare=st.none() | inner),
    max_leaves=3,
)
boxes = st.builds(
    Box,
    words=texts,
    factor=st.floats(allow_nan=False, allow_infinity=False),
    lines=st.lists(texts, max_size=3).map(tuple),
    tool=kinds,
    tools=st.lists(kinds, max_size=3).map(tuple),
    named=st.dictionaries(texts, kinds, max_size=2),
    numbered=st.dictionaries(st.integers(), st.floats(-1, 1), max_size=2),
    grid=st.lists(st.lists(st.integers(), max_size=2).map(tuple), max_size=2).map(tuple),
    table=st.dictionaries(texts, st.lists(texts, max_size=2).map(tuple), max_size=2),
    maybe=st.none() | st.integers() | st.booleans(),
)


@given(boxes, st.booleans())
def test_settings_read_back_as_the_same(box: Box, comments: bool) -> None:
    written = to_yaml(box, comments=comments)
    assert parse(Box, read_text(written, "x").plain()) == box
    assert parse(Box, yaml.safe_load(written)) == box


@given(texts)
def test_text_reads_back_as_the_same(text: str) -> None:
    written = f"- {scalar(text)}\n- {{{scalar(text)}: 1}}\n"
    assert yaml.safe_load(written) == [text, {text: 1}]
    assert read_text(f"a: {written[2:].splitlines()[0]}\n", "x").plain() == {"a": text}


@pytest.mark.parametrize(
    "word", ["no", "Yes", "on", "1e-3", "1_0", "1:30", "2024-01-01", "null", "~", "0x1", "=", "", " x"]
)
def test_words_that_some_reader_takes_for_something_else_are_quoted(word: str) -> None:
    assert scalar(word).startswith('"')


@pytest.mark.parametrize("word", ["attention", "corpus/python", "two words", "a.b-c", "auto", "_x"])
def test_plain_words_are_plain(word: str) -> None:
    assert scalar(word) == word


@pytest.mark.parametrize(
    "number, text", [(1e-5, "1.0e-05"), (1e22, "1.0e+22"), (0.1, "0.1"), (3.0, "3.0"), (-1.5e-9, "-1.5e-09"), (7, "7")]
)
def test_numbers(number: float, text: str) -> None:
    assert scalar(number) == text
    assert math.isclose(yaml.safe_load(text), number, rel_tol=0) and type(yaml.safe_load(text)) is type(number)


def test_the_layout() -> None:
    box = Box(
        lines=("a", "no"), tool=Saw(spare=Hand()), tools=(Hand(), Saw(teeth=2)), named={"x": Saw()}, numbered={3: 0.5}
    )
    assert to_yaml(box) == (
        'words: ""\n'
        "factor: 1.0\n"
        'lines: [a, "no"]\n'
        "tool:\n"
        "  kind: saw\n"
        "  teeth: 7\n"
        "  spare: hand\n"
        "tools:\n"
        "  - hand\n"
        "  - kind: saw\n"
        "    teeth: 2\n"
        "    spare: null\n"
        "named:\n"
        "  x:\n"
        "    kind: saw\n"
        "    teeth: 7\n"
        "    spare: null\n"
        "numbered:\n"
        '  "3": 0.5\n'
        "grid: []\n"
        "table: {}\n"
        "empty: {}\n"
        "maybe: null\n"
    )


def test_comments_are_the_descriptions() -> None:
    lines = to_yaml(Box(), comments=True).splitlines()
    assert lines[0] == 'words: ""  # what is written on it'
    assert "tool: hand  # what is in it" in lines
    assert all(len(line) <= 100 for line in lines)
    long = lines.index("factor: 1.0")
    assert lines[long - 1].startswith("# ") and lines[long - 2].startswith("# a factor, and a description")
    for name, info in Box.model_fields.items():
        assert not info.description or info.description.split()[-1] in "\n".join(lines), name
