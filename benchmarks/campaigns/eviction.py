"""Caches with a third of the memory: bits per byte of held-out text within 2 % of the whole cache's.

The first half of every window is read at once, the second token by token, and only the second counts, where
tokens are being dropped all the time. Memory is what the states really hold, indices and sums of attention
included, so each policy's budget is what a third of the memory has room for. Controls are the nearest tokens
alone, and the claim's policy with so few tokens (a 64th) that a past which matters must be missed.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from paired import Budget, Campaign, begin

from armillary.compare.statistics import percent_apart

TIMES = 3.0
PARTS = {"few": 16, "fewest": 64}  # of the context


def main() -> None:
    from armillary.nn.cache import HeavyHitters, Int8, Salient, Sinks

    campaign = begin("eviction", Budget(context=1024, steps=400, seeds=3, windows=32))
    context = campaign.budget.context
    arms: dict[str, Callable[[int], Any] | None] = {
        "whole": None,
        "salient": Salient,
        "heavy hitters": HeavyHitters,
        "sinks": lambda budget: Sinks(budget, sinks=min(4, budget - 1)),
        "nearest": lambda budget: Sinks(budget, sinks=0),
    }
    bits: dict[str, list[float]] = {}
    figures: dict[str, Any] = {}
    for seed in campaign.seeds():
        network = campaign.train("reference", seed, campaign.model())
        for name, policy in arms.items():
            cache = None if policy is None else fitting(network, context, policy)
            figures[f"{name}: times less memory"] = smaller(network, context, cache)
            if cache is not None:
                figures[f"{name}: tokens"] = cache.budget
            bits.setdefault(name, []).append(kept(campaign, network, name, seed, cache))
        figures["int8: times less memory"] = smaller(network, context, Int8())
        bits.setdefault("int8", []).append(kept(campaign, network, "int8", seed, Int8()))
        for name, part in PARTS.items():
            cache = Salient(max(2, context // part))
            figures[f"{name}: tokens"] = cache.budget
            bits.setdefault(name, []).append(kept(campaign, network, name, seed, cache))
        print(f"  {seed}: " + ", ".join(f"{name} {found[-1]:.4f}" for name, found in bits.items()), flush=True)
    base = statistics.mean(bits["whole"])
    figures["whole: bits per byte"] = base
    for name, found in bits.items():
        if name != "whole":
            apart = percent_apart(found, bits["whole"])
            figures[f"{name}: difference %"] = apart.value
            figures[f"{name}: difference %, high"] = apart.high
    reach: dict[str, tuple[float, str]] = {
        "salient: times less memory": (TIMES, "min"),
        "salient: difference %, high": (2.0, "max"),
        "int8: difference %, high": (0.5, "max"),
        "fewest: difference %": (2.0, "min"),
    }
    campaign.record(figures, reach, bits, "whole")


def smaller(network: Any, context: int, cache: Any) -> float:
    """How many times less memory the states of one row take than whole ones."""
    return float(network.init_state(1, context).nbytes / network.init_state(1, context, cache=cache).nbytes)


def fitting(network: Any, context: int, policy: Callable[[int], Any]) -> Any:
    """The policy with the largest budget that takes so many times less memory."""
    budget = int(context / TIMES)
    while smaller(network, context, policy(budget)) < TIMES:
        budget -= 1
    return policy(budget)


def kept(campaign: Campaign, network: Any, name: str, seed: int, cache: Any) -> float:
    """As `measured`, which takes minutes: what an interrupted campaign has measured already is not measured again."""
    file = campaign.folder / "measured.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    key = f"{name} {cache} seed {seed} {vars(campaign.budget)} {campaign.corpus.fingerprint}"
    if key not in known:
        known[key] = measured(campaign, network, cache)
        file.write_text(json.dumps(known), encoding="utf-8")
    return float(known[key])


@torch.no_grad()
def measured(campaign: Campaign, network: Any, cache: Any) -> float:
    """Held-out bits per byte of the second halves of windows."""
    nats, tokens = 0.0, 0
    ids = torch.cat(campaign.rows("heldout", campaign.budget.windows))
    half = ids.shape[1] // 2
    for rows in ids.split(32):
        state = network.init_state(len(rows), rows.shape[1], cache=cache)
        logits = network.extend(rows[:, :half], state, last=True)
        for at in range(half, rows.shape[1]):
            scores = torch.log_softmax(logits[:, -1].float(), -1)
            nats -= float(scores.gather(1, rows[:, at, None]).double().sum())
            tokens += len(rows)
            if at + 1 < rows.shape[1]:
                logits = network.extend(rows[:, at, None], state, last=True)
    store = campaign.corpus.heldout
    return nats / tokens / math.log(2) * store.tokens / float(store.document_bytes.sum())


if __name__ == "__main__":
    main()
