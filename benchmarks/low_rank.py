"""Products trained as two thin factors: tokens/s of whole training steps against the dense model of the same shape.

Both train in bf16, where the processor computes it (batch 4 × 512), with compiled blocks, fused AdamW and
clipping; only the kind of the blocks' products differs. Whether the loss is the same is campaigns/low_rank.py.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from armillary.base.settings import parse
from armillary.nn.linear import LowRank
from armillary.nn.network import ModelSettings, Network, build
from armillary.nn.ops import computes_bf16
from armillary.recipe.training import TrainingSettings
from armillary.train import Trainer
from common import DEPTH, HEADS, HIDDEN, KV_HEADS, VOCABULARY, WIDTH, interleaved, ratio, report

BATCH, LENGTH, STEPS = 4, 512, 2
RATIO = 2.64
PRECISION = "bf16" if computes_bf16() else "float32"  # imitated, bf16 would say nothing


def network(**kinds: dict) -> Network:
    block = {
        "mixer": {"kind": "attention", "heads": HEADS, "kv_heads": KV_HEADS, "position": "rope"},
        "channel": {"kind": "gated", "hidden": HIDDEN},
    }
    model = {"width": WIDTH, "depth": DEPTH, "vocabulary": VOCABULARY, "context": LENGTH, "block": block}
    return build(parse(ModelSettings, model | {"linear": kinds}))


def products(model: nn.Module) -> int:
    """Parameters of the blocks' products."""
    return sum(p.numel() for name, p in model.named_parameters() if ".inner." in name)


def step(model: Network, ids: Tensor) -> Callable[[], float]:
    trainer = Trainer(model, TrainingSettings(context=LENGTH, batch=BATCH, precision=PRECISION, compile="yes"))

    def speed() -> float:
        start = time.perf_counter()
        for _ in range(STEPS):
            trainer.step(ids)
        return STEPS * BATCH * LENGTH / (time.perf_counter() - start)

    return speed


def checked() -> None:
    """A dense model whose products are U V gives the same logits."""
    dense, thin = network(), network(all={"kind": "low_rank", "ratio": RATIO})
    factors = {name: part for name, part in thin.named_modules() if isinstance(part, LowRank)}
    held = {name: p for name, p in thin.state_dict().items() if name.partition(".inner.")[2].count(".") != 2}
    held |= {f"{name}.weight": part.widen.weight @ part.narrow.weight for name, part in factors.items()}
    dense.load_state_dict(held)
    ids = torch.randint(0, VOCABULARY, (1, 32))
    with torch.no_grad():
        torch.testing.assert_close(thin(ids), dense(ids), rtol=1e-3, atol=1e-3)


def main() -> None:
    torch.manual_seed(0)
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    checked()
    models = {"dense": network(), "low rank": network(all={"kind": "low_rank", "ratio": RATIO})}
    fewer = products(models["dense"]) / products(models["low rank"])
    whole = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1))
    found = interleaved({name: step(model, ids) for name, model in models.items()}, repeats=repeats)
    report(
        "low_rank",
        {
            "times fewer parameters of products": fewer,
            "times fewer parameters, embedding included": whole["dense"] / whole["low rank"],
            "dense tokens/s": statistics.median(found["dense"]),
            "low rank tokens/s": statistics.median(found["low rank"]),
            "times faster in training": ratio(found, "low rank", "dense"),
        },
        {"times fewer parameters of products": (RATIO, "min"), "times faster in training": (1.3, "min")},
    )


if __name__ == "__main__":
    main()
