"""Feedback memory against the paper's layer written as loops over blocks, and its limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.base.errors import ArmillaryError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.network import ModelSettings, Network, build

IDS = torch.randint(0, 24, (2, 22), generator=torch.Generator().manual_seed(3))
BLOCK = {"mixer": {"kind": "attention", "heads": 2}, "channel": "gated"}


def network(driver: dict[str, Any] | None, **more: Any) -> Network:
    data = {"width": 16, "depth": 2, "vocabulary": 24, "block": BLOCK, "driver": driver}
    return build(parse(ModelSettings, data | more))


def layer(block: Any, own: Tensor, seen: list[Tensor], which: list[int]) -> Tensor:
    """The block on rows `own`; row i looks at the first which[i] of all rows in `seen`."""
    mixer, norm = block.mixer.inner, block.mixer.norm
    keys = norm(torch.cat(seen, 1))
    q, k, v = (
        (rows @ product.weight.t()).unflatten(-1, (mixer.heads, mixer.width))
        for rows, product in ((norm(own), mixer.q), (keys, mixer.k), (keys, mixer.v))
    )
    out = []
    for i, count in enumerate(which):
        scores = torch.einsum("bhk,bshk->bhs", q[:, i], k[:, :count]) / math.sqrt(mixer.width)
        out.append(torch.einsum("bhs,bshk->bhk", torch.softmax(scores, -1), v[:, :count]).flatten(1))
    h = own + torch.stack(out, 1) @ mixer.o.weight.t()
    return h + block.channel(h, Context())


def paper(net: Network, x: Tensor, size: int, window: int) -> Tensor:
    """Layer by layer and block by block: tokens see f, the window and themselves; f sees the block and f."""
    for index, block in enumerate(net.blocks):
        f = net.driver.first[index].expand(len(x), -1, -1)
        rows, outputs = f.shape[1], []
        for begin in range(0, x.shape[1], size):
            own = x[:, begin : begin + size]
            back = x[:, max(0, begin - window * size) : begin]
            n = own.shape[1]
            outputs.append(layer(block, own, [f, back, own], [rows + back.shape[1] + i + 1 for i in range(n)]))
            last = layer(block, f, [f, own], [rows + n] * rows)
            f = last / (last.square().mean(-1, keepdim=True) + torch.finfo(last.dtype).eps).sqrt()
        x = torch.cat(outputs, 1)
    return x


@pytest.mark.parametrize("window", [0, 1, 2])
def test_outputs_and_gradients_are_the_papers(window: int, agree: Any) -> None:
    net = network({"kind": "feedback", "segment": 5, "window": window, "rows": 3})
    found, expected = net.driver(net.blocks, net.embed(IDS), Context()), paper(net, net.embed(IDS), 5, window)
    agree(found, expected)
    wanted = [net.embed.weight, net.driver.first, *net.blocks.parameters()]
    weights = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad((found * weights).sum(), wanted),
        torch.autograd.grad((expected * weights).sum(), wanted),
        strict=True,
    ):
        agree(a, b, 1e-4)


def test_recomputing_blocks_changes_no_gradient(agree: Any) -> None:
    net = network({"kind": "feedback", "segment": 5, "window": 1, "rows": 2})
    wanted = list(net.parameters())

    def slopes() -> list[Tensor]:
        return list(torch.autograd.grad(net(IDS).square().sum(), wanted))

    plain = slopes()
    net.recompute_blocks()
    for a, b in zip(slopes(), plain, strict=True):
        agree(a, b)


@torch.no_grad()
def test_without_rows_it_is_block_sliding_window_attention(agree: Any) -> None:
    """A block of 4 and the 2 before it; that is Transformer-XL's reach with a memory of 8."""
    net = network({"kind": "feedback", "segment": 4, "window": 2, "rows": 0})
    xl = network({"kind": "transformer_xl", "segment": 4, "memory": 8})
    xl.load_state_dict(net.state_dict())
    agree(net(IDS), xl(IDS))


@torch.no_grad()
def test_one_block_without_rows_is_the_plain_stack(agree: Any) -> None:
    net, plain = network({"kind": "feedback", "segment": 22, "rows": 0}), network(None)
    plain.load_state_dict(net.state_dict())
    agree(net(IDS), plain(IDS))


@torch.no_grad()
def test_beyond_the_window_only_the_rows_remember() -> None:
    """Two layers see 2 × 4 tokens back from a block's start; token 1 is felt in block [16, 20) by the rows alone."""
    changed = IDS.clone()
    changed[:, 1] = (changed[:, 1] + 1) % 24
    for rows, felt in ((0, False), (2, True)):
        net = network({"kind": "feedback", "segment": 4, "window": 1, "rows": rows})
        assert bool((net(changed)[:, 16:20] != net(IDS)[:, 16:20]).any()) is felt


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ArmillaryError, match="cannot drive 'retention'"):
        network({"kind": "feedback"}, block={"mixer": "retention", "channel": "gated"})(IDS)
    branches = [{"name": "channel", "channel": "gated"}, {"name": "mixer", "mixer": BLOCK["mixer"]}]
    with pytest.raises(ArmillaryError, match="mixers that read its input"):
        network({"kind": "feedback", "rows": 1}, block={"branches": branches})(IDS)
