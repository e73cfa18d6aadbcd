"""Every registered mechanism obeys every law; each law and example is a test of its own.

With ARMILLARY_THOROUGH=1 every example is compiled into a graph, too, as `armillary check` does it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from armillary import testing
from armillary.testing.suite import _REGISTRIES

THOROUGH = os.environ.get("ARMILLARY_THOROUGH") == "1"


def _laws() -> Iterator[pytest.param]:  # type: ignore[valid-type]
    for registry in _REGISTRIES:
        for name in registry.names():
            for law, run in testing.laws_for(registry.role, name, thorough=THOROUGH):
                yield pytest.param(run, id=f"{registry.role}-{name}-{law}")


@pytest.mark.parametrize("law", list(_laws()))
def test_law(law: Callable[[], None]) -> None:
    try:
        law()
    except testing.NotApplicable as reason:
        pytest.skip(str(reason))
