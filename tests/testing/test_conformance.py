"""Every registered mechanism obeys every law; each law and example is a test of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from armillary import testing
from armillary.testing.suite import _REGISTRIES


def _laws() -> Iterator[pytest.param]:  # type: ignore[valid-type]
    for registry in _REGISTRIES:
        for name in registry.names():
            for law, run in testing.laws_for(registry.role, name):
                yield pytest.param(run, id=f"{registry.role}-{name}-{law}")


@pytest.mark.parametrize("law", list(_laws()))
def test_law(law: Callable[[], None]) -> None:
    try:
        law()
    except testing.NotApplicable as reason:
        pytest.skip(str(reason))
