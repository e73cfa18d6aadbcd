"""How a command looks in its help: arguments explained, its example on a line of its own."""

from __future__ import annotations

import inspect
import typing

import click
from typer.core import TyperCommand
from typer.models import ArgumentInfo

EXAMPLE = "Example:"


class Command(TyperCommand):
    """Plain help. The last paragraph of a command's docstring, `Example: …`, can be copied as it stands."""

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The text before the example wrapped, the example not."""
        text, _, example = inspect.cleandoc(self.help or "").partition(EXAMPLE)
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(text.strip())
        if example:
            formatter.write(f"\n  {EXAMPLE}\n    {example.strip()}\n")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Arguments and options with their help; which arguments are needed is said by the usage line."""
        explained = self._explained()
        rows: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if isinstance(parameter, click.Argument):
                default = parameter.default
                shown = [explained.get(parameter.name or "", "")]
                if not (default is None or callable(default) or parameter.nargs == -1 or parameter.required):
                    shown.append(f"[default: {default}]")
                rows["Arguments"].append((parameter.make_metavar(ctx), "  ".join(shown)))
            elif record is not None:
                rows["Options"].append((record[0], record[1].replace("\\[", "[")))  # escaped for another printer
        for title, lines in rows.items():
            if lines:
                with formatter.section(title):
                    formatter.write_dl(lines)

    def _explained(self) -> dict[str, str]:
        """The help of each argument, from its annotation: some versions of click lose it on the way."""
        assert self.callback is not None
        hints = typing.get_type_hints(inspect.unwrap(self.callback), include_extras=True)
        return {
            name: info.help or ""
            for name, hint in hints.items()
            for info in getattr(hint, "__metadata__", ())
            if isinstance(info, ArgumentInfo)
        }
