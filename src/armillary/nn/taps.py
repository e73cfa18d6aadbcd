"""Taps: fixed, named places where a call can be watched or edited.

They travel in the context as an explicit argument, because module hooks are silently ignored once
a model is compiled. A place costs one `is None` test when no taps are set. Names are a versioned
contract, listed by `Network.taps()`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from armillary.base.errors import InputError, nearest

VERSION = 1
Edit = Callable[[Tensor], Tensor]


class NotSeen(InputError, KeyError):
    """A name at which a watch saw nothing; also a KeyError, so that `in` and `get` work on what was seen."""


class Seen(Mapping[str, Tensor]):
    """What a watch saw: name → tensor of the latest call; `steps(name)` gives every call's.

    Values that the fast path never forms (attention weights) are rebuilt when first read.
    """

    def __init__(self) -> None:
        self._calls: dict[str, list[Tensor | Callable[[], Tensor]]] = {}

    def add(self, name: str, value: Tensor | Callable[[], Tensor]) -> None:
        self._calls.setdefault(name, []).append(value)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._calls:
            raise NotSeen(f"nothing was seen at '{name}'", hint=nearest(name, self._calls))
        return self._read(name, -1)

    def steps(self, name: str) -> list[Tensor]:
        return [self._read(name, index) for index in range(len(self._calls.get(name, ())))]

    def __iter__(self) -> Iterator[str]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    def _read(self, name: str, index: int) -> Tensor:
        value = self._calls[name][index]
        if not isinstance(value, Tensor):
            value = self._calls[name][index] = value()
        return value


class Taps:
    """The watches and edits of one call; patterns are shell-style (`blocks.*.mixer.weights`)."""

    def __init__(self, watch: Sequence[str] = (), edits: Sequence[tuple[str, Edit]] = ()) -> None:
        self.patterns = tuple(watch)
        self.edits = tuple(edits)
        self.seen = Seen()

    def joined(self, other: Taps) -> Taps:
        """Both sets at once; each keeps its own record."""
        return _Joined((self, other))

    def watches(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns)

    def edited(self, name: str) -> bool:
        """Whether an edit is set here, so that a value which is usually fused away must be formed."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern, _ in self.edits)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        """Apply the edits set for `name`, then record; returns the value to go on with."""
        for pattern, edit in self.edits:
            if fnmatch.fnmatchcase(name, pattern):
                changed = edit(value)
                if not isinstance(changed, Tensor) or changed.shape != value.shape:
                    found = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
                    raise InputError(
                        f"the edit at '{name}' returned {found}",
                        hint=f"return a tensor of shape {tuple(value.shape)}",
                    )
                value = changed.to(value.dtype)
        if self.watches(name):
            self.seen.add(name, value)
        return value

    def lazy(self, name: str, make: Callable[[], Tensor]) -> None:
        """Record how to rebuild a value that the fast path does not form."""
        if self.watches(name):
            self.seen.add(name, make)


class _Joined(Taps):
    def __init__(self, parts: Sequence[Taps]) -> None:
        super().__init__()
        self.parts = tuple(parts)

    def watches(self, name: str) -> bool:
        return any(part.watches(name) for part in self.parts)

    def edited(self, name: str) -> bool:
        return any(part.edited(name) for part in self.parts)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        for part in self.parts:
            value = part(name, value)
        return value

    def lazy(self, name: str, make: Callable[[], Tensor]) -> None:
        for part in self.parts:
            part.lazy(name, make)
