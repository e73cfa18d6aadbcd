"""Channel attention of regions against PyTorch's pooling and convolution, one head after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.base.errors import InputError, SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.mechanism import MixerSettings, Place, initialise
from armillary.nn.mixers.lhc import Lhc, LhcSettings


def built(shake: Any, length: int = 20, **settings: Any) -> Lhc:
    made = LhcSettings(**{"heads": 4, "embed": 3, **settings}).build(Place(6, order="bidirectional", length=length))
    initialise(made, 1)
    shake(made)
    return made


def published(mixer: Lhc, x: Tensor, grid: tuple[int, int], pool: int, kernel: int, heads: int) -> Tensor:
    """On an image [B, C, h, w]; a sequence is an image of one line, pooled and convolved along it."""
    tall = [1 if grid[0] == 1 else size for size in (pool, kernel, 3)]
    image = x.transpose(1, 2).unflatten(2, grid)

    def mean(y: Tensor, size: tuple[int, int]) -> Tensor:
        middle = (size[0] // 2, size[1] // 2)
        return F.avg_pool2d(y, size, 1, middle, count_include_pad=False)

    q = mean(image, (tall[0], pool))
    k = F.max_pool2d(image, (tall[0], pool), 1, (tall[0] // 2, pool // 2))
    weight = mixer.v.weight.unflatten(1, (tall[1], kernel, -1)).permute(0, 3, 1, 2)
    v = F.conv2d(image, weight, mixer.v.bias, padding=(tall[1] // 2, kernel // 2))
    v = mean(v, (tall[2], 3))
    parts = []
    split = [each.flatten(2).chunk(heads, 2) for each in (q, k, v)]
    for head, a, b, c in zip(mixer.qk, *split, strict=True):
        scores = head(a) @ head(b).transpose(1, 2)
        own = torch.sigmoid(mixer.scale(scores.mean(2)))[..., None]
        parts.append(torch.softmax(scores / mixer.embed ** (mixer.norm + own), 2) @ c)
    return torch.cat(parts, 2).transpose(1, 2)


@pytest.mark.parametrize("grid, pool, kernel", [((4, 5), 3, 3), ((1, 20), 5, 3)])
def test_it_is_the_published_module(grid: tuple[int, int], pool: int, kernel: int, shake: Any, agree: Any) -> None:
    mixer = built(shake, grid=grid if grid[0] > 1 else None, pool=pool, kernel=kernel)
    x = torch.randn(2, 20, 6, requires_grad=True)
    found, expected = mixer(x, Context()), published(mixer, x, grid, pool, kernel, 4)
    agree(found, expected)
    weights, wanted = torch.randn_like(found), [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * weights).sum(), wanted)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 1e-4)


def test_identity_products_give_scaled_channel_attention(shake: Any, agree: Any) -> None:
    """embed = the region, no pooling, s = 0, c = ½: softmax(X Xᵀ / √R) V over features."""
    mixer = built(shake, heads=2, embed=10, pool=1, kernel=1)
    with torch.no_grad():
        for head in mixer.qk:
            head.weight.copy_(torch.eye(10))
            head.bias.zero_()
        mixer.scale.weight.zero_()
        mixer.scale.bias.fill_(-200)
    x = torch.randn(2, 20, 6)
    values = F.avg_pool1d(mixer.v(x).transpose(1, 2), 3, 1, 1, count_include_pad=False)
    parts = []
    for region, value in zip(x.transpose(1, 2).chunk(2, 2), values.chunk(2, 2), strict=True):
        parts.append(F.scaled_dot_product_attention(region, region, value))
    agree(mixer(x, Context()), torch.cat(parts, 2).transpose(1, 2))


def test_regions_change_places_with_their_heads(shake: Any, agree: Any) -> None:
    mixer = built(shake, heads=2, pool=1, kernel=1)
    other = built(shake, heads=2, pool=1, kernel=1)
    other.qk[0], other.qk[1] = mixer.qk[1], mixer.qk[0]
    x = torch.randn(1, 20, 6)
    x[:, 9:11] = 0  # where values are averaged across the border
    x[:, [0, 19]] = 0
    swapped = torch.cat([x[:, 10:], x[:, :10]], 1)
    a, b = mixer(x, Context()), other(swapped, Context())
    agree(b[:, 11:19], a[:, 1:9])
    agree(b[:, 1:9], a[:, 11:19])


def test_values_of_zero_add_nothing(shake: Any) -> None:
    mixer = built(shake)
    with torch.no_grad():
        mixer.v.weight.zero_()
        mixer.v.bias.zero_()
    assert bool((mixer(torch.randn(2, 13, 6), Context()) == 0).all())


def test_a_row_of_padding_alone_is_finite(shake: Any) -> None:
    padding = torch.tensor([[True] * 5, [False] * 5])
    assert bool(built(shake)(torch.randn(2, 5, 6), Context(padding=padding)).isfinite().all())


@pytest.mark.parametrize("length, grid", [(64, None), (24, None), (9, (4, 5)), (9, (8, 8))])
def test_every_head_learns_or_the_build_says_which_number_fits(length: int, grid: Any) -> None:
    place = Place(6, order="bidirectional", length=length)
    tokens, refused = length if grid is None else grid[0] * grid[1], 0
    for heads in range(1, 13):
        settings = LhcSettings(heads=heads, embed=4, grid=grid)
        fitting = -(-tokens // -(-tokens // heads))  # how many regions hold tokens
        if fitting < heads:
            refused += 1
            with pytest.raises(UnsupportedError, match=f"the other {heads - fitting} would never see one") as error:
                settings.build(place)
            assert str(error.value.hint).startswith(f"set heads: {fitting}, ")
            settings = settings.derive(heads=fitting)
        mixer = settings.build(place)
        initialise(mixer, 1)
        mixer(torch.randn(2, tokens, 6), Context()).square().sum().backward()
        assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in mixer.parameters())
    assert refused


def test_what_cannot_be_built_says_why(shake: Any) -> None:
    with pytest.raises(UnsupportedError, match="cannot be causal"):
        LhcSettings().build(Place(16))
    for key in ("pool", "kernel"):
        with pytest.raises(SettingsError, match=f"{key} \\(2\\) must be odd"):
            parse(MixerSettings, {"kind": "lhc", key: 2})
    for key in ("heads", "embed", "pool", "kernel"):
        with pytest.raises(SettingsError, match=key):
            parse(MixerSettings, {"kind": "lhc", key: 0})
    with pytest.raises(SettingsError, match="embed"):  # any power of 1 is 1, and nothing scales scores
        parse(MixerSettings, {"kind": "lhc", "embed": 1})
    with pytest.raises(InputError, match="21 tokens, but the heads' regions hold 20"):
        built(shake)(torch.randn(1, 21, 6), Context())
