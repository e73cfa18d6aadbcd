"""Examples and limits: what a mechanism asks the conformance suite to try it with.

They stand beside the settings they exercise, so that a new variant and its proof are one change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One variant to hold to the laws.

    place: what differs from a causal place of width 16 (order, cross, length); side: makes the side
    tensors that the mechanism needs, from (batch, length); compiled: also run through the full
    compiler, which takes seconds, so one example of each op asks for it.
    """

    name: str
    settings: Any
    place: Mapping[str, Any] = field(default_factory=dict)
    side: Callable[[int, int], Mapping[str, Tensor]] | None = None
    compiled: bool = False


@dataclass(frozen=True)
class Limit:
    """A setting at which the mechanism must equal something known, to 1e-4 of its size.

    reference: another example, given the same parameters by name, or a function of (module, x,
    ctx) that computes the closed form from the module's own parameters.
    """

    name: str
    example: Example
    reference: Example | Callable[[Any, Tensor, Any], Tensor]
