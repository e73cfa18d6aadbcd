"""Hashed attention against fused dense attention: forward and backward at 16,384 tokens, 8 heads of 64, hashing
and sorting included; time against length; how much of a trained model's attention is found; and the peak memory of
reversible stacks against depth."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from armillary.nn.mixers.lsh import Rotations
from armillary.nn.ops import plain_ops
from armillary.nn.ops.band import band_attend, band_seen, band_weights, sort_groups
from common import exponent, forward_backward, interleaved, largest_difference, peak_rss, ratio, report, slow

HEADS, WIDTH, LENGTH, SHORT, WINDOW = 8, 64, 16384, 4096, 64
TRAINED, SECONDS = 2048, 120.0  # tokens that the small model is looked at with; how long it trains


def tensors(length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries (keys are the same) and values."""
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(1, HEADS, length, WIDTH, generator=generator).to(dtype).requires_grad_() for _ in range(2)]


def bands(q: torch.Tensor, rounds: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Orders and places of a hash into buckets of about WINDOW tokens, from q [1, H, T, K]."""
    buckets = max(2, q.shape[2] // WINDOW)
    # many buckets are a product of two factors, as published: one would make hashing quadratic in length
    factors = (16, buckets // 16) if buckets >= 64 else (buckets,)
    hashed = Rotations(rounds, factors, q.shape[1], q.shape[3], 0).hash(q.detach().float().transpose(1, 2))
    pairs = [sort_groups(hashed[:, :, number], WINDOW) for number in range(rounds)]
    return [order for order, _ in pairs], torch.stack([place for _, place in pairs], 2)


def keys(q: torch.Tensor) -> torch.Tensor:
    return q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-6)


def hashed(rounds: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def call(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return band_attend(q, keys(q), v, *bands(q, rounds), [WINDOW] * rounds, 1.0)

    return call


def dense(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, keys(q), v, is_causal=True, scale=1.0)


def check(dtype: torch.dtype, rounds: int) -> float:
    """The largest difference from the definition, outputs and gradients."""
    parts = tensors(1024, dtype)
    wide = [part.detach().float().requires_grad_() for part in parts]
    found = hashed(rounds)(*parts)
    with plain_ops():
        expected = hashed(rounds)(*wide)
    return largest_difference(found, parts, expected, wide)


# -- how much of the attention is found


def trained() -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and values [1, H, T, K] of the last block of a small model with full shared-QK attention, trained on
    the bytes of Python's library, over text that it has not seen."""
    from armillary.base.settings import parse
    from armillary.nn.network import ModelSettings, build
    from armillary.recipe.training import TrainingSettings
    from armillary.train import Trainer

    library = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse.py", "ast.py", "inspect.py", "pathlib.py", "subprocess.py", "tarfile.py", "typing.py")
    ids = torch.tensor(list(b"".join((library / name).read_bytes() for name in names)))
    held = torch.tensor(list((library / "turtle.py").read_bytes()))[20_000 : 20_000 + TRAINED]
    length = 512
    mixer = {"kind": "lsh", "heads": 4, "buckets": 1, "rounds": 1, "window": length}
    data = {"width": 128, "depth": 2, "vocabulary": 256, "position": "sinusoidal", "context": TRAINED}
    network = build(parse(ModelSettings, {**data, "block": {"mixer": mixer, "channel": "gated"}}))
    trainer = Trainer(network, TrainingSettings(context=length, batch=8, steps=1000, precision="float32", compile="no"))
    generator, start, loss = torch.Generator().manual_seed(0), time.perf_counter(), 0.0
    while time.perf_counter() - start < SECONDS and trainer.steps_done < 1000:
        begins = torch.randint(0, len(ids) - length - 1, (8,), generator=generator)
        loss = trainer.step(torch.stack([ids[begin : begin + length + 1] for begin in begins]))
    print(f"the small model trained {trainer.steps_done} steps, to {loss / 0.693147:.2f} bits per byte")
    from armillary.nn.taps import Taps

    taps = Taps(["blocks.1.mixer.q", "blocks.1.mixer.v"])
    with torch.no_grad():
        network.hidden(held[None], taps=taps)
    return taps.seen["blocks.1.mixer.q"].transpose(1, 2), taps.seen["blocks.1.mixer.v"].transpose(1, 2)


def recovered() -> dict[str, float]:
    """The share of full attention's weight on what is seen, and the error of the outputs, relative; beside
    hashing, windows that see as many tokens, and both together."""
    q, v = trained()
    length = q.shape[2]
    local = sort_groups(torch.zeros(1, q.shape[1], length, dtype=torch.int64), length)
    order, place = [local[0]], local[1][:, :, None]
    with torch.no_grad():
        whole = band_weights(q, keys(q), order, place, [length], 1.0)
        found: dict[str, float] = {}
        for rounds in (2, 4):
            orders, places = bands(q, rounds)
            both = [*orders, *order], torch.cat([places, place], 2)
            ways = {
                f"hashing, {rounds} rounds": (orders, places, [WINDOW] * rounds),
                f"a window of {rounds * WINDOW}": (order, place, [rounds * WINDOW]),
                f"a window of {WINDOW}": (order, place, [WINDOW]),
                f"hashing, {rounds} rounds, and a window of {WINDOW}": (*both, [WINDOW] * (rounds + 1)),
            }
            for name, way in ways.items():
                late = slice(length // 2, None)
                seen = band_seen(*way)
                found[f"trained: mass, {name}"] = float((whole * seen)[:, :, late].sum(-1).mean())
                error = band_weights(q, keys(q), *way, 1.0) @ v - whole @ v
                found[f"trained: error, {name}"] = float(error[:, :, late].norm() / (whole @ v)[:, :, late].norm())
    return found


# -- memory of reversible stacks


def memory(depth: int, topology: str) -> float:
    """MB of one forward and backward pass above what there was before it, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, str(depth), topology], capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1])) / 1e6


def child(depth: int, topology: str) -> None:
    from armillary.base.settings import parse
    from armillary.nn.network import ModelSettings, build

    block = {"mixer": {"kind": "lsh", "heads": 4, "buckets": 32}, "channel": {"kind": "ffn", "chunk": 512}}
    data = {"width": 256, "depth": depth, "vocabulary": 256, "topology": topology, "block": block}
    network = build(parse(ModelSettings, {**data, "share": {"all": ["blocks.*"]} if depth > 1 else {}}))
    ids = torch.randint(0, 256, (2, 2048))
    before = peak_rss()
    hidden = network.hidden(ids)
    network.cross_entropy(hidden, ids).backward()
    print(json.dumps(peak_rss() - before))


def main() -> None:
    figures: dict[str, float] = {}
    reach: dict[str, tuple[float, str]] = {}
    for name, dtype, close in (("float32", torch.float32, 1e-4), ("bf16", torch.bfloat16, 5e-2)):
        figures[f"{name}: largest difference"] = max(check(dtype, rounds) for rounds in (2, 4))
        assert figures[f"{name}: largest difference"] <= close, figures
        length = SHORT if slow(dtype) else LENGTH
        parts = tensors(length, dtype)
        calls = {str(rounds): forward_backward(hashed(rounds), parts) for rounds in (2, 4)}
        found = interleaved({**calls, "dense": forward_backward(dense, parts)}, repeats=3)
        figures[f"{name}: tokens"] = length
        figures[f"{name}: dense, s"] = statistics.median(found["dense"])
        for rounds, least in ((2, 4.0), (4, 2.0)):
            figures[f"{name}: {rounds} rounds, s"] = statistics.median(found[str(rounds)])
            figures[f"{name}: {rounds} rounds, faster, ×"] = ratio(found, "dense", str(rounds))
            reach[f"{name}: {rounds} rounds, faster, ×"] = (least, "min")
        lengths = [length // 4, length // 2, length, 2 * length]
        found = interleaved({str(n): forward_backward(hashed(2), tensors(n, dtype)) for n in lengths}, repeats=3)
        what = f"{name}: exponent of time, {lengths[0] // 1024}k to {lengths[-1] // 1024}k"
        figures[what], reach[what] = exponent(found), (1.25, "max")
    figures |= recovered()
    for depth in (2, 8, 24):
        for topology in ("sequential", "reversible"):
            figures[f"{topology}, {depth} blocks: peak MB"] = memory(depth, topology)
    figures["reversible: 24 blocks to 2, ×"] = (
        figures["reversible, 24 blocks: peak MB"] / figures["reversible, 2 blocks: peak MB"]
    )
    reach["reversible: 24 blocks to 2, ×"] = (1.1, "max")
    report("lsh", figures, reach)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        child(int(sys.argv[1]), sys.argv[2])
    else:
        main()
