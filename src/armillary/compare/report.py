"""The report of a comparison: one HTML file that can be read offline, without a script, by anyone."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from armillary.base.files import write_atomic
from armillary.compare.conclusion import conclusion
from armillary.compare.drawing import Curve, Row, Spot, curves, front, intervals, keys
from armillary.compare.plan import Plan
from armillary.compare.skills import PATTERNS
from armillary.evaluate.charts import text
from armillary.evaluate.environment import environment
from armillary.evaluate.report import NAMES, page, table
from armillary.evaluate.words import count, duration, short, size
from armillary.train.metrics import read

REPORT = "report.html"
Found = dict[str, Any]


def write_report(found: Found, plan: Plan, folder: Path) -> Path:
    """Write report.html from the results of a comparison; what is not measured yet is left out."""
    style = importlib.resources.files("armillary.compare").joinpath("compare.css").read_text(encoding="utf-8")
    tones = {row["name"]: number for number, row in enumerate(found["variants"])}
    sections = [
        ("", _verdict(found)),
        ("Held-out bits per byte", _quality(found, tones)),
        ("Against the reference", _differences(found, tones)),
        ("Quality against cost", _fronts(found, tones)),
        ("Cost", _costs(found)),
        ("By length", _lengths(found, tones)),
        ("Learning", _learning(found, plan, folder, tones)),
        ("Skills", _skills(found)),
        ("Variants", _variants(found)),
        ("How it was done", _method(found)),
    ]
    number = sum(row["role"] != "control" for row in found["variants"])
    names = f"{number} variants · {len(found['seeds'])} seed{'' if len(found['seeds']) == 1 else 's'} each"
    subtitle = text(f"{names} · {found['budget']['text']} each")
    path = folder / REPORT
    footer = "Written by Armillary from the runs of this comparison."
    write_atomic(path, page(f"Comparison: {found['name']}", subtitle, sections, style=style, footer=footer))
    return path


def _verdict(found: Found) -> str:
    said = conclusion(found)
    items = []
    for number, sentence in enumerate(said):
        warn = sentence.startswith(("Unfinished", "Equal loss cannot"))
        kind = "warn" if warn else "first" if number == int(not found["finished"]) else ""
        items.append(f'<li class="{kind}">{text(sentence)}</li>' if kind else f"<li>{text(sentence)}</li>")
    return f'<div class="verdict"><ul>{"".join(items)}</ul></div>'


def _rows(found: Found, key: str) -> list[Found]:
    return [row for row in found["variants"] if row[key]]


def _quality(found: Found, tones: dict[str, int]) -> str:
    rows = _rows(found, "bits_per_byte")
    drawn = []
    for row in sorted(rows, key=lambda row: float(row["bits_per_byte"]["value"])):
        b = row["bits_per_byte"]
        spread = f" ± {(b['both'][1] - b['both'][0]) / 2:.4f}" if b["both"] else ""
        thin = [(f"over {name}", *b[name]) for name in ("seeds", "documents") if b[name]]
        wide = tuple(b["both"]) if b["both"] else None
        drawn.append(Row(row["name"], tones[row["name"]], b["value"], wide, thin, f"{b['value']:.4f}{spread}"))
    picture = intervals("Bits per byte", "on held-out text; less is better", drawn, show=lambda v: f"{v:.3f}")
    columns = ["variant", "mean", "95 % over seeds", "95 % over documents", "95 % over both", "each seed"]
    lines = [
        [
            row["name"],
            f"{row['bits_per_byte']['value']:.4f}",
            *(_ends(row["bits_per_byte"][name], ".4f") for name in ("seeds", "documents", "both")),
            ", ".join(f"{value:.4f}" for value in row["bits_per_byte"]["runs"].values()),
        ]
        for row in rows
    ]
    if not rows:
        return ""
    if found["baseline"]:
        count_alone = "counts of all the training text, read once"
        lines.append([found["baseline"]["name"], f"{found['baseline']['bits_per_byte']:.4f}", "", "", "", count_alone])
    note = (
        "Thick bars are over seeds and documents together; the thin lines below them are over seeds alone (upper) "
        "and over documents alone (dotted). Much of what documents and seeds have in common drops out of the paired "
        "differences below, so overlapping bars here do not mean that there is no difference."
    )
    return f'<div class="charts">{picture}</div><p class="soft">{note}</p>{table(columns, lines)}'


def _differences(found: Found, tones: dict[str, int]) -> str:
    rows = _rows(found, "difference")
    if not rows:
        return ""
    reference = next(row for row in found["variants"] if row["name"] == found["reference"])
    value = reference["bits_per_byte"]["value"]
    drawn, lines = [], []
    for row in rows:
        d = row["difference"]
        thin = [(f"over {name}", *d[name]) for name in ("seeds", "documents") if d[name]]
        said = f"{d['value']:+.4f} ({100 * d['value'] / value:+.2f} %)"
        drawn.append(
            Row(row["name"], tones[row["name"]], d["value"], tuple(d["both"]) if d["both"] else None, thin, said)
        )
        lines.append(
            [
                row["name"] + (" (control)" if row["role"] == "control" else ""),
                said,
                *(_ends(d[name], "+.4f") for name in ("seeds", "documents", "both")),
                "" if d["p"] is None else _p(d["p"]),
                "" if d["p_holm"] is None else _p(d["p_holm"]),
                str(d["pairs"]),
            ]
        )
    equal = found["equal_loss"]
    band = None
    if equal:
        band = (-equal["margin"] * value, equal["margin"] * value, f"±{100 * equal['margin']:g} %")
    picture = intervals(
        "Difference in bits per byte",
        f"paired by seed and document; left of the line is better than {found['reference']}",
        drawn,
        zero=found["reference"],
        band=band,
        show=lambda v: f"{v:+.3f}",
    )
    columns = [
        "variant",
        "difference",
        "95 % over seeds",
        "95 % over documents",
        "95 % over both",
        "p",
        "p (Holm)",
        "pairs",
    ]
    return f'<div class="charts">{picture}</div>{table(columns, lines)}'


def _fronts(found: Found, tones: dict[str, int]) -> str:
    axes: list[tuple[str, str, str, str, bool, Callable[[float], str]]] = [
        ("training", "Training time", "training_seconds", "seconds in updates", False, duration),
        ("decoding", "Decoding speed", "writing_speed", "tokens/s, one row", True, count),
        ("state", "State", "state", "bytes a row after a training sequence", False, size),
    ]
    drawn = ""
    for name, title, key, what, rising, show in axes:
        spots = []
        for row in found["variants"]:
            b = row["bits_per_byte"]
            if b and row[key] is not None:
                low, high = b["both"] or (None, None)
                spots.append(Spot(row["name"], tones[row["name"]], row[key], b["value"], low, high))
        best = found["fronts"][name]
        drawn += front(
            title, "against bits per byte", spots, best, x_is=what, y_is="bits per byte", rising=rising, show=show
        )
    if not drawn:
        return ""
    best = "; ".join(
        f"{title.lower()}: {', '.join(found['fronts'][name])}" for name, title, *_ in axes if found["fronts"][name]
    )
    note = (
        "The dashed line is the Pareto front: nothing measured is better in both. It goes by the means; the bars are "
        f"95 % intervals over seeds and documents, within which the order may be another. On the front: {best}."
    )
    return f'<p>{text(note)}</p><div class="charts pairs">{drawn}</div>'


def _costs(found: Found) -> str:
    columns = [
        "variant",
        "parameters",
        "FLOPs per token",
        "updates",
        "training FLOPs",
        "training time",
        "training tokens/s",
        "decoding tokens/s",
        "training memory",
        "state",
    ]
    lines = []
    for row in found["variants"]:
        steps = sorted(set(row["steps"]))
        updates = "" if not steps else f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,}–{steps[-1]:,}"
        memory = row["training_bytes"]
        lines.append(
            [
                row["name"],
                _shown(row["parameters"], count),
                _shown(row["flops_per_token"], count),
                updates,
                _shown(row["training_flops"], count),
                _shown(row["training_seconds"], duration),
                _spread(row["training_speeds"]),
                _spread(row["writing_speeds"]),
                size(memory)
                if memory is not None
                else _shown(row["predicted_training_bytes"], lambda v: f"{size(v)} predicted"),
                _shown(row["state"], size),
            ]
        )
    note = (
        "FLOPs are the declared ones of a forward pass; training counts three of them. Speeds are means over the "
        "seeds, with the slowest and fastest run. Training memory is what two updates add to the process, state "
        "the bytes of one row after as many tokens as a training sequence has."
    )
    return f'<p class="soft">{note}</p>{table(columns, lines)}'


def _lengths(found: Found, tones: dict[str, int]) -> str:
    shown = [row for row in found["variants"] if row["role"] != "control"]
    states = [
        Curve(row["name"], tones[row["name"]], [tuple(point) for point in row["state_bytes"]])
        for row in shown
        if row["state_bytes"]
    ]
    drawn = curves("State", "bytes of one row, measured", states, x_is="tokens so far", show=size)
    for key, title in (("mixer_time", "Time of the token mixers"), ("time", "Time of the whole model")):
        lines = []
        for row in shown:
            if row[key]:
                note = f"exponent {_exponent(row[key]['exponent'])}"
                lines.append(
                    Curve(row["name"], tones[row["name"]], [tuple(point) for point in row[key]["points"]], note)
                )
        drawn += curves(title, "one row, forward and backward", lines, x_is="tokens in the row", show=_time)
    if not drawn:
        return ""
    note = (
        "Both axes are logarithmic. The exponent is the slope: 1 grows with the length, 2 with its square; its 95 % "
        "interval is that of a straight line through these lengths, and says nothing of longer ones."
    )
    return f'<p class="soft">{note}</p><div class="charts pairs">{drawn}</div>'


def _learning(found: Found, plan: Plan, folder: Path, tones: dict[str, int]) -> str:
    """Mean training loss over the seeds at every logged step that all of them have."""
    bits: list[Curve] = []
    held: list[Curve] = []
    for variant in plan.variants:
        runs = [read(folder / "variants" / variant.folder / f"seed-{seed}" / "metrics.jsonl") for seed in plan.seeds]
        runs = [run for run in runs if run]
        if not runs:
            continue
        for key, into in (("bits_per_byte", bits), ("heldout_bits_per_byte", held)):
            points = _averaged(runs, key)
            into.append(Curve(variant.name, tones[variant.name], points))
    drawn = "".join(
        curves(title, unit, lines, x_is="training tokens", show=short, logarithmic=False)
        for title, unit, lines in (
            ("Training text", "bits per byte, estimated, mean over seeds", bits),
            ("Held-out text", "bits per byte, a fixed part of it, mean over seeds", held),
        )
    )
    return f'<div class="charts pairs">{drawn}</div>' if drawn else ""


def _averaged(runs: Sequence[Sequence[Found]], key: str) -> list[tuple[float, float]]:
    values: dict[float, list[float]] = {}
    for run in runs:
        for line in run:
            if line.get(key) is not None and line.get("tokens") is not None:
                values.setdefault(line["tokens"], []).append(line[key])
    return [(tokens, sum(v) / len(v)) for tokens, v in sorted(values.items()) if len(v) == len(runs)]


def _skills(found: Found) -> str:
    probes = found["probes"]
    if not probes:
        return ""
    tasks = list(dict.fromkeys(probe["task"] for probe in probes))
    titles = {probe["task"]: (probe["title"], probe["chance"], probe["source"]) for probe in probes}
    held = {(name, p["task"], p["pattern"]): p for p in probes for name in p["variants"]}
    names = [row["name"] for row in found["variants"] if row["role"] != "control"]
    head = "".join(
        f'<th title="{text(titles[t][2])}">{text(titles[t][0])}<br><small>chance {titles[t][1]:.0%}</small></th>'
        for t in tasks
    )
    body = ""
    for pattern, said in PATTERNS.items():
        body += f'<tr><th class="side" colspan="{len(tasks) + 1}">{text(said)}</th></tr>'
        for name in names:
            cells = "".join(_cell(held.get((name, task, pattern))) for task in tasks)
            body += f'<tr><td class="side">{text(name)}</td>{cells}</tr>'
    level = probes[0]["level"]
    most = next((p["most_updates"] for p in probes if "most_updates" in p), 0)
    over = next((p["over"] for p in probes if "over" in p), "test texts")
    note = (
        "Tiny models of each variant's mixers (two blocks, width 64 where it divides) learn tasks whose texts are "
        f"made on the fly; accuracy on new texts with its 95 % interval over {over}. In “both ways” the questions "
        "stand before the text, so that looking ahead is needed; in “cross” they look at it through an encoder that "
        "is plain attention for everyone. “At chance” means that the interval reaches down to chance. A probe ends "
        f"once it is solved; one that fails may succeed with more updates than the {most:,} of these {level} probes."
    )
    sources = [[titles[t][0], titles[t][2]] for t in tasks]
    return (
        f'<p class="soft">{note}</p><div class="scroll"><table class="matrix"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div><details><summary>where the tasks come from</summary>"
        f"{table(['task', 'source'], sources)}</details>"
    )


def _cell(probe: Found | None) -> str:
    if probe is None:
        return "<td></td>"
    if "refused" in probe:
        return f'<td class="refused" title="{text(probe["refused"])}">refused</td>'
    a, chance = probe["accuracy"], probe["chance"]
    strength = max(0.0, (a["value"] - chance) / (1 - chance))
    ends = "" if a["low"] is None else f"{100 * a['low']:.0f}–{100 * a['high']:.0f}"
    lucky = a["low"] is not None and a["low"] <= chance
    return (
        f'<td style="background:rgba(var(--shade),{0.42 * strength:.2f})" title="{probe["updates"]} updates">'
        f"{100 * a['value']:.0f} %<small>{'at chance' if lucky else ends}</small></td>"
    )


def _variants(found: Found) -> str:
    lines = []
    for row in found["variants"]:
        changed = ", ".join(f"{key} = {value}" for key, value in row["changes"].items()) or "as in the recipe"
        blocks = row["blocks"] or []
        lines.append(
            [row["name"], row["role"], changed, str(row["width"]), " · ".join(dict.fromkeys(blocks)), row["folder"]]
        )
    signs = keys([(row["name"], number, "") for number, row in enumerate(found["variants"])])
    failed = [f"{row['name']}, seed {seed}: {why}" for row in found["variants"] for seed, why in row["failed"].items()]
    lost = f"<p><b>Failed runs.</b> {text('; '.join(failed))}</p>" if failed else ""
    return signs + lost + table(["variant", "role", "what differs", "width", "blocks", "runs in"], lines)


def _method(found: Found) -> str:
    seeds = ", ".join(map(str, found["seeds"]))
    documents = ""
    if found["documents"]:
        documents = f"on {found['documents']:,} held-out documents ({size(found['bytes'])}), the same for all. "
    said = [
        f"Budget: {found['budget']['text']}. {found['meaning'].capitalize()}.",
        f"Seeds {seeds}: one run of every variant for each, with the same text, tokenizer and order of batches, "
        "trained seed by seed.",
        f"Quality is measured {documents}Intervals over seeds are Student's t; over documents, the percentile "
        "bootstrap of the seeds' mean; over both, their half-widths are added as squares (Zou & Donner). Differences "
        "are taken run by run and document by document before. Only differences that hold over both, after Holm's "
        "correction, are called so.",
    ]
    paragraphs = "".join(f"<p>{text(sentence)}</p>" for sentence in said)
    data = found["environment"] or environment()
    rows = [[NAMES.get(key, key), size(v) if key == "memory" and v else str(v)] for key, v in data.items()]
    rows.append(["text", found["corpus"]])
    return paragraphs + f"<details><summary>where it ran</summary>{table(['', ''], rows, head=False)}</details>"


# -- words


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} µs" if seconds < 9.5e-4 else duration(seconds)


def _ends(ends: Sequence[float] | None, form: str) -> str:
    return "not varied" if ends is None else f"{ends[0]:{form}} to {ends[1]:{form}}"


def _exponent(e: Found) -> str:
    return f"{e['value']:.2f}" if e["low"] is None else f"{e['value']:.2f} [{e['low']:.2f}, {e['high']:.2f}]"


def _spread(values: Sequence[float | None]) -> str:
    there = [value for value in values if value]
    if not there:
        return ""
    mean = count(sum(there) / len(there))
    return mean if len(there) == 1 else f"{mean} ({count(min(there))}–{count(max(there))})"


def _shown(value: float | None, show: Callable[[float], str]) -> str:
    return "" if value is None else show(value)


def _p(value: float) -> str:
    return "<0.0001" if value < 1e-4 else f"{value:.4f}"
