"""`compare`: from a recipe and what is varied to results, a report and a conclusion in words."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from armillary.base.files import write_atomic
from armillary.compare.budget import Budget
from armillary.compare.conclusion import conclusion
from armillary.compare.events import Compared, Progress
from armillary.compare.plan import Plan, Probes, settle
from armillary.compare.race import Race, Stopped, locked, prepared
from armillary.compare.report import REPORT, write_report
from armillary.compare.results import results
from armillary.compare.vary import Vary, variants
from armillary.recipe import Recipe

RESULTS = "results.json"


@dataclass(frozen=True)
class Comparison:
    """folder: with everything; data: all figures as plain data; conclusion: sentences; stopped: whether
    something is left to do, and by which signal."""

    folder: Path
    data: dict[str, Any] = field(repr=False)
    conclusion: list[str]
    stopped: bool = False
    signal: int | None = None

    @property
    def report(self) -> Path:
        return self.folder / REPORT


def compare(
    base: Recipe | str | Path | dict[str, Any],
    vary: Vary,
    budget: Budget | str,
    *,
    seeds: int = 3,
    folder: str | Path | None = None,
    probes: Probes = "quick",
    equal_loss: bool = False,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Race variants of a recipe at equal budget, and say what the differences are and how sure.

    vary: texts `KEY=VALUE,name:VALUE,…`, or a mapping of keys to a list of values or to a mapping of
    names to values; several keys span a grid, and the base is always there as the reference. budget:
    see `Budget` ("2e13flops", "20min", "5Mparams", "3e6tokens", "500steps"). seeds: runs of each
    variant, from the recipe's seed on. folder: by default runs/compare-NAME; a comparison that is
    there goes on when it is the same, so that a call after an interruption does only what is left.
    probes: none, quick or all. equal_loss: also train the reference at half its width, and say which
    variants have equal loss. limit: score at most this many held-out documents.

    Raises InputError, SettingsError or UnsupportedError, naming the variant, before anything is trained.
    """
    recipe = base if isinstance(base, Recipe) else Recipe.load(base)
    wanted = budget if isinstance(budget, Budget) else Budget.parse(budget)
    place = Path(folder) if folder is not None else Path("runs") / f"compare-{recipe.name}"
    tell: Progress = progress or (lambda event: None)
    found = variants(recipe, vary)
    options: dict[str, Any] = {"probes": probes, "equal_loss": equal_loss, "limit": limit}
    # Mistakes are found with the vocabulary that the recipe asks for, before any text is read.
    settle(found, wanted, seeds, vocabulary=recipe.tokenizer.vocabulary, **options)
    with locked(place):
        if (old := Plan.read(place)) is not None:
            expected = settle(found, wanted, seeds, vocabulary=_vocabulary(place, recipe), corpus=old.corpus, **options)
            expected.begin(place)  # says what differs before the data is looked at
        corpus = prepared(recipe, place, tell)
        plan = settle(found, wanted, seeds, vocabulary=corpus.tokenizer.size, corpus=corpus.fingerprint, **options)
        plan.begin(place)
        race = Race(plan, place, corpus, tell)
        stopped: Stopped | None = None
        try:
            race.run(lambda: _write(plan, race, place))
        except Stopped as error:
            stopped = error
        data = _write(plan, race, place)
        tell(Compared(str(place / REPORT), data["finished"]))
    return Comparison(place, data, data["conclusion"], stopped is not None, stopped.signal if stopped else None)


def _write(plan: Plan, race: Race, place: Path) -> dict[str, Any]:
    data = results(plan, race)
    data["conclusion"] = conclusion(data)
    write_atomic(place / RESULTS, json.dumps(data, indent=1) + "\n")
    write_report(data, plan, place)
    return data


def _vocabulary(place: Path, recipe: Recipe) -> int:
    """Of the corpus that is there, else what the recipe asks for."""
    from armillary.base.errors import DataError
    from armillary.compare.plan import DATA
    from armillary.data.corpus import Corpus

    try:
        return Corpus.open(place / DATA).tokenizer.size
    except DataError:
        return recipe.tokenizer.vocabulary


__all__ = ["Comparison", "compare"]
