"""From finished runs to figures: means, paired differences, fronts, and the question of equal loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from armillary.base.errors import DataError
from armillary.compare.plan import FEWEST_SEEDS, Plan
from armillary.compare.race import Race
from armillary.compare.skills import units
from armillary.compare.statistics import Spread, holm, spread
from armillary.compare.vary import Variant

MARGIN = 0.01  # of the reference's value, within which losses are equal
SENSITIVE = 0.02  # what half the width must cost, for equal losses to mean something
SIGNIFICANT = 0.05

# name of the axis → (key of a variant's figures, whether more is better)
FRONTS = {"training": ("training_seconds", False), "decoding": ("writing_speed", True), "state": ("state", False)}


def results(plan: Plan, race: Race) -> dict[str, Any]:
    """Everything that a report shows, as plain data; what is not measured yet is None."""
    scores = {(job.variant.name, job.seed): found for job in race.jobs if (found := race.scores(job)) is not None}
    failures = {(job.variant.name, job.seed): why for job in race.jobs if (why := race.failure(job)) is not None}
    sizes = _sizes(scores.values())
    probed = units(plan.probes, [v for v in plan.variants if v.role != "control"])
    probes = [done for unit in probed if (done := race.probe(unit)) is not None]
    settled = scores.keys() | failures.keys()
    finished = all((job.variant.name, job.seed) in settled for job in race.jobs) and len(probes) == len(probed)
    rows = [_variant(plan, race, variant, scores, failures, sizes) for variant in plan.variants]
    tested = [
        row for row in rows if row["role"] == "variant" and row["difference"] and row["difference"]["p"] is not None
    ]
    for row, p in zip(tested, holm([row["difference"]["p"] for row in tested]), strict=True):
        row["difference"]["p_holm"] = p
        row["difference"]["comparisons"] = len(tested)
    found = {
        "name": plan.name,
        "budget": {"amount": plan.budget.amount, "kind": plan.budget.kind, "text": str(plan.budget)},
        "meaning": plan.budget.meaning,
        "seeds": list(plan.seeds),
        "finished": finished,
        "runs": {"done": len(scores), "failed": len(failures), "all": len(race.jobs)},
        "reference": plan.reference.name,
        "documents": len(sizes) if sizes else None,
        "bytes": sum(sizes) if sizes else None,
        "corpus": plan.corpus,
        "variants": rows,
        "baseline": race.baseline(),
        "probes": probes,
        "fronts": {name: front(rows, key, more) for name, (key, more) in FRONTS.items()},
        "environment": next((s["environment"] for s in scores.values()), None),
    }
    found["equal_loss"] = equal_loss(found) if plan.equal_loss else None
    return found


def front(rows: Sequence[dict[str, Any]], key: str, more: bool) -> list[str]:
    """Names of the variants that no other beats in bits per byte and in `key` both (by point estimates)."""
    points = [
        (row["name"], row["bits_per_byte"]["value"], -row[key] if more else row[key])
        for row in rows
        if row["role"] != "control" and row["bits_per_byte"] and row.get(key) is not None
    ]
    return [
        name
        for name, bits, cost in points
        if not any(b <= bits and c <= cost and (b < bits or c < cost) for _, b, c in points)
    ]


def equal_loss(found: dict[str, Any]) -> dict[str, Any]:
    """The verdict for each variant: equal when at least 5 pairs are there, the interval of the difference
    lies inside ±1 % of the reference's value, and half the reference's width costs more than 2 % here."""
    rows = {row["name"]: row for row in found["variants"]}
    reference = rows[found["reference"]]
    value = reference["bits_per_byte"]["value"] if reference["bits_per_byte"] else None
    control = next(row for row in found["variants"] if row["role"] == "control")
    cost = control["difference"]
    sensitive = None
    if cost and cost["both"] and value:
        low, high = (end / value for end in cost["both"])
        sensitive = True if low > SENSITIVE else False if high <= SENSITIVE else None
        cost = {"value": cost["value"] / value, "low": low, "high": high}
    else:
        cost = None
    verdicts = {}
    for name, row in rows.items():
        if row["role"] != "variant":
            continue
        difference = row["difference"]
        enough = bool(difference) and difference["pairs"] >= FEWEST_SEEDS and not row["failed"]
        inside = None
        if enough and difference["both"] and value:
            low, high = (end / value for end in difference["both"])
            inside = True if low > -MARGIN and high < MARGIN else False if low >= MARGIN or high <= -MARGIN else None
            verdicts[name] = {"low": low, "high": high}
        shown = bool(inside and sensitive)
        verdicts[name] = verdicts.get(name, {}) | {"equal": shown, "inside": inside, "enough": enough}
    return {
        "margin": MARGIN,
        "sensitive_above": SENSITIVE,
        "half_width": cost,
        "sensitive": sensitive,
        "verdicts": verdicts,
    }


# -- one variant


def _variant(
    plan: Plan,
    race: Race,
    variant: Variant,
    scores: dict[tuple[str, int], dict[str, Any]],
    failures: dict[tuple[str, int], str],
    sizes: list[int],
) -> dict[str, Any]:
    mine = {seed: scores[variant.name, seed] for seed in plan.seeds if (variant.name, seed) in scores}
    base = {seed: scores[plan.reference.name, seed] for seed in plan.seeds if (plan.reference.name, seed) in scores}
    measures = race.measures(variant) or {}
    training = variant.recipe.training
    seconds = [run["seconds"] for run in mine.values()]
    steps = [run["steps"] for run in mine.values()] or ([training.steps] if training.seconds is None else [])
    tokens = None if not steps else sum(steps) / len(steps) * training.batch * training.context
    flops = measures.get("flops_per_token")
    pairs = [seed for seed in mine if seed in base and variant is not plan.reference]
    difference = None
    if pairs:
        nats = np.array([mine[s]["nats"] for s in pairs]) - np.array([base[s]["nats"] for s in pairs])
        found = spread(nats, sizes)
        difference = _data(found) | {
            "pairs": len(pairs),
            "p": found.p,
            "p_holm": None,
            "runs": {str(s): mine[s]["bits_per_byte"] - base[s]["bits_per_byte"] for s in pairs},
        }
    bits = None
    if mine:
        bits = _data(spread(np.array([run["nats"] for run in mine.values()]), sizes))
        bits["runs"] = {str(seed): run["bits_per_byte"] for seed, run in mine.items()}
    states = measures.get("state_bytes")
    return {
        "name": variant.name,
        "role": variant.role,
        "changes": {key: value for key, value in variant.changes},
        "folder": f"variants/{variant.folder}",
        "failed": {str(seed): why for (name, seed), why in failures.items() if name == variant.name},
        "bits_per_byte": bits,
        "difference": difference,
        "width": variant.recipe.model.width,
        "steps": steps,
        "tokens": tokens,
        "training_flops": None if not (tokens and flops) else 3 * flops * tokens,
        "training_seconds": sum(seconds) / len(seconds) if seconds else None,
        "training_speed": _mean([run["training_speed"] for run in mine.values()]),
        "training_speeds": [run["training_speed"] for run in mine.values()],
        "writing_speed": _mean([run["writing_speed"] for run in mine.values()]),
        "writing_speeds": [run["writing_speed"] for run in mine.values()],
        "parameters": measures.get("parameters"),
        "flops_per_token": flops,
        "training_bytes": measures.get("training_bytes"),
        "predicted_training_bytes": measures.get("predicted_training_bytes"),
        "state": _at(states, training.context),
        "state_bytes": states,
        "time": measures.get("time"),
        "mixer_time": measures.get("mixer_time"),
        "blocks": measures.get("blocks"),
        "precision": measures.get("precision"),
    }


def _data(found: Spread) -> dict[str, Any]:
    """The mean, and both ends of each interval or None."""
    ends = {
        name: None if interval.low is None or interval.high is None else [interval.low, interval.high]
        for name, interval in (("seeds", found.seeds), ("documents", found.documents), ("both", found.both))
    }
    return {"value": found.value, **ends}


def _sizes(scores: Any) -> list[int]:
    """Bytes of the documents; every run must have been measured on the same ones."""
    known = list(scores)
    if len({score["documents"] for score in known}) > 1:
        raise DataError("runs of this comparison were measured on different documents")
    return known[0]["sizes"] if known else []


def _at(states: list[list[int]] | None, length: int) -> int | None:
    """Bytes after the shortest measured text that is as long as a training sequence."""
    return next((held for at, held in states or [] if at >= length), None)


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
