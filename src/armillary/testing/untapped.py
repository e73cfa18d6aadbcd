"""A build of `armillary.nn` from which every tap is removed, to prove that unset taps cost nothing.

The source of each module is parsed, every test of whether taps are set is answered with "no", and
what can then never run is dropped; the rest is compiled as it stands.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from types import CodeType, ModuleType

PACKAGE = "armillary.nn"
# Shared with the real build: what holds no tap, and what both builds must agree on.
SHARED = ("ops", "activation", "context", "cost", "example", "linear", "mask", "state", "taps")


class Untapped(ast.NodeTransformer):
    """Answers `… taps is None` with True and drops the branches that follow from it."""

    def __init__(self) -> None:
        self.removed = 0

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        left = node.left
        name = left.attr if isinstance(left, ast.Attribute) else left.id if isinstance(left, ast.Name) else ""
        against = node.comparators[0]
        if name == "taps" and isinstance(against, ast.Constant) and against.value is None:
            self.removed += 1
            return ast.copy_location(ast.Constant(isinstance(node.ops[0], ast.Is)), node)
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        self.generic_visit(node)
        decides = isinstance(node.op, ast.Or)
        if any(isinstance(value, ast.Constant) and value.value is decides for value in node.values):
            return ast.copy_location(ast.Constant(decides), node)
        rest = [value for value in node.values if not (isinstance(value, ast.Constant) and value.value is not decides)]
        node.values = rest
        return rest[0] if len(rest) == 1 else node

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.test, ast.Constant):
            return node.body if node.test.value else node.orelse
        return node

    def visit_If(self, node: ast.If) -> ast.stmt | list[ast.stmt]:
        self.generic_visit(node)
        if isinstance(node.test, ast.Constant):
            return (node.body if node.test.value else node.orelse) or ast.copy_location(ast.Pass(), node)
        return node


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        tree = Untapped().visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec")


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not _ours(fullname):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(fullname, spec.origin)
        return spec


def _ours(name: str) -> bool:
    if name == PACKAGE:
        return True
    return name.startswith(f"{PACKAGE}.") and name.split(".")[2] not in SHARED


@contextlib.contextmanager
def untapped() -> Iterator[ModuleType]:
    """Inside the block `import armillary.nn…` finds modules without taps; yields their `network` module."""
    for name in SHARED:
        importlib.import_module(f"{PACKAGE}.{name}")
    for name in ("attend", "decay", "cross_entropy"):
        importlib.import_module(f"{PACKAGE}.ops.{name}")
    real = {name: module for name, module in sys.modules.items() if _ours(name)}
    parent = sys.modules["armillary"]
    finder = _Finder()
    for name in real:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        network = importlib.import_module(f"{PACKAGE}.network")
        for role in ("mixers", "channels", "positions", "norms"):
            getattr(sys.modules[f"{PACKAGE}.mechanism"], role).names()
        yield network
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if _ours(name)]:
            del sys.modules[name]
        sys.modules.update(real)
        parent.nn = real[PACKAGE]  # type: ignore[attr-defined]
