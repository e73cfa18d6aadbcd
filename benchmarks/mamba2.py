"""Mamba-2: forward and backward against `transformers` on the CPU, its memory, growth with length, decoding.

Width 512, expand 2, heads of 64, 128 features of state, batch 1; the same weights on both sides, outputs
and gradients compared in the run. Fraction of the floor: the time of the layer's products alone over that
of the layer. Peak memory is that of a process of its own, less what it held before the update. Where the
processor multiplies bf16 slowly the products are nearly all the time on both sides, so there bf16 is timed
at a shorter length and has nothing to reach.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.nn.context import Context
from armillary.nn.mechanism import Place, initialise
from armillary.nn.mixers.mamba2 import Mamba2, Mamba2Settings
from common import exponent, interleaved, largest_difference, peak_rss, ratio, report, slow

WIDTH, SHORT, LENGTH, LONG = 512, 256, 2048, 16384
PRODUCTS = ("gate", "v", "k", "q", "step")
CONVS = ("conv_v", "conv_k", "conv_q")


def ours() -> Mamba2:
    mixer = Mamba2Settings(head_width=64, state_width=128).build(Place(WIDTH))
    initialise(mixer, 0)
    return mixer


def theirs(mixer: Mamba2) -> Any:
    """The layer of `transformers`, with the same weights."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        num_heads=16, head_dim=64, hidden_size=WIDTH, state_size=128, n_groups=1, expand=2, num_hidden_layers=1
    )
    peer = Mamba2Mixer(config, 0)
    with torch.no_grad():
        peer.in_proj.weight.copy_(torch.cat([getattr(mixer, name).weight for name in PRODUCTS]))
        peer.conv1d.weight.copy_(torch.cat([getattr(mixer, name).weight for name in CONVS])[:, None])
        peer.conv1d.bias.copy_(torch.cat([getattr(mixer, name).bias for name in CONVS]))
        peer.A_log.copy_(mixer.decay.log_rate)
        peer.dt_bias.copy_(mixer.decay.bias)
        peer.D.copy_(mixer.skip)
        peer.norm.weight.copy_(mixer.norm_weight)
        peer.out_proj.weight.copy_(mixer.o.weight)
    return peer


def inputs(length: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, length, WIDTH, generator=generator).to(dtype).requires_grad_()


def update(call: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Any]) -> Callable[[], float]:
    """Seconds of one forward and backward pass."""

    def once() -> float:
        start = time.perf_counter()
        y = call(x)
        torch.autograd.grad(y, [x, *parameters], torch.ones_like(y))
        return time.perf_counter() - start

    return once


def products(mixer: Mamba2) -> Callable[[Tensor], Tensor]:
    """Nothing but the layer's products."""
    weight = torch.cat([getattr(mixer, name).weight for name in PRODUCTS])

    def call(x: Tensor) -> Tensor:
        made = F.linear(x, weight.to(x.dtype))
        return F.linear(made[..., : 2 * WIDTH], mixer.o.weight.to(x.dtype)) + made.sum(-1, keepdim=True)

    return call


def dense(length: int) -> Callable[[], float]:
    """Fused causal attention with 8 heads of 64 between products, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    weights = [(torch.randn(WIDTH, WIDTH, generator=generator) * WIDTH**-0.5).requires_grad_() for _ in range(4)]

    def call(x: Tensor) -> Tensor:
        q, k, v = (F.linear(x, weight).unflatten(-1, (8, 64)).transpose(1, 2) for weight in weights[:3])
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(y.transpose(1, 2).flatten(2), weights[3])

    return update(call, inputs(length, torch.float32), weights)


def memory(side: str) -> int:
    """Peak bytes of one layer's update, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--memory", side], capture_output=True, text=True, check=True)
    return int(done.stdout)


def grown(side: str) -> int:
    mixer = ours()
    peer = theirs(mixer)
    warm = inputs(16, torch.float32)  # what libraries take for themselves
    for layer in (lambda x: mixer(x, Context()), peer):
        update(layer, warm, [])()
    before = peak_rss()
    layer = peer if side == "theirs" else (lambda x: mixer(x, Context()))
    parameters = list(peer.parameters() if side == "theirs" else mixer.parameters())
    update(layer, inputs(LENGTH, torch.float32), parameters)()
    return peak_rss() - before


def decoding(mixer: Mamba2, seen: int) -> Callable[[], float]:
    """Seconds of a token once so many have been seen."""
    state = mixer.init_state(1, 1, torch.float32, "cpu")
    x = inputs(64, torch.float32).detach()
    with torch.no_grad():
        mixer.extend(inputs(seen, torch.float32), state, Context())

    def once() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            for t in range(64):
                mixer.extend(x[:, t : t + 1], state, Context())
        return (time.perf_counter() - start) / 64

    return once


def main(repeats: int = 5) -> None:
    mixer = ours()
    peer = theirs(mixer)
    wanted, parameters = list(mixer.parameters()), list(peer.parameters())

    def call(x: Tensor) -> Tensor:
        return mixer(x, Context())

    x = inputs(700, torch.float32)
    figures: dict[str, Any] = {
        "largest relative difference from transformers": largest_difference(call(x), [x], peer(x), [x])
    }
    reach: dict[str, tuple[float, str]] = {"largest relative difference from transformers": (1e-4, "max")}
    for dtype, goal in ((torch.float32, 2.5), (torch.bfloat16, 4.0)):
        word = str(dtype).removeprefix("torch.")
        imitated = slow(dtype)
        length = SHORT if imitated else LENGTH
        low = peer.to(dtype)
        x = inputs(length, dtype)
        calls = {
            "ours": update(call, x, wanted),
            "theirs": update(low, x, parameters),
            "products": update(products(mixer), x, [getattr(mixer, name).weight for name in (*PRODUCTS, "o")]),
        }
        found = interleaved(calls, repeats)
        for side in calls:
            figures[f"{side}, {word}, {length} tokens, s"] = statistics.median(found[side])
        figures[f"transformers over ours, {word}"] = ratio(found, "theirs", "ours")
        if not imitated:
            reach[f"transformers over ours, {word}"] = (goal, "min")
        figures[f"fraction of the products' floor, {word}"] = ratio(found, "products", "ours")
        peer.to(torch.float32)
    taken = {side: memory(side) for side in ("ours", "theirs")}
    for side, size in taken.items():
        figures[f"{side}, peak memory, MB"] = size / 1e6
    figures["peak memory, ours over theirs"] = taken["ours"] / taken["theirs"]
    reach["peak memory, ours over theirs"] = (0.5, "max")

    few = max(1, repeats // 2)
    found = interleaved({"ours": update(call, inputs(LONG, torch.float32), wanted), "dense": dense(LONG)}, few)
    figures[f"dense attention over ours, {LONG} tokens"] = ratio(found, "dense", "ours")
    reach[f"dense attention over ours, {LONG} tokens"] = (4.0, "min")
    lengths = {str(n): update(call, inputs(n, torch.float32), wanted) for n in (4096, 8192, 16384, 32768)}
    figures["time exponent, 4k to 32k"] = exponent(interleaved(lengths, few))
    reach["time exponent, 4k to 32k"] = (1.1, "max")
    found = interleaved({"after 64": decoding(mixer, 64), "after 16384": decoding(mixer, LONG)}, repeats)
    figures["a token, after 64 tokens, ms"] = 1e3 * statistics.median(found["after 64"])
    figures["a token, after 16384 over after 64"] = ratio(found, "after 16384", "after 64")
    reach["a token, after 16384 over after 64"] = (1.1, "max")
    report("mamba2", figures, reach)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("repeats", nargs="?", type=int, default=5)
    parser.add_argument("--memory", choices=("ours", "theirs"))
    given = parser.parse_args()
    if given.memory:
        print(grown(given.memory))
    else:
        main(given.repeats)
