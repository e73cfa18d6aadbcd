"""The command compare, and the live table that shows a comparison while it runs."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from armillary.base.words import clock
from armillary.cli.shared import AsJson, Overrides, emit, note, table

if TYPE_CHECKING:
    from armillary.train import Event


def compare(
    recipe: Annotated[str, typer.Argument(help="The reference: a recipe's name or file.", metavar="RECIPE")],
    overrides: Overrides = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE,NAME:VALUE,…: what to try; repeat it for a grid.", metavar="KEY=VALUES"),
    ] = None,
    budget: Annotated[
        str, typer.Option(help="For each variant: 2e13flops, 90s, 20min, 1h, 5Mparams, 3e6tokens or 500steps.")
    ] = "",
    seeds: Annotated[int, typer.Option(help="Runs of each variant, from the recipe's seed on.")] = 3,
    run: Annotated[Path | None, typer.Option(help="The comparison's folder; by default runs/compare-NAME.")] = None,
    probes: Annotated[str, typer.Option(help="Skills to try: none, quick or all.")] = "quick",
    equal_loss: Annotated[
        bool, typer.Option("--equal-loss", help="Add the reference at half its width, and say what has equal loss.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Score at most this many held-out documents.")] = None,
    json: AsJson = False,
) -> None:
    """Race variants of a recipe at equal budget.

    Trains each with every seed on the same text in the same order, measures quality, speed, memory and
    skills, and says how sure the differences are. Called again, it goes on where it stopped.

    Example: armillary compare quick --vary model.block.mixer=retention --budget 2e13flops --seeds 5
    """
    from armillary.base.errors import InputError
    from armillary.compare import compare as start
    from armillary.compare.budget import FORMS

    if not vary:
        raise InputError(
            "nothing is varied", hint="add --vary KEY=VALUE,VALUE, for example model.block.mixer=retention"
        )
    if not budget:
        raise InputError("no budget is given", hint=f"add --budget: {FORMS}")
    from armillary.recipe import Recipe

    base = Recipe.load(recipe, *(overrides or []))
    folder = run if run is not None else Path("runs") / f"compare-{base.name}"
    options: dict[str, Any] = {"probes": probes, "equal_loss": equal_loss, "limit": limit}
    try:
        with Board() as board:
            done = start(base, vary, budget, seeds=seeds, folder=folder, progress=board, **options)
    except KeyboardInterrupt:
        note(_go_on(folder))
        raise typer.Exit(130) from None
    if done.stopped:
        note(_go_on(folder))
        raise typer.Exit(128 + done.signal if done.signal else 130)
    if json:
        emit(done.data)
        return
    print()
    show(done.data)
    print()
    for sentence in done.conclusion:
        print(f"  {sentence}")
    print(f"\nreport: {done.report} (open it in a browser)")


def show(data: dict[str, Any]) -> None:
    """The main figures as a table."""
    from armillary.base.words import amount

    rows = [("", "bits per byte", "95 %", "against the reference", "tokens/s", "decoding", "state")]
    for row in data["variants"]:
        bits, difference = row["bits_per_byte"], row["difference"]
        value = f"{bits['value']:.4f}" if bits else "failed" if row["failed"] else ""
        spread = f"±{(bits['both'][1] - bits['both'][0]) / 2:.4f}" if bits and bits["both"] else ""
        apart = ""
        if difference:
            apart = f"{difference['value']:+.4f}"
            if difference["both"]:
                apart += " [{:+.4f}, {:+.4f}]".format(*difference["both"])
        speeds = [f"{row[key]:,.0f}" if row[key] else "" for key in ("training_speed", "writing_speed")]
        state = amount(row["state"], "B") if row["state"] is not None else ""
        rows.append((row["name"], value, spread, apart, *speeds, state))
    table(rows)


def _go_on(folder: Path) -> str:
    return f"stopped; what is done is kept in {folder}. Go on with the same command."


class Board:
    """Shows a comparison's events: a live table on a terminal, elsewhere plain lines.

    Use as a context manager, so that the terminal is left as it was.
    """

    def __init__(self, stream: IO[str] | None = None, *, every: float = 5.0) -> None:
        self.stream = stream or sys.stderr
        self.every = every
        self._live: Any = None
        self._variants: tuple[str, ...] = ()
        self._seeds: tuple[int, ...] = ()
        self._cells: dict[tuple[str, int], str] = {}
        self._bits: dict[tuple[str, int], float] = {}
        self._now, self._left = "", ""
        self._said = -float("inf")
        self._what = ""

    def __enter__(self) -> Board:
        if self.stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=self.stream), refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __call__(self, event: Event) -> None:
        from armillary.compare import Compared, Failed, Measured, Planned, Probed, Working
        from armillary.train import Notice, Preparing, Stepped

        match event:
            case Preparing(stage, fraction):
                self._show(f"{stage} {100 * fraction:.0f}%" if 0 < fraction < 1 else stage, fresh=stage != self._what)
                self._what = stage
            case Planned(variants, seeds, folder, done):
                self._variants, self._seeds, self._bits = variants, seeds, dict(done)
                self._cells = {key: f"{value:.4f}" for key, value in done.items()}
                count = len(variants) * len(seeds)
                there = f", {len(done)} of them done" if done else ""
                self._say(f"{len(variants)} variants × {len(seeds)} seeds: {count} runs{there}, into {folder}")
            case Working():
                if event.variant is not None and event.seed is not None:
                    share = f"{100 * event.share:.0f} %" if event.share is not None else "…"
                    self._cells[event.variant, event.seed] = share
                said = self._line(event)
                if isinstance(event.inner, Notice) and "step" in event.inner.text:
                    self._say(f"{event.variant}, seed {event.seed}: {event.inner.text}")
                fresh = said.partition(" · ")[0] != self._what
                self._what = said.partition(" · ")[0]
                if event.inner is None or isinstance(event.inner, Stepped):
                    self._show(said, fresh=fresh)
            case Measured(variant, seed, bits):
                self._bits[variant, seed] = bits
                self._cells[variant, seed] = f"{bits:.4f}"
                self._keep(f"{variant}, seed {seed}: {bits:.4f} bits per byte")
            case Failed(variant, seed, why):
                self._cells[variant, seed] = "failed"
                self._say(f"{variant}, seed {seed} failed: {why}")
            case Probed(variants, task, pattern, accuracy, chance, why):
                found = f"refused ({why})" if accuracy is None else f"{accuracy:.0%} right (chance {chance:.0%})"
                self._keep(f"{', '.join(variants)}, {task} {pattern}: {found}")
            case Compared():
                pass

    def _line(self, event: Any) -> str:
        who = f"{event.variant}" + (f", seed {event.seed}" if event.seed is not None else "")
        parts = [f"{event.what}: {who}"]
        inner = event.inner
        if hasattr(inner, "tokens_per_second"):
            parts.append(f"step {inner.step}/{inner.steps}")
            parts.append(f"{inner.bits_per_byte:.3f} bits per byte" if inner.bits_per_byte is not None else "")
            parts.append(f"{inner.tokens_per_second:,.0f} tokens/s")
        elif event.share:
            parts.append(f"{100 * event.share:.0f} %")
        self._left = "" if event.seconds_left is None else f"{clock(event.seconds_left)} left in all"
        if self._live is None:  # the live table has a line for it
            parts.append(self._left)
        return " · ".join(part for part in parts if part)

    def _show(self, text: str, *, fresh: bool) -> None:
        """A state that the next one replaces."""
        self._now = text
        if self._live is not None:
            self._live.update(self._table())
        elif fresh or time.monotonic() - self._said >= self.every:
            self._said = time.monotonic()
            print(text, file=self.stream, flush=True)

    def _keep(self, text: str) -> None:
        """A result: in the table where there is one, else a line of its own."""
        if self._live is not None:
            self._live.update(self._table())
        else:
            print(text, file=self.stream, flush=True)

    def _say(self, text: str) -> None:
        """Something that stays to be read."""
        if self._live is not None:
            from rich.text import Text

            self._live.console.print(Text(text))
        else:
            print(text, file=self.stream, flush=True)

    def _table(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        now = Text(self._now, no_wrap=True, overflow="ellipsis")
        if not self._variants:
            return now
        shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        shown.add_column("bits per byte", no_wrap=True)
        room = self._live.console.width if self._live is not None else 80
        fit = max(1, (room - 24 - max(map(len, self._variants))) // 9)
        seeds = self._seeds[-fit:] if len(self._seeds) > fit else self._seeds
        for seed in seeds:
            shown.add_column(f"seed {seed}", justify="right")
        shown.add_column("mean", justify="right")
        shown.add_column("difference", justify="right")
        reference = self._variants[0]
        for name in self._variants:
            mine = [self._bits[name, s] for s in self._seeds if (name, s) in self._bits]
            both = [s for s in self._seeds if (name, s) in self._bits and (reference, s) in self._bits]
            apart = [self._bits[name, s] - self._bits[reference, s] for s in both]
            mean = f"{sum(mine) / len(mine):.4f}" if mine else "·"
            difference = f"{sum(apart) / len(apart):+.4f}" if apart and name != reference else ""
            shown.add_row(Text(name), *(self._cells.get((name, s), "·") for s in seeds), mean, difference)
        return Group(shown, now, Text(self._left))


COMMANDS = {"compare": compare}
