"""What is varied: keys of the recipe with their values, and the variants that these span.

`model.block.mixer=window,performer` or `model.block.mixer=small:{kind: attention, heads: 2},performer`:
values are YAML; commas inside brackets and quotes do not split; `name:` in front of one names the
variant. Several keys span a grid. The base itself is always there, as the reference.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from armillary.base.errors import ArmillaryError, InputError, SettingsError
from armillary.nn.stack import DEFAULT_BLOCK
from armillary.recipe import Recipe
from armillary.recipe.write import scalar

BASE, HALF = "base", "half width"
Role = Literal["reference", "variant", "control"]
Vary = Mapping[str, Any] | Sequence[str]

_NAMED = re.compile(r"\s*([A-Za-z_][\w.+-]*(?: [\w.+-]+)*)\s*:\s*(?=\S)")
_PAIRS = {"[": "]", "{": "}"}
# What makes runs comparable is decided once for all of them.
_SHARED = {
    "seed": "seeds are given with --seeds",
    "name": "a variant is named in front of its value, as name:value",
    "schema_version": "",
    "data": "all variants read the same text in the same order",
    "tokenizer": "all variants read the same tokens",
    "training.batch": "all variants read the same batches",
    "training.context": "all variants read the same batches",
    "training.objective": "all variants answer the same question",
    "training.steps": "the budget decides it",
    "training.seconds": "the budget decides it",
    "model.vocabulary": "all variants read the same tokens",
}


@dataclass(frozen=True)
class Variant:
    """One recipe of a comparison. changes: (key, value as text); folder: a name safe for the disk."""

    name: str
    recipe: Recipe
    role: Role = "variant"
    changes: tuple[tuple[str, str], ...] = ()

    @property
    def folder(self) -> str:
        return re.sub(r"[^A-Za-z0-9=+-]+", "-", self.name).strip("-").lower() or "variant"


@dataclass(frozen=True)
class Option:
    """One value of a key, and the name given to it."""

    text: str
    name: str | None = None


def axes(vary: Vary) -> dict[str, list[Option]]:
    """Keys and their values, from `KEY=VALUE,VALUE` texts or a mapping of keys to values (a list, or a
    mapping of names to values)."""
    found: dict[str, list[Option]] = {}
    if isinstance(vary, Mapping):
        for key, values in vary.items():
            named = values.items() if isinstance(values, Mapping) else [(None, value) for value in values]
            found[key] = [Option(_text(value), name) for name, value in named]
    else:
        for text in vary:
            key, equals, values = text.partition("=")
            key = key.strip()
            if not equals or not key:
                raise InputError(
                    f"'{text}' varies nothing", hint="write KEY=VALUE,VALUE, for example model.width=128,256"
                )
            if key in found:
                raise InputError(f"{key} is varied twice", hint="write all its values behind one --vary")
            found[key] = [_option(part, text) for part in split(values)]
    for key, options in found.items():
        if not options:
            raise InputError(f"no values are given for {key}", hint=f"write {key}=VALUE,VALUE")
        for fixed, why in _SHARED.items():
            if key == fixed or key.startswith(f"{fixed}."):
                raise InputError(f"{key} cannot be varied" + (f": {why}" if why else ""))
    return found


def variants(base: Recipe, vary: Vary) -> list[Variant]:
    """The base first, then every combination of the values, those that equal the base left out.

    Raises SettingsError or InputError that says which variant is wrong and why.
    """
    asked = axes(vary)
    base = _spelled_out(base, asked)
    found = [Variant(BASE, base, "reference")]
    names = {BASE, HALF}
    seen = [base]
    for options in itertools.product(*asked.values()):
        changes = tuple(zip(asked, (option.text for option in options), strict=True))
        name = ", ".join(
            option.name or _label(key, option.text, alone=len(asked) == 1)
            for key, option in zip(asked, options, strict=True)
        )
        try:
            recipe = Recipe.load(base, *(f"{key}={text}" for key, text in changes))
        except SettingsError as error:
            if error.what.startswith("unknown key"):
                raise
            raise _of_variant(name, error) from None
        recipe = recipe.derive(name=base.name)
        if recipe in seen:
            continue
        seen.append(recipe)
        if name in names:
            raise InputError(
                f"two variants are called '{name}'", hint="name them in front of their values, as name:value"
            )
        names.add(name)
        found.append(Variant(name, recipe, changes=changes))
    if len(found) < 2:
        raise InputError(
            "every variant equals the base, so there is nothing to compare", hint="vary a key to other values"
        )
    folders = [variant.folder for variant in found]
    for variant in found:
        if folders.count(variant.folder) > 1:
            raise InputError(
                f"the name '{variant.name}' is too much like another's", hint="name variants in front of their values"
            )
    return found


def _spelled_out(base: Recipe, keys: Iterable[str]) -> Recipe:
    """The base with its default block written down, so that varying one part of it keeps the others."""
    inside = [key for key in keys if key.startswith("model.block.")]
    model = base.model
    if not inside:
        return base
    if model.blocks is not None:
        raise InputError(
            f"{inside[0]} would drop the base's named blocks ({', '.join(model.blocks)})",
            hint=f"vary model.blocks.{next(iter(model.blocks))}.{inside[0].removeprefix('model.block.')}",
        )
    if model.block is None:
        return base.derive(model=model.derive(block=DEFAULT_BLOCK))
    if model.block.branches is not None and not inside[0].startswith("model.block.branches"):
        raise InputError(
            f"{inside[0]} would drop the base's branches", hint="vary model.block.branches.0.mixer, for example"
        )
    return base


def explained(name: str, error: Exception) -> ArmillaryError:
    """The error of one variant, with its name in front."""
    if isinstance(error, SettingsError):
        return _of_variant(name, error)
    if isinstance(error, ArmillaryError):
        return type(error)(f"the variant '{name}' cannot be built: {error.what}", where=error.where, hint=error.hint)
    return InputError(f"the variant '{name}' cannot be built: {type(error).__name__}: {error}")


def split(text: str) -> list[str]:
    """At the commas that stand outside of brackets and quotes."""
    parts, closers, quote = [""], [], ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in _PAIRS:
            closers.append(_PAIRS[letter])
        elif closers and letter == closers[-1]:
            closers.pop()
        elif letter == "," and not closers:
            parts.append("")
            continue
        parts[-1] += letter
    if closers or quote:
        raise InputError(f"'{text}' does not close: {closers[-1] if closers else quote} is missing")
    return [part.strip() for part in parts if part.strip()]


def _of_variant(name: str, error: SettingsError) -> SettingsError:
    return SettingsError(
        f"the variant '{name}' cannot be built: {error.what}", path=error.path, where=error.where, hint=error.hint
    )


def _option(part: str, whole: str) -> Option:
    named = _NAMED.match(part)
    if named is None:
        return Option(part)
    if named[1] in (BASE, HALF):
        raise InputError(f"the name '{named[1]}' is taken", where=f"--vary '{whole}'", hint="choose another")
    return Option(part[named.end() :], named[1])


def _label(key: str, text: str, *, alone: bool) -> str:
    """A word stands for itself; a number needs its key."""
    plain = text.strip("\"'")
    if alone and re.match(r"[A-Za-z_]", plain) and plain not in ("true", "false", "null"):
        return plain
    if alone and text[0] in "[{":
        return text[1:-1].strip()
    return f"{key.rpartition('.')[2]}={plain}"


def _text(value: Any) -> str:
    if isinstance(value, (Mapping, list, tuple)):
        return json.dumps(value, ensure_ascii=False)
    return scalar(value)
