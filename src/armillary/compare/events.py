"""What a comparison tells whoever watches it, one dataclass each; the command line shows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from armillary.train import Event


@dataclass(frozen=True)
class Planned(Event):
    """Everything is settled. variants: their names, the reference first; done: bits per byte of the
    runs that were there already, by (variant, seed)."""

    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    folder: str
    done: dict[tuple[str, int], float]


@dataclass(frozen=True)
class Working(Event):
    """Something is under way. what: in a few words; share: of it that is done (0 to 1); seconds_left:
    of the whole comparison, None until it can be told; inner: what a run tells, when it is one."""

    what: str
    variant: str | None = None
    seed: int | None = None
    share: float | None = None
    seconds_left: float | None = None
    inner: Event | None = None


@dataclass(frozen=True)
class Measured(Event):
    """A run is trained and measured."""

    variant: str
    seed: int
    bits_per_byte: float


@dataclass(frozen=True)
class Failed(Event):
    """A run could not be trained to its end."""

    variant: str
    seed: int
    why: str


@dataclass(frozen=True)
class Probed(Event):
    """A skill was tried. accuracy: None where the mechanism refuses the pattern."""

    variants: tuple[str, ...]
    task: str
    pattern: str
    accuracy: float | None
    chance: float
    why: str = ""


@dataclass(frozen=True)
class Compared(Event):
    """The report was written; finished: whether everything is in it."""

    report: str
    finished: bool


Progress = Callable[[Event], None]
