"""A mixture of 8 experts, of which a token picks 2, against dense models of equal total and of equal active
size: tokens/s of training and of decoding; time against the number of experts; one block against transformers'.

Training is whole updates (AdamW, clipping) of 4 × 512 tokens in float32 without compiled blocks. At
batch 16 decoding tokens pick nearly all experts between them, so there it is reported and not bounded.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from armillary.base.settings import parse
from armillary.engine.slots import Slots
from armillary.nn.channels.moe import MixtureSettings
from armillary.nn.context import Context
from armillary.nn.describe import describe
from armillary.nn.mechanism import Place, initialise
from armillary.nn.network import ModelSettings, build
from armillary.nn.ops import plain_ops
from armillary.recipe.training import TrainingSettings
from armillary.train import Trainer
from common import forward_backward, interleaved, largest_difference, ratio, report

WIDTH, DEPTH, HEADS, KV_HEADS, HIDDEN, EXPERTS, TOP, VOCABULARY = 512, 4, 8, 4, 704, 8, 2, 4096
BATCH, LENGTH, PROMPT, TOKENS = 4, 512, 64, 16


def model(channel: dict[str, Any]) -> ModelSettings:
    mixer = {"kind": "attention", "heads": HEADS, "kv_heads": KV_HEADS, "position": "rope"}
    return parse(
        ModelSettings,
        {
            "width": WIDTH,
            "depth": DEPTH,
            "vocabulary": VOCABULARY,
            "context": LENGTH,
            "block": {"mixer": mixer, "channel": channel},
        },
    )


def mixture(experts: int = EXPERTS) -> dict[str, Any]:
    return {"kind": "moe", "experts": experts, "top": TOP, "hidden": HIDDEN}


ARMS = {
    "experts": model(mixture()),
    "dense, equal total": model({"kind": "gated", "hidden": EXPERTS * HIDDEN}),
    "dense, equal active": model({"kind": "gated", "hidden": TOP * HIDDEN}),
    "4 experts": model(mixture(4)),
    "16 experts": model(mixture(16)),
}
MAIN = ("experts", "dense, equal total", "dense, equal active")


def training(settings: ModelSettings) -> Callable[[], float]:
    """Tokens/s of one update."""
    how = TrainingSettings(context=LENGTH, batch=BATCH, precision="float32", compile="no", steps=10**6)
    trainer = Trainer(build(settings), how)
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1))

    def once() -> float:
        start = time.perf_counter()
        trainer.step(ids)
        return BATCH * LENGTH / (time.perf_counter() - start)

    return once


def decoding(settings: ModelSettings, batch: int, dtype: torch.dtype) -> Callable[[], float]:
    """Tokens/s behind a prompt, of all rows together."""
    network = build(settings).to(dtype).compute(dtype).eval()
    ids = torch.randint(0, VOCABULARY, (batch, PROMPT)).tolist()
    rows, weights = list(range(batch)), "bf16" if dtype == torch.bfloat16 else "float32"
    slots = Slots(network, batch, PROMPT + TOKENS, weights=weights)  # the engine's own steps

    @torch.no_grad()
    def once() -> float:
        for row in rows:
            slots.clear(row)
        tokens = slots.extend(rows, ids)[:, -1].argmax(-1).tolist()
        start = time.perf_counter()
        for _ in range(TOKENS):
            tokens = slots.extend(rows, [[token] for token in tokens])[:, -1].argmax(-1).tolist()
        return batch * TOKENS / (time.perf_counter() - start)

    return once


def block_against_transformers() -> tuple[dict[str, Callable[[], float]], float]:
    """Seconds of a block forward and backward on either side, and the largest relative difference between
    their outputs and gradients."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=TOP
    )
    config._experts_implementation = "eager"
    theirs = MixtralSparseMoeBlock(config)
    ours = MixtureSettings(experts=EXPERTS, top=TOP, hidden=HIDDEN).build(Place(WIDTH))
    initialise(ours, 0)
    gate = ours.experts.gate
    assert gate is not None
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router.weight)
        theirs.experts.gate_up_proj.copy_(torch.cat([gate.weight, ours.experts.up.weight], 1))
        theirs.experts.down_proj.copy_(ours.experts.down.weight)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    apart = largest_difference(ours(mine, Context()), (mine,), theirs(other), (other,))
    parts = (mine, *ours.parameters())
    sides = {
        "armillary": forward_backward(lambda x, *_: ours(x, Context()), parts),
        "transformers": forward_backward(lambda x, *_: theirs(x), (other, *theirs.parameters())),
    }
    return sides, apart


def checked() -> float:
    """The largest difference of the fast path from the plain one, relative to the largest score."""
    network = build(ARMS["experts"], seed=1).eval()
    ids = torch.randint(0, VOCABULARY, (2, 24))
    with torch.no_grad():
        found = network(ids)
        with plain_ops():
            expected = network(ids)
    return float((found - expected).abs().max() / expected.abs().max())


def main() -> None:
    torch.manual_seed(0)
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    sizes = {name: describe(settings, length=LENGTH) for name, settings in ARMS.items()}
    held = DEPTH * 3 * EXPERTS * HIDDEN * WIDTH
    figures: dict[str, Any] = {
        "parameters": sizes["experts"].parameters,
        "share of the parameters that experts hold": held / sizes["experts"].parameters,
        "dense, equal total, relative parameters": sizes["dense, equal total"].parameters / sizes["experts"].parameters,
        "dense, equal active, relative active": sizes["dense, equal active"].active / sizes["experts"].active,
        "fast against plain, relative difference": checked(),
    }
    found = interleaved({name: training(settings) for name, settings in ARMS.items()}, repeats)
    for name in MAIN:
        figures[f"training tokens/s, {name}"] = statistics.median(found[name])
    figures["training ratio to equal total"] = ratio(found, "experts", "dense, equal total")
    figures["training ratio to equal active"] = ratio(found, "experts", "dense, equal active")
    figures["training ratio of 16 experts to 4"] = ratio(found, "16 experts", "4 experts")
    for batch, dtype, label in (
        (1, torch.float32, "float32"),
        (1, torch.bfloat16, "bf16"),
        (16, torch.float32, "float32"),
    ):
        sides = {name: decoding(ARMS[name], batch, dtype) for name in MAIN}
        found = interleaved(sides, repeats)
        what = f"decoding batch {batch} {label}"
        for name in MAIN:
            figures[f"{what} tokens/s, {name}"] = statistics.median(found[name])
        figures[f"{what} ratio to equal total"] = ratio(found, "experts", "dense, equal total")
        figures[f"{what} ratio to equal active"] = ratio(found, "experts", "dense, equal active")
    sides, figures["transformers' block, relative difference"] = block_against_transformers()
    found = interleaved(sides, repeats)
    figures["times faster than transformers' block"] = ratio(found, "transformers", "armillary")
    reach = {
        "share of the parameters that experts hold": (0.8, "min"),
        "fast against plain, relative difference": (1e-4, "max"),
        "transformers' block, relative difference": (1e-4, "max"),
        "training ratio to equal total": (2.0, "min"),
        "training ratio of 16 experts to 4": (0.7, "min"),
        "decoding batch 1 float32 ratio to equal total": (2.0, "min"),
        "decoding batch 1 bf16 ratio to equal total": (2.0, "min"),
        "times faster than transformers' block": (1.0, "min"),
    }
    report("experts", figures, reach)


if __name__ == "__main__":
    main()
