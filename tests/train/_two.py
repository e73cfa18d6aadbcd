"""One of the processes that test_distributed starts: what it does is named by its argument.

torchrun --nproc-per-node 2 _two.py losses OUT | run RECIPE FOLDER STOP | go_on FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from armillary.base.settings import parse
from armillary.nn.network import ModelSettings, build
from armillary.recipe import Recipe
from armillary.recipe.training import TrainingSettings
from armillary.train import Trainer, distributed, resume, train

MODEL = {
    "width": 32,
    "depth": 2,
    "vocabulary": 97,
    "context": 32,
    "block": {"mixer": {"kind": "attention", "heads": 4, "kv_heads": 2}, "channel": "gated"},
}
CASES = {
    "plain": ({}, {}),
    "accumulated": ({}, {"micro_batch": 2}),
    "untied, recomputed": ({"head": {"kind": "language_model", "tied": False}}, {"recompute": "blocks"}),
    "shared": ({"share": {"channels": ["blocks.*.channel"]}}, {}),
}


def losses(case: str, steps: int) -> list[float]:
    """Training losses, the same batches whatever the number of processes; ties are checked at the end."""
    model, training = CASES[case]
    world = distributed.begin()
    network = build(parse(ModelSettings, MODEL | model), seed=1)
    plain = {"context": 24, "batch": 8, "steps": 50, "precision": "float32", "compile": "no"}
    settings = parse(TrainingSettings, plain | training | {"optimiser": {"learning_rate": 3e-3}})
    trainer = Trainer(network, settings, world=world)
    found = []
    for step in range(steps):
        ids = torch.randint(0, 97, (8, 25), generator=torch.Generator().manual_seed(step % 7))
        found.append(trainer.step(ids))
    network.check_ties()
    if not model:
        assert network.head.product.weight is network.embed.weight  # type: ignore[union-attr]
    return found


def main(what: str, *arguments: str) -> None:
    if what == "losses":
        found = {case: losses(case, 50 if case == "plain" else 5) for case in CASES}
        if distributed.begin().first:
            Path(arguments[0]).write_text(json.dumps(found))
    elif what == "run":
        train(Recipe.load(Path(arguments[0])), arguments[1], stop_after=int(arguments[2]) or None)
    else:
        resume(arguments[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
