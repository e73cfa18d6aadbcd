"""A package that bears the name of its main function, and may be called like it.

`armillary.train` is a room and, on the public face, a function: whichever of them the name leads to
(the import system decides by what was imported first), the call does the same.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


def callable_as(package: str, function: str) -> None:
    """Let calls of the module `package` go to its attribute `function`."""

    class Callable(ModuleType):
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return getattr(self, function)(*arguments, **options)

    sys.modules[package].__class__ = Callable
