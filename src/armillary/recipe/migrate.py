"""Older recipes raised to the present schema, one version at a time.

When the meaning or name of a key changes, `SCHEMA_VERSION` goes up by one and `MIGRATIONS` gets a
function from the version before. Each file is raised on its own before it is merged with what it
extends, so a migration meets partial mappings and must leave alone what is not written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from armillary.base.errors import SettingsError

Migration = Callable[[dict[str, Any]], dict[str, Any]]

SCHEMA_VERSION = 1
MIGRATIONS: dict[int, Migration] = {}  # version → what turns its data into the next version's


def migrate(data: dict[str, Any]) -> dict[str, Any]:
    """A recipe's plain data at the present schema version; `data` itself is not changed.

    A recipe that names no version is taken to be written for the present one. Raises SettingsError
    for a version that is not a whole number from 1 up, or newer than this code knows.
    """
    version = data.get("schema_version")
    if version is None:
        return data
    if type(version) is not int or version < 1:
        raise SettingsError(
            f"a schema version is a whole number from 1 up, found {version!r}", path=("schema_version",)
        )
    if version > SCHEMA_VERSION:
        raise SettingsError(
            f"this recipe has schema version {version}; this Armillary reads versions up to {SCHEMA_VERSION}",
            path=("schema_version",),
            hint="use the version of Armillary that wrote it, or a newer one",
        )
    data = copy.deepcopy(data)
    for step in range(version, SCHEMA_VERSION):
        data = MIGRATIONS[step](data)
    return data | {"schema_version": SCHEMA_VERSION}
