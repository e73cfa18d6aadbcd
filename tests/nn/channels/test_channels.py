"""Channel mixers and activations against formulas written with PyTorch's functions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.base.settings import parse
from armillary.nn.activation import ACTIVATIONS
from armillary.nn.channels.ffn import FFNSettings
from armillary.nn.channels.gated import GatedSettings
from armillary.nn.context import Context
from armillary.nn.mechanism import ChannelSettings, Place, initialise
from armillary.nn.taps import Taps

FORMULAS = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_activations_are_their_formulas(name: str, agree: Any) -> None:
    x = torch.linspace(-6, 6, 101)
    agree(ACTIVATIONS[name](x), FORMULAS[name](x), 1e-6)
    assert set(ACTIVATIONS) == set(FORMULAS)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", FORMULAS)
def test_ffn_and_gated_ffn_are_their_formulas(name: Any, bias: bool, agree: Any, shake: Any) -> None:
    act, x = FORMULAS[name], torch.randn(2, 5, 8)

    def product(module: Any, x: Tensor) -> Tensor:
        y: Tensor = x @ module.weight.t()
        return y if module.bias is None else y + module.bias

    plain = FFNSettings(hidden=12, activation=name, bias=bias).build(Place(8))
    gated = GatedSettings(hidden=12, activation=name, bias=bias).build(Place(8))
    for module in (plain, gated):
        shake(module)
    agree(plain(x, Context()), product(plain.down, act(product(plain.up, x))))
    agree(gated(x, Context()), product(gated.down, act(product(gated.gate, x)) * product(gated.up, x)))


def test_default_widths() -> None:
    assert FFNSettings().features(96) == 384
    assert GatedSettings().features(96) == 256  # 8/3 · 96
    assert GatedSettings().features(100) == 288  # 266.7, rounded up to a multiple of 32


def test_hidden_features_can_be_edited(agree: Any) -> None:
    module = GatedSettings(hidden=12).build(Place(8, path="blocks.0.channel"))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)

    def only_third(hidden: Tensor) -> Tensor:
        return hidden * (torch.arange(12) == 3)

    x = torch.randn(1, 4, 8)
    taps = Taps(["blocks.0.channel.hidden"], [("blocks.0.channel.hidden", only_third)])
    y = module(x, Context(taps=taps))
    agree(y, taps.seen["blocks.0.channel.hidden"][..., 3:4] * module.down.weight[:, 3])


@pytest.mark.parametrize("kind", ["ffn", "gated"])
def test_chunks_change_nothing_and_keep_less(kind: str, agree: Any) -> None:
    """Outputs and gradients are those of all tokens at once; hidden features are not kept for the backward pass."""
    grads, sizes, outputs = [], [], []
    for chunk in (None, 3):
        channel = parse(ChannelSettings, {"kind": kind, "hidden": 64, "chunk": chunk}).build(Place(16))
        initialise(channel, 1)
        x = torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(2), requires_grad=True)
        kept: list[int] = []

        def keep(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(0 if isinstance(tensor, torch.nn.Parameter) else tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = channel(x, Context())
        sizes.append(sum(kept))
        outputs.append(y)
        grads.append(torch.autograd.grad(y.square().sum(), [x, *channel.parameters()]))
        with torch.no_grad():
            agree(channel(x, Context()), y)
    agree(outputs[1], outputs[0])
    for a, b in zip(*grads, strict=True):
        agree(a, b)
    assert sizes[1] < sizes[0] / 4
