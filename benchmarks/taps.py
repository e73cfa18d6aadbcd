"""Unset taps cost nothing: the captured graphs are those of a build without taps, and an eager pass takes as many
instructions (callgrind, from Valgrind) as one of the same sources with the taps taken out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

PASSES = 100  # so many that the start of the processes, which differs a little each time, weighs nothing


def build(kind: str):
    """A small network of the given build, and its captured graph text."""
    import torch

    from armillary.base.settings import parse

    data = {
        "width": 32,
        "depth": 4,
        "vocabulary": 64,
        "block": {"mixer": {"kind": "attention", "heads": 4, "position": "rope"}, "channel": "gated"},
    }
    if kind == "tapped":
        import armillary.nn.network as module

        return torch, module.build(parse(module.ModelSettings, data))
    from armillary.testing.untapped import untapped

    with untapped() as module:
        return torch, module.build(parse(module.ModelSettings, data))


def child(kind: str, passes: int) -> None:
    torch, network = build(kind)
    torch.set_num_threads(1)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(passes):
            network(ids)


def instructions(kind: str, passes: int) -> int:
    """Instructions of a whole process that does so many passes."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable, __file__, kind]
    # The native kernels use instructions that Valgrind does not know; hashing is made repeatable.
    environment = os.environ | {"ARMILLARY_NATIVE": "0", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(passes)], capture_output=True, text=True, env=environment)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or found is None:
        sys.exit(f"taps: valgrind failed\n{done.stderr[-1000:]}")
    return int(found.group(1))


def graph(kind: str) -> str:
    """The code of the graph that a block is compiled from."""
    torch, network = build(kind)
    texts: list[str] = []

    def keep(module, inputs):
        texts.append(module.code)
        return module.forward

    torch._dynamo.reset()
    network.compile_blocks(backend=keep)
    network(torch.zeros(1, 8, dtype=torch.int64))
    torch._dynamo.reset()
    return "\n".join(texts)


def main() -> None:
    from common import report

    figures: dict[str, object] = {"same graph text": int(graph("tapped") == graph("untapped"))}
    reach = {"same graph text": (1, "min")}
    if shutil.which("valgrind"):
        per_pass = {}
        for kind in ("tapped", "untapped"):
            per_pass[kind] = (instructions(kind, 2 + PASSES) - instructions(kind, 2)) / PASSES
        figures |= {
            "instructions per pass, taps unset": per_pass["tapped"],
            "instructions per pass, taps removed": per_pass["untapped"],
            "more instructions, %": 100 * (per_pass["tapped"] / per_pass["untapped"] - 1),
        }
        reach["more instructions, %"] = (1.0, "max")
    else:
        print("taps: valgrind is not here, so instructions are not counted", file=sys.stderr)
    report("taps", figures, reach)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        child(sys.argv[1], int(sys.argv[2]))
    else:
        main()
