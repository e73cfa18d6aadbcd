"""How long a checkpoint folder takes to load, and how much memory beyond its weights: ours and `transformers`.

The folder holds the 32 M shape as `transformers` writes it, float32 in several shards. Each load is a
process of its own, after the imports; the model gives one token at the end, so that nothing is left to do.
Memory is the peak of the resident set beyond what the imports took, in copies of the weights.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from common import interleaved, ratio, report, theirs

CHILD = """
import sys, time, json
import torch
if sys.argv[1] == "ours":
    import armillary.checkpoints.open, armillary.model as tool
    load = lambda folder: tool.load(folder, device="cpu", dtype="float32")
else:
    from transformers import AutoModelForCausalLM
    import transformers.models.llama.modeling_llama
    load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
def resident(word):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(word))
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before = resident("VmRSS")
start = time.perf_counter()
model = load(sys.argv[2])
seconds = time.perf_counter() - start
with torch.no_grad():
    out = model(torch.ones(1, 1, dtype=torch.int64))
peak = resident("VmHWM") - before
print(json.dumps([seconds, peak]))
"""


def child(side: str, folder: Path) -> tuple[float, float]:
    done = subprocess.run([sys.executable, "-c", CHILD, side, str(folder)], capture_output=True, text=True, check=True)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def main(repeats: int = 5) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = theirs(torch.float32)
        weights = 4 * sum(parameter.numel() for parameter in model.parameters())
        model.save_pretrained(folder, max_shard_size="50MB")
        del model
        peaks: dict[str, list[float]] = {"ours": [], "transformers": []}

        def once(side: str) -> float:
            seconds, peak = child(side, folder)
            peaks[side].append(peak / weights)
            return seconds

        found = interleaved({side: (lambda side=side: once(side)) for side in peaks}, repeats)
    report(
        "loading",
        {
            "weights, MB": weights / 1e6,
            "ours, s": sorted(found["ours"])[repeats // 2],
            "transformers over ours": ratio(found, "transformers", "ours"),
            "ours, peak memory in copies of the weights": max(peaks["ours"]),
            "transformers, peak memory in copies of the weights": max(peaks["transformers"]),
        },
        {"ours, s": (1.0, "max"), "ours, peak memory in copies of the weights": (1.2, "max")},
    )


if __name__ == "__main__":
    main()
