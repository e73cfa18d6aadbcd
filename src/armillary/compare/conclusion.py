"""What was found, in words that claim no more than the intervals allow."""

from __future__ import annotations

from typing import Any

from armillary.compare.results import SIGNIFICANT
from armillary.evaluate.words import size

DIGITS = 4
FEWEST_SPEEDS = 4  # runs of each; with fewer, one may be faster every time by chance (with 4: 1 in 35)


def conclusion(found: dict[str, Any]) -> list[str]:
    """Sentences, the most important first."""
    said = []
    if not found["finished"]:
        runs = found["runs"]
        if runs["done"] + runs["failed"] < runs["all"]:
            said.append(f"Unfinished: {runs['done']} of {runs['all']} runs are measured, so what follows may change.")
        else:
            said.append("Unfinished: not all skill probes are done yet.")
    rows = {row["name"]: row for row in found["variants"]}
    reference = rows[found["reference"]]
    others = [row for row in found["variants"] if row["role"] == "variant"]
    for row in others:
        said.append(_quality(row, reference))
    if found["equal_loss"]:
        said += _equal(found)
    for row in others:
        said += _speed(row, reference)
    return said + _counting(found)


def _counting(found: dict[str, Any]) -> list[str]:
    """A warning where counting alone does as well."""
    baseline, rows = found.get("baseline"), [row for row in found["variants"] if row["role"] != "control"]
    best = min((row["bits_per_byte"]["value"] for row in rows if row["bits_per_byte"]), default=None)
    if baseline is None or best is None or best < baseline["bits_per_byte"]:
        return []
    return [
        f"None of them predicts the text better than a {baseline['name']} model of it "
        f"({baseline['bits_per_byte']:.3f} bits per byte): at this budget they have not learnt what counting tells."
    ]


def _quality(row: dict[str, Any], reference: dict[str, Any]) -> str:
    name, base, d = row["name"], reference["name"], row["difference"]
    for one in (row, reference):
        if one["failed"]:
            seed, why = next(iter(one["failed"].items()))
            return f"{one['name']} could not be trained with seed {seed} ({why}), so nothing is claimed of {name}."
    if d is None:
        return f"{name} is not measured yet."
    value = reference["bits_per_byte"]["value"]
    if d["seeds"] is None:
        words = f"With one seed, {name} comes out {_than(d['value'], base, value)}"
        more = ""
        if d["documents"] is not None:
            more = f" (95 % over documents: {_range(d['documents'])})"
        return (
            f"{words}{more}. That tells these two trained models apart, not what was varied: "
            "another seed may turn it round, so nothing is claimed. Train at least 2 seeds, better 5."
        )
    if d["both"] is None:
        return (
            f"{name} comes out {_than(d['value'], base, value)} on the only held-out document. "
            "Other text may turn that round, so nothing is claimed."
        )
    low, high = d["both"]
    p, count = d["p_holm"], d.get("comparisons", 1)
    corrected = f", p = {_p(p)}" + (f" after Holm's correction for {count} comparisons" if count > 1 else "")
    most = max(abs(low), abs(high))
    share = 100 * most / value
    if p < SIGNIFICANT and (low > 0 or high < 0):
        word = "better" if high < 0 else "worse"
        a, b = sorted((abs(low), abs(high)))
        return (
            f"{name} is {word} than {base} by {a:.{DIGITS}f}–{b:.{DIGITS}f} bits per byte "
            f"(95 %{corrected}), which is {100 * a / value:.1f}–{100 * b / value:.1f} % of {base}'s {value:.3f}."
        )
    if low > 0 or high < 0:
        return (
            f"No difference between {name} and {base} could be shown: its own 95 % interval "
            f"({_range(d['both'])} bits per byte) leaves 0 out, but not after correction for several "
            f"comparisons{corrected}."
        )
    return (
        f"No difference between {name} and {base} could be shown{corrected}; if there is one, it is at most "
        f"±{most:.{DIGITS}f} bits per byte (95 %), {share:.1f} % of {base}'s {value:.3f}."
    )


def _equal(found: dict[str, Any]) -> list[str]:
    equal = found["equal_loss"]
    cost, margin = equal["half_width"], 100 * equal["margin"]
    said = []
    if cost is None:
        said.append("Equal loss: the half-width control is not measured, so nothing can be said.")
    else:
        ends = f"{100 * cost['low']:+.1f} to {100 * cost['high']:+.1f} % (95 %)"
        if equal["sensitive"]:
            said.append(
                f"Equal loss: halving the reference's width costs {ends}, so losses of capacity show at this budget."
            )
        elif equal["sensitive"] is None:
            said.append(
                f"Equal loss cannot be shown: halving the reference's width costs {ends}, and it is not sure that this "
                "is more than 2 %. Train more seeds or longer."
            )
        else:
            said.append(
                f"Equal loss cannot be shown at this budget: even half the reference's width costs only {ends}. "
                "Train longer, or with smaller models."
            )
    for name, verdict in equal["verdicts"].items():
        if not verdict["enough"]:
            said.append(f"Equal loss of {name}: fewer than 5 finished pairs of runs, so nothing can be said.")
            continue
        ends = f"{100 * verdict['low']:+.2f} to {100 * verdict['high']:+.2f} %"
        where = f"the 95 % interval of the difference, {ends} of the reference,"
        if verdict["equal"]:
            said.append(f"{name} has equal loss: {where} lies inside ±{margin:g} %.")
        elif verdict["inside"]:
            said.append(f"{name}: {where} lies inside ±{margin:g} %, but at a budget that cannot tell losses apart.")
        elif verdict["inside"] is False:
            said.append(f"{name} does not have equal loss: {where} lies outside ±{margin:g} %.")
        else:
            said.append(f"Equal loss of {name} is not shown: {where} reaches beyond ±{margin:g} %.")
    return said


def _speed(row: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """Speeds where every run of one was faster than every run of the other; sizes, which do not vary."""
    said = []
    for key, what in (("training_speeds", "trains"), ("writing_speeds", "decodes")):
        mine, theirs = ([v for v in one[key] if v] for one in (row, reference))
        if min(len(mine), len(theirs)) < FEWEST_SPEEDS:
            continue
        if min(mine) > max(theirs) or max(mine) < min(theirs):
            word = "faster" if min(mine) > max(theirs) else "slower"
            said.append(
                f"{row['name']} {what} {word} than {reference['name']} in every run: "
                f"{min(mine):,.0f}–{max(mine):,.0f} against {min(theirs):,.0f}–{max(theirs):,.0f} tokens/s."
            )
    a, b = row["state_bytes"], reference["state_bytes"]
    if a and b and a[-1][1] != b[-1][1]:
        said.append(
            f"After {a[-1][0]:,} tokens the state of {row['name']} takes {size(a[-1][1])} a row, "
            f"that of {reference['name']} {size(b[-1][1])}."
        )
    return said


def _than(value: float, base: str, whole: float) -> str:
    word = "better" if value < 0 else "worse"
    return f"{abs(value):.{DIGITS}f} bits per byte ({100 * abs(value) / whole:.1f} %) {word} than {base}"


def _range(ends: list[float]) -> str:
    return f"{ends[0]:+.{DIGITS}f} to {ends[1]:+.{DIGITS}f}"


def _p(value: float) -> str:
    return "below 0.0001" if value < 1e-4 else f"{value:.2g}"
