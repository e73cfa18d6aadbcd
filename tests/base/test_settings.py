"""Settings: strictness, paths of mistakes, choices, null, round trips and the JSON Schema."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from armillary.base.errors import ArmillaryError, SettingsError
from armillary.base.registry import Registry
from armillary.base.settings import Choice, Settings, default_kind, json_schema, nested_class, nullable, parse

shapes: Registry[Shape] = Registry("shape", "armillary.base", default="disc")


class Shape(Choice):
    """A role with two kinds."""

    choices: ClassVar[Registry[Any]] = shapes


@shapes.register
class Disc(Shape):
    kind: ClassVar[str] = "disc"
    radius: float = Field(1.0, gt=0)


@shapes.register
class Pair(Shape):
    kind: ClassVar[str] = "pair"
    first: Shape = Disc(radius=2.0)
    second: Shape | None = None


class Leaf(Settings):
    count: int | Literal["auto"] = "auto"
    ends: tuple[float, float] = (0.0, 1.0)
    ratio: float | None = 0.5
    mode: Literal["linear", "cubic"] = "linear"
    size: Annotated[int, Field(ge=1)] = 8
    low: int = 0
    high: int = 10

    @model_validator(mode="after")
    def _ordered(self) -> Leaf:
        if self.low > self.high:
            raise SettingsError("low is above high", path=("low",), hint="swap them")
        if self.size == 13:
            raise ValueError("Thirteen brings bad luck")
        return self


class Tree(Settings):
    needed: str
    leaf: Leaf = Leaf()
    leaves: tuple[Leaf, ...] = ()
    named: dict[str, Leaf] = Field({})
    numbered: dict[int, Leaf] = Field({})
    weights: dict[str, float] = Field({})
    shape: Shape = Pair()
    maybe: Leaf | None = None
    flag: bool = False


def tree(**data: Any) -> Tree:
    return parse(Tree, {"needed": "x", **data})


MISTAKES: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
    ({"needed": None}, ("needed",), "required"),
    ({"laef": {}}, ("laef",), "did you mean 'leaf'"),
    ({"leaf": {"sise": 3}}, ("leaf", "sise"), "did you mean 'size'"),
    ({"leaf": {"size": "8"}}, ("leaf", "size"), "should be a valid integer, found '8'"),
    ({"leaf": {"size": 8.5}}, ("leaf", "size"), "should be a valid integer, found 8.5"),
    ({"leaf": {"size": True}}, ("leaf", "size"), "should be a valid integer, found True"),
    ({"leaf": {"size": 0}}, ("leaf", "size"), "greater than or equal to 1"),
    ({"leaf": {"count": "atuo"}}, ("leaf", "count"), "a valid integer or 'auto', found 'atuo'"),
    ({"leaf": {"mode": "cubik"}}, ("leaf", "mode"), "did you mean 'cubic'"),
    ({"leaf": {"ratio": "much"}}, ("leaf", "ratio"), "valid number"),
    ({"leaf": {"ratio": float("nan")}}, ("leaf", "ratio"), "finite"),
    ({"leaf": {"ratio": float("inf")}}, ("leaf", "ratio"), "finite"),
    ({"leaf": {"ends": [1.0]}}, ("leaf", "ends"), "expected 2 items, found 1"),
    ({"leaf": {"ends": [1.0, "x"]}}, ("leaf", "ends", "1"), "valid number"),
    ({"leaf": {"ends": "ab"}}, ("leaf", "ends"), "should be a list"),
    ({"leaf": {"low": 11}}, ("leaf", "low"), "low is above high"),
    ({"leaf": {"size": 13}}, ("leaf",), "thirteen brings bad luck"),
    ({"leaf": 3}, ("leaf",), "expected a mapping"),
    ({"leaf": {3: 1}}, ("leaf", "3"), "unknown key '3'"),
    ({"leaves": [{}, {"size": "1"}]}, ("leaves", "1", "size"), "valid integer"),
    ({"leaves": {"size": 1}}, ("leaves",), "should be a list"),
    ({"named": {"a": {"size": "1"}}}, ("named", "a", "size"), "valid integer"),
    ({"named": {3: {}}}, ("named",), "should be text"),
    ({"numbered": {"2": {"size": 0}}}, ("numbered", "2", "size"), "greater"),
    ({"numbered": {"two": {}}}, ("numbered", "two"), "valid integer"),
    ({"weights": {"int": "x"}}, ("weights", "int"), "valid number"),
    ({"flag": "no"}, ("flag",), "valid boolean"),
    ({"flag": 1}, ("flag",), "valid boolean"),
    ({"shape": "dics"}, ("shape",), "did you mean 'disc'"),
    ({"shape": {"kind": 3}}, ("shape",), "needs a `kind`"),
    ({"shape": 3}, ("shape",), "expected a shape"),
    ({"shape": {"kind": "disc", "radius": -1}}, ("shape", "radius"), "greater than 0"),
    ({"shape": {"kind": "pair", "first": {"kind": "disc", "radios": 1}}}, ("shape", "first", "radios"), "'radius'"),
    ({"maybe": {"size": "1"}}, ("maybe", "size"), "valid integer"),
]


@pytest.mark.parametrize("data, path, words", MISTAKES)
def test_a_mistake_is_answered_with_its_place(data: dict[str, Any], path: tuple[str, ...], words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        tree(**data)
    assert caught.value.path == path
    assert words in str(caught.value)
    assert str(caught.value).startswith(".".join(path) + ": ")


@pytest.mark.parametrize("data, path, words", [case for case in MISTAKES if all(isinstance(k, str) for k in case[0])])
def test_direct_construction_says_the_same(data: dict[str, Any], path: tuple[str, ...], words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Tree(**{"needed": "x", **data})
    assert caught.value.path == path and words in str(caught.value)


def test_the_path_given_to_parse_leads() -> None:
    with pytest.raises(SettingsError) as caught:
        parse(Leaf, {"low": 11}, ("a", "b"))
    assert caught.value.path == ("a", "b", "low") and caught.value.hint == "swap them"


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Leaf().size = 9  # type: ignore[misc]


def test_null_is_the_default_unless_it_is_a_value() -> None:
    made = tree(leaf={"size": None, "ratio": None}, leaves=None, named={"a": None, "b": {}}, shape=None, flag=None)
    assert made == tree(leaf=Leaf(ratio=None), named={"b": Leaf()})
    assert made.leaf.ratio is None and made.shape == Pair()


def test_a_choice_without_kind_keeps_the_kind_of_its_default() -> None:
    assert tree(shape={"second": "disc"}).shape == Pair(second=Disc())  # the field's default, not the registry's
    assert tree(shape={"first": {"radius": 3.0}}).shape == Pair(first=Disc(radius=3.0))
    assert parse(Shape, {"radius": 3.0}) == Disc(radius=3.0)
    assert parse(Shape, {"kind": None}) == Disc()
    assert default_kind(Tree, "shape") == "pair"
    assert default_kind(Tree, "leaf") is None


def test_a_bare_name_is_its_defaults() -> None:
    assert tree(shape="disc").shape == Disc() == parse(Disc, "disc")
    with pytest.raises(SettingsError, match="expected the kind 'disc' here"):
        parse(Disc, {"kind": "pair"})


def test_whole_numbers_are_floats_but_not_the_other_way_round() -> None:
    made = parse(Leaf, {"ratio": 1, "ends": [0, 2]})
    assert (made.ratio, made.ends) == (1.0, (0.0, 2.0)) and isinstance(made.ratio, float)


leaves = st.builds(
    lambda count, ends, ratio, mode, size: Leaf(count=count, ends=ends, ratio=ratio, mode=mode, size=size),
    st.one_of(st.integers(), st.just("auto")),
    st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 2),
    st.none() | st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["linear", "cubic"]),
    st.integers(1, 12),
)
some_shapes = st.recursive(
    st.builds(Disc, radius=st.floats(0.1, 10)), lambda inner: st.builds(Pair, first=inner, second=st.none() | inner)
)
trees = st.builds(
    Tree,
    needed=st.text(),
    leaf=leaves,
    leaves=st.lists(leaves, max_size=2).map(tuple),
    named=st.dictionaries(st.text(), leaves, max_size=2),
    numbered=st.dictionaries(st.integers(), leaves, max_size=2),
    weights=st.dictionaries(st.text(), st.floats(0, 1), max_size=2),
    shape=some_shapes,
    maybe=st.none() | leaves,
)


@given(trees, st.booleans())
def test_data_and_json_read_back_as_the_same(made: Tree, defaults: bool) -> None:
    data = made.to_data(defaults=defaults)
    assert parse(Tree, data) == made
    assert parse(Tree, json.loads(json.dumps(data))) == made


@given(trees)
def test_pydantic_writes_what_we_write(made: Tree) -> None:
    assert made.model_dump() == made.to_data()
    assert parse(Tree, json.loads(made.model_dump_json())) == made


def test_only_what_differs_is_written_without_defaults() -> None:
    assert tree(leaf={"size": 9}).to_data(defaults=False) == {"needed": "x", "leaf": {"size": 9}}
    assert tree(shape="disc").to_data(defaults=False)["shape"] == {"kind": "disc"}


def test_derive_checks_again() -> None:
    assert Leaf().derive(size=9) == Leaf(size=9)
    with pytest.raises(SettingsError) as caught:
        Leaf().derive(low=11)
    assert caught.value.path == ("low",)
    with pytest.raises(SettingsError, match="did you mean 'size'"):
        Leaf().derive(sizes=9)


@pytest.mark.parametrize(
    "annotation, can_be_null, holds",
    [
        (int, False, None),
        (int | None, True, None),
        (Any, True, None),
        (Annotated[Leaf | None, Field()], True, Leaf),
        (Leaf | int, False, Leaf),
        (tuple[Leaf, ...], False, None),
    ],
)
def test_annotations_are_understood(annotation: Any, can_be_null: bool, holds: type[Settings] | None) -> None:
    assert nullable(annotation) is can_be_null
    assert nested_class(annotation) is holds


def test_the_schema_holds_every_choice() -> None:
    schema = json_schema(Tree)
    text = json.dumps(schema)
    assert "x-any-of-registry" not in text
    definitions = schema["$defs"]
    options = definitions["any-shape"]["anyOf"]
    assert options[0] == {"enum": ["disc", "pair"]}
    assert definitions["shape-pair"]["properties"]["kind"] == {"const": "pair"}
    assert definitions["shape-disc"]["additionalProperties"] is False
    assert schema["properties"]["shape"]["default"]["kind"] == "pair"

    def references(node: Any) -> list[str]:
        if isinstance(node, dict):
            own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
            return own + [found for item in node.values() for found in references(item)]
        return [found for item in node for found in references(item)] if isinstance(node, list) else []

    found = set(references(schema))
    assert "#/$defs/any-shape" in found
    for reference in found:  # each leads to a definition
        assert reference.removeprefix("#/$defs/") in definitions


def test_errors_print_what_where_and_hint() -> None:
    assert str(ArmillaryError("bad", where="a.yaml:3", hint="do this")) == "a.yaml:3: bad\n  do this"
    assert str(SettingsError("bad", path=("a", "b"), where="x.yaml:3")) == "x.yaml:3 (a.b): bad"
    assert str(SettingsError("bad")) == "bad"
