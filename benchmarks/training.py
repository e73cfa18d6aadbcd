"""Training: tokens/s against `transformers` with torch.compile, the fraction of the matrix peak, memory.

Both sides train the same shape in bf16 (batch 4 × 512) with compiled blocks, fused AdamW and clipping.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

import torch

from common import VOCABULARY, interleaved, matmul_peak, ours, peak_rss, ratio, report, theirs

BATCH, LENGTH, STEPS = 4, 512, 2


def side(name: str):
    """A function that does one training step on one side."""
    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1))
    if name == "armillary":
        from armillary.recipe.training import TrainingSettings
        from armillary.train import Trainer

        trainer = Trainer(ours(torch.bfloat16), TrainingSettings(context=LENGTH, batch=BATCH, compile="yes"))
        return lambda: trainer.step(ids)
    model = theirs(torch.float32)
    compiled = torch.compile(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(input_ids=ids[:, :-1], labels=ids[:, :-1]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def speed(step) -> float:
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    return STEPS * BATCH * LENGTH / (time.perf_counter() - start)


def memory(name: str) -> int:
    """Peak memory of three steps in a process of its own, less what it had before the model."""
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    sides = {name: side(name) for name in ("armillary", "transformers")}
    found = interleaved({name: lambda step=step: speed(step) for name, step in sides.items()})
    peak = matmul_peak(torch.bfloat16)
    parameters = sum(p.numel() for p in ours(torch.bfloat16).parameters())
    rate = statistics.median(found["armillary"])
    kept = {name: memory(name) for name in sides}
    report(
        "training",
        {
            "armillary tokens/s": rate,
            "transformers tokens/s": statistics.median(found["transformers"]),
            "speed ratio": ratio(found, "armillary", "transformers"),
            "bf16 matmul peak GFLOP/s": peak / 1e9,
            "fraction of the peak": 6 * parameters * rate / peak,
            "armillary peak MB": kept["armillary"] / 1e6,
            "transformers peak MB": kept["transformers"] / 1e6,
            "memory ratio": kept["armillary"] / kept["transformers"],
        },
        {"speed ratio": (1.25, "min"), "fraction of the peak": (0.7, "min"), "memory ratio": (0.6, "max")},
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        start = peak_rss()
        run = side(sys.argv[1])
        for _ in range(3):
            run()
        print(json.dumps(peak_rss() - start))
    else:
        main()
