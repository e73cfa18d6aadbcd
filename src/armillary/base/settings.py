"""Settings: strict, frozen, serialisable trees in which every mistake is answered with its place.

`Settings` is one node. `Choice` is a node whose class is picked by its `kind` from a registry; in
data it is written `{kind: name, …}` or, with all defaults, as the bare name. `parse` turns plain
data (from YAML or JSON) into settings; errors carry the path of keys that leads to the mistake.
`null` stands for a key's default wherever null is not itself a value of that key.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar, Union

from pydantic import (
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from armillary.base.errors import SettingsError, nearest
from armillary.base.registry import Registry

S = TypeVar("S", bound="Settings")
_ANY = "x-any-of-registry"
_WORDS = (("valid tuple", "list"), ("valid list", "list"), ("valid dictionary", "mapping"), ("a valid string", "text"))


class Settings(BaseModel):
    """One node of a recipe: frozen, strict about types, no unknown keys.

    Built directly, derived or parsed, a mistake is a SettingsError with the path of its key.
    """

    # no NaN and no infinity: JSON has neither, and a setting that is not a number is a mistake
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise _explained(error, type(self), data) from None

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, data: Any) -> Any:
        return _prepared(cls, data) if isinstance(data, Mapping) else data

    @model_serializer(mode="plain")
    def _serialise(self) -> dict[str, Any]:
        return self.to_data()  # pydantic's own form would lose each choice's `kind`

    def to_data(self, *, defaults: bool = True) -> dict[str, Any]:
        """Plain data (dicts, lists, scalars) that `parse` turns back into an equal object."""
        fields = type(self).model_fields
        return {
            name: _plain(getattr(self, name), defaults)
            for name in fields
            if defaults or getattr(self, name) != fields[name].get_default(call_default_factory=True)
        }

    def derive(self, **changes: Any) -> typing.Self:
        """A copy with some fields changed, validated again."""
        data = {name: getattr(self, name) for name in type(self).model_fields} | changes
        return type(self)(**data)


class Choice(Settings):
    """A node picked by name: subclasses set `kind` and register in `choices`.

    The abstract base of a role sets `choices` to that role's registry; a field typed with the base
    then takes any registered class. `source` names where the mechanism was published,
    `oracle` the test that compares it with something outside this package, and with what.
    """

    choices: ClassVar[Registry[Any]]
    kind: ClassVar[str] = ""
    source: ClassVar[str] = ""
    oracle: ClassVar[str] = ""

    def to_data(self, *, defaults: bool = True) -> dict[str, Any]:
        return {"kind": self.kind, **super().to_data(defaults=defaults)}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        if cls.kind:
            schema = handler.resolve_ref_schema(handler(core))
            schema["properties"] = {"kind": {"const": cls.kind}, **schema.get("properties", {})}
            return schema
        return {_ANY: cls.choices.role}  # filled in by `json_schema`: choices may contain each other


def parse(cls: type[S], data: Any, path: tuple[str, ...] = ()) -> S:
    """Build settings of class `cls` (or the registered class that `kind` names) from plain data.

    Raises SettingsError with the path of the offending key.
    """
    if isinstance(data, cls):
        return data
    if issubclass(cls, Choice) and not cls.kind:
        chosen, data = _choose(cls, data, path)
        return typing.cast(S, parse(chosen, data, path))
    if data is None:
        data = {}
    if isinstance(data, str) and issubclass(cls, Choice) and data == cls.kind:
        data = {}
    if not isinstance(data, Mapping):
        raise SettingsError(f"expected a mapping of settings, found {data!r}", path=path)
    for key in data:
        if not isinstance(key, str):
            raise _unknown(cls, key, path)
    try:
        return cls(**data)
    except SettingsError as error:
        raise SettingsError(error.what, path=(*path, *error.path), where=error.where, hint=error.hint) from None


def json_schema(cls: type[Settings]) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of `cls` with every registered choice, for editors to complete and check."""
    schema = cls.model_json_schema()
    definitions: dict[str, Any] = schema.setdefault("$defs", {})
    registries = {base.choices.role: base.choices for base in _choice_bases(Choice)}

    def resolve(node: Any) -> None:
        if isinstance(node, list):
            for item in node:
                resolve(item)
        elif isinstance(node, dict):
            role = node.pop(_ANY, None)
            for item in list(node.values()):
                resolve(item)
            if role is not None:
                node["$ref"] = f"#/$defs/any-{role}"
                add(role)

    def add(role: str) -> None:
        if f"any-{role}" in definitions:
            return
        registry = registries[role]
        options: list[Any] = [{"enum": registry.names()}]
        definitions[f"any-{role}"] = {"anyOf": options}
        for kind, entry in registry:
            inner = entry.model_json_schema()
            nested = inner.pop("$defs", {})
            definitions[f"{role}-{kind}"] = inner
            options.append({"$ref": f"#/$defs/{role}-{kind}"})
            resolve(inner)
            for name, definition in nested.items():
                if name not in definitions:
                    definitions[name] = definition
                    resolve(definition)

    resolve(schema)
    return schema


def _choice_bases(base: type[Choice]) -> list[type[Choice]]:
    found = [sub for sub in base.__subclasses__() if "choices" in vars(sub)]
    return found + [deeper for sub in base.__subclasses__() for deeper in _choice_bases(sub)]


def fields_of(cls: type[Settings]) -> dict[str, Any]:
    """Field names and their annotations."""
    return {name: info.annotation for name, info in cls.model_fields.items()}


def nullable(annotation: Any) -> bool:
    """Whether null is a value of this annotation (rather than standing for the default)."""
    if typing.get_origin(annotation) is typing.Annotated:
        return nullable(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return any(nullable(option) for option in typing.get_args(annotation))
    return annotation is None or annotation is type(None) or annotation is Any


def nested_class(annotation: Any) -> type[Settings] | None:
    """The settings class in an annotation (`X`, `X | None`, `Annotated[X, …]`), if it holds one."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return nested_class(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        found = [nested_class(option) for option in typing.get_args(annotation)]
        return next((option for option in found if option is not None), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Settings) else None


def default_kind(cls: type[Settings], field: str) -> str | None:
    """The kind that `field` has when its settings are given without one."""
    info = cls.model_fields[field]
    choice = nested_class(info.annotation)
    if choice is None or not issubclass(choice, Choice):
        return None
    default = None if info.is_required() else info.get_default(call_default_factory=True)
    return default.kind if isinstance(default, Choice) else choice.kind or choice.choices.default


def _choose(cls: type[Choice], data: Any, path: tuple[str, ...]) -> tuple[type[Choice], Any]:
    registry = cls.choices
    kind: Any
    rest: dict[str, Any]
    if isinstance(data, str):
        kind, rest = data, {}
    elif isinstance(data, Mapping):
        kind, rest = data.get("kind"), {k: v for k, v in data.items() if k != "kind"}
        kind = registry.default if kind is None else kind
    else:
        raise SettingsError(
            f"expected a {registry.role}, found {data!r}", path=path, hint=f"one of {', '.join(registry.names())}"
        )
    if not isinstance(kind, str):
        raise SettingsError(
            f"a {registry.role} needs a `kind`", path=path, hint=f"one of {', '.join(registry.names())}"
        )
    try:
        return registry.get(kind), rest
    except SettingsError as error:
        raise SettingsError(error.what, path=path, hint=error.hint) from None


def _unknown(cls: type[Settings], key: Any, path: tuple[str, ...]) -> SettingsError:
    return SettingsError(f"unknown key '{key}'", path=(*path, str(key)), hint=nearest(str(key), cls.model_fields))


def _prepared(cls: type[Settings], data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with nested settings built; keys whose null stands for the default are left out."""
    fields = cls.model_fields
    ready: dict[str, Any] = {}
    for key, value in data.items():
        if key == "kind" and issubclass(cls, Choice):
            if value is None or value == cls.kind:
                continue
            raise SettingsError(f"expected the kind '{cls.kind}' here, found {value!r}", path=("kind",))
        if key not in fields:
            raise _unknown(cls, key, ())
        annotation = fields[key].annotation
        if value is None and not nullable(annotation):
            continue
        if isinstance(value, Mapping) and value.get("kind") is None and (kind := default_kind(cls, key)):
            value = {**value, "kind": kind}
        ready[key] = _converted(annotation, value, (key,))
    return ready


def _converted(annotation: Any, value: Any, path: tuple[str, ...]) -> Any:
    """Nested settings built, lists turned into tuples; scalars are left for pydantic to judge."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _converted(arguments[0], value, path)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        nested = [option for option in options if _is_nested(option)]
        if isinstance(value, (Mapping, list, tuple)) or len(options) == 1:
            return _converted((nested or options)[0], value, path)
        if isinstance(value, str) and str not in options and nested:
            return _converted(nested[0], value, path)
        return value
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return parse(annotation, value, path)
    if origin is tuple and isinstance(value, (list, tuple)):
        fixed = len(arguments) != 2 or arguments[1] is not Ellipsis
        inner = arguments if fixed else arguments[:1] * len(value)
        if len(inner) != len(value):
            raise SettingsError(f"expected {len(inner)} items, found {len(value)}", path=path)
        return tuple(_converted(inner[i], item, (*path, str(i))) for i, item in enumerate(value))
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        key_type, value_type = arguments
        return {
            _key(key, key_type, path): _converted(value_type, item, (*path, str(key)))
            for key, item in value.items()
            if item is not None or nullable(value_type)  # the default of an entry is not to be there
        }
    return value


def _is_nested(option: Any) -> bool:
    origin = typing.get_origin(option)
    if origin is typing.Annotated:
        return _is_nested(typing.get_args(option)[0])
    return origin in (tuple, dict, Mapping) or (isinstance(option, type) and issubclass(option, Settings))


def _key(key: Any, key_type: Any, path: tuple[str, ...]) -> Any:
    if key_type is int and isinstance(key, str) and key.removeprefix("-").isdecimal():
        return int(key)
    if key_type is str and not isinstance(key, str):
        raise SettingsError(f"the key {key!r} should be text", path=path)
    return key


def _plain(value: Any, defaults: bool) -> Any:
    if isinstance(value, Settings):
        return value.to_data(defaults=defaults)
    if isinstance(value, Mapping):
        return {key: _plain(item, defaults) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item, defaults) for item in value]
    return value


def _explained(error: ValidationError, cls: type[Settings], data: Mapping[str, Any]) -> SettingsError:
    """The first mistake that pydantic found, in our words."""
    mistakes = error.errors(include_url=False)
    first = mistakes[0]
    path = _path(first["loc"], data)
    if first["type"] == "missing":
        return SettingsError("this key is required", path=path)
    if first["type"] in ("value_error", "assertion_error"):
        message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        return SettingsError(message[:1].lower() + message[1:], path=path)
    # one wrong value of a union is reported once for each option
    options = list(dict.fromkeys(_message(each["msg"]) for each in mistakes if _path(each["loc"], data) == path))
    message = " or ".join([options[0], *(option.removeprefix("should be ") for option in options[1:])])
    words = _literals(cls.model_fields[path[0]].annotation) if path and path[0] in cls.model_fields else []
    close = difflib.get_close_matches(first["input"], words, n=1) if isinstance(first["input"], str) else []
    hint = f"did you mean '{close[0]}'?" if close else None
    if first["type"] == "string_type" and isinstance(first["input"], (bool, int, float)):
        hint = "quotes make it text"
    return SettingsError(f"{message}, found {first['input']!r}", path=path, hint=hint)


def _path(loc: tuple[int | str, ...], data: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of `loc`, without the names that pydantic adds for the options of a union."""
    path: list[str] = []
    value: Any = data
    for part in loc:
        if isinstance(value, Mapping):
            found = [item for key, item in value.items() if str(key) == str(part)]
            if not found and path:
                continue
            value = found[0] if found else None
        elif isinstance(value, (list, tuple)) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            continue
        path.append(str(part))
    return tuple(path)


def _message(text: str) -> str:
    text = text.removeprefix("Input ")
    for theirs, ours in _WORDS:
        text = text.replace(theirs, ours)
    return text[:1].lower() + text[1:]


def _literals(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is Literal:
        return [option for option in typing.get_args(annotation) if isinstance(option, str)]
    return [word for option in typing.get_args(annotation) for word in _literals(option)]
