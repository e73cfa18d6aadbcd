"""Options of the engine that commands share: how keys and values are kept, and who guesses tokens ahead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from armillary.cli.shared import note, open_model, refuse_unused

if TYPE_CHECKING:
    from armillary.engine.drafts import Drafter
    from armillary.model import Model
    from armillary.nn.cache import Cache

Guess = Annotated[bool, typer.Option(help="Guess tokens from what was said before, and check them together.")]
Guesses = Annotated[
    int | None,
    typer.Option(
        help="Most tokens guessed at a time; by default 6, and fewer where that is quicker.", min=1, metavar="N"
    ),
]
Kv = Annotated[str | None, typer.Option(help="int8: keys and values in 8 bits, for longer or more answers.")]
Policy = Annotated[
    str | None,
    typer.Option(
        "--cache",
        help="Keep so many tokens of each layer, which is lossy: sinks:512, heavy_hitters:512 or salient:512; "
        "more settings behind it: sinks:512,sinks=8.",
        metavar="KIND:TOKENS",
    ),
]


def checked(kv: str | None, cache: str | None, guess: bool, draft: bool, guesses: int | None) -> Cache | None:
    """How keys and values are kept, after all of these options were held against one another. Raises InputError that
    names those that do not go together."""
    from armillary.base.errors import InputError
    from armillary.nn.cache import Int8, read_policy

    if guess and draft:
        raise InputError("--guess and --draft are two ways to guess", hint="leave one out")
    if not guess and not draft:
        refuse_unused({"--guesses": guesses}, "it goes with --guess or --draft")
    if kv not in (None, "int8"):
        raise InputError(f"--kv is '{kv}'", hint="int8")
    if cache is None:
        return None if kv is None else Int8()
    others = [name for name, given in (("--kv", kv), ("--guess", guess), ("--draft", draft)) if given]
    if others:
        why = (
            "tokens that were dropped come in no form of 8 bits"
            if others == ["--kv"]
            else "guesses cannot be taken back"
        )
        raise InputError(
            f"--cache {cache} does not go with {', '.join(others)}: where tokens are dropped, {why}",
            hint="leave out one or the other",
        )
    return read_policy(cache)


def warn_lossy(cache: str | None) -> None:
    """Say what an answer may lose by --cache."""
    if cache is not None:
        note(f"--cache {cache} is lossy: what it drops is gone, and answers may differ from those with all tokens")


def drafter(
    model: Model, guess: bool, draft: str | None, guesses: int | None, rows: int, device: str, dtype: str, weights: str
) -> Drafter | None:
    """Who guesses for a model, if anybody does. draft: the folder of a small model; rows: answers at a time."""
    from armillary.base.errors import InputError
    from armillary.engine.drafts import PromptLookup

    if guess:
        return PromptLookup() if guesses is None else PromptLookup(guesses)
    if draft is None:
        return None
    count = {} if guesses is None else {"count": guesses}
    try:
        return model.drafter(open_model(draft, device, dtype, mapped=True), rows=rows, weights=weights, **count)  # type: ignore[arg-type]
    except InputError as error:
        raise InputError(error.what, where=f"--draft {draft}", hint=error.hint) from None
