"""A run: from a recipe to a trained model in a folder, stopped and resumed at will."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import armillary
from armillary.base.errors import InputError
from armillary.base.files import explained
from armillary.recipe import Recipe
from armillary.train import distributed
from armillary.train.checkpoint import Checkpoints, step_of
from armillary.train.distributed import World
from armillary.train.layout import BOARD, CHECKPOINTS, DATA, FILES, LEDGER, LOCK, METRICS, RECIPE, REPORT, SAMPLES
from armillary.train.ledger import Ledger
from armillary.train.metrics import read
from armillary.train.precision import settled
from armillary.train.progress import Progress
from armillary.train.session import Session

FIXED = ("objective", "context", "batch")  # parts of `training` that decide the order of the data


@dataclass
class Run:
    """The handle of a run folder. stopped: whether training ended before its last step; signal: the
    number of the signal that stopped it, if one did; step: updates done."""

    folder: Path
    stopped: bool = False
    signal: int | None = None
    step: int = 0

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """A run that is there; raises InputError when the folder is none."""
        path = Path(folder)
        if not (path / RECIPE).is_file():
            raise InputError("this folder is not a run: it has no recipe.yaml", where=str(path))
        run = cls(path)
        run.step = (step_of(run.checkpoints[-1]) or 0) if run.checkpoints else 0
        training = run.recipe.training
        ended = run.ledger.last("finished")
        run.stopped = run.step < training.steps if training.seconds is None else ended is None
        return run

    @property
    def recipe(self) -> Recipe:
        return Recipe.load(self.folder / RECIPE)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read(self.folder / METRICS)

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The lines of samples.jsonl: step, prompt, text."""
        return read(self.folder / SAMPLES)

    @property
    def checkpoints(self) -> list[Path]:
        """Model folders, the latest last."""
        return Checkpoints(self.folder / CHECKPOINTS).all()

    @property
    def ledger(self) -> Ledger:
        """The ledger, checked."""
        return Ledger(self.folder / LEDGER)

    @property
    def report(self) -> Path:
        """Where the report of an evaluated run lies."""
        return self.folder / REPORT


def train(
    recipe: Recipe | str | Path | Mapping[str, Any],
    folder: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    stop_after: int | None = None,
) -> Run:
    """Train by a recipe into a new run folder, by default runs/NAME.

    overwrite: replace a run that is there (its prepared data is kept when it still fits). progress:
    takes events as they happen. stop_after: save and stop once this many updates are done. Under
    `torchrun` all processes call it alike. Raises InputError for a folder that is in use, DataError,
    SettingsError, TrainingError.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    recipe = recipe.derive(training=settled(recipe.training))  # a run that goes on elsewhere computes alike
    path = Path(folder) if folder is not None else Path("runs") / recipe.name
    world = distributed.begin()
    with _locked(path, world, lambda: _claim(path, recipe, overwrite)):
        done = Session(path, recipe, world, progress, fresh=True).run(stop_after)
    return Run(path, done.stopped, done.signal, done.step)


def resume(
    folder: str | Path,
    *overrides: str,
    progress: Progress | None = None,
    stop_after: int | None = None,
) -> Run:
    """Go on with a run from its latest whole checkpoint, as if it had never stopped.

    overrides: of `training.*` only, for example training.steps=4000. Raises InputError when the
    folder is no run or in use, CheckpointError when no checkpoint is whole.
    """
    path = Path(folder)
    if not (path / RECIPE).is_file():
        raise InputError("this folder is not a run: it has no recipe.yaml", where=str(path))
    old = Recipe.load(path / RECIPE)
    recipe = Recipe.load(path / RECIPE, *overrides)
    fixed = {name: getattr(old.training, name) for name in FIXED}
    if recipe.derive(training=old.training) != old or recipe.training.derive(**fixed) != recipe.training:
        raise InputError(
            "a run goes on with its own data, tokenizer, model and batches",
            hint=f"override keys of training only, and not {', '.join(FIXED)}; or train into another folder",
        )
    world = distributed.begin()

    def claim() -> None:
        if recipe != old:
            recipe.save(path / RECIPE)

    with _locked(path, world, claim):
        done = Session(path, recipe, world, progress, fresh=False).run(stop_after)
    return Run(path, done.stopped, done.signal, done.step)


def _claim(path: Path, recipe: Recipe, overwrite: bool) -> None:
    """Make the folder this run's own. Only what has a ledger is a run, and nothing else is ever removed."""
    held = {item.name for item in path.iterdir()} - {LOCK}
    if LEDGER in held:
        if RECIPE in held and not overwrite:
            raise InputError(
                "there is a run in this folder",
                where=str(path),
                hint=f"go on with it: armillary resume {path}; or name another folder",
            )
        with explained("replacing a run", path):
            # The recipe goes first and the ledger last, so that an interruption leaves no half of a run.
            (path / RECIPE).unlink(missing_ok=True)
            for name in (CHECKPOINTS, BOARD):
                shutil.rmtree(path / name, ignore_errors=True)
            for name in FILES:
                (path / name).unlink(missing_ok=True)
    elif held - {DATA}:
        raise InputError("this folder holds other things and is not a run", where=str(path), hint="name another folder")
    Ledger(path / LEDGER).add("created", armillary=armillary.__version__, recipe=recipe.fingerprint, name=recipe.name)
    recipe.save(path / RECIPE)


@contextlib.contextmanager
def _locked(path: Path, world: World, claim: Callable[[], None]) -> Iterator[None]:
    """Hold the run folder alone; the system lets go of the lock when a process dies."""
    held: list[int] = []

    def take() -> None:
        with explained("writing", path):
            if path.exists() and not path.is_dir():
                raise InputError("this is a file, not a folder for a run", where=str(path))
            path.mkdir(parents=True, exist_ok=True)
            held.append(os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644))
        try:
            fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError("another process is training this run", where=str(path)) from None
        claim()

    try:
        world.lead(take)
        yield
    finally:
        for handle in held:
            os.close(handle)
