"""The report of a run: one HTML file that needs no network, no library and no script to be read."""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from armillary.base.files import write_atomic
from armillary.evaluate.charts import Bar, Point, Series, bar_chart, line_chart, text
from armillary.evaluate.record import Line, Record
from armillary.evaluate.words import count, duration, short, size

REPORT = "report.html"
NAMES = {
    "python": "Python",
    "torch": "PyTorch",
    "armillary": "Armillary",
    "system": "system",
    "processor": "processor",
    "cores": "cores",
    "threads": "threads",
    "memory": "memory",
    "accelerator": "accelerator",
}


def write_report(folder: str | Path) -> Path:
    """Write report.html into a run folder from its recipe, metrics, evaluation and data; returns its path.

    What the folder lacks is left out. Raises InputError when there is nothing to report, DataError for
    a damaged file.
    """
    record = Record.read(folder)
    sections = [
        ("", _headline(record)),
        ("Training", _curves(record)),
        ("Samples", _samples(record)),
        ("Data", _data(record)),
        ("Evaluation", _evaluation(record)),
        ("Ledger", _events(record)),
        ("Environment", _environment(record)),
        ("Recipe", _recipe(record)),
        ("Fingerprints", _fingerprints(record)),
    ]
    path = record.folder / REPORT
    write_atomic(path, page(record.name, _subtitle(record), sections))
    return path


def page(
    name: str,
    subtitle: str,
    sections: Sequence[tuple[str, str]],
    *,
    style: str = "",
    footer: str = "Written by Armillary from the files of this run.",
) -> str:
    """A whole report: (title, content) of each section, content and subtitle being HTML, without those
    that are empty; style: CSS after our own. It fetches nothing, and only our script can run in it."""
    body = "".join(
        f"<section>{f'<h2>{title}</h2>' if title else ''}{content}</section>" for title, content in sections if content
    )
    files = importlib.resources.files("armillary.evaluate")
    style = files.joinpath("report.css").read_text(encoding="utf-8") + style
    script = files.joinpath("report.js").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # nothing is fetched and nothing but the script below can run, whatever a corpus or sample holds
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>{text(name)} · Armillary report</title><style>{style}</style></head><body><main>"
        f"<header><h1>{text(name)}</h1><p>{subtitle}</p></header>{body}"
        f"<footer>{text(footer)}</footer>"
        f"</main><script>{script}</script></body></html>\n"
    )


def number(data: Any, *keys: str) -> float | None:
    """A finite number inside plain data, or None."""
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    if isinstance(data, bool) or not isinstance(data, (int, float)) or not math.isfinite(data):
        return None
    return float(data)


def baselines_of(evaluation: Line | None) -> list[tuple[str, float]]:
    """(name, bits per byte) of the baselines of an evaluation."""
    rows = (evaluation or {}).get("baselines")
    found = []
    for row in rows if isinstance(rows, list) else []:
        value = number(row, "bits_per_byte")
        if value is not None:
            found.append((str(row.get("name", "baseline")), value))
    return found


def heldout_text(evaluation: Line) -> str:
    """What was scored, in a few words."""
    documents, amount = number(evaluation, "documents"), number(evaluation, "bytes")
    said = []
    if documents is not None:
        said.append(f"{documents:,.0f} held-out document{'' if documents == 1 else 's'}")
    if amount is not None:
        said.append(size(amount))
    return ", ".join(said)


def verdict(evaluation: Line | None) -> str:
    """The model against the best baseline that was measured, in one sentence; "" without both."""
    value, compared = number(evaluation, "bits_per_byte", "value"), baselines_of(evaluation)
    if value is None or not compared:
        return ""
    name, best = min(compared, key=lambda row: row[1])
    share = 100 * (1 - value / best)
    if abs(share) < 0.05:
        return f"As many bits as the best baseline ({name}, {best:.3f})."
    return f"{abs(share):.1f}% {'fewer' if share > 0 else 'more'} bits than the best baseline ({name}, {best:.3f})."


# -- sections


def _subtitle(record: Record) -> str:
    said = []
    if record.parameters is not None:
        said.append(f"{count(record.parameters)} parameters")
    if record.recipe is not None:
        said.append(f"{record.recipe.model.form.replace('_', '–')}, {record.recipe.model.depth} blocks")
    if record.trained_tokens:
        said.append(f"trained on {count(record.trained_tokens)} tokens")
    return text(" · ".join(said))


def _headline(record: Record) -> str:
    evaluation = record.evaluation
    value = number(evaluation, "bits_per_byte", "value")
    out = ""
    if evaluation is not None and value is not None:
        low, high = number(evaluation, "bits_per_byte", "low"), number(evaluation, "bits_per_byte", "high")
        level = number(evaluation, "bits_per_byte", "level") or 0.95
        sure = "from one document: no interval"
        if low is not None and high is not None:
            sure = f"{100 * level:.0f}% interval {low:.3f} to {high:.3f}"
        bars = [Bar("this model", value, low, high, ours=True)]
        bars += [Bar(name, bits) for name, bits in baselines_of(evaluation)]
        bars.sort(key=lambda bar: bar.value)
        compared = bar_chart(bars, "bits per byte") if len(bars) > 1 else ""
        out += (
            f'<div class="headline"><div><div class="figure">{value:.3f}</div>'
            '<p class="what">held-out bits per byte, lower is better</p>'
            f'<p class="soft">{text(sure)}</p><p class="soft">{text(heldout_text(evaluation))}</p>'
            f"<p>{text(verdict(evaluation))}</p></div>{compared}</div>"
        )
    tiles = [(name, shown) for name, shown in _figures(record) if shown]
    if tiles:
        inner = "".join(f'<div class="tile"><dt>{text(a)}</dt><dd>{text(b)}</dd></div>' for a, b in tiles)
        out += f'<dl class="tiles">{inner}</dl>'
    return out


def _figures(record: Record) -> list[tuple[str, str]]:
    evaluation = record.evaluation
    perplexity = number(evaluation, "perplexity", "value")
    speed, memory = record.last("tokens_per_second"), number(evaluation, "peak_memory")
    trained = record.last("memory")
    seconds, writing = record.last("seconds"), number(evaluation, "writing_speed")
    return [
        ("perplexity per token", short(perplexity) if perplexity is not None else ""),
        ("updates", f"{record.steps:,}" if record.steps is not None else ""),
        ("training tokens", count(record.trained_tokens) if record.trained_tokens else ""),
        ("training time", duration(seconds) if seconds else ""),
        ("training speed", f"{count(speed)} tokens/s" if speed else ""),
        ("generation speed", f"{count(writing)} tokens/s" if writing else ""),
        ("peak memory, training", size(trained) if trained else ""),
        ("peak memory, evaluation", size(memory) if memory else ""),
    ]


def _curves(record: Record) -> str:
    train = record.metrics
    levels = sorted(baselines_of(record.evaluation), key=lambda row: row[1])[:1]
    bits = [
        Series("training text, estimated", _points(train, "bits_per_byte")),
        Series("held-out text", _points(train, "heldout_bits_per_byte"), tone="b", dots=True),
    ]
    charts = [
        line_chart("Bits per byte", "over training steps; lower is better", bits, lines=levels, wide=True),
        line_chart("Loss", "nats per token", [Series("loss", _points(train, "loss"))]),
        line_chart("Learning rate", "", [Series("learning rate", _points(train, "learning_rate"))], from_zero=True),
        line_chart(
            "Throughput",
            "training tokens per second",
            [Series("tokens per second", _points(train, "tokens_per_second"))],
            from_zero=True,
            show=count,
        ),
        line_chart(
            "Gradient norm", "before clipping", [Series("gradient norm", _points(train, "grad_norm"))], from_zero=True
        ),
    ]
    drawn = "".join(charts)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def _points(lines: Iterable[Line], key: str) -> list[Point]:
    found = []
    for line in lines:
        step, value = number(line, "step"), number(line, key)
        if step is not None and value is not None:
            found.append((step, value))
    return found


def _samples(record: Record) -> str:
    samples = record.samples
    if not samples:
        return ""
    last = samples[-1].get("step")
    final = [line for line in samples if line.get("step") == last]
    earlier = [line for line in samples if line.get("step") != last]
    out = "".join(_sample(line) for line in final)
    if earlier:
        older = "".join(_sample(line) for line in reversed(earlier))
        out += f"<details><summary>{len(earlier)} earlier, the newest first</summary>{older}</details>"
    return out


def _sample(line: Line) -> str:
    prompt, written = str(line.get("prompt") or ""), str(line.get("text") or "")
    step = number(line, "step")
    label = f"<p>after {step:,.0f} updates</p>" if step is not None else ""
    return f'<div class="sample">{label}<pre><b>{text(prompt)}</b>{text(written)}</pre></div>'


def _data(record: Record) -> str:
    if not record.sources:
        return ""
    rows = []
    for source in record.sources:
        r = source.record
        held = f"{source.heldout:,}" + (f" ({size(source.heldout_bytes)})" if source.heldout_bytes is not None else "")
        rows.append([r.path, f"{r.documents:,}", size(r.bytes), count(source.tokens), held, f"{r.skipped:,}"])
    found = table(["source", "documents", "text", "tokens", "held out", "skipped"], rows)
    names = [name for source in record.sources for name in source.record.skipped_names]
    if names:
        items = "\n".join(names)
        found += f"<details><summary>what was skipped, and why</summary><pre>{text(items)}</pre></details>"
    return found


def _evaluation(record: Record) -> str:
    evaluation = record.evaluation
    if evaluation is None:
        return ""
    rows = []
    for label, key, show in (
        ("documents", "documents", lambda v: f"{v:,.0f}"),
        ("text", "bytes", size),
        ("predicted tokens", "tokens", lambda v: f"{v:,.0f}"),
        ("context", "context", lambda v: f"{v:,.0f} tokens"),
        ("scoring speed", "tokens_per_second", lambda v: f"{count(v)} tokens/s"),
        ("reading speed, batch 1", "reading_speed", lambda v: f"{count(v)} tokens/s"),
        ("writing speed, batch 1", "writing_speed", lambda v: f"{count(v)} tokens/s"),
        ("peak memory of the process", "peak_memory", size),
        ("time", "seconds", duration),
    ):
        value = number(evaluation, key)
        if value is not None:
            rows.append([label, show(value)])
    for label, key in (("precision", "precision"), ("device", "device"), ("text from", "data")):
        if evaluation.get(key):
            rows.append([label, str(evaluation[key])])
    note = ""
    if evaluation.get("truncated"):
        note = "<p>Only a part of the held-out documents, drawn at random, was scored.</p>"
    return note + table(["", ""], rows, head=False)


def _events(record: Record) -> str:
    rows = []
    for event in record.events:
        facts = ", ".join(
            f"{name} {value}"
            for name, value in event.items()
            if name not in ("event", "time", "previous", "environment") and isinstance(value, (str, int, float))
        )
        rows.append([str(event.get("time", "")), str(event.get("event", "")), facts])
    if not rows:
        return ""
    entries = table(["time", "event", "facts"], rows)
    return f"<details><summary>{len(rows)} entries of the ledger</summary>{entries}</details>"


def _environment(record: Record) -> str:
    columns = {"training": record.environment, "evaluation": (record.evaluation or {}).get("environment")}
    there = {name: data for name, data in columns.items() if isinstance(data, dict)}
    if not there:
        return ""
    keys = list(dict.fromkeys(key for data in there.values() for key in data))
    if len(there) == 2 and len({str(data) for data in there.values()}) == 1:
        there = {"training and evaluation": next(iter(there.values()))}
    rows = []
    for key in keys:
        shown = [data.get(key, "") for data in there.values()]
        rows.append([NAMES.get(key, key), *(size(v) if key == "memory" and v else str(v) for v in shown)])
    return table(["", *there], rows)


def _recipe(record: Record) -> str:
    if record.recipe is None:
        return ""
    return f"<details><summary>every setting of this run</summary><pre>{text(record.recipe.to_yaml())}</pre></details>"


def _fingerprints(record: Record) -> str:
    if not record.fingerprints:
        return ""
    rows = "".join(
        f"<tr><td>{text(name)}</td><td><code>{text(value)}</code></td></tr>"
        for name, value in record.fingerprints.items()
    )
    return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'


def table(names: Sequence[str], rows: Sequence[Sequence[str]], *, head: bool = True) -> str:
    """Columns of figures are set to the right."""
    figures = [head and i > 0 and all(row[i][:1].isdigit() or not row[i] for row in rows) for i in range(len(names))]

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="number">{text(v)}</{tag}>' if right else f"<{tag}>{text(v)}</{tag}>"
            for v, right in zip(values, figures, strict=True)
        )

    top = f"<thead><tr>{cells('th', names)}</tr></thead>" if head else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'
