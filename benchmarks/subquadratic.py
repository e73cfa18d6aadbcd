"""Attention that is cheap in length against PyTorch's fused dense attention: forward and backward at 16,384
tokens, how time grows from 4k to 32k, and Scatterbrain's error against either of its parts.

Batch 1, 8 heads of 64, gradients of queries, keys and values (LISA: of its input; its projections are
part of the mechanism), causal where the mechanism can be. Linformer is timed at rank 128.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.nn.context import Context
from armillary.nn.mechanism import Place, initialise
from armillary.nn.mixers.h_transformer import HTransformerSettings
from armillary.nn.mixers.linformer import LinformerSettings
from armillary.nn.mixers.lisa import LisaSettings
from armillary.nn.mixers.scatterbrain import ScatterbrainSettings
from armillary.nn.ops.features import log_features, orthogonal_features
from armillary.nn.ops.scatter import scatter_attend
from common import exponent, interleaved, ratio, report, slow

HEADS, EACH = 8, 64
LENGTHS = (4096, 8192, 16384, 32768)
AT = 16384
SETTINGS = {
    "h_transformer": (HTransformerSettings(heads=HEADS, block=16), "causal"),
    "h_transformer both ways": (HTransformerSettings(heads=HEADS, block=16), "bidirectional"),
    "linformer": (LinformerSettings(heads=HEADS, rank=128), "bidirectional"),
    "scatterbrain": (ScatterbrainSettings(heads=HEADS, window=64, features=64), "causal"),
    "lisa": (LisaSettings(heads=HEADS, codebooks=4, codewords=64), "causal"),
}


def dense(length: int, dtype: torch.dtype, causal: bool) -> Callable[[], float]:
    """Seconds of the peer."""
    q, k, v = (torch.randn(1, HEADS, length, EACH, dtype=dtype, requires_grad=True) for _ in range(3))
    return timed(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal), (q, k, v))


def ours(name: str, length: int, dtype: torch.dtype) -> Callable[[], float]:
    """Seconds of a mechanism: what stands between its projections."""
    settings, order = SETTINGS[name]
    mixer = settings.build(Place(HEADS * EACH, order=order, length=length))
    initialise(mixer, 0)
    x = torch.randn(1, length, HEADS * EACH, dtype=dtype, requires_grad=True)
    if name == "lisa":
        return timed(lambda: mixer(x, Context()), tuple(p for p in mixer.parameters() if p is not mixer.similarity))
    with torch.no_grad():
        frozen, values = mixer.freeze(x, Context()), mixer.values(x, Context())
    parts = {part: frozen.parts[part].detach().requires_grad_() for part in ("q", "k")}
    values = values.detach().requires_grad_()
    if name == "linformer":  # its projection along time belongs to it
        fresh = torch.randn(1, length, HEADS, EACH, dtype=dtype, requires_grad=True)

        def call() -> Tensor:
            k = mixer._project(fresh, mixer.along.keys, None)
            return mixer.mix(type(frozen)({**frozen.parts, "q": parts["q"], "k": k}), values)

        return timed(call, (parts["q"], fresh, values, *mixer.along.parameters()))
    return timed(lambda: mixer.mix(type(frozen)({**frozen.parts, **parts}), values), (*parts.values(), values))


def timed(call: Callable[[], Tensor], wanted: tuple[Tensor, ...]) -> Callable[[], float]:
    def once() -> float:
        start = time.perf_counter()
        y = call()
        torch.autograd.grad(y, wanted, torch.ones_like(y))
        return time.perf_counter() - start

    return once


def checked() -> None:
    """Far beyond their windows and blocks the mechanisms equal attention where they must: with keys that
    are all alike every token weighs the same."""
    x = torch.randn(1, 1000, HEADS * EACH)
    mean = x.cumsum(1) / torch.arange(1, 1001)[:, None]
    for name in ("h_transformer", "scatterbrain"):
        settings, order = SETTINGS[name]
        mixer = settings.build(Place(HEADS * EACH, order=order))
        initialise(mixer, 0)
        with torch.no_grad():
            mixer.k.weight.zero_()
            if name == "scatterbrain":
                mixer.q.weight.zero_()
            found, expected = mixer(x, Context()), mixer.o(mixer.v(mean))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def errors(size: float, length: int = 512, window: int = 64, features: int = 64) -> dict[str, float]:
    """Relative error of causal attention matrices of Gaussian queries and keys of this deviation. The
    variance of positive features grows with e^|q|², so at some size no number of them in use helps."""
    q, k = (size * torch.randn(1, HEADS, length, EACH) for _ in range(2))
    steps = torch.arange(length)
    later = steps[:, None] < steps
    scores = q @ k.transpose(2, 3) / EACH**0.5
    exact = torch.softmax(scores.masked_fill(later, -torch.inf), -1)
    far = later | (steps[:, None] - steps >= window)
    omega = orthogonal_features(features, EACH, 0, HEADS).float()
    logs = [log_features(z * EACH**-0.25, omega) for z in (q, k)]
    eye = torch.eye(length).expand(1, HEADS, -1, -1)

    def together(size: int) -> Tensor:
        return scatter_attend(q, k, eye, *logs, window=size, scale=EACH**-0.5, causal=True)

    found = {"sparse": torch.softmax(scores.masked_fill(far, -torch.inf), -1), "low rank": together(0)}
    found["both"] = together(window)
    return {name: float((made - exact).norm() / exact.norm()) for name, made in found.items()}


def main() -> None:
    torch.manual_seed(0)
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    checked()
    figures: dict[str, float] = {}
    reach: dict[str, tuple[float, str]] = {}
    for dtype, label in ((torch.float32, "float32"), (torch.bfloat16, "bf16")):
        less = 8 if slow(dtype) else 1
        at, lengths = AT // less, [length // less for length in LENGTHS]
        peers = {"dense": dense(at, dtype, True), "dense both ways": dense(at, dtype, False)}
        calls = peers | {name: ours(name, at, dtype) for name in SETTINGS}
        found = interleaved(calls, repeats=repeats)
        for name, (_, order) in SETTINGS.items():
            peer = "dense" if order == "causal" else "dense both ways"
            figures[f"{name} {label} times faster at {at}"] = ratio(found, peer, name)
            figures[f"{name} {label} seconds at {at}"] = statistics.median(found[name])
        for name in SETTINGS:
            seconds = interleaved({str(n): ours(name, n, dtype) for n in lengths}, repeats=repeats)
            what = f"{name} {label} exponent, {lengths[0]} to {lengths[-1]}"
            figures[what], reach[what] = exponent(seconds), (1.3 if name == "h_transformer" else 1.2, "max")
    for size in (0.25, 0.5, 1.0):
        wrong = errors(size)
        for name, value in wrong.items():
            figures[f"scatterbrain error at deviation {size}, {name}"] = value
        if size < 1:
            reach[f"scatterbrain error at deviation {size}, both"] = (min(wrong["sparse"], wrong["low rank"]), "max")
    report("subquadratic", figures, reach)


if __name__ == "__main__":
    main()
