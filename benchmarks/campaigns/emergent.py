"""Experts out of dense weights, without training again: at most 1 % more loss with all of them picked, and what
three quarters, half and a quarter of them cost.

The controls pick as many experts of the same sizes whose features were grouped at random.
"""

from __future__ import annotations

from paired import Budget, begin

EXPERTS = 16
SHARES = (0.75, 0.5, 0.25)


def main() -> None:
    from armillary.compress import pick, split_experts

    campaign = begin("emergent", Budget(context=512, steps=400))
    experts = 4 if campaign.tiny else EXPERTS
    bits: dict[str, list[float]] = {}
    likeness = []
    for seed in campaign.seeds():
        channel = {"kind": "gated", "hidden": 3 * campaign.budget.width}
        whole = campaign.model()
        trained = campaign.train("reference", seed, whole | {"block": whole["block"] | {"channel": channel}})
        small = campaign.train("half-width", seed, campaign.half())
        found = {"reference": campaign.bits(trained), "half width": campaign.bits(small)}
        split = split_experts(trained, experts, seed=seed)
        likeness += list(split.likeness.values())
        found["candidate"] = campaign.bits(split.network)
        shuffled = at_random(split_experts(trained, experts, seed=seed).network, seed)
        for share in SHARES:
            found[f"{share:.0%} of the experts"] = campaign.bits(pick(split.network, share))
            found[f"{share:.0%} of random experts"] = campaign.bits(pick(shuffled, share))
        for name, value in found.items():
            bits.setdefault(name, []).append(value)
    campaign.report({"likeness of an expert's features": sum(likeness) / len(likeness)}, bits, {})


def at_random(network, seed: int):
    """The network with the features of every channel in an order that no weight went into."""
    import torch

    from armillary.nn.channels.emergent import Emergent

    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, Emergent):
            order = torch.randperm(len(module.order), generator=generator)
            with torch.no_grad():
                for name, part in module.dense.named_children():
                    part.weight.copy_(part.weight[:, order] if name == "down" else part.weight[order])
    return network


if __name__ == "__main__":
    main()
