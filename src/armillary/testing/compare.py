"""How laws compare and complain: each failure says which part of the law was broken and by how much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from armillary.base.errors import ArmillaryError, InputError, UnsupportedError
from armillary.nn.state import State

TOLERANCE = 1e-4  # float32, relative to the largest expected value


class LawBroken(AssertionError):
    """A mechanism does not obey a law; the message says which part and how far off it is."""


def require(holds: bool, what: str) -> None:
    """Raise LawBroken unless `holds`; unlike an assert, this stays in optimised runs."""
    if not holds:
        raise LawBroken(what)


def near(found: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE, floor: float = 1e-3) -> None:
    """Largest difference at most `tolerance` times the largest expected value, or times `floor`."""
    require(found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    require(found.dtype == expected.dtype, f"{what}: {found.dtype}, expected {expected.dtype}")
    require(bool(found.isfinite().all()), f"{what}: not finite")
    if found.numel() == 0:
        return
    size = float(expected.abs().max())
    error = float((found - expected).abs().max())
    require(
        error <= tolerance * max(size, floor),
        f"{what}: off by {error:.2e} where values reach {size:.2e} ({tolerance:g})",
    )


def slopes_near(
    module: nn.Module,
    found: Sequence[Tensor | None],
    expected: Sequence[Tensor | None],
    what: str,
    tolerance: float = 2 * TOLERANCE,
) -> None:
    """Gradients of x and of every parameter. Some are 0 by cancellation (a bias on keys), so each is
    measured against a hundredth of the largest of all at least."""
    names = ["x", *(name for name, _ in module.named_parameters())]
    largest = max(float(slope.abs().max()) for slope in expected if slope is not None and slope.numel())
    for name, a, b in zip(names, found, expected, strict=True):
        require((a is None) == (b is None), f"gradient of {name}, {what}: there in one way only")
        if a is not None and b is not None:
            near(a, b, f"gradient of {name}, {what}", tolerance, floor=largest / 100)


def same(found: Tensor, expected: Tensor, what: str) -> None:
    """Bit for bit."""
    require(found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    require(bool(torch.equal(found, expected)), f"{what}: not bit-identical")


def refuses(call: Callable[[], Any], what: str) -> None:
    """The call must raise UnsupportedError or InputError, never go on."""
    try:
        call()
    except (UnsupportedError, InputError):
        return
    except ArmillaryError as error:
        raise LawBroken(f"{what}: raised {type(error).__name__}, expected UnsupportedError") from error
    raise LawBroken(f"{what}: was accepted, expected UnsupportedError")


def held(state: State | None) -> dict[str, Tensor]:
    """A copy of everything that a state holds, and of its lengths where it has them."""
    if state is None:
        return {}
    parts = {name: tensor.detach().clone() for name, tensor in state.tensors.items()}
    lengths = getattr(state, "lengths", None)
    return parts if lengths is None else {**parts, "lengths": lengths.clone()}


def untouched(before: dict[str, Tensor], after: dict[str, Tensor], rows: Tensor, what: str) -> None:
    """The rows of a state are bit-identical; room added at the end of an axis is no change."""
    for name, old in before.items():
        new = after[name]
        shape = [min(a, b) for a, b in zip(old.shape, new.shape, strict=True)]
        window = tuple(slice(size) for size in shape)
        same(new[window][rows], old[window][rows], f"{what}: {name}")
