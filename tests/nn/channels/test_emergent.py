"""Emergent experts against loops over tokens, and the dense network that they are groups of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.channels.emergent import Emergent, EmergentSettings
from armillary.nn.channels.ffn import FFNSettings
from armillary.nn.channels.gated import GatedSettings
from armillary.nn.context import Context
from armillary.nn.linear import LowRankSettings
from armillary.nn.mechanism import ChannelSettings, Place, initialise
from armillary.nn.ops.routing import spread
from armillary.nn.taps import Taps

PLAIN = FFNSettings(hidden=24, activation="relu", bias=True)
GATED = GatedSettings(hidden=24, bias=True)


def built(dense: ChannelSettings, experts: int = 6, top: int = 2) -> Emergent:
    channel = EmergentSettings(experts=experts, top=top, dense=dense).build(Place(16, path="here"))
    initialise(channel, 1)
    with torch.no_grad():
        for parameter in channel.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return channel


def by_token(channel: Emergent, x: Tensor) -> Tensor:
    """Every token: scores against the mean of each expert's rows, the best experts, their features one by one."""
    dense, size = channel.dense, channel.size
    looked = dense.gate if channel.gated else dense.up
    out = []
    for token in x.reshape(-1, 16):
        scores = [float((token @ looked.weight[e * size : (e + 1) * size].mean(0)).detach()) for e in range(24 // size)]
        picked = sorted(range(len(scores)), key=lambda e: -scores[e])[: channel.top]
        y = dense.down.bias.clone()
        for feature in (f for e in picked for f in range(e * size, (e + 1) * size)):
            seen = looked.weight[feature] @ token + looked.bias[feature]
            if channel.gated:
                value = F.silu(seen) * (dense.up.weight[feature] @ token + dense.up.bias[feature])
            else:
                value = F.relu(seen)
            y = y + value * dense.down.weight[:, feature]
        out.append(y)
    return torch.stack(out).view(x.shape)


@pytest.mark.parametrize("dense", [PLAIN, GATED])
@pytest.mark.parametrize("top", [1, 4])
def test_it_is_the_loop_over_tokens(dense: ChannelSettings, top: int, agree: Any) -> None:
    channel, x = built(dense, top=top), torch.randn(2, 5, 16, requires_grad=True)
    found, expected = channel(x, Context()), by_token(channel, x)
    agree(found, expected)
    weights = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad((found * weights).sum(), [x, *channel.parameters()]),
        torch.autograd.grad((expected * weights).sum(), [x, *channel.parameters()]),
        strict=True,
    ):
        agree(a, b)


@pytest.mark.parametrize("dense", [PLAIN, GATED])
def test_all_experts_are_the_dense_network_bit_by_bit(dense: ChannelSettings, agree: Any) -> None:
    channel, x = built(dense, top=6), torch.randn(2, 5, 16)
    whole = dense.build(Place(16))
    whole.load_state_dict(channel.dense.state_dict())
    assert torch.equal(channel(x, Context()), whole(x, Context()))
    assert len(list(channel.parameters())) == len(list(whole.parameters()))
    picked = channel._picked(x, torch.arange(6).expand(2, 5, 6))  # the way of fewer experts, with all
    channel.top = 6
    agree(picked, whole(x, Context()))


def test_keys_are_means_of_what_features_look_for() -> None:
    for dense, name in ((PLAIN, "up"), (GATED, "gate")):
        channel = built(dense)
        rows = channel.dense.get_submodule(name).weight
        assert torch.allclose(channel.keys()[2], rows[8:12].mean(0))


def test_picks_do_not_depend_on_other_rows() -> None:
    channel, x = built(GATED), torch.randn(40, 7, 16)
    whole = channel.route(x, Context())
    assert all(torch.equal(channel.route(x[i : i + 1], Context()), whole[i : i + 1]) for i in range(40))


def test_experts_are_watched_and_picked_by_hand(agree: Any) -> None:
    channel, x = built(GATED), torch.randn(1, 5, 16)
    taps = Taps(["*.router"])
    channel(x, Context(taps=taps))
    shown = taps.seen["here.router"]
    assert torch.equal(shown, spread(channel.route(x, Context()), torch.ones(1, 5, 2), 6)) and bool(
        (shown.sum(-1) == 2).all()
    )
    by_hand = torch.tensor([0.0, 1, 0, 0, 1, 0]).expand(1, 5, 6)
    edited = channel(x, Context(taps=Taps(edits=[("*.router", lambda _: by_hand)])))
    agree(edited, channel._picked(x, torch.tensor([1, 4]).expand(1, 5, 2)))


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(UnsupportedError, match="24 hidden features do not divide into 5 experts"):
        EmergentSettings(experts=5, dense=PLAIN).build(Place(16))
    with pytest.raises(UnsupportedError, match="dense products only"):
        EmergentSettings(experts=4, dense=PLAIN).build(Place(16, linear={"up": LowRankSettings()}))
    for wrong in ({"experts": 2, "top": 3}, {"dense": {"kind": "ffn", "chunk": 4}}, {"dense": {"kind": "emergent"}}):
        with pytest.raises(SettingsError):
            parse(ChannelSettings, {"kind": "emergent"} | wrong)
