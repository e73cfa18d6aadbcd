"""Errors that a person can mend: each says what is wrong, where, and what would be right.

Commands print them as one message and leave with exit status 2; invariants of our own code are
plain asserts instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ArmillaryError(Exception):
    """Base of every error a user can cause.

    what: the fact that is wrong; where: file, line, key or tensor; hint: what would be right.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what = what
        self.where = where
        self.hint = hint
        super().__init__(what)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  {self.hint}" if self.hint else text


class SettingsError(ArmillaryError):
    """A recipe, override or settings object is unknown, contradictory or out of range.

    path: the keys that lead to the value, for example ("model", "block", "mixer").
    """

    def __init__(
        self,
        what: str,
        *,
        path: tuple[str, ...] = (),
        where: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.path = path

    def __str__(self) -> str:
        key = ".".join(self.path)
        place = " ".join(part for part in (self.where, f"({key})" if self.where and key else key) if part)
        text = f"{place}: {self.what}" if place else self.what
        return f"{text}\n  {self.hint}" if self.hint else text


class InputError(ArmillaryError):
    """An argument of a call or command cannot be used."""


class DataError(ArmillaryError):
    """A corpus, shard or manifest is empty, unreadable or damaged."""


class TokenizerError(ArmillaryError):
    """A tokenizer cannot be trained, loaded or applied."""


class CheckpointError(ArmillaryError):
    """A checkpoint or model folder is incomplete, damaged, or does not fit."""


class UnsupportedError(ArmillaryError):
    """A mechanism was asked for something that it cannot honour."""


class TrainingError(ArmillaryError):
    """Training cannot start or go on (a loss that is not finite, a full disk, a lost worker)."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest known name, or lists them when none is close."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.55)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(options)}" if options else "none are known here"
