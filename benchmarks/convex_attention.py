"""Does convex training of an attention layer reach the global optimum, where gradient descent may not?

The problem is small and real: what comes after eight characters of Python source (a letter or digit, a
space or line break, anything else), from fixed random codes of the characters. The convex form is
solved with its certificate; the same layer as heads, with weight decay and the same objective, is
trained by Adam from many random starts, each for several times as long. No run may end below the
bound; how far above it they end is the figure.

    python benchmarks/convex_attention.py
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import torch

from armillary.train import ConvexAttention, convex_attention
from common import report

BEFORE, WIDTH, ROWS, HEADS, RUNS = 8, 12, 600, 8, 8
TOLERANCE = 1e-6
STEPS = 1000


def kind(letter: str) -> int:
    return 0 if letter.isalnum() else 1 if letter.isspace() else 2


def text() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features and classes, to learn from and held out."""
    source = Path(os.__file__).parent / "argparse.py"
    letters = source.read_text(encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(0x110000 if not letters.isascii() else 128, WIDTH, generator=generator)
    places = torch.randperm(len(letters) - BEFORE, generator=generator)[: 2 * ROWS] + BEFORE
    x = torch.stack([codes[[ord(letter) for letter in letters[p - BEFORE : p]]] for p in places.tolist()])
    y = torch.tensor([kind(letters[p]) for p in places.tolist()])
    return x[:ROWS], y[:ROWS], x[ROWS:], y[ROWS:]


def descend(x: torch.Tensor, y: torch.Tensor, decay: float, seed: int) -> float:
    """The objective that Adam ends at, with a rate that falls to nothing."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, BEFORE), (HEADS, WIDTH), (HEADS, 3), (3,))
    parts = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    logits, u, c, b = parts
    optimiser = torch.optim.Adam(parts, lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    cost = torch.zeros(())
    for _ in range(STEPS):
        optimiser.zero_grad()
        read = torch.einsum("mt,ntd,md->nm", torch.softmax(logits, 1), x, u)
        cost = torch.nn.functional.cross_entropy(read @ c + b, y)
        cost = cost + decay / 2 * (u.square().sum() + c.square().sum())
        cost.backward()
        optimiser.step()
        schedule.step()
    return float(cost.detach())


def accuracy(found: ConvexAttention, x: torch.Tensor, y: torch.Tensor) -> float:
    return float((found(x).argmax(1) == y).float().mean())


def main() -> None:
    x, y, other, answers = text()
    start = time.perf_counter()
    found = convex_attention(x, y, tolerance=TOLERANCE)
    seconds = time.perf_counter() - start
    ends, times = [], []
    for seed in range(RUNS):
        start = time.perf_counter()
        ends.append(descend(x, y, found.decay, seed))
        times.append(time.perf_counter() - start)
    assert min(ends) >= found.bound - 1e-6, "gradient descent went below the certified bound"
    excess = [end / found.objective - 1 for end in ends]
    common = float(torch.bincount(answers).max() / len(answers))
    report(
        "convex_attention",
        {
            "gap / objective": found.gap / found.objective,
            "objective at the optimum (nats)": found.objective,
            "tokens that are read": int((found.attention() > 0).sum()),
            "heads at the optimum": len(found.heads().gates),
            "best run of Adam above it": min(excess),
            "median run above it": statistics.median(excess),
            "worst run above it": max(excess),
            "runs within 0.1% of it": sum(e < 1e-3 for e in excess) / RUNS,
            "seconds": seconds,
            "seconds of a run of Adam": statistics.median(times),
            "held-out accuracy": accuracy(found, other, answers),
            "share of the commonest class": common,
        },
        {"gap / objective": (2 * TOLERANCE, "max"), "best run of Adam above it": (-1e-6, "min")},
    )


if __name__ == "__main__":
    main()
