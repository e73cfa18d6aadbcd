"""Runs: stopped and resumed they equal one that never stopped; faults lose nothing."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from armillary.base.errors import CheckpointError, DataError, InputError, SettingsError, TrainingError
from armillary.base.files import explained
from armillary.checkpoints.native import load_native
from armillary.recipe import Recipe
from armillary.train import Event, Ledger, Notice, Run, Sampled, Saved, Stepped, resume, session, train
from armillary.train import checkpoint as checkpoints
from armillary.train.ledger import verify
from armillary.train.metrics import read

Make = Callable[..., Recipe]
Same = Callable[[Run, Run], None]


class Watch:
    """Collects events, and does something when one of a kind arrives."""

    def __init__(self, kind: type[Event] | None = None, at: int = 1, do: Callable[[], None] | None = None) -> None:
        self.events: list[Any] = []
        self.kind, self.at, self.do = kind, at, do

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if self.do is not None and isinstance(event, self.kind or Event) and len(self.of(self.kind)) == self.at:
            self.do()

    def of(self, kind: Any) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def notices(self) -> str:
        return "\n".join(event.text for event in self.of(Notice))


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[:-5])
    elif how == "missing":
        path.unlink()
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def full_disk(*args: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# -- the plain way


def test_a_run_leaves_a_model_curves_samples_and_a_sealed_ledger(whole: Run) -> None:
    assert (whole.step, whole.stopped, whole.signal) == (12, False, None)
    assert [path.name for path in whole.checkpoints][-1] == "step-000012"
    lines = whole.metrics
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["tokens"] == line["step"] * 4 * 24 for line in lines)
    assert [line["step"] for line in lines if "heldout_bits_per_byte" in line] == [4, 8, 12]
    # bytes are the tokens here, with one boundary token to each document
    ratio = lines[-1]["bits_per_byte"] / (lines[-1]["loss"] / torch.log(torch.tensor(2.0)).item())
    assert 1 < ratio < 1.01
    assert [sample["step"] for sample in whole.samples] == [6, 12]
    events = [entry["event"] for entry in whole.ledger.events]
    assert events == ["created", "data", "started", "checkpoint", "checkpoint", "checkpoint", "finished"]
    assert verify(whole.folder / "ledger.jsonl") == len(events)
    loaded = load_native(whole.checkpoints[-1])
    assert loaded.recipe is not None and loaded.tokenizer is not None
    assert loaded.recipe.model.vocabulary == loaded.tokenizer.size
    assert whole.recipe.name == "tiny" and whole.report == whole.folder / "report.html"


def test_it_is_the_same_twice(whole: Run, recipe: Make, same: Same, tmp_path: Path) -> None:
    same(whole, train(recipe(), tmp_path / "run"))


@pytest.mark.parametrize("at", [1, 4, 7])
def test_stopping_and_going_on_changes_nothing(whole: Run, recipe: Make, same: Same, tmp_path: Path, at: int) -> None:
    first = train(recipe(), tmp_path / "run", stop_after=at)
    assert first.stopped and first.step == at and Run.open(tmp_path / "run").stopped
    second = resume(tmp_path / "run")
    assert not second.stopped
    if at % 4:  # the extra checkpoint takes the place of an older one
        assert (tmp_path / "run" / "checkpoints" / "step-000012").is_dir()
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (whole.checkpoints[-1] / name).read_bytes() == (second.checkpoints[-1] / name).read_bytes()
    same(whole, second)


def test_a_finished_run_has_nothing_left_to_do(recipe: Make, tmp_path: Path) -> None:
    train(recipe(steps=2), tmp_path)
    watch = Watch()
    again = resume(tmp_path, progress=watch)
    assert not again.stopped and again.step == 2 and "all 2 steps" in watch.notices


def test_a_run_may_be_made_longer(recipe: Make, tmp_path: Path) -> None:
    train(recipe(steps=4), tmp_path)
    longer = resume(tmp_path, "training.steps=6")
    assert longer.step == 6 and longer.recipe.training.steps == 6
    for override in ("training.batch=2", "model.width=32", "data.heldout=0.5"):
        with pytest.raises(InputError, match="goes on with its own data"):
            resume(tmp_path, override)


def test_the_masked_objective_trains_an_encoder(recipe: Make, tmp_path: Path) -> None:
    encoder = recipe(model={"form": "encoder"}, objective="masked", steps=4)
    done = train(encoder, tmp_path)
    assert "bits_per_byte" not in done.metrics[-1] and "heldout_loss" in done.metrics[-1]
    assert done.samples == []


def test_old_checkpoints_go_and_the_best_stays(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.4, 2.6])
    monkeypatch.setattr(session.HeldOut, "loss", lambda *args, **options: next(losses))
    done = train(recipe(checkpoint_every=2, evaluate_every=2, keep=2), tmp_path)
    assert [path.name for path in done.checkpoints] == ["step-000004", "step-000010", "step-000012"]


def test_training_ends_when_the_held_out_loss_does_not_fall(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.1, 9.0])
    monkeypatch.setattr(session.HeldOut, "loss", lambda *args, **options: next(losses))
    watch = Watch()
    done = train(recipe(evaluate_every=2, checkpoint_every=None, guards={"stall": 2}), tmp_path, progress=watch)
    assert done.step == 8 and not done.stopped
    assert "2 evaluations without a better held-out loss" in watch.notices
    assert [path.name for path in done.checkpoints] == ["step-000008"]


def test_tensorboard_gets_the_same_numbers(recipe: Make, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    done = train(recipe(steps=4, tensorboard=True), tmp_path)
    board = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in board.Scalars("loss")]
    assert found == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in done.metrics]


# -- refusals


def test_a_run_is_not_written_over(recipe: Make, tmp_path: Path) -> None:
    train(recipe(steps=2), tmp_path / "run")
    with pytest.raises(InputError, match="there is a run in this folder"):
        train(recipe(steps=2), tmp_path / "run")
    again = train(recipe(steps=3), tmp_path / "run", overwrite=True)
    assert again.step == 3 and [path.name for path in again.checkpoints] == ["step-000003"]
    assert [line["step"] for line in again.metrics] == [2, 3]


def test_other_folders_are_left_alone(recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="holds other things"):
            train(recipe(), tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    (tmp_path / "thesis.txt").unlink()
    for name in ("checkpoints", "recipe.yaml"):  # these alone do not make it ours
        (tmp_path / name).mkdir()
        with pytest.raises(InputError, match="holds other things"):
            train(recipe(), tmp_path, overwrite=True)
        (tmp_path / name).rmdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="this is a file"):
        train(recipe(), tmp_path / "file")
    for act in (resume, Run.open):
        with pytest.raises(InputError, match="not a run"):
            act(tmp_path)


def test_two_processes_do_not_train_one_run(recipe: Make, tmp_path: Path) -> None:
    def second() -> None:
        with pytest.raises(InputError, match="another process is training"):
            resume(tmp_path)

    train(recipe(steps=2), tmp_path, progress=Watch(Stepped, 1, second))


def test_an_unfinished_beginning_is_no_run(recipe: Make, tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger.jsonl").add("created")
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    done = train(recipe(steps=2), tmp_path)
    assert [path.name for path in done.checkpoints] == ["step-000002"] and len(done.ledger.events) == 5


def test_overwriting_with_other_data_leaves_one_corpus(recipe: Make, tmp_path: Path) -> None:
    train(recipe(steps=2), tmp_path)
    other = recipe(steps=2)
    done = train(other.derive(data=other.data.derive(heldout=0.4)), tmp_path, overwrite=True)
    assert list((tmp_path / "data").glob("*/manifest.json")) == []
    event = done.ledger.last("data")
    assert event is not None and event["folder"] == "data"
    assert resume(tmp_path, "training.steps=3").step == 3


def test_a_recipe_that_does_not_fit_is_refused(recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="smaller than the tokenizer's"):
        train(recipe(model={"vocabulary": 100}), tmp_path / "a")
    with pytest.raises(InputError, match="cannot be used"):
        train(recipe(device="cuda:7"), tmp_path / "b")
    plain = recipe()
    with pytest.raises(DataError, match="no sources"):
        train(plain.derive(data=plain.data.derive(sources=())), tmp_path / "c")


def test_too_little_held_out_text_is_told(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.HeldOut, "take", lambda *args, **options: None)
    watch = Watch()
    done = train(recipe(steps=2), tmp_path, progress=watch)
    assert "too little held-out text" in watch.notices
    assert all("heldout_loss" not in line for line in done.metrics)


# -- faults


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends(whole: Run, recipe: Make, same: Same, tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    done = train(recipe(), tmp_path, progress=Watch(Stepped, 5, lambda: os.kill(os.getpid(), number)))
    assert done.stopped and done.signal == number and done.step in (5, 6)
    assert signal.getsignal(number) is before
    assert done.checkpoints[-1].name == f"step-{done.step:06d}"
    same(whole, resume(tmp_path))


def test_a_nan_stops_with_the_last_good_checkpoint(whole: Run, recipe: Make, same: Same, tmp_path: Path) -> None:
    def spoil(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 6:
            with torch.no_grad():
                held[0].trainer.network.norm.weight.fill_(float("nan"))

    held: list[session.Session] = []
    begin = session.Session.__init__

    def spy(self: session.Session, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        held.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.Session, "__init__", spy)
        with pytest.raises(TrainingError) as caught:
            train(recipe(), tmp_path, progress=spoil)
    text = str(caught.value)
    assert "step 7: the loss is not finite" in text
    assert f"the last good checkpoint is {tmp_path / 'checkpoints' / 'step-000004'}" in text
    assert [path.name for path in Run.open(tmp_path).checkpoints] == ["step-000004"]
    assert all(
        torch.isfinite(t).all() for t in load_file(tmp_path / "checkpoints/step-000004/model.safetensors").values()
    )
    failed = Run.open(tmp_path).ledger.last("failed")
    assert failed is not None and failed["why"] == "the loss is not finite"
    same(whole, resume(tmp_path))


@pytest.mark.parametrize("how", ["truncated", "missing", "changed"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer.json", "tokenizer.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    whole: Run, recipe: Make, same: Same, tmp_path: Path, name: str, how: str
) -> None:
    train(recipe(), tmp_path, stop_after=8)
    damage(tmp_path / "checkpoints" / "step-000008" / name, how)
    watch = Watch()
    done = resume(tmp_path, progress=watch)
    assert name in watch.notices and "damaged-step-000008" in watch.notices
    resumed = done.ledger.last("resumed")
    assert resumed is not None and resumed["step"] == 4
    same(whole, done)


def test_no_whole_checkpoint_is_an_error_and_none_at_all_begins_anew(
    whole: Run, recipe: Make, same: Same, tmp_path: Path
) -> None:
    train(recipe(), tmp_path / "a", stop_after=3)
    damage(tmp_path / "a/checkpoints/step-000003/model.safetensors", "changed")
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        resume(tmp_path / "a")
    train(recipe(), tmp_path / "b", stop_after=3)
    (tmp_path / "b/checkpoints/step-000003").rename(tmp_path / "gone")
    same(whole, resume(tmp_path / "b"))


def test_a_full_disk_costs_a_checkpoint_but_not_the_run(
    whole: Run, recipe: Make, same: Same, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, watch = os.replace, Watch()
    seen: list[int] = []

    def sometimes(source: Any, target: Any) -> None:
        if Path(target).name == "step-000008" and not seen:
            seen.append(1)
            full_disk()
        real(source, target)

    monkeypatch.setattr(os, "replace", sometimes)
    done = train(recipe(), tmp_path, progress=watch)
    assert watch.notices.count("the disk is full: step 8 could not be saved") == 1
    assert "step-000004" in watch.notices
    assert [event.step for event in watch.of(Saved)] == [4, 9, 12]
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (whole.checkpoints[-1] / name).read_bytes() == (done.checkpoints[-1] / name).read_bytes()


def test_a_disk_that_stays_full_is_one_message_and_the_last_checkpoint_stays(
    whole: Run, recipe: Make, same: Same, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "PATIENCE", 0.0)

    def fill() -> None:
        monkeypatch.setattr(checkpoints, "save_file", full_disk)

    with pytest.raises(TrainingError) as caught:
        train(recipe(), tmp_path, progress=Watch(Saved, 1, fill))
    assert "the disk is full: step 12 could not be saved" in str(caught.value)
    assert "step-000004" in str(caught.value) and f"armillary resume {tmp_path}" in str(caught.value)
    monkeypatch.undo()
    same(whole, resume(tmp_path))


def test_metrics_wait_for_room(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real, closed = builtins.open, [True]

    def refusing(file: Any, *args: Any, **options: Any) -> Any:
        if Path(str(file)).name == "metrics.jsonl" and closed[0] and args[:1] == ("ab",):
            full_disk()
        return real(file, *args, **options)

    watch = Watch(Saved, 1, lambda: closed.clear() or closed.append(False))
    monkeypatch.setattr(builtins, "open", refusing)
    train(recipe(), tmp_path, progress=watch)
    assert watch.notices.count("metrics wait in memory") == 1
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [2, 4, 6, 8, 10, 12]


def test_the_ledger_waits_for_room(whole: Run, recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Ledger.add

    def refusing(self: Ledger, event: str, **facts: Any) -> None:
        if event == "checkpoint" and facts["step"] == 4 and not refused:
            refused.append(1)
            with explained("writing", self.path):
                full_disk()
        real(self, event, **facts)

    refused: list[int] = []
    monkeypatch.setattr(Ledger, "add", refusing)
    done = train(recipe(), tmp_path)
    names = [(entry["event"], entry.get("step")) for entry in done.ledger.events]
    assert refused and names == [(entry["event"], entry.get("step")) for entry in whole.ledger.events]


def test_a_missing_library_is_named(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SettingsError, match="armillary\\[tensorboard\\]"):
        train(recipe(tensorboard=True), tmp_path)


def test_samples_are_told_and_stored(recipe: Make, tmp_path: Path) -> None:
    watch = Watch()
    done = train(recipe(steps=2, samples_every=1, sample_prompts=["the dog", "Über"]), tmp_path, progress=watch)
    assert [(event.step, event.prompt) for event in watch.of(Sampled)] == [
        (step, prompt) for step in (1, 2) for prompt in ("the dog", "Über")
    ]
    assert [sample["text"] for sample in done.samples] == [event.text for event in watch.of(Sampled)]


def test_the_seal_covers_every_file(whole: Run) -> None:
    folder = whole.checkpoints[-1]
    named = set(json.loads((folder / "trainer.json").read_text())["files"])
    assert named | {"trainer.json"} == {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_a_run_may_end_by_the_clock(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    """Updates count, looks do not; the schedule follows the time, and a stopped run has the rest of it."""
    limit = 0.6
    wanted = recipe(steps=1000, seconds=limit, schedule={"kind": "wsd", "warmup": 0.0, "decay": 1.0}, log_every=1)
    first = train(wanted, tmp_path, stop_after=2)
    assert first.stopped and Run.open(tmp_path).stopped
    done = resume(tmp_path)
    assert not done.stopped and done.step > 2 and not Run.open(tmp_path).stopped
    info = json.loads((done.checkpoints[-1] / "trainer.json").read_text())
    assert limit <= info["course"]["updating"] < limit + 0.3
    rates = [line["learning_rate"] for line in done.metrics]
    assert rates == sorted(rates, reverse=True) and rates[0] == 1e-3 and rates[-1] < 5e-4
    again = resume(tmp_path)
    assert again.step == done.step and not again.stopped
