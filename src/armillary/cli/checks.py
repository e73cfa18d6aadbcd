"""Commands about mechanisms: mechanisms, check."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from armillary.cli.shared import AsJson, emit, table

if TYPE_CHECKING:
    from armillary.testing import LawResult


def mechanisms(
    role: Annotated[str, typer.Argument(help="mixer, channel, position, norm, head, driver or objective.")] = "mixer",
    json: AsJson = False,
) -> None:
    """What a recipe can be made of, with sources.

    Example: armillary mechanisms mixer
    """
    from armillary.model import mechanisms as known

    found = known(role)
    if json:
        emit({name: {"source": one.source, "settings": one.model_json_schema()} for name, one in found.items()})
        return
    table((name, (one.__doc__ or "").split("\n")[0], one.source) for name, one in found.items())


def check(
    role: Annotated[str, typer.Argument(help="mixer, channel, position, norm, head or driver.")],
    name: Annotated[str, typer.Argument(help="The mechanism's name in a recipe.")],
    file: Annotated[Path | None, typer.Option(help="Your own Python file that registers it.")] = None,
    json: AsJson = False,
) -> None:
    """Hold a mechanism to the laws that all of them obey.

    Chunking, causality, packing, gradients, declared cost, sight, dtypes and more.

    Example: armillary check mixer attention
    """
    from armillary.base.registry import load_file
    from armillary.testing import check as run

    if file is not None:
        load_file(file)

    def tell(one: LawResult) -> None:
        if not json:
            verdict = "FAILED" if not one.passed else "-" if one.skipped else "ok"
            print(f"  {verdict:<6}  {one.law:<28}  {one.seconds:5.1f} s  {one.detail}".rstrip(), flush=True)

    results = run(role, name, tell)
    if json:
        emit([vars(one) for one in results])
    if not all(one.passed for one in results):
        raise typer.Exit(1)


COMMANDS = {"mechanisms": mechanisms, "check": check}
