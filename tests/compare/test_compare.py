"""Whole comparisons: equal data, interruptions, changed settings, failures, and what is written."""

from __future__ import annotations

import json
import math
import os
import signal
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from armillary.base.errors import DataError, InputError, TrainingError
from armillary.compare import Comparison, Measured, Planned, Working, compare, race
from armillary.compare import run as runs
from armillary.compare.conclusion import conclusion
from armillary.compare.drawing import Curve, Row, Spot, curves, front, intervals, marker
from armillary.compare.results import equal_loss
from armillary.compare.results import front as on_front
from armillary.data.corpus import Corpus
from armillary.evaluate import evaluate
from armillary.evaluate.baselines import ByteNgram
from armillary.model import load
from armillary.recipe import Recipe
from armillary.train import Event, Stepped
from armillary.train.metrics import read

Make = Callable[..., Recipe]
VARY = ["model.block.mixer=retention"]


@pytest.fixture(scope="module")
def done(recipe: Make, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compare(recipe(), VARY, "3steps", seeds=2, folder=tmp_path_factory.mktemp("done") / "c")


def row(found: Comparison, name: str) -> dict[str, Any]:
    return next(row for row in found.data["variants"] if row["name"] == name)


def test_every_run_is_there_and_was_measured(done: Comparison) -> None:
    assert not done.stopped and done.data["finished"] and done.data["runs"] == {"done": 4, "failed": 0, "all": 4}
    for name in ("base", "retention"):
        for seed in (3, 4):
            folder = done.folder / "variants" / name / f"seed-{seed}"
            assert (folder / "report.html").is_file() and (folder / "data").resolve() == (
                done.folder / "data"
            ).resolve()
            value = evaluate(load(folder), folder).bits_per_byte.value
            assert row(done, name)["bits_per_byte"]["runs"][str(seed)] == pytest.approx(value, rel=1e-6)


def test_counting_stands_beside_the_models(done: Comparison) -> None:
    """A Kneser-Ney model of the same training text, on the same held-out documents."""
    corpus = Corpus.open(done.folder / "data")
    heldout = [
        corpus.tokenizer.decode(corpus.heldout.document(i).tolist()).encode() for i in range(len(corpus.heldout))
    ]
    train = [corpus.tokenizer.decode(corpus.train.document(i).tolist()).encode() for i in range(len(corpus.train))]
    expected = sum(map(ByteNgram(5).fit(train).bits, heldout)) / sum(map(len, heldout))
    baseline = done.data["baseline"]
    assert baseline == {"name": "byte 5-gram, modified Kneser-Ney", "bits_per_byte": pytest.approx(expected)}
    said = done.report.read_text(encoding="utf-8")
    assert baseline["name"] in said and f"{expected:.4f}" in said


def test_runs_of_one_seed_are_paired(done: Comparison) -> None:
    """The same documents, and the mean difference is the difference of the means."""
    base, other = row(done, "base"), row(done, "retention")
    difference = other["bits_per_byte"]["value"] - base["bits_per_byte"]["value"]
    assert other["difference"]["value"] == pytest.approx(difference)
    assert base["difference"] is None and other["difference"]["pairs"] == 2
    events = [json.loads(line) for line in (done.folder / "variants/base/seed-3/ledger.jsonl").read_text().splitlines()]
    twins = [
        json.loads(line) for line in (done.folder / "variants/retention/seed-3/ledger.jsonl").read_text().splitlines()
    ]
    prints = [next(e["fingerprint"] for e in found if e["event"] == "data") for found in (events, twins)]
    assert prints[0] == prints[1] == done.data["corpus"]
    # The first logged loss is of the same first batch, from other weights; tokens run alike.
    lines = [read(done.folder / f"variants/{name}/seed-3/metrics.jsonl") for name in ("base", "retention")]
    assert [line["tokens"] for line in lines[0]] == [line["tokens"] for line in lines[1]] == [96, 192, 288]


def test_cost_is_what_is_known_of_the_mechanisms(done: Comparison) -> None:
    base, other = row(done, "base"), row(done, "retention")
    for length, held in base["state_bytes"]:
        assert held == length * 2 * 16 * 4  # keys and values of one block in float32
    assert {held for _, held in other["state_bytes"]} == {4 * 4 * 8 * 4}  # heads · key · value, always
    assert base["training_flops"] == 3 * base["flops_per_token"] * 3 * 96
    assert base["time"]["exponent"]["value"] > 0 and base["writing_speed"] > 0
    assert base["training_bytes"] is None or base["training_bytes"] >= 0


def test_probes_show_what_a_mechanism_refuses(done: Comparison) -> None:
    held = {(tuple(p["variants"]), p["task"], p["pattern"]): p for p in done.data["probes"]}
    assert len(held) == 2 * 2 * 4
    for pattern in ("bidirectional-self", "causal-cross", "bidirectional-cross"):
        assert "accuracy" in held[("base",), "recall", pattern]
        assert "'retention' cannot" in held[("retention",), "recall", pattern]["refused"]
    assert 0 <= held[("retention",), "nesting", "causal-self"]["accuracy"]["value"] <= 1


class Page(HTMLParser):
    """Tags with attributes and text; every tag must be closed in order."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_report_says_it_all_and_fetches_nothing(done: Comparison) -> None:
    content = done.report.read_text(encoding="utf-8")
    page = Page(content)
    said = " ".join(page.texts)
    for part in (
        "Held-out bits per byte",
        "Against the reference",
        "Quality against cost",
        "Skills",
        "refused",
        "p (Holm)",
    ):
        assert part in said, part
    for sentence in done.conclusion:
        assert sentence in said
    assert f"{row(done, 'base')['bits_per_byte']['value']:.4f}" in said
    for _, attributes in page.tags:
        assert not {"src", "href", "onload", "onerror"} & set(attributes)
    assert "http://" not in content and "https://" not in content and "url(" not in content
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert done.data == json.loads((done.folder / "results.json").read_text())


def test_a_finished_comparison_is_not_done_again(done: Comparison, recipe: Make) -> None:
    seen: list[Event] = []
    before = {path: path.stat().st_mtime_ns for path in done.folder.rglob("scores.json")}
    again = compare(recipe(), VARY, "3steps", seeds=2, folder=done.folder, progress=seen.append)
    assert again.data == done.data
    assert not [event for event in seen if isinstance(event, Working)]
    assert {path: path.stat().st_mtime_ns for path in done.folder.rglob("scores.json")} == before


@pytest.mark.parametrize(
    "vary, budget, options, differs",
    [
        (VARY, "3steps", {"seeds": 3}, "seeds: [3, 4] → [3, 4, 5]"),
        (VARY, "4steps", {"seeds": 2}, "budget.amount: 3.0 → 4.0"),
        (["model.block.mixer=a:retention"], "3steps", {"seeds": 2}, "variants.a: not there → there"),
        (VARY, "3steps", {"seeds": 2, "probes": "none"}, "probes: quick → none"),
    ],
)
def test_other_settings_are_refused_with_what_differs(
    done: Comparison, recipe: Make, vary: list[str], budget: str, options: dict[str, Any], differs: str
) -> None:
    with pytest.raises(InputError) as found:
        compare(recipe(), vary, budget, folder=done.folder, **options)
    assert differs in str(found.value) and "--run" in str(found.value)


def test_a_foreign_folder_is_left_alone(recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="holds other things"):
        compare(recipe(), VARY, "2steps", seeds=1, folder=tmp_path, probes="none")
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_an_interrupted_comparison_goes_on_and_ends_alike(recipe: Make, tmp_path: Path, done: Comparison) -> None:
    """Stopped inside the second run by a signal; then all is as if it never was."""
    stopped_in: list[Event] = []

    def interrupt(event: Event) -> None:
        inside = isinstance(event, Working) and isinstance(event.inner, Stepped)
        if inside and (event.variant, event.seed, event.inner.step) == ("retention", 3, 2):  # type: ignore[attr-defined,union-attr]
            stopped_in.append(event)
            os.kill(os.getpid(), signal.SIGINT)

    first = compare(recipe(), VARY, "3steps", seeds=2, folder=tmp_path / "c", progress=interrupt)
    assert stopped_in and first.stopped and first.signal == signal.SIGINT and not first.data["finished"]
    assert first.conclusion[0].startswith("Unfinished: 1 of 4 runs")
    seen: list[Event] = []
    second = compare(recipe(), VARY, "3steps", seeds=2, folder=tmp_path / "c", progress=seen.append)
    planned = next(event for event in seen if isinstance(event, Planned))
    assert set(planned.done) == {("base", 3)}
    assert [(e.variant, e.seed) for e in seen if isinstance(e, Measured)] == [
        ("retention", 3),
        ("base", 4),
        ("retention", 4),
    ]
    for name in ("base", "retention"):
        assert row(second, name)["bits_per_byte"] == row(done, name)["bits_per_byte"]


def test_text_that_changed_is_refused(recipe: Make, tmp_path: Path, corpus: Path) -> None:
    mine = tmp_path / "text"
    mine.mkdir()
    for path in corpus.iterdir():
        (mine / path.name).write_bytes(path.read_bytes())
    base = recipe(f"data.sources=[{{path: {mine}}}]")
    options: dict[str, Any] = {"seeds": 1, "folder": tmp_path / "c", "probes": "none"}
    compare(base, ["model.width=8"], "1steps", **options)
    (mine / "more.txt").write_text("the dog sees more " * 30)
    with pytest.raises(DataError, match="changed since"):
        compare(base, ["model.width=8"], "1steps", **options)


def test_a_run_that_fails_does_not_end_the_others(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = race.train

    def failing(wanted: Recipe, folder: Path, **options: Any) -> Any:
        if wanted.model.width == 8 and wanted.seed == 4:
            raise TrainingError("the loss is not finite", where="step 2")
        return train(wanted, folder, **options)

    monkeypatch.setattr(race, "train", failing)
    found = compare(recipe(), {"model.width": [8, 24]}, "2steps", seeds=2, folder=tmp_path / "c", probes="none")
    assert found.data["finished"] and found.data["runs"] == {"done": 5, "failed": 1, "all": 6}
    assert "width=8 could not be trained with seed 4 (the loss is not finite)" in found.conclusion[0]
    assert "Failed runs" in found.report.read_text()


def test_one_seed_claims_nothing(recipe: Make, tmp_path: Path) -> None:
    found = compare(recipe(), ["model.width=8"], "2steps", seeds=1, folder=tmp_path / "c", probes="none")
    assert "nothing is claimed" in found.conclusion[0] and row(found, "width=8")["difference"]["both"] is None


def test_equal_time(recipe: Make, tmp_path: Path) -> None:
    found = compare(recipe(), ["model.width=8"], "0.3s", seeds=1, folder=tmp_path / "c", probes="none")
    for name in ("base", "width=8"):
        assert 0.3 <= row(found, name)["training_seconds"] < 1.5 and row(found, name)["steps"][0] > 1


# -- words and fronts, from figures made up for the purpose


def made_up(values: dict[str, list[float]], *, equal: bool = False, counted: float | None = None) -> dict[str, Any]:
    """Results in which every variant's runs have these bits per byte on forty equal documents."""
    sizes = [100] * 40
    wobble = 0.01 * np.random.default_rng(0).standard_normal(40)
    scores = {
        (name, seed): {
            "bits_per_byte": bits,
            "documents": "d",
            "nats": ((bits + wobble) * 100 * math.log(2)).tolist(),
            "sizes": sizes,
            "writing_speed": 10.0,
            "training_speed": 100.0,
            "steps": 5,
            "seconds": 1.0,
            "environment": {},
        }
        for name, runs in values.items()
        for seed, bits in enumerate(runs)
    }
    names = list(values)
    recipe = Recipe.load({"model": {"width": 16}})
    roles = {names[0]: "reference", "half width": "control"}
    found = [race.Variant(name, recipe, roles.get(name, "variant")) for name in names]  # type: ignore[arg-type]

    class Held:
        def __init__(self) -> None:
            self.jobs = [race.Job(v, seed) for v in found for seed in range(len(values[v.name]))]

        def scores(self, job: Any) -> Any:
            return scores[job.variant.name, job.seed]

        def failure(self, job: Any) -> None:
            return None

        def measures(self, variant: Any) -> None:
            return None

        def baseline(self) -> dict[str, Any] | None:
            return None if counted is None else {"name": "byte 5-gram", "bits_per_byte": counted}

    seeds = tuple(range(max(map(len, values.values()))))
    plan = runs.Plan("made up", runs.Budget(5, "steps"), seeds, tuple(found), "none", equal)
    data = runs.results(plan, Held())  # type: ignore[arg-type]
    return data


BASE = [2.000, 2.010, 1.990, 2.005, 1.995]


def shifted(by: float, wobble: float = 0.001) -> list[float]:
    return [value + by + wobble * (-1) ** i for i, value in enumerate(BASE)]


def test_a_clear_difference_is_called_one() -> None:
    said = conclusion(made_up({"base": BASE, "new": shifted(-0.1)}))[0]
    assert said.startswith("new is better than base by 0.09") and "bits per byte" in said and "of base's 1.99" in said
    assert "is worse than base by" in conclusion(made_up({"base": BASE, "new": shifted(0.1)}))[0]


def test_models_that_counting_beats_are_called_so() -> None:
    values = {"base": BASE, "new": shifted(-0.1)}
    assert conclusion(made_up(values, counted=1.5))[-1].startswith("None of them predicts the text better than a byte")
    for counted in (1.95, None):
        assert not any("None of them" in sentence for sentence in conclusion(made_up(values, counted=counted)))


def test_no_difference_is_bounded() -> None:
    said = conclusion(made_up({"base": BASE, "new": shifted(0.0, 0.02)}))[0]
    assert said.startswith("No difference between new and base could be shown") and "at most ±" in said


def test_several_comparisons_are_corrected() -> None:
    """A difference that passes alone, and not among many."""
    weak = [value + d for value, d in zip(BASE, (0.004, 0.012, 0.001, 0.009, 0.006), strict=True)]
    alone = conclusion(made_up({"base": BASE, "weak": weak}))[0]
    others = {f"o{i}": shifted(0.0, 0.02) for i in range(6)}
    among = conclusion(made_up({"base": BASE, "weak": weak, **others}))[0]
    assert "weak is worse" in alone
    assert "leaves 0 out, but not after correction" in among


@pytest.mark.parametrize(
    "new, half, said",
    [
        (shifted(0.002), shifted(0.1), "new has equal loss"),
        (shifted(0.002), shifted(0.005), "cannot be shown at this budget"),
        (shifted(0.002), shifted(0.04, 0.02), "it is not sure"),
        (shifted(0.1), shifted(0.1), "new does not have equal loss"),
        (shifted(0.0, 0.04), shifted(0.1), "Equal loss of new is not shown"),
        (shifted(0.002)[:4], shifted(0.1), "fewer than 5"),
    ],
)
def test_equal_loss_is_claimed_only_when_it_is_shown(new: list[float], half: list[float], said: str) -> None:
    data = made_up({"base": BASE, "new": new, "half width": half}, equal=True)
    assert any(said in sentence for sentence in conclusion(data)), conclusion(data)
    claimed = equal_loss(data)["verdicts"]["new"]["equal"]
    assert claimed == (said == "new has equal loss")


def test_a_front_holds_what_nothing_beats() -> None:
    def point(name: str, bits: float, cost: float) -> dict[str, Any]:
        return {"name": name, "role": "variant", "bits_per_byte": {"value": bits}, "cost": cost}

    rows = [point("a", 1.0, 9), point("b", 2.0, 3), point("c", 2.0, 4), point("d", 3.0, 1), point("e", 1.5, 10)]
    assert on_front(rows, "cost", False) == ["a", "b", "d"]
    assert on_front(rows, "cost", True) == ["a", "e"]


def test_drawings_are_whole_and_safe() -> None:
    hostile = "<script>alert(1)</script>\"'"
    drawn = [
        intervals("t", "u", [Row(hostile, 0, 1.0, (0.9, 1.2), [("over seeds", 0.95, 1.1)])], zero="base"),
        intervals("t", "u", [Row("one", 3, 1.0, None)], band=(-0.1, 0.1, "±1 %")),
        front(
            "t",
            "u",
            [Spot(hostile, 1, 1.0, 2.0, 1.9, 2.1), Spot("b", 2, 900.0, 1.0)],
            ["b"],
            x_is="x",
            y_is="y",
            rising=True,
            show=str,
        ),
        curves("t", "u", [Curve(hostile, 4, [(1, 1), (2, 4), (1000, 9)], "note")], x_is="x", show=str),
        curves("t", "u", [Curve("flat", 4, [(1, 5), (2, 5)])], x_is="x", show=str, logarithmic=False),
    ]
    for picture in drawn:
        assert "<script" not in picture
        for svg in ElementTree.fromstring(picture).iter("svg"):
            numbers = [float(v) for line in svg.iter("line") for v in (line.attrib["x1"], line.attrib["y1"])]
            width, height = map(float, svg.attrib["viewBox"].split()[2:])
            assert all(-1 <= value <= max(width, height) + 1 for value in numbers)
    assert front("t", "u", [Spot("a", 1, 1.0, 2.0)], [], x_is="x", y_is="y", rising=True, show=str) == ""
    shapes = {marker(tone, 0, 0).replace(f"v{tone % 8}", "") for tone in range(8)}
    assert len(shapes) == 8  # no two of the first eight variants look alike
