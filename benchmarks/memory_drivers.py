"""Memory beyond the window: constant state over a million tokens, and what the memory of each driver can hold.

(a) A million tokens through `extend` in chunks: resident memory at the end against that after the first 10,000.
(b) Copying: a string of 16 random symbols fills window 1 and is asked for in window 9, one place after the
other by name; in between stand fillers and nothing of the string. Networks learn it from one window's
distance on, then two, four and eight, on strings drawn anew for every update; 1,000 fresh strings decide.
With the memory set to zero the string is gone; Transformer-XL sees as far as its layers' memories reach
together, and no further. Its gradients flow through the memory: as published none reaches what the
fillers should have kept, and it learns to look no further back than one memory.

`python benchmarks/memory_drivers.py [streaming] [copying]` runs one part.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import report

LENGTH, SYMBOLS, FILLERS = 16, 32, 4  # tokens of a window; what strings are made of; what stands between
ASK = SYMBOLS + FILLERS  # the first of LENGTH tokens that ask, each for its place
STREAM, EARLY, CHUNK = 1_000_000, 10_000, 2000

DRIVERS: dict[str, dict[str, Any]] = {
    "transformer_xl": {"segment": LENGTH, "memory": 2 * LENGTH, "through": True},
    "memory_tokens": {"segment": LENGTH, "tokens": LENGTH},
    "feedback": {"segment": LENGTH, "window": 0, "rows": LENGTH},  # a window carries a little of the string, too
}
WIDE = {
    "transformer_xl": {"segment": 256, "memory": 512},
    "memory_tokens": {"segment": 256},
    "feedback": {"segment": 256},
}
REACH = 3  # windows back that are inside two layers of Transformer-XL with two windows of memory each; 4 are the edge
STAGES = ((1, 4000), (2, 1500), (4, 1000), (8, 1000))  # distance in windows, updates at most
GOOD = 0.999  # accuracy on a training batch at which the next stage begins


def network(driver: str, **changes: Any) -> Any:
    from armillary.base.settings import parse
    from armillary.nn.network import ModelSettings, build

    data = {
        "width": 64,
        "depth": 2,
        "vocabulary": ASK + LENGTH,
        "block": {
            "mixer": {"kind": "attention", "heads": 4, "position": "transformer_xl"},
            "channel": {"kind": "gated", "hidden": 128},
        },
        "head": {"kind": "language_model", "tied": False},
        "driver": {"kind": driver, **DRIVERS[driver], **changes},
    }
    return build(parse(ModelSettings, data))


# -- (a)


def resident() -> int:
    """Bytes of this process that are in memory now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


@torch.no_grad()
def stream(driver: str) -> None:
    """Prints the growth in % and the speed."""
    model = network(driver, **WIDE[driver]).eval()
    state = model.init_state(1)
    ids = torch.randint(0, ASK, (1, CHUNK), generator=torch.Generator().manual_seed(1))
    early, start = 0, time.perf_counter()
    for done in range(CHUNK, STREAM + 1, CHUNK):
        out = model.extend(ids, state, last=True)
        if done == EARLY:
            early = resident()
    assert bool(out.isfinite().all())
    print(100 * (resident() / early - 1), STREAM / (time.perf_counter() - start))


def streamed(driver: str) -> tuple[float, float]:
    """In a process of its own."""
    done = subprocess.run([sys.executable, __file__, "stream", driver], capture_output=True, text=True, check=True)
    growth, speed = done.stdout.split()[-2:]
    return float(growth), float(speed)


# -- (b)


def strings(rows: int, distance: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """ids [rows, (distance + 1) · 16] and the symbols [rows, 16] that the last window asks for."""
    symbols = torch.randint(0, SYMBOLS, (rows, LENGTH), generator=generator)
    fillers = torch.randint(SYMBOLS, ASK, (rows, (distance - 1) * LENGTH), generator=generator)
    return torch.cat([symbols, fillers, torch.arange(ASK, ASK + LENGTH).expand(rows, -1)], 1), symbols


def learn(driver: str, stages: tuple[tuple[int, int], ...] = STAGES) -> Any:
    model = network(driver)
    generator = torch.Generator().manual_seed(2)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    for distance, most in stages:
        good = 0
        for step in range(most):
            for group in optimiser.param_groups:
                group["lr"] = 2e-3 * min(1.0, (step + 1) / 50)
            # every distance so far takes turns, the newest most often
            now = distance if step % 2 == 0 else int(torch.randint(1, distance + 1, (), generator=generator))
            ids, symbols = strings(64, now, generator)
            hidden = model.hidden(ids)[:, -LENGTH:]
            loss = model.cross_entropy(hidden, symbols) / symbols.numel()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            if now == distance:
                right = float((model.head(hidden.detach()).argmax(-1) == symbols).float().mean())
                good = good + 1 if right >= GOOD else 0
                if step % 50 == 0:
                    print(
                        f"  {driver} distance {distance} step {step} loss {float(loss.detach()):.3f} right {right:.3f}",
                        flush=True,
                    )
                if good == 5:
                    break
    return model.eval()


@torch.no_grad()
def recalled(model: Any, distance: int, blank: bool = False) -> float:
    """Share of the symbols of 1,000 fresh strings that are given back, read by `extend` in two chunks."""
    generator = torch.Generator().manual_seed(1234)
    right = 0.0
    for _ in range(10):
        ids, symbols = strings(100, distance, generator)
        state = model.init_state(100)
        model.extend(ids[:, :-LENGTH], state)
        if blank:
            forget(state)
        right += float((model.extend(ids[:, -LENGTH:], state).argmax(-1) == symbols).float().mean()) / 10
    return right


def forget(state: Any) -> None:
    """Set what the memory holds to zero; counters stay."""
    for block in state.blocks:
        for held in block.values():
            for name, tensor in held.tensors.items():
                if tensor.is_floating_point() and (name == "memory" or name.startswith("row")):
                    tensor.zero_()


def streaming() -> None:
    figures: dict[str, Any] = {}
    reach: dict[str, tuple[float, str]] = {}
    for driver in DRIVERS:
        growth, speed = streamed(driver)
        figures |= {f"{driver}: memory grown, %": growth, f"{driver}: tokens/s read": speed}
        reach[f"{driver}: memory grown, %"] = (2.0, "max")
    report("memory_stream", figures, reach)


def copying() -> None:
    figures: dict[str, Any] = {}
    reach: dict[str, tuple[float, str]] = {}
    for driver in DRIVERS:
        start = time.perf_counter()
        if driver == "transformer_xl":
            model = learn(driver, tuple((distance, 2000) for distance in range(1, REACH + 1)))
            found = {
                "recalled within reach, %": (100 * recalled(model, REACH), 99.0, "min"),
                "recalled beyond, %": (100 * recalled(model, 8), 5.0, "max"),
            }
        else:
            model = learn(driver)
            found = {
                "recalled, %": (100 * recalled(model, 8), 99.0, "min"),
                "memory zeroed, %": (100 * recalled(model, 8, blank=True), 5.0, "max"),
            }
        figures |= {f"{driver}: {name}": value for name, (value, _, _) in found.items()}
        figures[f"{driver}: learned in, s"] = time.perf_counter() - start
        reach |= {f"{driver}: {name}": (bound, kind) for name, (_, bound, kind) in found.items()}
    report("memory_copy", figures, reach)


if __name__ == "__main__":
    if sys.argv[1:2] == ["stream"]:
        stream(sys.argv[2])
    else:
        parts = {"streaming": streaming, "copying": copying}
        for part in sys.argv[1:] or parts:
            parts[part]()
