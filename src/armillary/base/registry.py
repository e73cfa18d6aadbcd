"""Registries: a mechanism is known by its name because its file lies in the registry's package.

A registry imports its package's modules on the first look-up, so that importing the library stays
cheap and a new file needs no list to be edited. Files of users join through `load_file`.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, TypeVar

from armillary.base.errors import InputError, SettingsError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to settings classes of one role ("mixer", "channel", …).

    package: dotted name of the package whose modules register themselves when imported.
    default: the name used when a recipe gives settings without a `kind`.
    """

    def __init__(self, role: str, package: str, default: str | None = None) -> None:
        self.role = role
        self.package = package
        self.default = default
        self._entries: dict[str, type[T]] = {}
        self._discovered = False

    def register(self, entry: type[T]) -> type[T]:
        """Class decorator: make `entry` known under its `kind`."""
        kind = getattr(entry, "kind", None)
        if not isinstance(kind, str) or not kind:
            raise InputError(f"{entry.__name__} needs a `kind` to be registered as a {self.role}")
        known = self._entries.get(kind)
        if known is not None and (known.__module__, known.__qualname__) != (entry.__module__, entry.__qualname__):
            raise InputError(f"{self.role} '{kind}' is already registered by {known.__module__}.{known.__qualname__}")
        self._entries[kind] = entry
        return entry

    def get(self, kind: str) -> type[T]:
        """The class registered as `kind`; raises SettingsError naming the nearest known one."""
        if kind not in self._entries:
            self._import(kind)
        if kind not in self._entries:
            self._discover()
        if kind not in self._entries:
            raise SettingsError(f"unknown {self.role} '{kind}'", hint=nearest(kind, self._entries))
        return self._entries[kind]

    def names(self) -> list[str]:
        self._discover()
        return sorted(self._entries)

    def __iter__(self) -> Iterator[tuple[str, type[T]]]:
        return ((name, self._entries[name]) for name in self.names())

    def _import(self, kind: str) -> None:
        """The module called as the kind, if there is one: looking one up need not import all the others."""
        package = importlib.import_module(self.package)
        if kind in (module.name for module in pkgutil.iter_modules(getattr(package, "__path__", ()))):
            importlib.import_module(f"{self.package}.{kind}")

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True  # before the imports: a module may look a name up while it is imported
        try:
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
                importlib.import_module(f"{self.package}.{module.name}")
        except BaseException:
            self._discovered = False  # the next look-up says the same, not "unknown"
            raise


def load_file(path: str | Path) -> None:
    """Import one Python file of the user's own, so that what it registers becomes known.

    Only ever called on a path that the user names on purpose; never on data or checkpoints.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"no such file: {file}")
    spec = importlib.util.spec_from_file_location(f"armillary_user_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise InputError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # annotations of settings are looked up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
