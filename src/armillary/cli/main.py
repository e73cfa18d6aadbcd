"""The `armillary` command: its sub-commands, and how mistakes and interrupts end.

Nothing heavy is imported until a command needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer

from armillary.cli import checks, comparing, compress, models, recipes, runs, serving
from armillary.cli.command import Command

app = typer.Typer(
    name="armillary",
    help="From text to a language model that its owner can trust.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (recipes, runs, comparing, models, serving, compress, checks):
    for name, function in group.COMMANDS.items():
        app.command(name, cls=Command)(function)


def _version(wanted: bool) -> None:
    if wanted:
        from armillary import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """From text to a language model that its owner can trust."""


def main() -> None:
    """Run the command line; a user's mistake gives one message and exit status 2."""
    if sys.argv[1:2] == ["serve"]:
        from armillary.base.memory import begin_whole

        begin_whole()
    # OpenMP's threads spin for long while they wait, and slow each other down as soon as anything else
    # runs; a short spin keeps most of the speed. PyTorch reads this when it is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"  # a user has no use for our line
    from armillary.base.errors import ArmillaryError

    try:
        app()
    except ArmillaryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except MemoryError as error:
        print(f"error: there is not enough memory: {error}\n  ask for less at a time", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; closing quietly keeps Python from complaining.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
