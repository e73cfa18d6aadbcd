"""The race: trains what is not trained yet, measures what is not measured yet, and can be stopped anywhere.

A comparison's folder:
comparison.json        the plan
data/                  the corpus, prepared once; every run has a link to it
variants/NAME/         measures.json, and a run folder for every seed, with scores.json once it is done
probes/                one file for each skill tried
results.json, report.html
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from armillary.base.errors import DataError, InputError, TrainingError
from armillary.base.files import explained, write_atomic
from armillary.compare import skills
from armillary.compare.budget import forward_flops
from armillary.compare.events import Compared, Failed, Measured, Planned, Probed, Progress, Working
from armillary.compare.measure import measure
from armillary.compare.plan import DATA, Job, Plan
from armillary.compare.vary import Variant
from armillary.data.corpus import Corpus
from armillary.data.prepare import prepare
from armillary.evaluate import kneser_ney, write_card, write_report
from armillary.evaluate.heldout import held_out, training_texts
from armillary.evaluate.measure import evaluate
from armillary.model import load
from armillary.recipe import Recipe
from armillary.train import Event, Preparing, Run, Stepped, resume, train

SCORES, FAILURE, MEASURES, PROBES = "scores.json", "failure.json", "measures.json", "probes"
BASELINE = "baseline.json"
MOST_COUNTED = 2**28  # bytes of training text, beyond which counting n-grams takes too much memory


class Stopped(Exception):
    """A signal stopped the run that was under way; everything so far is saved."""

    def __init__(self, signal: int | None) -> None:
        super().__init__("stopped")
        self.signal = signal


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the comparison's folder alone; the system lets go of the lock when a process dies."""
    with explained("writing", folder):
        if folder.exists() and not folder.is_dir():
            raise InputError("this is a file, not a folder for a comparison", where=str(folder))
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError("another process works on this comparison", where=str(folder)) from None
        yield
    finally:
        os.close(handle)


def prepared(base: Recipe, folder: Path, progress: Progress) -> Corpus:
    """The comparison's corpus; DataError when the text has changed since it began."""
    corpus = prepare(
        base.data,
        base.tokenizer,
        folder / DATA,
        progress=lambda stage, fraction: progress(Preparing(stage, fraction)),
    )
    if corpus.folder != folder / DATA:
        raise DataError(
            "the text or the settings of the data have changed since this comparison began",
            where=str(folder / DATA),
            hint="compare into another folder",
        )
    return corpus


class Race:
    """Goes through a plan in its folder; `run` may be called again and again."""

    def __init__(self, plan: Plan, folder: Path, corpus: Corpus, progress: Progress) -> None:
        self.plan, self.folder, self.corpus, self._progress = plan, folder, corpus, progress
        self.vocabulary = corpus.tokenizer.size
        self.jobs = list(plan.jobs())
        self._clock = _Clock()

    def run(self, after_round: Any) -> None:
        """Everything that is left to do; after_round() is called when a seed is done for all variants.

        Raises Stopped when a signal ended a run.
        """
        done = {(job.variant.name, job.seed): _bits(found) for job in self.jobs if (found := self.scores(job))}
        names = tuple(variant.name for variant in self.plan.variants)
        self._progress(Planned(names, self.plan.seeds, str(self.folder), done))
        probes = skills.units(self.plan.probes, [v for v in self.plan.variants if v.role != "control"])
        self._clock.expect("run", [job for job in self.jobs if not self._settled(job)], self._weight)
        self._clock.expect("measure", [v for v in self.plan.variants if not self.measures(v)])
        self._clock.expect("probe", [unit for unit in probes if self.probe(unit) is None])
        self._baseline()
        for variant in self.plan.variants:
            self._measure(variant)
        for seed in self.plan.seeds:
            for job in self.jobs:
                if job.seed == seed:
                    self._job(job)
            after_round()
        for unit in probes:
            self._probe(unit)

    # -- what is there

    def scores(self, job: Job) -> dict[str, Any] | None:
        return _read(self.folder / job.folder / SCORES)

    def failure(self, job: Job) -> str | None:
        found = _read(self.folder / job.folder / FAILURE)
        return None if found is None else str(found["why"])

    def measures(self, variant: Variant) -> dict[str, Any] | None:
        return _read(self.folder / "variants" / variant.folder / MEASURES)

    def probe(self, unit: skills.Unit) -> dict[str, Any] | None:
        return _read(self._probe_path(unit))

    def baseline(self) -> dict[str, Any] | None:
        return _read(self.folder / BASELINE)

    def _probe_path(self, unit: skills.Unit) -> Path:
        return self.folder / PROBES / f"{unit.task}-{unit.pattern}-{unit.key}.json"

    def _settled(self, job: Job) -> bool:
        return self.scores(job) is not None or self.failure(job) is not None

    # -- one piece of work each

    def _baseline(self) -> None:
        """What counting alone makes of the same text: an n-gram model on the same held-out documents."""
        size = int(self.corpus.train.document_bytes.sum())
        if self.baseline() is not None or not 0 < size <= MOST_COUNTED:
            return
        self._progress(Preparing("counting n-grams", 0.0))
        held = held_out(self.corpus, self.corpus.tokenizer)
        texts = [held.text(number) for number in held.first(self.plan.limit)[0]]
        if any(texts):
            found = kneser_ney(training_texts(self.corpus), texts)
            _write(self.folder / BASELINE, {"name": found.name, "bits_per_byte": found.bits_per_byte})

    def _job(self, job: Job) -> None:
        if self._settled(job):
            return
        folder, name = self.folder / job.folder, job.variant.name
        begun = time.perf_counter()

        def told(event: Event) -> None:
            share = event.step / max(1, event.steps) if isinstance(event, Stepped) else None
            left = self._clock.left("run", job, share)
            self._progress(Working("training", name, job.seed, share, left, event))

        try:
            run = self._trained(job, folder, told)
        except TrainingError as error:
            _write(folder / FAILURE, {"why": error.what, "where": error.where})
            self._clock.done("run", job, None)
            self._progress(Failed(name, job.seed, error.what))
            return
        if run.stopped or run.signal is not None:  # a signal in the last step ends the comparison too
            raise Stopped(run.signal)
        self._progress(Working("scoring held-out text", name, job.seed, 1.0, self._clock.left("run", job, 1.0)))
        found = evaluate(load(run.folder), self.corpus, limit=self.plan.limit)
        found.save(run.folder)
        write_report(run.folder)
        write_card(run.folder)
        info = json.loads((run.checkpoints[-1] / "trainer.json").read_bytes())
        speeds = [line["tokens_per_second"] for line in run.metrics if line.get("tokens_per_second")]
        _write(
            folder / SCORES,
            {
                "bits_per_byte": found.bits_per_byte.value,
                "documents": found.fingerprints["documents"],
                "nats": [score.nats for score in found.scores],
                "sizes": list(found.sizes),
                "writing_speed": found.writing_speed,
                "reading_speed": found.reading_speed,
                "steps": run.step,
                "tokens": run.step * job.recipe.training.batch * job.recipe.training.context,
                "seconds": info["course"]["updating"],
                "training_speed": _median(speeds[1:] or speeds),
                "device": found.device,
                "precision": found.precision,
                "environment": found.environment,
            },
        )
        self._clock.done("run", job, time.perf_counter() - begun)
        self._progress(Measured(name, job.seed, found.bits_per_byte.value))

    def _trained(self, job: Job, folder: Path, told: Progress) -> Run:
        """The job's run, trained to its end or stopped; a run that was begun goes on."""
        if not (folder / "recipe.yaml").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            link = folder / DATA
            if not link.is_symlink():
                link.symlink_to(os.path.relpath(self.folder / DATA, folder), target_is_directory=True)
            return train(job.recipe, folder, overwrite=(folder / "ledger.jsonl").exists(), progress=told)
        if Recipe.load(folder / "recipe.yaml").fingerprint != job.recipe.fingerprint:
            raise InputError(
                "this run is not of this comparison: its recipe was changed",
                where=str(folder),
                hint="remove the folder to train it again",
            )
        return resume(folder, progress=told)

    def _measure(self, variant: Variant) -> None:
        if self.measures(variant) is not None:
            return
        begun = time.perf_counter()

        def told(share: float) -> None:
            left = self._clock.left("measure", variant, share)
            self._progress(Working("measuring time, memory and state", variant.name, None, share, left))

        told(0.0)
        found = measure(variant.recipe, self.vocabulary, told)
        _write(self.folder / "variants" / variant.folder / MEASURES, found)
        self._clock.done("measure", variant, time.perf_counter() - begun)

    def _probe(self, unit: skills.Unit) -> None:
        found = self.probe(unit)
        if found is None:
            begun = time.perf_counter()

            def told(share: float) -> None:
                left = self._clock.left("probe", unit, share)
                what = f"probe: {skills.TITLES[unit.task]}, {skills.PATTERNS[unit.pattern]}"
                self._progress(Working(what, ", ".join(unit.variants), None, share, left))

            told(0.0)
            found = unit.run(told)
            _write(self._probe_path(unit), found)
            self._clock.done("probe", unit, time.perf_counter() - begun)
            accuracy, why = found.get("accuracy"), found.get("refused", "")
            value = None if accuracy is None else accuracy["value"]
            self._progress(Probed(unit.variants, unit.task, unit.pattern, value, found["chance"], why))

    def _weight(self, job: Job) -> float:
        """What a run costs, to share out the time left."""
        training = job.recipe.training
        if training.seconds is not None:
            return training.seconds
        return training.steps * forward_flops(job.recipe, self.vocabulary)

    def tell(self, event: Compared) -> None:
        self._progress(event)


class _Clock:
    """How long the rest will take, from what was done so far of each kind of work."""

    def __init__(self) -> None:
        self._open: dict[str, list[Any]] = {}
        self._weights: dict[int, float] = {}
        self._spent: dict[str, tuple[float, float]] = {}  # weight done and seconds for it
        self._begun: tuple[int, float] | None = None

    def expect(self, kind: str, units: list[Any], weight: Any = lambda unit: 1.0) -> None:
        self._open[kind] = units
        self._weights |= {id(unit): weight(unit) for unit in units}

    def done(self, kind: str, unit: Any, seconds: float | None) -> None:
        self._open[kind] = [other for other in self._open[kind] if other is not unit]
        if seconds is not None:
            weight, spent = self._spent.get(kind, (0.0, 0.0))
            self._spent[kind] = (weight + self._weights[id(unit)], spent + seconds)

    def left(self, kind: str, unit: Any, share: float | None) -> float | None:
        """Seconds for everything that is open, `share` of `unit` being done; None until it can be told."""
        now = time.perf_counter()
        if self._begun is None or self._begun[0] != id(unit):
            self._begun = (id(unit), now)
        total = 0.0
        for name, units in self._open.items():
            weight, spent = self._spent.get(name, (0.0, 0.0))
            if name == kind and share:
                weight += share * self._weights[id(unit)]
                spent += now - self._begun[1]
            ahead = sum(self._weights[id(other)] * (1 - (share or 0) * (other is unit)) for other in units)
            if not units:
                continue
            if not weight or not spent:
                return None
            total += ahead * spent / weight
        return total


def _bits(scores: dict[str, Any]) -> float:
    return float(scores["bits_per_byte"])


def _median(values: list[float]) -> float | None:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else None


def _read(path: Path) -> dict[str, Any] | None:
    """A file that was written whole, or None."""
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_bytes())
    except ValueError:
        raise DataError("this file is damaged", where=str(path), hint="remove it, and it is made again") from None
    return data if isinstance(data, dict) else None


def _write(path: Path, data: Any) -> None:
    write_atomic(path, json.dumps(data) + "\n")
