"""Mixed attention against loops over groups of tokens and over heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.base.errors import InputError, UnsupportedError
from armillary.nn.context import Context
from armillary.nn.mechanism import Place, initialise
from armillary.nn.mixers.attention import AttentionSettings
from armillary.nn.mixers.mansformer import Mansformer, MansformerSettings

WIDTH, HEADS = 12, 3


def built(shake: Any, **settings: Any) -> Mansformer:
    made = MansformerSettings(**{"heads": HEADS, **settings}).build(Place(WIDTH, order="bidirectional"))
    initialise(made, 1)
    shake(made)
    return made


def only(mixer: Mansformer, kind: int) -> Mansformer:
    """The merge as one attention's weight 1, the others' 0."""
    with torch.no_grad():
        mixer.excite.weight.zero_()
        mixer.excite.bias.copy_((torch.arange(4) == kind).repeat_interleave(WIDTH) * 200.0 - 100)
    return mixer


def places(length: int, grid: tuple[int, int] | None, window: int, cells: int) -> tuple[list[Any], list[Any]]:
    """Of every token, what tokens share with it that are in its window, and that it sees from afar."""
    if grid is None:
        apart = -(-length // cells)
        return [t // window for t in range(length)], [t % apart for t in range(length)]
    down, across = (-(-side // cells) for side in grid)
    spots = [divmod(t, grid[1]) for t in range(length)]
    return [(a // window, b // window) for a, b in spots], [(a % down, b % across) for a, b in spots]


def loops(mixer: Mansformer, x: Tensor, near: list[Any], far: list[Any]) -> Tensor:
    """The four attentions of one row x [T, D], group by group and head by head, merged."""
    q, k, v = (each(x).unflatten(-1, (HEADS, -1)) for each in (mixer.q, mixer.k, mixer.v))

    def tokens(each: list[int], head: int) -> Tensor:
        scores = q[each, head] @ k[each, head].t() / q.shape[-1] ** 0.5
        return torch.softmax(scores, -1) @ v[each, head]

    def features(factor: Tensor) -> Callable[[list[int], int], Tensor]:
        def mixed(each: list[int], head: int) -> Tensor:
            a, b = (part[each, head] / part[each, head].norm(dim=0) for part in (q, k))
            return v[each, head] @ torch.softmax(a.t() @ b * factor[head], -1).t()

        return mixed

    kinds = []
    ways = (
        (near, tokens),
        (far, tokens),
        ([0] * len(x), features(mixer.factors[0])),
        (near, features(mixer.factors[1])),
    )
    for groups, mix in ways:
        y = torch.zeros(len(x), HEADS, WIDTH // HEADS)
        for group in dict.fromkeys(groups):
            each = [t for t, other in enumerate(groups) if other == group]
            for head in range(HEADS):
                index = torch.tensor(each), torch.tensor(head)
                y = y.index_put(index, mix(each, head))
        kinds.append(y.flatten(1))
    told = sum(kinds).mean(0)  # type: ignore[union-attr]
    weights = torch.sigmoid(mixer.excite(torch.relu(mixer.squeeze(told)))).unflatten(-1, (4, -1))
    return mixer.o(sum(w * y for w, y in zip(weights, kinds, strict=True)))


@pytest.mark.parametrize("grid", [None, (4, 5)])
def test_it_is_four_attentions_merged(grid: tuple[int, int] | None, shake: Any, agree: Any) -> None:
    mixer = built(shake, window=3, cells=2, grid=grid)
    x = torch.randn(1, 20, WIDTH, requires_grad=True)
    found = mixer(x, Context())
    expected = loops(mixer, x[0], *places(20, grid, 3, 2))[None]
    agree(found, expected)
    weights, wanted = torch.randn_like(found), [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * weights).sum(), wanted)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 1e-4)


@pytest.mark.parametrize("kind, settings", [(0, {"window": 4, "cells": 1}), (1, {"window": 1, "cells": 4})])
def test_one_group_for_the_whole_image_is_attention(
    kind: int, settings: dict[str, int], shake: Any, agree: Any, load: Any
) -> None:
    mixer = only(built(shake, grid=(4, 3), **settings), kind)
    dense = AttentionSettings(heads=HEADS).build(Place(WIDTH, order="bidirectional"))
    load(dense, {f"{name}.weight": getattr(mixer, name).weight for name in ("q", "k", "v", "o")})
    x = torch.randn(2, 12, WIDTH)
    agree(mixer(x, Context()), dense(x, Context()))


def test_tokens_out_of_every_group_do_not_meet(shake: Any) -> None:
    mixer, x = only(built(shake, window=3, cells=2), 0), torch.randn(1, 9, WIDTH)
    moved = x.clone()
    moved[:, 4] += 1
    change = (mixer(moved, Context()) - mixer(x, Context())).abs().amax((0, 2))
    assert (change > 0).tolist() == [3 <= t < 6 for t in range(9)]


def test_a_row_of_padding_alone_is_finite(shake: Any) -> None:
    padding = torch.tensor([[True] * 5, [False] * 5])
    assert bool(built(shake)(torch.randn(2, 5, WIDTH), Context(padding=padding)).isfinite().all())


def test_what_cannot_be_built_says_why(shake: Any) -> None:
    with pytest.raises(UnsupportedError, match="cannot be causal"):
        MansformerSettings().build(Place(16))
    with pytest.raises(UnsupportedError, match="does not divide into 4 heads"):
        MansformerSettings().build(Place(18, order="bidirectional"))
    with pytest.raises(InputError, match="7 tokens do not fit a grid of 2 lines and 3 columns"):
        built(shake, grid=(2, 3))(torch.randn(1, 7, WIDTH), Context())
