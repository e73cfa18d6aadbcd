"""What may step into the choice of one answer's tokens: constraints before anything else, a watermark at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from armillary.base.errors import ArmillaryError


class Step(Protocol):
    """Something that changes the scores of one sequence: a constraint before anything else, a watermark
    after everything else."""

    def apply(self, scores: Tensor, ids: Sequence[int]) -> Tensor:
        """Scores [V] float32 after the tokens `ids` → new scores; may change them in place."""
        ...

    def accept(self, token: int) -> None:
        """The token that was chosen."""
        ...


class Sieve(Step, Protocol):
    """A step that only forbids tokens, and says which without any scores."""

    tokens: int  # those behind are forbidden
    address: int  # of a bit for each of them, in words of 32: set where it is allowed

    def look(self) -> None:
        """Set the bits for the next token. Raises as `apply` does."""
        ...

    @property
    def over(self) -> bool:
        """Whether nothing but an end is allowed next."""
        ...

    def forced(self) -> list[int]:
        """The next tokens, as far as each is the only one allowed, and no end."""
        ...

    def why_nothing(self) -> ArmillaryError | None:
        """What is wrong, if it allows no token."""
        ...


class Mark(Protocol):
    """What watermarks answers: gives each a step of its own, which sees the scores that are drawn from."""

    @property
    def draws(self) -> bool:
        """Whether it acts through the draw, so that a greedy answer cannot carry it."""
        ...

    def begin(self) -> Step: ...
