"""Writing recipes: YAML that reads back as the same values, whichever version of YAML the reader follows."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from typing import Any

import yaml

from armillary.base.settings import Choice, Settings
from armillary.recipe import source

_WORDS = re.compile(r"[A-Za-z_./](?:[A-Za-z0-9_./+ -]*[A-Za-z0-9_./+-])?\Z")
_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", '"': '\\"', "\\": "\\\\"}
_LINE = 100


def to_yaml(settings: Settings, *, comments: bool = False) -> str:
    """`settings` with every key, defaults too; with `comments`, each key beside its description."""
    return "".join(f"{line}\n" for line in _settings(settings, "", comments))


def _settings(settings: Settings, indent: str, comments: bool) -> list[str]:
    lines = [f"{indent}kind: {settings.kind}"] if isinstance(settings, Choice) else []
    for name, info in type(settings).model_fields.items():
        entry = _entry(name, getattr(settings, name), indent, comments)
        if comments and info.description:
            entry = _commented(entry, " ".join(info.description.split()), indent)
        if comments and not indent and lines and len(entry) > 1:
            lines.append("")
        lines += entry
    return lines


def _commented(entry: list[str], description: str, indent: str) -> list[str]:
    """The entry with its description at the end of its first line, or above it where that is too long."""
    first = f"{entry[0]}  # {description}"
    if len(first) <= _LINE:
        return [first, *entry[1:]]
    return [*(f"{indent}# {line}" for line in textwrap.wrap(description, _LINE - 2 - len(indent))), *entry]


def _entry(key: str, value: Any, indent: str, comments: bool) -> list[str]:
    """`key: value` in as many lines as it takes."""
    start, deeper = f"{indent}{scalar(key)}:", indent + "  "
    if isinstance(value, Settings):
        if type(value).model_fields:
            return [start, *_settings(value, deeper, comments)]
        return [f"{start} {scalar(value.kind) if isinstance(value, Choice) else '{}'}"]
    if isinstance(value, Mapping) and value:
        return [start, *(line for name, item in value.items() for line in _entry(str(name), item, deeper, comments))]
    if isinstance(value, (list, tuple)) and any(isinstance(item, (Settings, Mapping, list, tuple)) for item in value):
        return [start, *(line for item in value for line in _item(item, deeper, comments))]
    return [f"{start} {_flow(value)}"]


def _item(value: Any, indent: str, comments: bool) -> list[str]:
    """One item of a list that does not fit on a line: its first line after `- `, the rest below it."""
    if isinstance(value, Settings) and type(value).model_fields:
        lines = _settings(value, indent + "  ", comments)
        first = next(i for i, line in enumerate(lines) if not line.lstrip().startswith("#"))
        lines = [line[2:] for line in lines[:first]] + lines[first:]  # comments stand above the dash
        return [*lines[:first], f"{indent}- {lines[first].lstrip()}", *lines[first + 1 :]]
    if isinstance(value, Settings):
        return [f"{indent}- {scalar(value.kind) if isinstance(value, Choice) else '{}'}"]
    return [f"{indent}- {_flow(value)}"]


def _flow(value: Any) -> str:
    if isinstance(value, Settings):
        return _flow(value.to_data())
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{scalar(str(key))}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    return scalar(value)


def scalar(value: bool | int | float | str | None) -> str:
    """A scalar as both YAML 1.1 and 1.2 read it back."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        text = repr(value)
        return text if "." in text else text.replace("e", ".0e")  # YAML 1.1 wants the point
    if _WORDS.match(value) and isinstance(source.scalar(value), str) and _text_in_yaml_1_1(value):
        return value
    return '"' + "".join(_escaped(character) for character in value) + '"'


def _text_in_yaml_1_1(value: str) -> bool:
    tag = yaml.SafeLoader("").resolve(yaml.ScalarNode, value, (True, False))  # type: ignore[no-untyped-call]
    return bool(tag == "tag:yaml.org,2002:str")


def _escaped(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    code = ord(character)
    if 0x20 <= code < 0x7F or (character.isprintable() and not character.isspace() and code != 0xFEFF):
        return character
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
