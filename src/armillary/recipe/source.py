"""Reading recipes: YAML in which every value remembers the file and line where it was written.

Plain scalars follow the core schema of YAML 1.2 (Ben-Kiki, Evans, döt Net, 2009): `1e-3` is a
number, `no`, `on` and `012:30` are text. A key written twice, a tag that names a Python object, a
reference to itself and anything that does not close are refused with their line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from armillary.base.errors import SettingsError
from armillary.base.settings import Settings

_LARGEST_FILE = 1 << 20  # bytes: a recipe is written by a person
_LARGEST_TREE = 20_000  # values, references to anchors counted each time they are used

_TAG = "tag:yaml.org,2002:"
_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
_SPECIAL = re.compile(r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z")


@dataclass(frozen=True, slots=True)
class Node:
    """A value of a recipe and where it was written.

    value: dict of text to Node, list of Node, or a scalar; place: "quick.yaml:12", "override
    'seed=1'", or None for data that no file holds.
    """

    value: Any
    place: str | None = None

    @property
    def is_mapping(self) -> bool:
        return isinstance(self.value, dict)

    def get(self, key: str) -> Node | None:
        """The value under `key`; None when this is no mapping or the key is not written."""
        found = self.value.get(key) if self.is_mapping else None
        return found if isinstance(found, Node) else None

    def plain(self) -> Any:
        """The same as dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        return self.value

    def locate(self, path: tuple[str, ...]) -> str | None:
        """Where the value at `path` was written, or the closest one above it."""
        node, place = self, self.place
        for part in path:
            if isinstance(node.value, dict) and part in node.value:
                node = node.value[part]
            elif isinstance(node.value, list) and part.isdecimal() and int(part) < len(node.value):
                node = node.value[int(part)]
            else:
                break
            place = node.place or place
        return place


def from_data(data: Any, place: str | None = None, old: Node | None = None) -> Node:
    """Plain data as a Node; values that stand where `old` has one take their place from it."""
    place = old.place if old is not None else place
    if isinstance(data, Settings):
        data = data.to_data()
    if isinstance(data, Mapping):
        return Node({str(key): from_data(item, place, old and old.get(str(key))) for key, item in data.items()}, place)
    if isinstance(data, (list, tuple)):
        known = old.value if old is not None and isinstance(old.value, list) else []
        items = [from_data(item, place, known[i] if i < len(known) else None) for i, item in enumerate(data)]
        return Node(items, place)
    return Node(data, place)


def read(path: Path) -> Node:
    """The recipe in the file `path`, as written. Raises SettingsError with the line of a mistake."""
    try:
        with open(path, "rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise SettingsError(f"this recipe cannot be read ({error.strerror})", where=str(path)) from None
    if len(content) > _LARGEST_FILE:
        raise SettingsError(f"this file is larger than {_LARGEST_FILE:,} bytes: not a recipe", where=str(path))
    try:
        return read_text(content.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SettingsError("this is not UTF-8 text", where=f"{path}:{line}") from None


def read_text(text: str, name: str) -> Node:
    """A recipe held in `text`; `name` stands for the file in places. Nothing written is an empty mapping."""
    root = _compose(text, name)
    if root is None:
        return Node({}, name)
    node = _Builder(name).build(root)
    if node.value is None:
        return Node({}, name)
    if not node.is_mapping:
        raise SettingsError("a recipe is a mapping of keys to values", where=node.place)
    return Node(node.value, name)


def read_value(text: str, name: str) -> Node:
    """One value given on its own, as in an override: a YAML scalar, a quoted text or a flow `[…]`, `{…}`."""
    text = text.strip()
    if not text.startswith(("[", "{", '"', "'")):
        return Node(_scalar(text, name), name)
    try:
        root = _compose(text, name)
    except SettingsError as error:
        raise SettingsError(error.what, where=name, hint="text that begins with this sign needs quotes") from None
    assert root is not None
    return _Builder(name, lines=False).build(root)


def scalar(text: str) -> bool | int | float | str | None:
    """The value that a plain (unquoted) scalar stands for."""
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text[0] in "tT"
    if _INT.match(text):
        digits = text.lstrip("+-")
        base = {"0o": 8, "0x": 16}.get(digits[:2], 10)
        return int(text[2:] if base != 10 else text, base)
    if _FLOAT.match(text):
        return float(text)
    if _SPECIAL.match(text):
        return float(text.replace(".", "", 1))
    return text


def _scalar(text: str, place: str) -> Any:
    try:
        return scalar(text)
    except ValueError:  # Python refuses to read thousands of digits
        raise SettingsError("this number has too many digits", where=place) from None


class _Loader(yaml.SafeLoader):
    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0]:
            return _TAG + _name_of(value)
        return super().resolve(kind, value, (False, False))  # type: ignore[no-untyped-call]


def _name_of(text: str) -> str:
    """The core schema's type of a plain scalar; no number is built, so its length does not matter."""
    if _NULL.match(text):
        return "null"
    if _BOOL.match(text):
        return "bool"
    if _INT.match(text):
        return "int"
    return "float" if _FLOAT.match(text) or _SPECIAL.match(text) else "str"


def _compose(text: str, name: str) -> yaml.Node | None:
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        problem = " ".join(part for part in (error.context, error.problem) if part)
        raise SettingsError(f"this is not valid YAML: {problem}", where=where) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise SettingsError(f"the character {error.character!r} is not allowed", where=f"{name}:{line}") from None
    except RecursionError:
        raise SettingsError("this is nested too deeply", where=name) from None
    finally:
        if loader is not None:
            loader.dispose()


class _Builder:
    """Turns composed YAML into Nodes, with the checks that YAML itself does not make."""

    def __init__(self, name: str, lines: bool = True) -> None:
        self.name = name
        self.lines = lines
        self.count = 0
        self.open: set[int] = set()

    def place(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}" if self.lines else self.name

    def build(self, node: yaml.Node, place: str | None = None) -> Node:
        place = place or self.place(node)
        self.count += 1
        if self.count > _LARGEST_TREE:
            raise SettingsError(f"this recipe holds more than {_LARGEST_TREE:,} values", where=place)
        if id(node) in self.open:
            raise SettingsError("a value refers to itself", where=place)
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.ScalarNode):
                return Node(self.scalar(node, place), place)
            if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
                return Node([self.build(item) for item in node.value], place)
            if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
                return self.mapping(node, place)
            raise self.refused(node, place)
        finally:
            self.open.discard(id(node))

    def mapping(self, node: yaml.MappingNode, place: str) -> Node:
        items: dict[str, Node] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            here = self.place(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                raise SettingsError("a key is a word or a number", where=here)
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in items:
                hint = f"first on line {lines[key]}, again on line {line}" if self.lines else None
                raise SettingsError(f"the key '{key}' is written twice", where=here, hint=hint)
            lines[key] = line
            items[key] = self.build(value_node, here)
        return Node(items, place)

    def scalar(self, node: yaml.ScalarNode, place: str) -> Any:
        if node.tag == _TAG + "str":
            return node.value
        written = _name_of(node.value)
        if node.tag == _TAG + "float" and written == "int":
            return float(node.value)
        if node.tag != _TAG + written:
            raise self.refused(node, place)
        return _scalar(node.value, place)

    def refused(self, node: yaml.Node, place: str) -> SettingsError:
        tag = str(node.tag).replace(_TAG, "!!")
        return SettingsError(f"the tag {tag} has no meaning here", where=place, hint="a recipe holds plain values only")
