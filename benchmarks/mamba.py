"""Mamba: forward and backward against `transformers`' layer and against dense attention; memory, growth, decoding.

The mixer at width 512 (1,024 channels of 16 states, a convolution of 4), products included, batch 1.

(a) 2,048 tokens, forward and backward, against the loop over tokens of the plain form; forward alone also
against `transformers`' layer on the CPU (its loop in PyTorch) from the same weights. That peer's backward
pass fills tensors of the whole length for every token, so forward and backward together it is timed at
512 tokens, once, between two of ours; it falls behind further as length grows, so the ratio is a lower
bound. Outputs and gradients are compared in the run. The floor is the products alone.
(b) What the same takes in memory from before the model: the peaks of processes of their own.
(c) Against a layer of fused dense attention of 8 heads of 64 at 16,384 tokens; time from 4k to 32k.
(d) Decoding: one token after contexts from 1k to 64k, with the bytes of the state.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.nn.context import Context
from armillary.nn.mechanism import Place, initialise
from armillary.nn.mixers.mamba import Mamba, MambaSettings
from armillary.nn.ops import plain_ops
from armillary.nn.ops.scan import selective_scan
from common import exponent, interleaved, peak_rss, ratio, report, slow

WIDTH, HEADS, LENGTH, LONG = 512, 8, 2048, 16384
PEER = 512  # tokens of the peer's backward pass
CONTEXTS = (1024, 4096, 16384, 65536)


def ours(dtype: torch.dtype = torch.float32) -> Mamba:
    mixer = MambaSettings().build(Place(WIDTH))
    initialise(mixer, 0)
    return mixer.to(dtype)


def theirs(dtype: torch.dtype = torch.float32) -> Any:
    """The same layer in `transformers`, from the same weights."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    peer, mixer = MambaMixer(MambaConfig(hidden_size=WIDTH, state_size=16, vocab_size=8), 0), ours()
    with torch.no_grad():
        peer.in_proj.weight.copy_(torch.cat([mixer.v.weight, mixer.gate.weight]))
        peer.conv1d.weight.copy_(mixer.conv[:, None])
        for tensor, value in (
            (peer.conv1d.bias, mixer.conv_bias),
            (peer.x_proj.weight, mixer.choose.weight),
            (peer.dt_proj.weight, mixer.step.weight),
            (peer.dt_proj.bias, mixer.step_bias),
            (peer.A_log, mixer.log_decay),
            (peer.D, mixer.skip),
            (peer.out_proj.weight, mixer.o.weight),
        ):
            tensor.copy_(value)
    return peer.eval().to(dtype)


class Dense(nn.Module):
    """Fused causal attention with its four products."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Products(nn.Module):
    """The products of the mixer and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        mixer = ours()
        self.first, self.gate, self.choose, self.step, self.last = (
            mixer.v,
            mixer.gate,
            mixer.choose,
            mixer.step,
            mixer.o,
        )

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.first(x), self.gate(x)
        chosen = self.choose(u)
        steps = self.step(chosen[..., : self.step.inputs])
        return self.last(u + z + steps) + chosen.sum()


def inputs(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(length))
    return x.to(dtype).requires_grad_()


def called(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return (lambda x: module(x, Context())) if isinstance(module, Mamba) else module


def slopes(module: nn.Module, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    y = called(module)(x)
    return y, torch.autograd.grad(y.square().mean(), [x, *module.parameters()])


def timed(module: nn.Module, x: Tensor) -> Callable[[], float]:
    """Seconds of a forward and backward pass."""

    def once() -> float:
        start = time.perf_counter()
        slopes(module, x)
        return time.perf_counter() - start

    return once


def looped(module: nn.Module, x: Tensor) -> Callable[[], float]:
    """As `timed`, on the plain path."""

    def once() -> float:
        with plain_ops():
            return timed(module, x)()

    return once


def forward(module: nn.Module, x: Tensor) -> Callable[[], float]:
    """Seconds of a forward pass without gradients."""

    def once() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            called(module)(x)
        return time.perf_counter() - start

    return once


def core(length: int) -> tuple[Callable[[], float], Callable[[], float]]:
    """Seconds of the scan alone and of the attention alone, from what their products give."""
    generator = torch.Generator().manual_seed(0)
    mixer = ours()
    u, dt = (torch.randn(1, length, 2 * WIDTH, generator=generator).requires_grad_() for _ in range(2))
    b, c = (torch.randn(1, length, 16, generator=generator).requires_grad_() for _ in range(2))
    heads = [torch.randn(1, HEADS, length, WIDTH // HEADS, generator=generator).requires_grad_() for _ in range(3)]

    def once(call: Callable[..., Tensor], parts: list[Tensor]) -> float:
        start = time.perf_counter()
        y = call(*parts)
        torch.autograd.grad(y, parts, torch.ones_like(y))
        return time.perf_counter() - start

    def scan(u: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return selective_scan(u, dt, -mixer.log_decay.exp(), b, c, mixer.skip, mixer.step_bias)[0]

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return (lambda: once(scan, [u, dt, b, c])), (lambda: once(dense, heads))


def check() -> float:
    """The largest difference from the peer, of output and gradients, relative to their size."""
    mixer, peer, x = ours(), theirs(), inputs(300)
    y, found = slopes(mixer, x)
    expected, wanted = slopes(peer, x)
    named = dict(zip(["x", *(name for name, _ in peer.named_parameters())], wanted, strict=True))
    own = dict(zip(["x", *(name for name, _ in mixer.named_parameters())], found, strict=True))
    pairs = [
        (y, expected),
        (own["x"], named["x"]),
        (torch.cat([own["v.weight"], own["gate.weight"]]), named["in_proj.weight"]),
        (own["conv"], named["conv1d.weight"][:, 0]),
        (own["choose.weight"], named["x_proj.weight"]),
        (own["step_bias"], named["dt_proj.bias"]),
        (own["log_decay"], named["A_log"]),
        (own["skip"], named["D"]),
    ]
    return max(float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in pairs)


def alone(side: str) -> None:
    """Prints the seconds of one forward and backward pass, and the bytes beyond what was there before the model."""
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    if side == "theirs":
        import transformers.models.mamba.modeling_mamba  # noqa: F401 (its import is not what is measured)
    before = peak_rss()
    seconds = timed(theirs() if side == "theirs" else ours(), inputs(PEER))()
    print(seconds, peak_rss() - before)


def taken(side: str) -> tuple[float, float]:
    """In a process of its own."""
    command = [sys.executable, __file__, "alone", side]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, size = done.stdout.split()[-2:]
    return float(seconds), float(size)


@torch.no_grad()
def decoding() -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds per token and bytes of the state, after each context."""
    mixer, states = ours(), {}
    for context in CONTEXTS:
        states[str(context)] = mixer.init_state(1, context, torch.float32, "cpu")
        x = torch.randn(1, 4096, WIDTH, generator=torch.Generator().manual_seed(1))
        for start in range(0, context, 4096):
            mixer.extend(x[:, : min(4096, context - start)], states[str(context)], Context())
    token = torch.randn(1, 1, WIDTH)

    def step(state: Any) -> Callable[[], float]:
        def once() -> float:
            start = time.perf_counter()
            for _ in range(100):
                mixer.extend(token, state, Context())
            return (time.perf_counter() - start) / 100

        return once

    found = interleaved({name: step(state) for name, state in states.items()}, 15)
    return found, {name: state.nbytes for name, state in states.items()}


def main(repeats: int = 3) -> None:
    figures: dict[str, Any] = {"largest relative difference from transformers": check()}
    reach: dict[str, tuple[float, str]] = {"largest relative difference from transformers": (1e-4, "max")}

    def goal(name: str, value: float, bound: float, kind: str) -> None:
        figures[name], reach[name] = value, (bound, kind)

    for dtype in (torch.float32,) if slow(torch.bfloat16) else (torch.float32, torch.bfloat16):
        word, x = str(dtype).removeprefix("torch."), inputs(LENGTH, dtype)
        sides = {"ours": ours(), "theirs": theirs(dtype)}
        found = interleaved({name: forward(module, x) for name, module in sides.items()}, repeats)
        for name, times in found.items():
            figures[f"{word}, {LENGTH} tokens, forward of {name}, ms"] = 1e3 * statistics.median(times)
        figures[f"{word}, forward, faster than transformers, ×"] = ratio(found, "theirs", "ours")
        mixer, products = ours(), Products()
        calls = {"ours": timed(mixer, x), "loop": looped(mixer, x), "products": timed(products, x)}
        found = interleaved(calls, repeats)
        for name, times in found.items():
            figures[f"{word}, {LENGTH} tokens, forward and backward of {name}, ms"] = 1e3 * statistics.median(times)
        figures[f"{word}, faster than the token loop, ×"] = ratio(found, "loop", "ours")
        figures[f"{word}, share of the products' floor"] = ratio(found, "products", "ours")

    (before, size), (peer, peer_size), (after, _) = taken("ours"), taken("theirs"), taken("ours")
    figures[f"float32, {PEER} tokens, forward and backward of transformers, s"] = peer
    goal(f"float32, {PEER} tokens, faster than transformers, ×", peer / max(before, after), 10.0, "min")
    figures[f"memory of ours, {PEER} tokens, MB"] = size / 1e6
    figures[f"memory of transformers, {PEER} tokens, MB"] = peer_size / 1e6
    goal("memory relative to transformers", size / peer_size, 0.5, "max")

    x = inputs(LONG)
    found = interleaved({"mamba": timed(ours(), x), "dense": timed(Dense(), x)}, repeats)
    for name, times in found.items():
        figures[f"float32, {LONG} tokens, {name} layer, s"] = statistics.median(times)
    goal("faster than a layer of dense attention, ×", ratio(found, "dense", "mamba"), 4.0, "min")
    scan, dense = core(LONG)
    found = interleaved({"scan": scan, "dense": dense}, repeats)
    figures["the scan alone against the attention alone, ×"] = ratio(found, "dense", "scan")
    mixer = ours()
    found = interleaved({str(n): timed(mixer, inputs(n)) for n in (4096, 8192, 16384, 32768)}, repeats)
    goal("exponent of time, 4k to 32k", exponent(found), 1.1, "max")

    found, held = decoding()
    for context, times in found.items():
        figures[f"decoding after {context}, µs a token"] = 1e6 * statistics.median(times)
    shortest = str(CONTEXTS[0])
    worst = max(abs(ratio(found, context, shortest) - 1) for context in found)
    goal("decoding, largest change with context, %", 100 * worst, 10.0, "max")
    figures["state, bytes"] = held[shortest]
    assert len(set(held.values())) == 1, "the state grew"
    report("mamba", figures, reach)


if __name__ == "__main__":
    if sys.argv[1:2] == ["alone"]:
        alone(sys.argv[2])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
