"""Mamba against `transformers`' layer from the same weights: whole, in chunks and token by token, with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from armillary.base.errors import UnsupportedError
from armillary.nn.context import Context
from armillary.nn.mechanism import Place, initialise
from armillary.nn.mixers.mamba import Mamba, MambaSettings

WIDTH = 24


def theirs(bias: bool = False, conv_bias: bool = True) -> MambaMixer:
    config = MambaConfig(
        hidden_size=WIDTH,
        state_size=5,
        expand=2,
        conv_kernel=4,
        time_step_rank=3,
        num_hidden_layers=1,
        vocab_size=8,
        use_bias=bias,
        use_conv_bias=conv_bias,
    )
    return MambaMixer(config, 0).eval()


def table(peer: MambaMixer) -> dict[str, Tensor]:
    """The peer's tensors by our names."""
    (v, gate), found = peer.in_proj.weight.chunk(2), {}
    if peer.in_proj.bias is not None:
        found["v.bias"], found["gate.bias"] = peer.in_proj.bias.chunk(2)
        found["o.bias"] = peer.out_proj.bias
    if peer.conv1d.bias is not None:
        found["conv_bias"] = peer.conv1d.bias
    return found | {
        "v.weight": v,
        "gate.weight": gate,
        "conv": peer.conv1d.weight[:, 0],
        "choose.weight": peer.x_proj.weight,
        "step.weight": peer.dt_proj.weight,
        "step_bias": peer.dt_proj.bias,
        "log_decay": peer.A_log,
        "skip": peer.D,
        "o.weight": peer.out_proj.weight,
    }


@pytest.fixture(params=[(False, True), (True, False)], ids=["published", "biased"])
def pair(request: Any, load: Any, shake: Any) -> tuple[Mamba, MambaMixer]:
    bias, conv_bias = request.param
    peer = theirs(bias, conv_bias)
    shake(peer)
    settings = MambaSettings(states=5, rank=3, bias=bias, conv_bias=conv_bias)
    ours = settings.build(Place(WIDTH))
    load(ours, table(peer))
    return ours, peer


def test_outputs_and_gradients_are_theirs(pair: tuple[Mamba, MambaMixer], agree: Any) -> None:
    ours, peer = pair
    x = torch.randn(2, 37, WIDTH, requires_grad=True)
    weights = torch.randn(2, 37, WIDTH)
    found, expected = ours(x, Context()), peer(x)
    agree(found, expected, 1e-5)
    own, other = dict(ours.named_parameters()), dict(peer.named_parameters())
    slopes = torch.autograd.grad((found * weights).sum(), [x, *own.values()])
    wanted = torch.autograd.grad((expected * weights).sum(), [x, *other.values()])
    agree(slopes[0], wanted[0], 1e-4)
    with torch.no_grad():  # the peer's gradients, cut and named as its tensors are
        for tensor, slope in zip(other.values(), wanted[1:], strict=True):
            tensor.copy_(slope)
    named = table(peer)
    for name, slope in zip(own, slopes[1:], strict=True):
        agree(slope, named[name], 1e-4)


@pytest.mark.parametrize("cuts", [[1] * 23, [9, 1, 2, 11]], ids=["tokens", "chunks"])
def test_in_pieces_it_is_theirs(pair: tuple[Mamba, MambaMixer], cuts: list[int], agree: Any) -> None:
    ours, peer = pair
    x = torch.randn(2, 23, WIDTH)
    with torch.no_grad():
        state = ours.init_state(2, 1, torch.float32, "cpu")
        found = torch.cat([ours.extend(part, state, Context()) for part in x.split(cuts, 1)], 1)
        agree(found, peer(x), 1e-5)


def test_padding_on_the_left_is_theirs(pair: tuple[Mamba, MambaMixer], agree: Any) -> None:
    ours, peer = pair
    x = torch.randn(2, 12, WIDTH)
    padding = torch.arange(12) >= torch.tensor([[0], [5]])
    with torch.no_grad():
        found = ours(x, Context(padding=padding))
        agree(found[1:, 5:], peer(x[1:, 5:]), 1e-5)


def test_a_fresh_one_starts_as_published() -> None:
    ours = MambaSettings().build(Place(64))
    initialise(ours, 0)
    assert torch.equal(ours.log_decay.exp().round(), torch.arange(1.0, 17).expand(128, -1))
    steps = torch.nn.functional.softplus(ours.step_bias).detach()
    assert 1e-3 * 0.99 <= float(steps.min()) < 3e-3 and 3e-2 < float(steps.max()) <= 1e-1 * 1.01
    assert torch.equal(ours.skip, torch.ones(128))
    assert ours.choose.weight.shape == (4 + 2 * 16, 128)  # a rank of ⌈64 / 16⌉


def test_the_state_is_of_one_size() -> None:
    ours = MambaSettings().build(Place(WIDTH))
    initialise(ours, 0)
    state = ours.init_state(3, 4, torch.bfloat16, "cpu")
    size = state.nbytes
    with torch.no_grad():
        ours.extend(torch.randn(3, 50, WIDTH).bfloat16(), state, Context())
    assert state.nbytes == size == 3 * (48 * 16 * 4 + 48 * 3 * 2)


def test_a_row_of_padding_alone_gives_finite_numbers() -> None:
    ours = MambaSettings(states=4).build(Place(WIDTH))
    initialise(ours, 0)
    padding = torch.tensor([[True] * 6, [False] * 6])
    x = torch.randn(2, 6, WIDTH, requires_grad=True)
    y = ours(x, Context(padding=padding))
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert bool(y.isfinite().all()) and bool(slope.isfinite().all())


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(UnsupportedError, match="cannot be bidirectional"):
        MambaSettings().build(Place(WIDTH, order="bidirectional"))
