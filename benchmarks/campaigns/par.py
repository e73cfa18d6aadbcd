"""Attention only where required: at least 63 % of the attention blocks replaced at equal loss.

The reference alternates attention and feed-forward blocks; the candidate has as many blocks, 4 of
them attention, among the first two thirds (Mandava et al. 2020). Controls with 4 too: the same in
the last blocks, and at random places.
"""

from __future__ import annotations

import random
from typing import Any

from paired import Budget, Campaign, begin

FULL, KEPT = 11, 4


def main() -> None:
    campaign = begin("par", Budget(depth=2 * FULL, context=512, steps=100), depth=2 * FULL)
    spread = [0, 4, 8, 12]
    places = {
        "reference": list(range(0, 2 * FULL, 2)),
        "candidate": spread,
        "last blocks": [2 * FULL - 2 - place for place in spread],
        "half width": list(range(0, 2 * FULL, 2)),
    }
    bits: dict[str, list[float]] = {}
    for seed in campaign.seeds():
        drawn = sorted(random.Random(seed).sample(range(2 * FULL), KEPT))
        for name, chosen in {**places, "random places": drawn}.items():
            width = campaign.budget.width // (2 if name == "half width" else 1)
            network = campaign.train(name.replace(" ", "-"), seed, model(campaign, chosen, width))
            bits.setdefault(name, []).append(campaign.bits(network))
    replaced = 1 - KEPT / FULL
    campaign.report({"attention blocks replaced": replaced}, bits, {"attention blocks replaced": 0.63})


def model(campaign: Campaign, places: list[int], width: int) -> dict[str, Any]:
    """2 · FULL blocks with attention at `places`, a feed-forward network elsewhere."""
    whole = campaign.model(width=width)
    parts = whole.pop("block")
    blocks = {"s": {"mixer": parts["mixer"]}, "f": {"channel": parts["channel"]}}
    pattern = ["s" if place in places else "f" for place in range(2 * FULL)]
    return whole | {"depth": 2 * FULL, "blocks": blocks, "pattern": pattern}


if __name__ == "__main__":
    main()
