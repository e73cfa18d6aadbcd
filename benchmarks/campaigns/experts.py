"""Eight experts, two a token, against dense models: at equal tokens less loss than equal active size and at least
half of the gap to equal total size closed; at equal training time less loss than equal total size; experts
evenly used, layer by layer, on held-out text.

Equal time: the dense model of equal total size makes as many updates as fit into the time that the
experts' updates take, measured side by side in this run; its schedule ends there.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

from paired import Budget, Campaign, begin

import common
from armillary.compare.statistics import percent_apart

EXPERTS, TOP = 8, 2


def arms(campaign: Campaign) -> dict[str, dict[str, Any]]:
    hidden = -(-8 * campaign.budget.width // (3 * 32)) * 32
    mixer = campaign.model()["block"]["mixer"]

    def model(channel: dict[str, Any]) -> dict[str, Any]:
        return campaign.model(block={"mixer": mixer, "channel": channel})

    return {
        "experts": model({"kind": "moe", "experts": EXPERTS, "top": TOP, "hidden": hidden, "balance_weight": 0.02}),
        "equal active": model({"kind": "gated", "hidden": TOP * hidden}),
        "equal total": model({"kind": "gated", "hidden": EXPERTS * hidden}),
    }


def seconds_per_update(campaign: Campaign, models: dict[str, dict[str, Any]], repeats: int) -> dict[str, list[float]]:
    """Of the two arms that are compared at equal time, taking turns."""
    from armillary.base.settings import parse
    from armillary.nn.network import ModelSettings, build
    from armillary.recipe.training import TrainingSettings
    from armillary.train import Trainer

    spent = campaign.budget
    how = {"context": spent.context, "batch": spent.batch, "steps": 10**6, "precision": "float32", "compile": "no"}
    loader = campaign.corpus.loader(campaign.data, context=spent.context, batch=spent.batch, seed=0)
    batch = loader.batch(0)
    calls = {}
    for name in ("experts", "equal total"):
        trainer = Trainer(build(parse(ModelSettings, models[name])), parse(TrainingSettings, how))

        def once(trainer: Any = trainer) -> float:
            start = time.perf_counter()
            trainer.step(batch)
            return time.perf_counter() - start

        calls[name] = once
    return common.interleaved(calls, repeats)


def main() -> None:
    from armillary.evaluate import expert_load

    campaign = begin("experts", Budget(context=512, steps=300, seeds=3))
    models = arms(campaign)
    pace = common.ratio(seconds_per_update(campaign, models, 2 if campaign.tiny else 7), "experts", "equal total")
    whole, fewer = campaign.budget, max(1, round(campaign.budget.steps * pace))
    bits: dict[str, list[float]] = {}
    loads: list[float] = []
    for seed in campaign.seeds():
        for name, model in models.items():
            network = campaign.train(name.replace(" ", "-"), seed, model)
            bits.setdefault(name, []).append(campaign.bits(network))
            if name == "experts":
                rows = campaign.rows("heldout", campaign.budget.windows)
                loads += [each.load for each in expert_load(network, [ids[:, :-1] for ids in rows]).values()]
        campaign.budget = replace(whole, steps=fewer)
        network = campaign.train("equal-time", seed, models["equal total"])
        campaign.budget = whole
        bits.setdefault("equal time", []).append(campaign.bits(network))
    means = {name: statistics.mean(found) for name, found in bits.items()}
    gap = means["equal active"] - means["equal total"]
    figures: dict[str, Any] = {f"{name}, bits per byte": value for name, value in means.items()}
    figures |= {
        "gap between equal active and equal total %": 100 * gap / means["equal active"],
        "share of the gap closed": (means["equal active"] - means["experts"]) / gap,
        "updates of equal total in equal time": fewer,
        "load, largest of all layers and seeds": max(loads),
        "load, mean": statistics.mean(loads),
    }
    for other in ("equal active", "equal time"):
        apart = percent_apart(bits["experts"], bits[other])
        figures[f"experts against {other} %"] = apart.value
        figures[f"experts against {other} %, high"] = apart.high
    reach = {
        "experts against equal active %, high": (0.0, "max"),
        "share of the gap closed": (0.5, "min"),
        "experts against equal time %, high": (0.0, "max"),
        "load, largest of all layers and seeds": (1.2, "max"),
    }
    campaign.record(figures, reach, bits, "equal active")


if __name__ == "__main__":
    main()
