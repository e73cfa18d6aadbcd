"""Merging and overrides, on a small tree of settings with the shapes that a recipe has."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pytest
from pydantic import Field

from armillary.base.errors import SettingsError
from armillary.base.registry import Registry
from armillary.base.settings import Choice, Settings
from armillary.recipe.merge import Site, merge, override
from armillary.recipe.source import from_data, read_text

looks: Registry[Look] = Registry("look", "armillary.base", default="near")


class Look(Choice):
    choices: ClassVar[Registry[Any]] = looks


@looks.register
class Near(Look):
    kind: ClassVar[str] = "near"
    heads: int = 4
    inner: Look | None = None


@looks.register
class Far(Look):
    kind: ClassVar[str] = "far"
    heads: int = 8


class Part(Settings):
    mixer: Look | None = None
    channel: Look | None = None
    branches: tuple[Look, ...] | None = None


class Item(Settings):
    path: str = ""
    weight: float = 1.0


class Words(Settings):
    kind: Literal["pair", "byte"] = "pair"
    size: int = 8


class Whole(Settings):
    width: int = 1
    clip: float | None = 1.0
    block: Part | None = None
    blocks: dict[str, Part] | None = None
    pattern: tuple[str, ...] | None = None
    overrides: dict[int, Part] = Field({})
    items: tuple[Item, ...] = ()
    given: tuple[Item, ...] = (Item(path="a"), Item(path="b"))
    look: Look = Far()
    words: Words = Words()


SITE = Site(Whole)


@pytest.mark.parametrize(
    "under, over, result",
    [
        ({"width": 1, "clip": 2.0}, {"width": 3}, {"width": 3, "clip": 2.0}),
        ({"block": {"mixer": {"heads": 1}}}, {"block": {"channel": "far"}},
         {"block": {"mixer": {"heads": 1}, "channel": "far"}}),
        # lists replace
        ({"items": [{"path": "a"}, {"path": "b"}]}, {"items": [{"path": "c"}]}, {"items": [{"path": "c"}]}),
        # another kind replaces, the same kind merges
        ({"look": {"kind": "near", "heads": 2}}, {"look": {"kind": "far"}}, {"look": {"kind": "far"}}),
        ({"look": {"kind": "near", "heads": 2}}, {"look": {"kind": "near", "inner": "far"}},
         {"look": {"kind": "near", "heads": 2, "inner": "far"}}),
        ({"look": {"kind": "near", "heads": 2}}, {"look": {"heads": 3}}, {"look": {"kind": "near", "heads": 3}}),
        # a kind that is not written is the default's: `look` defaults to far, a mixer to near
        ({"look": {"heads": 2}}, {"look": {"kind": "far"}}, {"look": {"heads": 2, "kind": "far"}}),
        ({"look": {"heads": 2}}, {"look": {"kind": "near"}}, {"look": {"kind": "near"}}),
        ({"block": {"mixer": {"heads": 2}}}, {"block": {"mixer": {"kind": "near"}}},
         {"block": {"mixer": {"heads": 2, "kind": "near"}}}),
        ({"block": {"mixer": {"heads": 2}}}, {"block": {"mixer": {"kind": "far"}}},
         {"block": {"mixer": {"kind": "far"}}}),
        # `kind` of plain settings too
        ({"words": {"size": 9}}, {"words": {"kind": "byte"}}, {"words": {"kind": "byte"}}),
        ({"words": {"size": 9}}, {"words": {"kind": "pair"}}, {"words": {"size": 9, "kind": "pair"}}),
        # bare names
        ({"look": {"kind": "near", "heads": 2}}, {"look": "near"}, {"look": "near"}),
        ({"look": "near"}, {"look": {"heads": 2}}, {"look": {"kind": "near", "heads": 2}}),
        ({"look": "near"}, {"look": {"kind": "far", "heads": 2}}, {"look": {"kind": "far", "heads": 2}}),
        # two spellings of one thing
        ({"blocks": {"a": {}}, "pattern": ["a"], "width": 2}, {"block": {"mixer": "near"}},
         {"width": 2, "block": {"mixer": "near"}}),
        ({"block": {"mixer": "near"}}, {"blocks": {"a": {}}, "pattern": ["a"]},
         {"blocks": {"a": {}}, "pattern": ["a"]}),
        ({"blocks": {"a": {}}, "pattern": ["a"]}, {"pattern": ["a", "a"]},
         {"blocks": {"a": {}}, "pattern": ["a", "a"]}),
        ({"block": {"mixer": "near"}}, {"block": {"branches": ["far"]}}, {"block": {"branches": ["far"]}}),
        ({"block": {"branches": ["far"]}}, {"block": {"channel": "far"}}, {"block": {"channel": "far"}}),
        ({"block": None, "blocks": {"a": {}}}, {"block": {"mixer": "near"}}, {"block": {"mixer": "near"}}),
        ({"block": {"mixer": "near"}}, {"block": None, "blocks": {"a": {}}}, {"block": None, "blocks": {"a": {}}}),
        ({"blocks": {"a": {}}}, {"block": None}, {"blocks": {"a": {}}, "block": None}),
        # given together in one file they stay together, for the settings to complain about
        ({"width": 1}, {"block": {}, "blocks": {}}, {"width": 1, "block": {}, "blocks": {}}),
        # null
        ({"width": 3, "look": {"heads": 2}}, {"width": None, "look": None}, {"width": None, "look": None}),
        ({"blocks": {"a": {}, "b": {}}}, {"blocks": {"a": None}}, {"blocks": {"a": None, "b": {}}}),
        # what is not known is merged as it stands
        ({"odd": {"kind": "x", "a": 1}}, {"odd": {"kind": "y"}}, {"odd": {"kind": "y"}}),
        ({"odd": {"a": 1}}, {"odd": {"b": 2}}, {"odd": {"a": 1, "b": 2}}),
        ({"width": 3}, {"width": {"a": 1}}, {"width": {"a": 1}}),
    ],
)  # fmt: skip
def test_merge(under: dict[str, Any], over: dict[str, Any], result: dict[str, Any]) -> None:
    assert merge(from_data(under), from_data(over), SITE).plain() == result


def test_merged_values_keep_their_places() -> None:
    under, over = read_text("width: 1\nlook:\n  heads: 2\n", "a"), read_text("# x\nlook:\n  kind: far\n", "b")
    both = merge(under, over, SITE)
    assert both.locate(("width",)) == "a:1"
    assert both.locate(("look", "heads")) == "a:3" and both.locate(("look", "kind")) == "b:3"
    assert both.locate(("look", "odd")) == "b:2"


@pytest.mark.parametrize(
    "data, text, result",
    [
        ({}, "width=3", {"width": 3}),
        ({}, " width = 3 ", {"width": 3}),
        ({"width": 3}, "width=", {"width": None}),
        ({}, "look.heads=3", {"look": {"heads": 3}}),
        ({"look": "near"}, "look.heads=3", {"look": {"kind": "near", "heads": 3}}),
        ({"look": None}, "look.heads=3", {"look": {"heads": 3}}),
        ({"look": {"kind": "near", "heads": 3}}, "look.kind=far", {"look": {"kind": "far"}}),
        ({"look": {"kind": "near", "heads": 3}}, "look.kind=near", {"look": {"kind": "near", "heads": 3}}),
        ({"look": {"kind": "near", "heads": 3}}, "look=far", {"look": "far"}),
        ({"look": {"kind": "near", "heads": 3}}, "look={inner: far}",
         {"look": {"kind": "near", "heads": 3, "inner": "far"}}),
        ({"block": {"mixer": "near", "channel": "far"}}, "block.mixer.inner.heads=2",
         {"block": {"mixer": {"kind": "near", "inner": {"heads": 2}}, "channel": "far"}}),
        ({"blocks": {"a": {"mixer": "near"}}, "pattern": ["a"]}, "blocks.a.mixer=far",
         {"blocks": {"a": {"mixer": "far"}}, "pattern": ["a"]}),
        ({"blocks": {"a": {}}, "pattern": ["a"]}, "block.mixer=far", {"block": {"mixer": "far"}}),
        ({}, "overrides.3.mixer=far", {"overrides": {"3": {"mixer": "far"}}}),
        # lists: an item's number, one more to add
        ({}, "items.0.path=x", {"items": [{"path": "x"}]}),
        ({"items": [{"path": "a", "weight": 2}]}, "items.0.path=x", {"items": [{"path": "x", "weight": 2}]}),
        ({"items": [{"path": "a"}]}, "items.1.path=x", {"items": [{"path": "a"}, {"path": "x"}]}),
        ({"items": [{"path": "a"}]}, "items=[{path: x}]", {"items": [{"path": "x"}]}),
        ({"items": None}, "items.0.path=x", {"items": [{"path": "x"}]}),
        ({"pattern": ["a", "b"]}, "pattern.1=c", {"pattern": ["a", "c"]}),
        ({"block": {"branches": ["near"]}}, "block.branches.0.heads=2",
         {"block": {"branches": [{"kind": "near", "heads": 2}]}}),
        # a list that is not written is its default
        ({}, "given.1.path=x", {"given": [{"path": "a", "weight": 1.0}, {"path": "x", "weight": 1.0}]}),
        ({}, "given.2.path=x",
         {"given": [{"path": "a", "weight": 1.0}, {"path": "b", "weight": 1.0}, {"path": "x"}]}),
    ],
)  # fmt: skip
def test_override(data: dict[str, Any], text: str, result: dict[str, Any]) -> None:
    before = from_data(data)
    assert override(before, text, SITE).plain() == result
    assert before.plain() == data  # what it was laid on is as before


@pytest.mark.parametrize(
    "data, text, words",
    [
        ({}, "width", "an override is written key=value"),
        ({}, "=3", "an override is written key=value"),
        ({}, "look..heads=3", "an override is written key=value"),
        ({}, "items.1.path=x", "there is no item '1' here"),
        ({"items": [{}]}, "items.-1.path=x", "there is no item '-1' here"),
        ({}, "items.path=x", "0 to 0 (0 adds one)"),
        ({"width": 3}, "width.a=3", "'width' is the value 3 and has no keys"),
        ({"items": [{"path": "x"}]}, "items.0.path.a=3", "'items.0.path' is text and has no keys"),
        ({}, "width=[1", "not valid YAML"),
    ],
)
def test_an_override_that_cannot_be_quotes_itself(data: dict[str, Any], text: str, words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        override(from_data(data), text, SITE)
    assert words in str(caught.value)
    assert caught.value.where == f"override '{text}'"


def test_overrides_are_places() -> None:
    node = override(read_text("look: near\nitems: [{path: a}]\n", "f"), "look.heads=2", SITE)
    node = override(node, "items.0.weight=2", SITE)
    assert node.locate(("look", "heads")) == "override 'look.heads=2'"
    assert node.locate(("look", "kind")) == "f:1"
    assert node.locate(("items", "0", "path")) == "f:2"
    assert node.locate(("items", "0", "weight")) == "override 'items.0.weight=2'"
