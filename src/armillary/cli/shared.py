"""What the commands share: options, tables, and where a name leads."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armillary.base.words import printable

if TYPE_CHECKING:
    from armillary.engine.watermark import Watermark
    from armillary.model import Model

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted overrides, for example model.width=512.", metavar="[KEY=VALUE]...")
]
Folder = Annotated[str, typer.Argument(help="A run folder, a model folder, or a hub name.", metavar="MODEL")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, …")]
Weights = Annotated[
    str,
    typer.Option(
        help="Weights of native steps: auto (as they are), float32, bf16, float16, int8, int4; plain: no such step."
    ),
]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bf16, float16.")]
KeyFile = Annotated[Path | None, typer.Option("--watermark", help="A file with the key of a watermark.")]
MarkKind = Annotated[
    str, typer.Option("--watermark-kind", help="gumbel: every token as likely as without; kgw: stronger, by a bias.")
]


def emit(data: Any) -> None:
    """Print JSON."""
    print(json.dumps(data, ensure_ascii=False, indent=2, default=str))


def table(rows: Iterable[Sequence[str]]) -> None:
    """Print rows as two or more aligned columns."""
    lines = [list(row) for row in rows]
    if not lines:
        return
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(max(map(len, lines)))]
    for line in lines:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip())


def note(text: str) -> None:
    """A remark beside the result, on the error stream, so that a pipe gets the result alone."""
    print(text, file=sys.stderr)


def write(text: str) -> None:
    """Show a piece of text that a model wrote, at once; on a terminal nothing in it can steer the terminal."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def open_model(name: str, device: str, dtype: str, revision: str | None = None, *, mapped: bool = False) -> Model:
    """The model that a command was pointed at; mapped: for commands that let its weights be as they are."""
    from armillary.model import load

    return load(name, device=device, dtype=dtype, revision=revision, mapped=mapped)


def watermark_of(path: Path | None, kind: str) -> Watermark:
    """The watermark whose key is in a file, or in the environment."""
    from armillary.engine.watermark import Watermark, read_key

    return Watermark(read_key(path), kind)  # type: ignore[arg-type]  # it says itself what kinds there are


def read_text(argument: str | None) -> str:
    """The argument, or standard input for `-` or when nothing was given."""
    from armillary.base.errors import InputError

    if argument is not None and argument != "-":
        return argument
    if argument is None and sys.stdin.isatty():
        raise InputError("no text was given", hint="write it behind the model, or pipe it in")
    return sys.stdin.read()


def refuse_unused(options: Mapping[str, Any], why: str) -> None:
    """Raises InputError naming the options that were given (not None) and would do nothing."""
    from armillary.base.errors import InputError

    given = [name for name, value in options.items() if value is not None and value is not False]
    if given:
        raise InputError(
            f"{', '.join(given)} would do nothing: {why}", hint="leave it out" if len(given) == 1 else "leave them out"
        )
