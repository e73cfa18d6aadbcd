"""What is asked of an engine, against what it can do, before anything is computed."""

from __future__ import annotations

from collections.abc import Collection

from armillary.base.errors import InputError
from armillary.engine.request import Request
from armillary.engine.steps import Mark
from armillary.nn.network import Network
from armillary.nn.positions.learned import LearnedPosition


def check(request: Request, network: Network, capacity: int, side: Collection[str]) -> None:
    """Raises InputError for a request that can never be served. side: the numbers that mechanisms take."""
    vocabulary = network.settings.vocabulary or 0
    if not request.ids:
        raise InputError("the prompt has no tokens", hint="give at least one token")
    if min(request.ids) < 0 or max(request.ids) >= vocabulary:
        raise InputError(f"the prompt holds an id outside the vocabulary of {vocabulary}")
    needed = len(request.ids) + request.sampling.max_new_tokens
    position = network.position
    if isinstance(position, LearnedPosition) and needed > position.length:
        raise InputError(
            f"prompt and completion need {needed} positions, but {position.length} were learned",
            hint="shorten the prompt or max_new_tokens",
        )
    if needed > capacity:
        raise InputError(
            f"prompt and completion need {needed} tokens, and the engine holds {capacity} of one answer",
            hint="shorten the prompt or max_new_tokens, or give the engine a larger capacity",
        )
    reads = network.settings.form == "encoder_decoder"
    if reads != (request.source is not None):
        raise InputError("an encoder–decoder needs a source" if reads else "this network has no encoder to read one")
    if request.source is not None and not (request.source and min(request.source) >= 0):
        raise InputError("the source has no tokens, or negative ones")
    if request.source is not None and max(request.source) >= vocabulary:
        raise InputError(f"the source holds an id outside the vocabulary of {vocabulary}")
    for name in network.side_names - {"prefix"}:
        if name not in request.side:
            raise InputError(f"this network needs the side number '{name}'")
    for name in request.side:
        if name not in side:
            raise InputError(f"no mechanism here takes the side number '{name}'")


def carried(request: Request, mark: Mark | None) -> Mark | None:
    """The watermark of an answer; mark: of answers that bring none. Raises InputError for one of the request's own that
    it cannot carry."""
    found = mark if request.mark is None else request.mark
    if found is None or not found.draws or request.sampling.temperature > 0:
        return found
    if request.mark is not None:
        raise InputError(
            "this watermark acts through the draw, and at temperature 0 nothing is drawn",
            hint="give a temperature, or a watermark of kind 'kgw'",
        )
    return None
