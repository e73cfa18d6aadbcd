"""Where recipes are found, and a recipe together with all that it extends.

`extends: quick` is a file `quick.yaml` beside the one that says so, or else the recipe of that name
that comes with Armillary; `extends: ../base.yaml` is a path from the folder of that file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import armillary
from armillary.base.errors import SettingsError, nearest
from armillary.recipe.merge import Site, merge
from armillary.recipe.migrate import migrate
from armillary.recipe.source import Node, from_data, read

_SUFFIXES = (".yaml", ".yml", ".json")


def folder() -> Path:
    """The recipes that come with Armillary: in an installed package, or in a source checkout."""
    package = Path(armillary.__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parents[1] / "recipes"


def names() -> list[str]:
    """The names of the recipes that come with Armillary."""
    return sorted(file.stem for file in folder().glob("*.yaml"))


def find(name: str | Path, beside: Path, asking: Path | None = None) -> Path:
    """The file of the recipe called `name`: a path, a run folder, a file in `beside`, or one of ours.

    asking: the file whose `extends` is followed; it is not the answer to its own name. Raises
    SettingsError when there is none.
    """
    given = beside / name
    text = str(name)
    if isinstance(name, Path) or "/" in text or "\\" in text or text.endswith(_SUFFIXES):
        if given.is_dir() and (given / "recipe.yaml").is_file():
            return given / "recipe.yaml"
        if given.is_dir():
            raise SettingsError("this folder holds no recipe.yaml", where=text)
        if given.is_file():
            return given
        raise SettingsError(f"there is no recipe at {text}", hint=f"recipes by name: {', '.join(names())}")
    if (given / "recipe.yaml").is_file():
        return given / "recipe.yaml"
    for place in (beside, folder()):
        file = place / f"{text}.yaml"
        if file.is_file() and (asking is None or file.resolve() != asking.resolve()):
            return file
    raise SettingsError(f"there is no recipe called '{text}'", hint=nearest(text, names()))


def load(source: str | Path | Mapping[str, Any], site: Site) -> tuple[Node, Path | None]:
    """The recipe `source` merged over all that it extends, without `extends`; and its own file, if it has one."""
    if isinstance(source, Mapping):
        return _extended(_current(from_data(source)), None, (), site), None
    file = find(source, Path())
    return _extended(_current(read(file)), file, (), site), file


def _extended(node: Node, file: Path | None, above: tuple[Path, ...], site: Site) -> Node:
    """`node`, read from `file`, over what it extends; `above`: the files that led here."""
    parent = node.get("extends")
    rest = Node({key: item for key, item in node.value.items() if key != "extends"}, node.place)
    if parent is None or parent.value is None:
        return rest
    if not isinstance(parent.value, str):
        raise SettingsError("expected the name or path of one recipe", where=parent.place, path=("extends",))
    try:
        found = find(parent.value, file.parent if file is not None else Path(), file)
    except SettingsError as error:
        raise SettingsError(error.what, where=parent.place, path=("extends",), hint=error.hint) from None
    chain = (*above, file) if file is not None else above
    if found.resolve() in [one.resolve() for one in chain]:
        trail = " → ".join(str(one) for one in (*chain, found))
        raise SettingsError("this recipe extends itself", where=parent.place, path=("extends",), hint=trail)
    under = _extended(_current(read(found)), found, chain, site)
    # a recipe is called after its own file, not after what it extends
    under = Node({key: item for key, item in under.value.items() if key != "name"}, under.place)
    return merge(under, rest, site)


def _current(node: Node) -> Node:
    """`node` raised to the present schema; what a migration leaves in place keeps its line."""
    try:
        data = node.plain()
        raised = migrate(data)
    except SettingsError as error:
        raise SettingsError(error.what, where=node.locate(error.path), path=error.path, hint=error.hint) from None
    return node if raised is data else from_data(raised, old=node)
