"""`kill -9` at any moment: the run goes on and ends in the same weights, bit for bit.

The processes are forked, so that each costs no import; each is killed by the system, without a chance
to tidy up.
"""

from __future__ import annotations

import builtins
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from armillary.recipe import Recipe
from armillary.train import Event, Run, Stepped, checkpoint, resume, train

Make = Callable[..., Recipe]
Same = Callable[[Run, Run], None]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(work: Callable[[], object]) -> None:
    """Run `work` in a process that must not survive it."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


class Dying:
    """Kills the process after an update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, event: Event) -> None:
        if isinstance(event, Stepped) and event.step == self.step:
            die()


def before_the_seal(patch: pytest.MonkeyPatch) -> None:
    """Weights and optimiser are written, the list of files is not."""
    patch.setattr(checkpoint, "seal", lambda *args: die())


def in_the_optimiser(patch: pytest.MonkeyPatch) -> None:
    """Half of a file is written."""

    def half(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        die()

    patch.setattr(checkpoint, "save_file", half)


def before_the_rename(patch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target).name.startswith("step-"):
            die()
        real(source, target)

    patch.setattr(os, "replace", replace)


def after_the_rename(patch: pytest.MonkeyPatch) -> None:
    """The new checkpoint is there, the old ones and the ledger do not know."""
    patch.setattr(checkpoint.Checkpoints, "thin", lambda *args: die())


def while_thinning(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checkpoint.shutil, "rmtree", lambda *args, **options: die())


def in_a_line_of_metrics(patch: pytest.MonkeyPatch) -> None:
    real = builtins.open

    def opened(file: Any, *args: Any, **options: Any) -> Any:
        if Path(str(file)).name == "metrics.jsonl" and args[:1] == ("ab",):
            with real(file, "ab") as handle:
                handle.write(b'{"step": 2, "lo')
            die()
        return real(file, *args, **options)

    patch.setattr(builtins, "open", opened)


def in_a_line_of_the_ledger(patch: pytest.MonkeyPatch) -> None:
    real = builtins.open

    def opened(file: Any, *args: Any, **options: Any) -> Any:
        if Path(str(file)).name == "ledger.jsonl" and args[:1] == ("ab",):
            with real(file, "ab") as handle:
                handle.write(b'{"event": "che')
            die()
        return real(file, *args, **options)

    patch.setattr(builtins, "open", opened)


@pytest.mark.parametrize(
    "fault",
    [
        before_the_seal,
        in_the_optimiser,
        before_the_rename,
        after_the_rename,
        while_thinning,
        in_a_line_of_metrics,
        in_a_line_of_the_ledger,
    ],
)
def test_killed_in_the_middle_of_writing(
    whole: Run, recipe: Make, same: Same, tmp_path: Path, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    train(recipe(), tmp_path, stop_after=5)  # two checkpoints are there: steps 4 and 5

    def work() -> None:
        fault(pytest.MonkeyPatch())
        resume(tmp_path)

    killed(work)
    same(whole, resume(tmp_path))


@pytest.mark.parametrize("step", [1, 4, 11])
def test_killed_after_an_update(whole: Run, recipe: Make, same: Same, tmp_path: Path, step: int) -> None:
    killed(lambda: train(recipe(), tmp_path, progress=Dying(step)))
    same(whole, resume(tmp_path))


def test_killed_again_and_again_at_random(whole: Run, recipe: Make, same: Same, tmp_path: Path) -> None:
    draw = random.Random(os.urandom(8))
    train(recipe(), tmp_path, stop_after=1)
    for _ in range(5):
        process = multiprocessing.get_context("fork").Process(target=lambda: resume(tmp_path))
        process.start()
        time.sleep(draw.uniform(0.0, 0.4))
        process.kill()
        process.join(60)
    same(whole, resume(tmp_path))


def test_killed_while_the_data_is_prepared(whole: Run, recipe: Make, same: Same, tmp_path: Path) -> None:
    def fault(event: Event) -> None:
        if getattr(event, "stage", "").startswith("tokenising"):
            die()

    killed(lambda: train(recipe(), tmp_path, progress=fault))
    same(whole, resume(tmp_path))
