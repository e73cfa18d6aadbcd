"""The best learning rate at width 128 is the best at 512, within a step of a grid of factors of 2.

Each width is trained at every rate of the grid, with `model.scaling` (base width 128) and without; the
claim is for the scaled networks, the others show how far the best rate moves where nothing is scaled.
Loss is held-out bits per byte, the mean over seeds.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

from paired import Budget, begin

RATES = (2.0**-11, 2.0**-10, 2.0**-9, 2.0**-8, 2.0**-7, 2.0**-6, 2.0**-5)
BASE, WIDE = 128, 512


def main() -> None:
    campaign = begin("width_transfer", Budget(context=256, steps=100, depth=2, seeds=1))
    rates = RATES[2:4] if campaign.tiny else RATES
    narrow = campaign.budget.width  # 128, or tiny
    wide = narrow * WIDE // BASE
    spent = campaign.budget
    figures: dict[str, Any] = {}
    for scaled in (True, False):
        name = "scaled" if scaled else "not scaled"
        best: dict[int, int] = {}
        for width in (narrow, wide):
            losses = []
            for rate in rates:
                campaign.budget = replace(spent, rate=rate)
                scaling = {"scaling": {"width": narrow}} if scaled else {}
                model = campaign.model(width=width, **scaling)
                model["block"]["mixer"]["heads"] = narrow // spent.head  # heads grow wider, not more
                found = []
                for seed in campaign.seeds():
                    found.append(campaign.bits(campaign.train(f"{name.replace(' ', '-')}-{width}", seed, model)))
                losses.append(statistics.mean(found))
                figures[f"{name}, width {width}, rate {rate:.2g}: bits per byte"] = losses[-1]
            best[width] = min(range(len(losses)), key=losses.__getitem__)
            figures[f"{name}, width {width}: best rate"] = rates[best[width]]
        figures[f"{name}: steps of the grid between the best rates"] = abs(best[narrow] - best[wide])
        lost = figures[f"{name}, width {wide}, rate {rates[best[narrow]]:.2g}: bits per byte"]
        least = figures[f"{name}, width {wide}, rate {rates[best[wide]]:.2g}: bits per byte"]
        figures[f"{name}: wide at the narrow one's best rate, % more bits"] = 100 * (lost / least - 1)
    assert all(math.isfinite(value) for value in figures.values())
    campaign.budget = spent
    goals = {"scaled: steps of the grid between the best rates": (1.0, "max")}
    campaign.record(figures, goals)


if __name__ == "__main__":
    main()
