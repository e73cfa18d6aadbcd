"""Pruning attention by data: at least 25 % of it removed at equal loss, without training again.

Masks are calibrated on training text. Controls remove as many pairs of the same trained models: all
but a window, and random ones.
"""

from __future__ import annotations

import torch
from paired import Budget, Campaign, begin

FRACTIONS = (0.25, 0.5, 0.9)
CLAIMED = 0.25


def main() -> None:
    from armillary.compress import prune_attention

    campaign = begin("pruning", Budget(context=512, steps=400))
    bits: dict[str, list[float]] = {}
    removed = []
    for seed in campaign.seeds():
        trained = campaign.train("reference", seed, campaign.model())
        found = {"reference": trained, "half width": campaign.train("half-width", seed, campaign.half())}
        rows = [ids[:, :-1] for ids in campaign.rows("train", campaign.budget.windows)]
        for fraction in FRACTIONS:
            pruned = prune_attention(trained, rows, fraction)
            if fraction == CLAIMED:
                found["candidate"] = pruned.network
                removed.append(pruned.removed)
                for mask in ("window", "random"):
                    found[f"{mask} instead"] = control(campaign, trained, rows[:1], mask, 1 - pruned.removed, seed)
            else:
                found[f"{fraction:.0%} removed"] = pruned.network
        for name, network in found.items():
            bits.setdefault(name, []).append(campaign.bits(network))
    campaign.report({"attention removed": min(removed)}, bits, {"attention removed": CLAIMED})


def control(campaign: Campaign, trained, rows, mask: str, keep: float, seed: int):
    """The trained network under a mask that no data went into."""
    from armillary.compress import prune_attention
    from armillary.nn.mixers.pruned import Pruned, first_mask

    network = prune_attention(trained, rows, 0.0).network
    for module in network.modules():
        if isinstance(module, Pruned):
            settings = module.start.derive(mask=mask, keep=keep, seed=seed)
            kept, distances = first_mask(settings, True, module.layer)
            with torch.no_grad():
                module.kept.copy_(kept)
                module.distances.copy_(distances)
    return network


if __name__ == "__main__":
    main()
