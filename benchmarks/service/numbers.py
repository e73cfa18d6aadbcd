"""12. Load numbers: latencies at shares of what the server can do, by the client of our own, and by guidellm at one of
them. What guidellm calls ITL is TPOT here (`load` has the definitions); its TTFT counts from when a request was sent.

guidellm 0.8.1 sends a hundred requests at once when it begins (of those that are planned before its clock is set, the
due times lie decades ago). More than the server has in line would be refused, so it is told to have no more than
that under way.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from pathlib import Path

from service.load import closed_loop, open_loop, prompts, summary
from service.process import SLOTS, Figures, Process, Reach, serving, warm

PROMPT, TOKENS = 64, 32
SHARES = (0.25, 0.5, 0.75, 0.9)  # of the capacity
CALM, BOTH = 0.5, 0.25  # up to which nobody is refused; that at which both clients measure
MOST = 4 * SLOTS  # answers that `armillary serve` has under way, waiting ones included
SHOWN = tuple(f"{name} {word} ms" for name in ("TTFT", "ITL", "TPOT", "latency") for word in ("p50", "p99"))
INSTALL = """  guidellm is not there, and its part is left out. It brings some 100 packages: give it a place of its own.
    python -m venv /tmp/guidellm && /tmp/guidellm/bin/pip install guidellm==0.8.1
    python benchmarks/campaign.py reliability --parts numbers --guidellm /tmp/guidellm/bin/guidellm"""


def run(model: Path, tiny: bool, guidellm: str) -> tuple[Figures, Reach]:
    seconds = 2.0 if tiny else 20.0
    with serving(model, "--memory", "0.0625") as server:
        warm(server, 1 if tiny else 20)
        most = summary(asyncio.run(closed_loop(server.port, prompts(PROMPT, TOKENS, 1), 2 * SLOTS, seconds)))
        figures: Figures = {"capacity, answers/s": most["answers/s"], "capacity, tokens/s": most["tokens/s"]}
        reach: Reach = {}
        for seed, share in enumerate(SHARES, 2):
            rate = share * most["answers/s"]
            found = asyncio.run(open_loop(server.port, prompts(PROMPT, TOKENS, seed), rate, seconds, seed))
            ours = summary(found)
            name = f"at {share:.0%} of it"
            good, refused = sum(one.complete for one in found), sum(one.status == 429 for one in found)
            figures |= {f"{name}: requests": len(found), f"{name}: answered": good, f"{name}: refused": refused}
            figures[f"{name}: neither"] = len(found) - good - refused
            figures |= {f"{name}: {key}": ours[key] for key in (*SHOWN, "late p99 ms")}
            reach[f"{name}: late p99 ms"] = (10, "max")
            reach[f"{name}: neither"] = (0, "max")
            if share <= CALM:
                reach[f"{name}: answered"] = (len(found), "min")
            if share == BOTH:
                theirs = _guidellm(guidellm, server, model, rate, seconds)
                if theirs:
                    figures |= {f"guidellm {name}: {key}": value for key, value in theirs.items()}
                    for key, own in (("TTFT p50 ms", "TTFT p50 ms"), ("ITL p50 ms", "TPOT p50 ms")):
                        ratio = f"guidellm {name}: {key} over our {own}"
                        figures[ratio] = theirs[key] / ours[own]
                        reach[ratio] = (1.25, "max")
                    reach[f"guidellm {name}: failed"] = (0, "max")
    return figures, reach


def _guidellm(command: str, server: Process, model: Path, rate: float, seconds: float) -> dict[str, float]:
    """The same load by the other tool; nothing, if it is not there."""
    if shutil.which(command) is None:
        print(INSTALL)
        return {}
    into = model.parent / "guidellm.json"
    words = [command, "run", "--disable-console", "--tokenizer", f"kind=hf_auto,model={model}"]
    where = f"kind=openai_http,target=http://127.0.0.1:{server.port},model=tiny,request_format=/v1/completions"
    words += ["--backend", where, "--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={TOKENS}"]
    words += ["--profile", f"kind=poisson,rate={rate:.3f},max_concurrency={MOST}"]
    words += ["--constraint", f"kind=max_duration,seconds={seconds:g}"]
    around = os.environ | {"HF_HUB_OFFLINE": "1", "GUIDELLM__MAX_WORKER_PROCESSES": "1"}  # a core is the server's
    subprocess.run([*words, "--output", f"kind=json,path={into}"], env=around, check=True, timeout=seconds + 240)
    metrics = json.loads(into.read_text(encoding="utf-8"))["benchmarks"][0]["metrics"]
    totals = metrics["request_totals"]
    found = {"answered": totals["successful"], "failed": totals["errored"]}
    for name, key in (("TTFT", "time_to_first_token_ms"), ("ITL", "inter_token_latency_ms")):
        row = metrics[key]["successful"]["percentiles"]
        found |= {f"{name} p50 ms": row["p50"], f"{name} p99 ms": row["p99"]}
    row = metrics["request_latency"]["successful"]["percentiles"]
    found |= {"latency p50 ms": 1000 * row["p50"], "latency p99 ms": 1000 * row["p99"]}
    return found | {"tokens/s": metrics["output_tokens_per_second"]["successful"]["mean"]}
