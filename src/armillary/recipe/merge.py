"""One recipe over another: what `extends` and dotted overrides do to inherited values.

Mappings are merged key by key; lists and scalars replace. Besides:
- a mapping whose `kind` is another than the inherited one replaces it whole, since the keys of one
  mechanism mean nothing to another;
- a bare name (`mixer: attention`) is that kind with its defaults: it replaces, and a deeper key
  given later turns it into a mapping;
- two spellings of one thing exclude each other: `block` drops inherited `blocks` and `pattern`;
- null stays null, which stands for the default wherever it is not itself a value.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Union

from armillary.base.errors import SettingsError
from armillary.base.settings import Choice, Settings, default_kind, nested_class
from armillary.recipe.source import Node, from_data, read_value

_SPELLINGS = ((("block",), ("blocks", "pattern")), (("mixer", "cross", "channel"), ("branches",)))


@dataclass(frozen=True)
class Site:
    """What the tree of settings expects at one place.

    annotation: the type of the value, None where it is not known; kind: the kind it has when none is
    written; default: what stands there when nothing is written.
    """

    annotation: Any = None
    kind: str | None = None
    default: Any = None

    def settings(self, node: Node | None) -> type[Settings] | None:
        """The settings class that the value `node` here is read with, if it can be known."""
        cls = nested_class(self.annotation)
        if cls is None or not issubclass(cls, Choice) or cls.kind:
            return cls
        kind = kind_of(node, self.kind or cls.choices.default)
        return cls.choices.get(kind) if kind in cls.choices.names() else None

    def child(self, key: str, node: Node | None) -> Site:
        """The site under `key` of the value `node` here."""
        cls = self.settings(node)
        if cls is not None:
            info = cls.model_fields.get(key)
            if info is None:
                return Site()
            default = None if info.is_required() else info.get_default(call_default_factory=True)
            return Site(info.annotation, default_kind(cls, key), default)
        inner = _inner(self.annotation)
        choice = nested_class(inner)
        return Site(inner, choice.choices.default if choice is not None and issubclass(choice, Choice) else None)

    @property
    def holds_list(self) -> bool:
        return _container(self.annotation) is tuple

    @property
    def written(self) -> Node | None:
        """The default of a list or mapping, for a first key that is set inside it."""
        if _container(self.annotation) is None or not self.default:
            return None
        items = self.default.items() if isinstance(self.default, Mapping) else enumerate(self.default)
        data = {str(key): item.to_data() if isinstance(item, Settings) else item for key, item in items}
        return from_data(data if isinstance(self.default, Mapping) else list(data.values()))


def merge(under: Node, over: Node, site: Site) -> Node:
    """`over` laid on the inherited `under`."""
    if not over.is_mapping:
        return over
    if isinstance(under.value, str):
        under = Node({"kind": under}, under.place)
    if not under.is_mapping:
        return over
    kind = _default_kind(site)
    if "kind" in over.value and kind_of(over, kind) != kind_of(under, kind):
        return over
    items: dict[str, Node] = dict(under.value)
    for one, other in (*_SPELLINGS, *(pair[::-1] for pair in _SPELLINGS)):
        if _writes(over, one) and not _writes(over, other):
            for key in other:
                items.pop(key, None)
    for key, value in over.value.items():
        items[key] = merge(items[key], value, site.child(key, under)) if key in items else value
    return Node(items, over.place)


def override(root: Node, text: str, site: Site) -> Node:
    """`root` with one dotted override, `model.width=512`, laid on it.

    Raises SettingsError that quotes the override.
    """
    place = f"override '{text}'"
    key, equals, value = text.partition("=")
    parts = tuple(key.strip().split("."))
    if not equals or not all(parts):
        raise SettingsError("an override is written key=value", where=place, hint="for example model.width=512")
    return _put(root, parts, read_value(value, place), site, place, ())


def kind_of(node: Node | None, default: str | None) -> str | None:
    """The kind that a value is of: a bare name, its `kind`, or else the default."""
    if node is None:
        return default
    if isinstance(node.value, str):
        return node.value
    kind = node.get("kind")
    return kind.value if kind is not None and isinstance(kind.value, str) else default


def _put(node: Node | None, rest: tuple[str, ...], value: Node, site: Site, place: str, path: tuple[str, ...]) -> Node:
    if not rest:
        return merge(node, value, site) if node is not None else value
    if node is None or node.value is None:
        node = site.written or Node([] if site.holds_list else {}, place)
    key, path = rest[0], (*path, rest[0])
    if isinstance(node.value, list):
        items = list(node.value)
        if not key.isdecimal() or int(key) > len(items):
            hint = f"give the item's number, 0 to {len(items)} ({len(items)} adds one)"
            raise SettingsError(f"there is no item '{key}' here", where=place, path=path, hint=hint)
        index = int(key)
        old = items[index] if index < len(items) else None
        items[index : index + 1] = [_put(old, rest[1:], value, site.child(key, node), place, path)]
        return Node(items, place)
    if not node.is_mapping and not isinstance(node.value, str):
        what = f"'{'.'.join(path[:-1])}' is the value {node.value!r} and has no keys"
        raise SettingsError(what, where=place, path=path)
    cls = nested_class(site.annotation)
    if isinstance(node.value, str) and cls is None and site.annotation is not None:
        raise SettingsError(f"'{'.'.join(path[:-1])}' is text and has no keys", where=place, path=path)
    child = _put(node.get(key), rest[1:], value, site.child(key, node), place, path)
    return merge(node, Node({key: child}, place), site)


def _writes(node: Node, keys: tuple[str, ...]) -> bool:
    found = (node.get(key) for key in keys)
    return any(item is not None and item.value is not None for item in found)


def _default_kind(site: Site) -> str | None:
    """The kind of a mapping that writes none; for plain settings, the default of their `kind` field."""
    cls = nested_class(site.annotation)
    if site.kind is None and cls is not None and "kind" in cls.model_fields:
        default = cls.model_fields["kind"].default
        return default if isinstance(default, str) else None
    return site.kind


def _container(annotation: Any) -> Any:
    """tuple or dict when the annotation is one (or optionally one), else None."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _container(arguments[0])
    if origin in (Union, types.UnionType):
        return next((found for option in arguments if (found := _container(option)) is not None), None)
    return tuple if origin is tuple else dict if origin in (dict, Mapping) else None


def _inner(annotation: Any) -> Any:
    """The type of what a container holds."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _inner(arguments[0])
    if origin in (Union, types.UnionType):
        return next((found for option in arguments if (found := _inner(option)) is not None), None)
    if origin in (dict, Mapping):
        return arguments[1]
    return arguments[0] if origin is tuple and arguments else None
