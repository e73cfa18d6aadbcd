"""Reports and cards: every figure of the run's files is there, nothing of the text can run, nothing is fetched."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from armillary.base.errors import DataError, InputError
from armillary.data.prepare import prepare
from armillary.data.settings import DataSettings, SourceSettings
from armillary.evaluate import environment, write_card, write_report
from armillary.evaluate.charts import Series, bar_chart, line_chart, thinned, ticks
from armillary.evaluate.record import Record
from armillary.evaluate.words import count, duration, short, size
from armillary.recipe import Recipe
from armillary.text.tokenizer import TokenizerSettings

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
EVALUATION = {
    "bits_per_byte": {"value": 1.612, "low": 1.571, "high": 1.655, "level": 0.95},
    "perplexity": {"value": 21.37, "low": 20.1, "high": 22.9, "level": 0.95},
    "documents": 41,
    "bytes": 812_345,
    "tokens": 251_000,
    "parameters": 4_321_987,
    "writing_speed": 412.0,
    "peak_memory": 912_000_000,
    "environment": {"processor": HOSTILE, "torch": "2.13.0"},
    "baselines": [
        {"name": "uniform", "bits_per_byte": 8.0, "seconds": 0.0},
        {"name": "byte 5-gram", "bits_per_byte": 2.043, "seconds": 3.0},
    ],
    "fingerprints": {"documents": "d" * 64},
}


def lines(steps: int = 50) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for step in range(10, steps * 10 + 1, 10):
        line = {"step": step, "loss": 9 / step**0.3, "bits_per_byte": 4 / step**0.2, "learning_rate": 1e-3}
        line |= {"grad_norm": 1.0, "tokens_per_second": 5321.0, "tokens": step * 4096, "seconds": step, "new": [1]}
        if step % 100 == 0:
            line["heldout_bits_per_byte"] = 4.1 / step**0.2
        found.append(line)
    return found


SAMPLES = [
    {"step": 250, "prompt": "early", "text": "an early sample"},
    {"step": 500, "prompt": "def ", "text": HOSTILE},
]
EVENTS = [
    {"event": "started", "time": "2026-01-01T00:00:00+00:00", "environment": environment(), "previous": "0"},
    {"event": "failed", "step": 77, "why": "a spike in the loss", "previous": "1"},
]


def write_metrics(folder: Path, rows: list[dict[str, object]], name: str = "metrics") -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder, source = tmp_path / "run", tmp_path / "so<b>urce"
    source.mkdir()
    for number in range(20):
        (source / f"{number}.txt").write_text(f"text number {number} says <script> " * 20)
    (source / "<i>.bin").write_bytes(b"\0")
    settings = DataSettings(sources=(SourceSettings(path=str(source)),), heldout=0.3, workers=1)
    prepare(settings, TokenizerSettings(kind="byte"), folder / "data")
    data = {"name": HOSTILE.replace("/", "|"), "model": {"width": 32, "depth": 2}, "training": {"steps": 500}}
    Recipe.load(data).save(folder / "recipe.yaml")
    write_metrics(folder, lines())
    write_metrics(folder, SAMPLES, "samples")
    write_metrics(folder, EVENTS, "ledger")
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    return folder


class Page(HTMLParser):
    """Tags with attributes, text, and whether every tag is closed in order."""

    VOID = ("meta", "br")

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_report_shows_what_was_measured(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    said = " ".join(page.texts)
    for figure in ("1.612", "1.571 to 1.655", "2.043", "8.000", "41 held-out documents", "21.1% fewer bits"):
        assert figure in said, figure
    for figure in ("4.32 M parameters", "2.05 M", "8 min 20 s", "5,321 tokens/s", "412 tokens/s", "912 MB"):
        assert figure in said, figure
    for part in ("Bits per byte", "Learning rate", "Throughput", "Gradient norm", "an early sample", "a spike in"):
        assert part in said, part
    assert "width: 32" in said and "binary (it holds NUL bytes)" in said and "d" * 64 in said
    assert [tag for tag, _ in page.tags].count("svg") == 5


def test_text_of_a_corpus_cannot_run_and_nothing_is_fetched(run: Path) -> None:
    content = write_report(run).read_text(encoding="utf-8")
    page = Page(content)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1 and "img" not in tags and "i" in tags
    assert HOSTILE in " ".join(page.texts)  # it is shown, as text
    for _, attributes in page.tags:
        assert not {"src", "href", "onerror", "onload"} & set(attributes)
    assert "http://" not in content and "https://" not in content and "url(" not in content and "@import" not in content
    card = write_card(run).read_text(encoding="utf-8")
    assert "<script" not in card and "<img" not in card and "&lt;" in card


def test_drawings_are_valid_and_readable_aloud(run: Path) -> None:
    content = write_report(run).read_text(encoding="utf-8")
    for drawing in re.findall(r"<svg.*?</svg>", content, flags=re.S):
        tree = ElementTree.fromstring(drawing)
        assert tree.findtext("title") and " goes from " in (tree.findtext("desc") or "")
        for path in tree.iter("path"):
            numbers = [float(n) for n in re.findall(r"-?[\d.]+", path.attrib["d"])]
            _, _, width, height = map(float, tree.attrib["viewBox"].split())
            assert all(0 <= x <= width for x in numbers[::2]) and all(0 <= y <= height for y in numbers[1::2])


def test_a_curve_goes_where_its_numbers_say() -> None:
    drawing = line_chart("t", "u", [Series("s", [(0, 2.0), (50, 4.0), (100, 3.0)])])
    points = [tuple(map(float, p.split(","))) for p in re.search(r'd="M([^"]+)"', drawing)[1].split("L")]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert (y0 - y2) == pytest.approx(y2 - y1, abs=0.2) and y1 < y2 < y0  # up is smaller in SVG
    assert line_chart("t", "u", [Series("s", [])]) == ""
    assert line_chart("t", "u", [Series("s", [(1, float("nan"))])]) == ""
    assert "circle" in line_chart("t", "u", [Series("one", [(5, 5.0)])])


def test_many_points_become_means() -> None:
    points = [(float(i), float(i % 2)) for i in range(10_000)]
    found = thinned(points, 100)
    assert len(found) == 100 and all(y == 0.5 for _, y in found)
    assert found[0][0] == 49.5
    assert ticks(0.0, 10.0) == [0, 2, 4, 6, 8, 10]
    assert ticks(1.62, 1.655)[:2] == [1.62, 1.63] or len(ticks(1.62, 1.655)) >= 3


def test_bars_are_as_long_as_their_values() -> None:
    from armillary.evaluate.charts import Bar

    drawn = bar_chart([Bar("a", 2.0, 1.5, 2.5, ours=True), Bar("b", 8.0)], "bits")
    assert re.findall(r'fill" style="width:([\d.]+)%', drawn) == ["25.00", "100.00"]
    assert "left:18.75%;width:12.50%" in drawn


def test_a_card_holds_measurements_only(run: Path) -> None:
    path = write_card(run)
    card = path.read_text(encoding="utf-8")
    for figure in ("4,321,987", "| **1.612** | 1.571 to 1.655 |", "2.043", "20.1", "500", "2,048,000", "8 min 20 s"):
        assert figure in card, figure
    assert "21.1% fewer bits" in card and "tokens per parameter" in card and "Not stated." in card
    recipe = Recipe.load(run / "recipe.yaml")
    assert f"- recipe: `{recipe.fingerprint}`" in card and "20 | " in card
    (run / "evaluation.json").unlink()
    card = write_card(run).read_text(encoding="utf-8")
    assert "Not evaluated." in card and "was not measured at all" in card and "1.612" not in card


def test_a_model_worse_than_a_baseline_is_said_to_be(run: Path) -> None:
    worse = EVALUATION | {"bits_per_byte": {"value": 2.5, "low": None, "high": None}, "documents": 1}
    (run / "evaluation.json").write_text(json.dumps(worse))
    card = write_card(run).read_text(encoding="utf-8")
    assert "does not beat the best baseline" in card and "22.4% more bits" in card
    assert "only 1 held-out documents" in card
    assert "no interval" in write_report(run).read_text(encoding="utf-8")


def test_what_a_folder_lacks_is_left_out(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"step": 1, "loss": 3.0}, {"step": 2, "loss": float("nan")}])
    said = " ".join(Page(write_report(tmp_path).read_text(encoding="utf-8")).texts)
    assert "Loss" in said and "Samples" not in said and "Recipe" not in said and "Data" not in said
    card = write_card(tmp_path).read_text(encoding="utf-8")
    assert "Not known" in card and "Not evaluated." in card


def test_parameters_are_counted_when_they_were_not_measured(run: Path) -> None:
    (run / "evaluation.json").unlink()
    from armillary.nn.network import build

    record = Record.read(run)
    settings = record.recipe.model.derive(vocabulary=262)  # 256 bytes and six special tokens
    assert record.parameters == sum(p.numel() for p in build(settings).parameters())


def test_weights_of_the_newest_checkpoint_are_fingerprinted(run: Path) -> None:
    import hashlib

    for name in ("step-1000", "step-999"):
        (run / "checkpoints" / name).mkdir(parents=True)
        (run / "checkpoints" / name / "model.safetensors").write_bytes(name.encode())
    found = Record.read(run).fingerprints
    assert found["checkpoints/step-1000/model.safetensors"] == hashlib.sha256(b"step-1000").hexdigest()
    assert "checkpoints/step-999/model.safetensors" not in found


def test_a_resumed_run_replaces_the_lines_it_did_again(tmp_path: Path) -> None:
    rows = [{"step": s, "loss": 1.0} for s in (1, 2, 3, 4)] + [{"step": s, "loss": 2.0} for s in (3, 4, 5)]
    write_metrics(tmp_path, rows)
    found = Record.read(tmp_path).metrics
    assert [(line["step"], line["loss"]) for line in found] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(InputError, match="not a run folder"):
        write_card(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    write_report(tmp_path)  # a last line cut off by a kill is no damage
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo\n{"step": 2, "loss": 2.0}\n')
    with pytest.raises(DataError) as caught:
        write_report(tmp_path)
    assert "metrics.jsonl, line 1" in str(caught.value)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("value", "written"), [(0, "0"), (9999, "9,999"), (12_345, "12.3 k"), (999_999, "1 M"), (1.5e9, "1.5 G")]
)
def test_counts(value: float, written: str) -> None:
    assert count(value) == written


def test_other_words() -> None:
    assert [size(v) for v in (12, 1234, 812_345, 2.5e9)] == ["12 bytes", "1.23 kB", "812 kB", "2.5 GB"]
    assert [duration(v) for v in (0.25, 12.34, 61, 7300)] == ["250 ms", "12.3 s", "1 min 1 s", "2 h 1 min"]
    assert [short(v) for v in (0, 1e-4, 2.5, 1234.5, 0.001)] == ["0", "1e-4", "2.5", "1,234", "0.001"]
