"""Adapters that one engine holds, by name: requests for different ones run beside each other.

The rows of a step that have one adapter are one call of that adapter's network, over the same states; rows
without an adapter are computed as if no others were there. What is kept of a sequence belongs to the
adapter's numbers, not to its name: a name that is given away again finds nothing of its predecessor. An
answer keeps the adapter with which it began, whatever is loaded or unloaded meanwhile.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from armillary.base.errors import InputError, UnsupportedError
from armillary.engine.slots import Slots
from armillary.native.tape import alone
from armillary.nn.adapted import Change, adapted
from armillary.nn.network import Network

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, eq=False)
class Adapter:
    """network: the engine's, with the changes, sharing its tensors; digest: of all that they are."""

    name: str
    network: Network
    digest: bytes


class Adapters:
    """why_not: why this engine takes none, or empty; still: holds while the network computes."""

    def __init__(self, network: Network, why_not: str, still: AbstractContextManager[Any]) -> None:
        self.network, self.why_not, self._still = network, why_not, still
        self._held: dict[str, Adapter] = {}

    def names(self) -> list[str]:
        return list(self._held)

    def load(self, name: str, changes: Mapping[str, Change]) -> Adapter:
        """Take one in, in place of another of this name. Raises InputError or UnsupportedError."""
        if self.why_not:
            raise UnsupportedError(f"no adapters here: {self.why_not}")
        if not NAME.fullmatch(name):
            raise InputError(f"'{name[:80]}' is no name of an adapter", hint="letters, digits, . _ -, at most 64")
        made = hashlib.sha256()
        for path, change in sorted(changes.items()):
            made.update(hashlib.sha256(path.encode()).digest() + change.digest())
        with self._still:  # modules keep tables that grow as they compute
            network = adapted(self.network, changes)
        alone()
        self._held[name] = adapter = Adapter(name, network, made.digest())
        return adapter

    def unload(self, name: str) -> None:
        """Requests no longer find it. Raises InputError for one that is not there."""
        if self._held.pop(name, None) is None:
            raise self._unknown(name)

    def get(self, name: str | None) -> Adapter | None:
        """Raises InputError for one that is not there."""
        found = None if name is None else self._held.get(name)
        if name is not None and found is None:
            raise self._unknown(name)
        return found

    def _unknown(self, name: str) -> InputError:
        return InputError(f"there is no adapter '{name[:80]}'", hint=", ".join(self._held) or "none is loaded")


def refused(slots: Slots, form: str) -> str:
    """Why an engine takes no adapters; empty where it does."""
    if form == "encoder_decoder":
        return "an encoder–decoder reads its source before it is known who asks"
    if slots.replay is not None and slots.replay.other:
        return f"the weights are held in {slots.replay.weights}, which plain steps do not see"
    return ""
