"""Memory of the states of 64 streams of 32,768 tokens: purely recurrent models against attention of as many
parameters (4 key/value heads for 8 heads, keys and values in bf16).

What the engine counts a stream as is compared with what becomes resident. The recurrent streams are all there, each
after a request; a few of attention's rows are filled to the last token, and count for 64.
"""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch

from armillary.base.settings import parse
from armillary.engine.core import Engine
from armillary.engine.request import Request
from armillary.engine.sampling import Sampling
from armillary.nn.network import ModelSettings, Network, build
from armillary.nn.state import SpanState
from common import DEPTH, HEADS, HIDDEN, KV_HEADS, VOCABULARY, WIDTH, report

STREAMS, TOKENS, FILLED = 64, 32768, 4
RECURRENT = {"mamba2": {"kind": "mamba2"}, "retention": {"kind": "retention", "heads": HEADS}}


def network(mixer: dict[str, Any], hidden: int) -> Network:
    settings = {
        "width": WIDTH,
        "depth": DEPTH,
        "vocabulary": VOCABULARY,
        "context": TOKENS,
        "block": {"mixer": mixer, "channel": {"kind": "gated", "hidden": hidden}},
    }
    return build(parse(ModelSettings, settings)).to(torch.bfloat16).compute(torch.bfloat16).eval()


def size(net: Network) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def alike(mixer: dict[str, Any], wanted: int) -> Network:
    """With such a mixer and as many parameters as wanted, by the width of its feed-forward networks."""
    least, step = size(network(mixer, 16)), 16 * 3 * WIDTH * DEPTH
    return network(mixer, 16 + 16 * round((wanted - least) / step))


def resident() -> int:
    """Bytes of this process in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def requests() -> list[Request]:
    return [
        Request(tuple(range(3 + row, 11 + row)), Sampling(max_new_tokens=2, temperature=0)) for row in range(STREAMS)
    ]


def measure(net: Network) -> tuple[int, int]:
    """Bytes of one stream as the engine counts it, and as it becomes resident."""
    Engine(net, slots=2, capacity=TOKENS, keep=False).run(requests()[:2])  # what comes once: packed weights, threads
    before = resident()
    engine = Engine(net, slots=STREAMS, capacity=TOKENS, keep=False)
    if engine.slots.divisible:
        for _, _, state in engine.slots.state.each():
            assert isinstance(state, SpanState)
            shapes = {name: (tensor.shape[1], TOKENS, *tensor.shape[3:]) for name, tensor in state.tensors.items()}
            for row in range(FILLED):
                state.paste(row, 0, {name: torch.ones(shape, dtype=net.dtype) for name, shape in shapes.items()})
        filled = FILLED
    else:
        engine.run(requests())
        filled = STREAMS
    return engine.memory.of(TOKENS), (resident() - before) // filled


@torch.no_grad()
def found(mixer: dict[str, Any], wanted: int | None) -> tuple[int, int, int]:
    """Parameters, and what `measure` gives; wanted: parameters that it shall have, or as many as come."""
    net = network(mixer, HIDDEN) if wanted is None else alike(mixer, wanted)
    return (size(net), *measure(net))


def main() -> None:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)  # what is freed goes back at once, so only states are left
    # each in a process of its own: what an earlier one gave back would not count as taken
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        look = {"kind": "attention", "heads": HEADS, "kv_heads": KV_HEADS, "position": "rope"}
        wanted, counted, seen = pool.apply(found, (look, None))
        figures: dict[str, Any] = {
            "attention: million parameters": wanted / 1e6,
            "attention: GB of 64 streams, counted": STREAMS * counted / 1e9,
            "attention: GB of 64 streams, from what 4 took": STREAMS * seen / 1e9,
        }
        reach: dict[str, tuple[float, str]] = {}
        for name, mixer in RECURRENT.items():
            own_size, own, held = pool.apply(found, (mixer, wanted))
            assert abs(own_size / wanted - 1) < 0.01
            figures |= {
                f"{name}: million parameters": own_size / 1e6,
                f"{name}: GB of 64 streams, counted": STREAMS * own / 1e9,
                f"{name}: GB of 64 streams, resident": STREAMS * held / 1e9,
                f"{name}: times less, counted": counted / own,
                f"{name}: times less, resident": seen / held,
            }
            reach |= {f"{name}: times less, {how}": (50.0, "min") for how in ("counted", "resident")}
    report("states", figures, reach)


if __name__ == "__main__":
    main()
