"""The gated convolutional network against PyTorch's depthwise convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.base.errors import InputError, UnsupportedError
from armillary.nn.context import Context
from armillary.nn.mechanism import Place, initialise
from armillary.nn.mixers.gated_conv import GatedConv, GatedConvSettings


def built(order: Any = "causal", **settings: Any) -> GatedConv:
    made = GatedConvSettings(**{"hidden": 10, **settings}).build(Place(16, order=order))
    initialise(made, 1)
    return made


def convolved(mixer: GatedConv, x: Tensor, grid: tuple[int, int] | None, left: int, right: int) -> Tensor:
    both = torch.cat([x @ mixer.up.weight.t(), x @ mixer.gate.weight.t()], -1).transpose(1, 2)
    kernel = mixer.kernel[:, None]
    if grid is None:
        mixed = F.conv1d(F.pad(both, (left, right)), kernel, groups=20)
    else:
        mixed = F.conv2d(both.unflatten(2, grid), kernel.unflatten(2, (3, 3)), padding=1, groups=20).flatten(2)
    up, gate = mixed.transpose(1, 2).chunk(2, -1)
    return (up * F.gelu(gate)) @ mixer.down.weight.t()


@pytest.mark.parametrize(
    "order, kernel, grid, sides",
    [("causal", 4, None, (3, 0)), ("bidirectional", 5, None, (2, 2)), ("bidirectional", 3, (3, 4), (1, 1))],
)
def test_it_is_a_depthwise_convolution(
    order: str, kernel: int, grid: tuple[int, int] | None, sides: tuple[int, int], agree: Any
) -> None:
    mixer = built(order, kernel=kernel, grid=grid)
    x = torch.randn(2, 12, 16, requires_grad=True)
    found, expected = mixer(x, Context()), convolved(mixer, x, grid, *sides)
    agree(found, expected)
    weights, wanted = torch.randn_like(found), [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * weights).sum(), wanted)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 1e-4)


def test_a_causal_kernel_in_a_grid_is_masked(agree: Any) -> None:
    """Its weights after the middle are 0 (a masked convolution), and packed images stay apart."""
    mixer = built(grid=(3, 4), kernel=3)
    whole = built("bidirectional", grid=(3, 4), kernel=3)
    with torch.no_grad():
        for ours, theirs in ((whole.up, mixer.up), (whole.gate, mixer.gate), (whole.down, mixer.down)):
            ours.weight.copy_(theirs.weight)
        whole.kernel.zero_()
        whole.kernel[:, :5] = mixer.kernel
    x = torch.randn(1, 12, 16)
    agree(mixer(x, Context()), whole(x, Context()))
    twice = Context(
        documents=torch.tensor([0, 1]).repeat_interleave(12)[None], positions=torch.arange(12).repeat(2)[None]
    )
    agree(whole(torch.cat([x, x], 1), twice)[:, 12:], whole(x, Context()))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="a kernel of 2 has no middle"):
        built("bidirectional", kernel=2)
    with pytest.raises(InputError, match="13 tokens do not fit a grid of 3 lines and 4 columns"):
        built(grid=(3, 4))(torch.randn(1, 13, 16), Context())
