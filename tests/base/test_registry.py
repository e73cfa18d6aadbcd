"""Registries: discovery on the first look-up, names, doubles, files of users."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from armillary.base.errors import InputError, SettingsError
from armillary.base.registry import Registry, load_file


class Thing:
    kind = "thing"


def make(kind: str) -> type[Thing]:
    return type(f"Thing_{kind}", (Thing,), {"kind": kind})


def test_a_registered_class_is_known_by_its_kind() -> None:
    registry: Registry[Thing] = Registry("thing", "armillary.base")
    one, two = registry.register(make("b")), registry.register(make("a"))
    assert registry.get("b") is one
    assert registry.names() == ["a", "b"] and list(registry) == [("a", two), ("b", one)]


def test_an_unknown_kind_names_the_nearest() -> None:
    registry: Registry[Thing] = Registry("thing", "armillary.base")
    registry.register(make("attention"))
    with pytest.raises(SettingsError, match="unknown thing 'atention'\n  did you mean 'attention'"):
        registry.get("atention")
    with pytest.raises(SettingsError, match="known: attention"):
        registry.get("xyz")


def test_two_classes_cannot_have_one_name() -> None:
    registry: Registry[Thing] = Registry("thing", "armillary.base")
    registry.register(Thing)
    registry.register(Thing)  # the same class again, as after a reload
    with pytest.raises(InputError, match="already registered by"):
        registry.register(make("thing"))
    with pytest.raises(InputError, match="needs a `kind`"):
        registry.register(make(""))


def test_modules_of_the_package_are_imported_on_the_first_look_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "somethings"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from armillary.base.registry import Registry\nthings = Registry('thing', 'somethings')\n"
    )
    (package / "one.py").write_text("from somethings import things\n@things.register\nclass One:\n    kind = 'one'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        import somethings

        assert "somethings.one" not in sys.modules
        assert somethings.things.names() == ["one"]
    finally:
        for name in ("somethings", "somethings.one"):
            sys.modules.pop(name, None)


def test_a_users_file_registers_what_it_holds(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import json\njson.registered_by_test = True\n")
    try:
        load_file(file)
        import json

        assert json.registered_by_test  # type: ignore[attr-defined]
    finally:
        vars(sys.modules["json"]).pop("registered_by_test", None)
    with pytest.raises(InputError, match="no such file"):
        load_file(tmp_path / "absent.py")
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(InputError, match="not a Python file"):
        load_file(tmp_path / "mine.txt")
