"""One stretch of a run in one process: prepare, build or restore, loop, look, save."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from armillary.base.errors import ArmillaryError, DataError, SettingsError, TrainingError
from armillary.checkpoints.assemble import pick_device
from armillary.checkpoints.native import load_native
from armillary.data.batch import Batch
from armillary.data.corpus import Corpus
from armillary.data.prepare import prepare
from armillary.engine import GenerationError, Sampling
from armillary.engine.generate import generate
from armillary.nn.heads.language_model import LanguageModelHead
from armillary.nn.network import build
from armillary.nn.ops import computes_bf16
from armillary.objectives.base import Vocabulary
from armillary.recipe import Recipe
from armillary.text.tokenizer import Tokenizer
from armillary.train import progress as told
from armillary.train.checkpoint import TRAINER, Checkpoints, disk_full, restore
from armillary.train.distributed import World
from armillary.train.heldout import HeldOut, bits_per_byte
from armillary.train.layout import BOARD, CHECKPOINTS, DATA, LEDGER, METRICS, SAMPLES
from armillary.train.ledger import Ledger
from armillary.train.metrics import Board, StepLines
from armillary.train.pace import Pace
from armillary.train.progress import Progress
from armillary.train.signals import StopSignals
from armillary.train.trainer import Trainer, derived_seed

PATIENCE = 600.0  # seconds that a finished run waits for room on a full disk
STALE = 5  # evaluations without a better held-out loss before it is said

logger = logging.getLogger("armillary.train")


@dataclass
class Course:
    """What a run carries from step to step besides the trainer's state."""

    seconds: float = 0.0
    updating: float = 0.0  # of these, in updates: what a limit of time counts
    window: list[float] = field(default_factory=lambda: [0.0, 0.0])  # sum and count of losses since the last line
    skipped: int = 0
    best_loss: float | None = None  # held out, over all evaluations
    stale: int = 0
    best_checkpoint: tuple[float, int] | None = None  # held-out loss and step

    def to_data(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Course:
        course = cls(**{**data, "window": list(data["window"])})
        best = data["best_checkpoint"]
        course.best_checkpoint = None if best is None else (float(best[0]), int(best[1]))
        return course


@dataclass(frozen=True)
class Outcome:
    """How a stretch ended: before the last step or not, by which signal, after which step."""

    stopped: bool
    signal: int | None
    step: int


class Session:
    """One process's part in one stretch of a run."""

    def __init__(self, folder: Path, recipe: Recipe, world: World, progress: Progress | None, *, fresh: bool) -> None:
        self.folder, self.recipe, self.world, self.fresh = folder, recipe, world, fresh
        self.training = recipe.training
        self._progress = progress if world.first else None
        self.checkpoints = Checkpoints(folder / CHECKPOINTS, world)
        self.course = Course()
        self.saved: int | None = None  # step of the latest checkpoint
        self._heldout_now: float | None = None  # measured at the present step
        self._unwritten: list[tuple[str, dict[str, Any]]] = []  # lines of the ledger that found no room
        self._owed: int | None = None  # step at which a save that found no room is tried again

    # -- the whole way

    def run(self, stop_after: int | None) -> Outcome:
        self.ledger = Ledger(self.folder / LEDGER) if self.world.first else None
        if self.training.threads is not None:
            torch.set_num_threads(self.training.threads)
        found = self._latest()
        if found is not None and self._over(found[1]["step"], Course.of(found[1]["course"])):
            self.say(told.Notice(f"all {found[1]['step']} steps of this run are done"))
            return Outcome(False, None, found[1]["step"])
        self.corpus = self._corpus()
        self.tokenizer: Tokenizer = self.corpus.tokenizer
        self._build(found)
        try:
            with StopSignals(self._ask_to_stop) as signals:
                stopped = self._loop(stop_after, signals)
        except TrainingError as error:
            self._failed(error)
            raise
        finally:
            self._close()
        step = self.trainer.steps_done
        steps = self._total(step)
        self._note("stopped" if stopped else "finished", step=step)
        self.say(told.Finished(step, steps, stopped, self.course.seconds))
        return Outcome(stopped, signals.received, step)

    def _over(self, step: int, course: Course) -> bool:
        """Whether the run has had all its updates, or all its time."""
        limit = self.training.seconds
        return step >= self.training.steps if limit is None else self.world.agree(course.updating >= limit)

    def _total(self, step: int) -> int:
        """How many updates the run will have; where the clock decides, as far as can be told."""
        limit, used = self.training.seconds, self.course.updating
        if limit is None:
            return self.training.steps
        return max(step, round(step * limit / used)) if used and step else self.training.steps

    def _latest(self) -> tuple[Path, dict[str, Any]] | None:
        if self.fresh:
            return None

        def look() -> Any:
            found = self.checkpoints.newest_good(self._warn)
            return None if found is None else [str(found[0]), found[1]]

        found = self.world.lead(look)
        return None if found is None else (Path(found[0]), found[1])

    def _corpus(self) -> Corpus:
        """The prepared corpus: that which the run began with, or a new one."""

        def ready() -> str:
            assert self.ledger is not None
            known = self.ledger.last("data")
            if known is not None:
                corpus = Corpus.open(self.folder / known["folder"])
                if corpus.fingerprint != known["fingerprint"]:
                    raise DataError("the prepared data is not that of this run", where=str(corpus.folder))
                return str(corpus.folder)
            corpus = prepare(
                self.recipe.data,
                self.recipe.tokenizer,
                self.folder / DATA,
                progress=lambda stage, fraction: self.say(told.Preparing(stage, fraction)),
            )
            if corpus.folder != self.folder / DATA:
                corpus = _promoted(corpus.folder, self.folder / DATA)
            self._note(
                "data",
                folder=str(corpus.folder.relative_to(self.folder)),
                fingerprint=corpus.fingerprint,
                tokenizer=corpus.tokenizer.fingerprint,
            )
            return str(corpus.folder)

        return Corpus.open(self.world.lead(ready))

    def _build(self, found: tuple[Path, dict[str, Any]] | None) -> None:
        recipe, training = self._complete(), self.training
        self.recipe = recipe
        device = pick_device(self.training.device if self.world.size == 1 else self.world.device)
        if found is None:
            network = build(recipe.model, seed=recipe.seed)
        else:
            network = load_native(found[0], "cpu", verify=False).network
        network.to(device)
        network.tie()
        special, size = tuple(sorted(self.tokenizer.special.values())), recipe.model.vocabulary or 0
        self.trainer = Trainer(
            network,
            training.derive(device="auto"),
            vocabulary=Vocabulary(size, self.tokenizer.mask, special, self._counted),
            seed=recipe.seed,
            world=self.world,
            notice=self._warn,
        )
        if found is not None:
            restore(self.trainer, *found)
            self.course = Course.of(found[1]["course"])
            self.saved = self.trainer.steps_done
        tokens = self.trainer.objective.tokens(training.context)
        self.loader = self.corpus.loader(recipe.data, context=tokens - 1, batch=training.batch, seed=recipe.seed)
        self.heldout = HeldOut.take(
            self.corpus.heldout,
            window=tokens,
            tokens=training.evaluate_tokens,
            isolate=recipe.data.isolate,
            seed=recipe.seed,
            tasks=self.corpus.heldout_tasks(recipe.data),
        )
        causal = training.objective.kind == "causal"  # others do not ask for every token
        self.tokens_per_byte = _tokens_per_byte(self.corpus, recipe) if causal else None
        step = self.trainer.steps_done
        self.metrics = self.samples = self.board = None
        if self.world.first:
            self.metrics = StepLines(self.folder / METRICS, step, notice=self._warn)
            self.samples = StepLines(self.folder / SAMPLES, step, notice=self._warn)
            self.board = Board(self.folder / BOARD, step) if training.tensorboard else None
        self._note(
            "started" if found is None else "resumed",
            step=step,
            recipe=recipe.fingerprint,
            data=self.corpus.fingerprint,
            tokenizer=self.tokenizer.fingerprint,
            checkpoint=None if found is None else found[0].name,
            torch=torch.__version__,
            python=platform.python_version(),
            device=str(device),
            threads=torch.get_num_threads(),
            processes=self.world.size,
        )
        count = sum(p.numel() for p in self.trainer.names.values())
        self.say(told.Started(step, self._total(step), count, str(self.folder)))
        self.say(told.Notice(self.trainer.compiled.why))
        if training.precision == "bf16" and device.type == "cpu" and not computes_bf16():
            self._warn("this processor does not compute in bf16; training.precision=float32 may be faster")
        if self.heldout is None:
            self._warn("there is too little held-out text to measure; see data.heldout")

    def _counted(self) -> torch.Tensor:
        """How often each id occurs in the training text."""
        return torch.from_numpy(self.corpus.train.counts(self.recipe.model.vocabulary or self.tokenizer.size))

    def _complete(self) -> Recipe:
        """The recipe with the vocabulary that the tokenizer has."""
        given, size = self.recipe.model.vocabulary, self.tokenizer.size
        if given is not None and given < size:
            raise SettingsError(
                f"a vocabulary of {given} is smaller than the tokenizer's {size}",
                path=("model", "vocabulary"),
                hint="leave it out, and it comes from the tokenizer",
            )
        return self.recipe if given else self.recipe.derive(model=self.recipe.model.derive(vocabulary=size))

    def _ask_to_stop(self) -> None:
        self.trainer.stop_asked = True

    # -- the loop

    def _loop(self, stop_after: int | None, signals: StopSignals) -> bool:
        """Train to the end; returns whether it stopped before."""
        trainer, course, limit = self.trainer, self.course, self.training.seconds
        goal = None if stop_after is None else max(stop_after, trainer.steps_done)
        pace = Pace(trainer.steps_done)
        spent = course.seconds
        stalled = False
        source = cast(Generator[Batch], self.loader.iterate(trainer.steps_done))
        with contextlib.closing(source) as batches:
            over = self._over(trainer.steps_done, course)
            while not (over or stalled or trainer.stop_agreed or trainer.steps_done == goal):
                began = time.perf_counter()
                if limit is not None:
                    trainer.progress = self.world.agree(min(1.0, course.updating / limit))
                loss = trainer.step(next(batches))
                update = trainer.last
                assert update is not None
                step = trainer.steps_done
                if update.skipped is None:
                    course.window[0] += loss
                    course.window[1] += 1
                else:
                    course.skipped += 1
                took = time.perf_counter() - began
                course.updating += took
                pace.stepped(step, update.tokens, took, loss)
                course.seconds = spent + pace.elapsed
                over = self._over(step, course)
                self._tell(step, pace)
                stalled = self._look(step, pace, last=over)
                course.seconds = spent + pace.elapsed
        if self.saved != trainer.steps_done:
            self._save(last=True)
        return not (over or stalled)

    def _look(self, step: int, pace: Pace, *, last: bool) -> bool:
        """Whatever is due after this step; returns whether the guards ask to stop."""
        training = self.training
        saves = _due(step, training.checkpoint_every)
        self._heldout_now = None
        # A checkpoint is measured too, so that the best one is known.
        if last or _due(step, training.evaluate_every) or (saves and training.evaluate_every is not None):
            self._evaluate(step)
        stalled = self._stalled(step)
        last = last or stalled
        if last or _due(step, training.log_every) or self._heldout_now is not None:
            self._log(step, pace)
        if last or _due(step, training.samples_every):
            self._sample(step)
        if (saves and not last) or self._owed == step:
            self._save(last=False)
        return stalled

    def _evaluate(self, step: int) -> None:
        if self.heldout is None:
            return
        trainer = self.trainer
        loss = self.heldout.loss(
            trainer.network,
            trainer.objective,
            batch=self.training.micro_batch or self.training.batch,
            seed=derived_seed(self.recipe.seed, "heldout"),
            world=self.world,
        )
        self._heldout_now = loss
        self.say(told.Evaluated(step, loss, self._bits(loss, self.heldout.tokens_per_byte)))

    def _stalled(self, step: int) -> bool:
        loss, course, limit = self._heldout_now, self.course, self.training.guards.stall
        if loss is None:
            return False
        if math.isfinite(loss) and (course.best_loss is None or loss < course.best_loss):
            course.best_loss, course.stale = loss, 0
            return False
        course.stale += 1
        if limit is not None and course.stale >= limit:
            self._warn(f"step {step}: {limit} evaluations without a better held-out loss, so training ends here")
            return True
        if course.stale == STALE:
            self._warn(f"step {step}: the held-out loss has not become better for {STALE} evaluations")
        return False

    def _log(self, step: int, pace: Pace) -> None:
        course, update = self.course, self.trainer.last
        assert update is not None
        total, count = course.window
        loss = total / count if count else math.nan
        line: dict[str, Any] = {"step": step, "loss": loss}
        if self.tokens_per_byte is not None:
            line["bits_per_byte"] = bits_per_byte(loss, self.tokens_per_byte)
        line |= {
            "learning_rate": update.rate,
            "grad_norm": update.grad_norm,
            "tokens": step * update.tokens,
            "tokens_per_second": round(pace.lap(), 1),
            "seconds": round(course.seconds, 3),
            "memory": _peak_memory(self.trainer.network.device),
        }
        line |= {name: value for name, value in update.metrics.items() if name not in ("nats", *line)}
        line |= self.trainer.observe()
        if course.skipped:
            line["skipped"] = course.skipped
        if self._heldout_now is not None and self.heldout is not None:
            line["heldout_loss"] = self._heldout_now
            bits = self._bits(self._heldout_now, self.heldout.tokens_per_byte)
            if bits is not None:
                line["heldout_bits_per_byte"] = bits
        course.window, course.skipped = [0.0, 0.0], 0
        if self.metrics is not None:
            self.metrics.add(line)
        if self.board is not None:
            self.board.add(line)

    def _sample(self, step: int) -> None:
        """Sample texts of a network that can continue one."""
        network, training, begin = self.trainer.network, self.training, self.tokenizer.begin
        if network.settings.form != "decoder" or not isinstance(network.head, LanguageModelHead):
            return
        begin = self.tokenizer.bos if begin is None else begin
        start = [] if begin is None else [begin]
        room = network.settings.context
        was_training = network.training
        network.eval()
        try:
            for number, prompt in enumerate(training.sample_prompts or ("",)):
                ids = [*start, *self.tokenizer.encode(prompt)][-(room - 1) :] or [0]
                count = min(training.sample_tokens, room - len(ids))
                asked = Sampling(max_new_tokens=max(1, count), seed=self.recipe.seed + number)
                try:
                    done = generate(network, self.tokenizer, [ids], asked)
                except GenerationError:  # no finite scores: the loss will say so
                    return
                if self.samples is not None:
                    self.samples.add({"step": step, "prompt": prompt, "text": done[0].text})
                if self.board is not None:
                    self.board.text(step, prompt, done[0].text)
                self.say(told.Sampled(step, prompt, done[0].text))
        finally:
            network.train(was_training)

    # -- saving

    def _save(self, *, last: bool) -> None:
        """Write a checkpoint. On a full disk training goes on and tries again; at the end it waits."""
        step, course, training = self.trainer.steps_done, self.course, self.training
        self._owed = None
        before = course.best_checkpoint
        loss = self._heldout_now
        if loss is not None and math.isfinite(loss) and (before is None or loss < before[0]):
            course.best_checkpoint = (loss, step)
        more = {
            "course": course.to_data(),
            "recipe": self.recipe.fingerprint,
            "data": self.corpus.fingerprint,
            "processes": self.world.size,
        }
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                path = self.checkpoints.save(self.trainer, self.tokenizer, self.recipe, more)
                break
            except ArmillaryError as error:
                if not disk_full(error):
                    raise
                if not last:
                    course.best_checkpoint = before
                    self._owed = step + max(1, (training.checkpoint_every or training.steps) // 10)
                    self._warn(
                        f"the disk is full: step {step} could not be saved; training goes on and "
                        f"tries again at step {self._owed}. {self._last_good()}"
                    )
                    return
                if self.world.agree(time.monotonic() > deadline):
                    raise TrainingError(
                        f"the disk is full: step {step} could not be saved",
                        where=str(self.folder),
                        hint=f"{self._last_good()}; free some space, then: armillary resume {self.folder}",
                    ) from error
                self._warn(f"the disk is full: step {step} waits to be saved until there is room")
                time.sleep(min(10.0, PATIENCE))
        self.saved = step

        def settle() -> None:
            best = None if course.best_checkpoint is None else course.best_checkpoint[1]
            self.checkpoints.thin(training.keep, best)
            if self.metrics is not None and self.samples is not None:
                self.metrics.flush()
                self.samples.flush()
            self._note("checkpoint", step=step, name=path.name, sha256=_seal(path), recipe=self.recipe.fingerprint)

        self.world.lead(settle)
        self.say(told.Saved(step, str(path)))

    def _last_good(self) -> str:
        return (
            "there is no checkpoint yet"
            if self.saved is None
            else f"the last good checkpoint is {self.folder / CHECKPOINTS / f'step-{self.saved:06d}'}"
        )

    def _failed(self, error: TrainingError) -> None:
        """Name the last good checkpoint in a fault that ends training."""
        if error.hint is None or ("last good" not in error.hint and "no checkpoint yet" not in error.hint):
            error.hint = "; ".join(part for part in (self._last_good(), error.hint) if part)
        with contextlib.suppress(ArmillaryError, OSError):
            self._note("failed", step=self.trainer.steps_done, why=error.what)

    # -- telling

    def say(self, event: told.Event) -> None:
        if self._progress is not None:
            self._progress(event)

    def _warn(self, text: str) -> None:
        if self._progress is not None:
            self._progress(told.Notice(text))
        elif self.world.first:
            logger.warning(text)

    def _note(self, event: str, **facts: Any) -> None:
        """A line of the ledger; one that finds no room is written with the next."""
        if self.ledger is None:
            return
        self._unwritten.append((event, facts))
        try:
            while self._unwritten:
                name, found = self._unwritten[0]
                self.ledger.add(name, **found)
                del self._unwritten[0]
        except ArmillaryError as error:
            if not disk_full(error):
                raise

    def _tell(self, step: int, pace: Pace) -> None:
        if self._progress is not None:
            limit, loss, steps = self.training.seconds, pace.loss, self._total(step)
            left = pace.left(step, steps) if limit is None else max(0.0, limit - self.course.updating)
            bits = None if self.tokens_per_byte is None else bits_per_byte(loss, self.tokens_per_byte)
            self._progress(told.Stepped(step, steps, loss, bits, pace.speed, left))

    def _bits(self, loss: float, tokens_per_byte: float) -> float | None:
        return None if self.tokens_per_byte is None else bits_per_byte(loss, tokens_per_byte)

    def _close(self) -> None:
        if self.board is not None:
            self.board.close()


def _promoted(inner: Path, place: Path) -> Corpus:
    """Put a corpus that was prepared beside an older one in its place; the older one goes."""
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(place, old)
    os.replace(old / inner.name, place)
    shutil.rmtree(old)
    return Corpus.open(place)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _tokens_per_byte(corpus: Corpus, recipe: Recipe) -> float:
    """Of the training text, its sources in the proportions in which they are drawn."""
    total = bytes_per_token = 0.0
    for source, wanted in zip(corpus.sources, recipe.data.sources, strict=True):
        if source.train.tokens:
            total += wanted.weight
            bytes_per_token += wanted.weight * int(source.train.document_bytes.sum()) / source.train.tokens
    return total / bytes_per_token


def _peak_memory(device: torch.device) -> int:
    """Most bytes held so far: on a GPU by tensors, else by the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _seal(path: Path) -> str:
    return hashlib.sha256((path / TRAINER).read_bytes()).hexdigest()
