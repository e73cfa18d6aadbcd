"""Products trained as two thin factors: at least 2.64 times fewer parameters of products at equal loss.

The control has as many parameters of products as the candidate but dense ones: the same depth, narrower.
"""

from __future__ import annotations

from typing import Any

from paired import Budget, begin

RATIO = 2.64


def main() -> None:
    campaign = begin("low_rank", Budget(context=512, steps=400))
    bits: dict[str, list[float]] = {}
    fewer = []
    for seed in campaign.seeds():
        arms: dict[str, dict[str, Any]] = {
            "reference": campaign.model(),
            "candidate": campaign.model(linear={"all": {"kind": "low_rank", "ratio": RATIO}}),
            "dense and narrower": campaign.model(width=narrower(campaign.budget)),
            "half width": campaign.half(),
        }
        found = {name: campaign.train(name.replace(" ", "-"), seed, model) for name, model in arms.items()}
        for name, network in found.items():
            bits.setdefault(name, []).append(campaign.bits(network))
        sizes = {name: products(network) for name, network in found.items()}
        fewer.append(sizes["reference"] / sizes["candidate"])
    campaign.report(
        {"times fewer parameters of products": min(fewer)}, bits, {"times fewer parameters of products": RATIO}
    )


def narrower(budget: Budget) -> int:
    """The width at which dense products hold 1/RATIO of the parameters, in whole heads."""
    return max(1, round(budget.width / RATIO**0.5 / budget.head)) * budget.head


def products(network) -> int:
    """Parameters of the blocks' products."""
    return sum(p.numel() for name, p in network.named_parameters() if ".inner." in name)


if __name__ == "__main__":
    main()
