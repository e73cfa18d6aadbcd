"""Block gates at a context of 1,024: at least 90 % of the scores skipped at equal loss.

The control keeps as many pairs, the same for every input: a window.
"""

from __future__ import annotations

import statistics

import torch
from paired import Budget, Campaign, begin

BLOCK, TARGET = 32, 0.03


def main() -> None:
    campaign = begin("block_gate", Budget(steps=120, seeds=3))
    block = 8 if campaign.tiny else BLOCK
    gates = {"position": "rope", "block": block, "penalty": 1.0, "target": TARGET, "start": -1.0}
    bits: dict[str, list[float]] = {}
    skipped, spared = [], []
    for seed in campaign.seeds():
        gated = campaign.train("gates", seed, campaign.model({"kind": "block_gate"} | gates))
        kept, computed = opened(campaign, gated, block)
        skipped.append(1 - kept)
        spared.append(1 - computed)
        static = {"kind": "pruned", "position": "rope", "length": campaign.budget.context, "keep": round(kept, 3)}
        arms = {
            "reference": campaign.model(),
            "window": campaign.model(static | {"mask": "window"}),
            "half width": campaign.half(),
        }
        found = {name: campaign.train(name.replace(" ", "-"), seed, model) for name, model in arms.items()}
        for name, network in {**found, "candidate": gated}.items():
            bits.setdefault(name, []).append(campaign.bits(network))
    figures = {
        "scores skipped, least of the seeds": min(skipped),
        "scores skipped, mean": statistics.mean(skipped),
        "scores not computed by the op, mean": statistics.mean(spared),
    }
    campaign.report(figures, bits, {"scores skipped, least of the seeds": 0.9})


def opened(campaign: Campaign, network, block: int) -> tuple[float, float]:
    """The shares of the causal scores that gates leave open, and that the op's tiles of queries compute."""
    from armillary.nn.mixers.block_gate import BlockGate
    from armillary.nn.taps import Taps

    context = campaign.budget.context
    own = torch.arange(context) // block
    index = torch.arange(context)
    inside = (index - own * block + 1).sum()  # scores in the queries' own blocks
    whole = context * (context + 1) / 2
    tile = next(module.tile for module in network.modules() if isinstance(module, BlockGate))
    kept, computed, count = 0.0, 0.0, 0
    with torch.no_grad():
        for ids in campaign.rows("heldout", max(4, campaign.budget.windows // 4)):
            taps = Taps(["blocks.*.gate"])
            network.hidden(ids[:, :-1], taps=taps)
            for gate in taps.seen.values():
                earlier = torch.arange(gate.shape[-1]) < own[:, None]
                shown = (gate > 0) & earlier
                tiles = shown.unflatten(2, (-1, tile)).any(3).repeat_interleave(tile, 2)
                heads = gate.shape[0] * gate.shape[1]
                kept += float(shown.sum()) * block + heads * float(inside)
                computed += float(tiles.sum()) * block + heads * float(inside)
                count += heads
    return kept / count / whole, computed / count / whole


if __name__ == "__main__":
    main()
