"""Compact attention against masks written out, PyTorch's convolutions, and tied window attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.base.errors import UnsupportedError
from armillary.nn.context import Context
from armillary.nn.mechanism import Place, initialise
from armillary.nn.mixers.compact import Compact, CompactSettings
from armillary.nn.mixers.window import WindowSettings
from armillary.nn.positions.alibi import AlibiSettings
from armillary.nn.positions.rope import RopeSettings


def built(order: Any = "causal", **settings: Any) -> Compact:
    made = CompactSettings(**settings).build(Place(16, order=order))
    initialise(made, 1)
    nn.init.normal_(made.kernel, generator=torch.Generator().manual_seed(2))
    return made


def written_out(mixer: Compact, x: Tensor, seen: Tensor, grid: tuple[int, int] | None, causal: bool) -> Tensor:
    q, v = ((x @ each.weight.t()).unflatten(-1, (4, 4)).transpose(1, 2) for each in (mixer.qk, mixer.v))
    y = torch.softmax((q @ q.transpose(2, 3) / 2).masked_fill(~seen, -torch.inf), -1) @ v
    line, kernel = y.transpose(2, 3).flatten(1, 2), mixer.kernel.repeat_interleave(4, 0)[:, None]
    if grid is None:
        size = kernel.shape[2]
        room = (size - 1, 0) if causal else (size // 2, size // 2)
        added = F.conv1d(F.pad(line, room), kernel, groups=16)
    else:
        added = F.conv2d(line.unflatten(2, grid), kernel.unflatten(2, (3, 3)), padding=1, groups=16).flatten(2)
    return (line + added).transpose(1, 2) @ mixer.o.weight.t()


def square(grid: tuple[int, int], far: int) -> Tensor:
    lines = torch.arange(grid[0]).repeat_interleave(grid[1])
    columns = torch.arange(grid[1]).repeat(grid[0])
    near = (lines[:, None] - lines).abs() <= far
    return near & ((columns[:, None] - columns).abs() <= far)


@pytest.mark.parametrize("order, kernel, grid", [("causal", 4, None), ("bidirectional", 3, (3, 5))])
def test_it_is_windowed_attention_and_a_convolution(
    order: str, kernel: int, grid: tuple[int, int] | None, agree: Any
) -> None:
    mixer = built(order, window=3, kernel=kernel, grid=grid)
    x = torch.randn(2, 15, 16, requires_grad=True)
    distance = torch.arange(15)[:, None] - torch.arange(15)
    seen = (distance >= 0) & (distance < 3) if grid is None else square(grid, 2)
    found, expected = mixer(x, Context()), written_out(mixer, x, seen, grid, order == "causal")
    agree(found, expected)
    weights, wanted = torch.randn_like(found), [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * weights).sum(), wanted)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 1e-4)


def test_without_a_convolution_it_is_tied_window_attention(agree: Any, load: Any) -> None:
    rope = RopeSettings()
    mixer = built(window=4, position=rope)
    nn.init.zeros_(mixer.kernel)
    tied = WindowSettings(window=4, position=rope).build(Place(16))
    load(
        tied,
        {
            "q.weight": mixer.qk.weight,
            "k.weight": mixer.qk.weight,
            "v.weight": mixer.v.weight,
            "o.weight": mixer.o.weight,
        },
    )
    x = torch.randn(2, 11, 16)
    agree(mixer(x, Context()), tied(x, Context()))
    assert sum(p.numel() for p in mixer.parameters()) == 3 * 16 * 16 + 4 * 3


def test_an_image_row_by_row(agree: Any) -> None:
    """A causal one sees its lines above and its own, in chunks that end inside a line; the state is bounded."""
    mixer, x = built(window=2, grid=(4, 5)), torch.randn(2, 20, 16)
    whole = mixer(x, Context())
    with torch.no_grad():
        nn.init.zeros_(mixer.kernel)
        base, moved = mixer(x, Context()), x.clone()
        moved[:, 11] += 1  # line 2, column 1
        changed = (mixer(moved, Context()) - base).abs().amax((0, 2)).nonzero()[:, 0]
    assert changed.tolist() == [11, 12, 15, 16, 17]
    mixer = built(window=2, grid=(4, 5))
    state, parts = mixer.init_state(2, 20, torch.float32, "cpu"), []
    size = state.nbytes
    for start, stop in ((0, 7), (7, 8), (8, 20)):
        ctx = Context(positions=torch.arange(start, stop)[None])
        parts.append(mixer.extend(x[:, start:stop], state, ctx))
    agree(torch.cat(parts, 1), whole)
    assert state.nbytes == size


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(UnsupportedError, match="does not divide into 3 heads"):
        CompactSettings(heads=3).build(Place(16))
    with pytest.raises(UnsupportedError, match="rotations only"):
        CompactSettings(position=AlibiSettings()).build(Place(16))
    with pytest.raises(UnsupportedError, match="no middle"):
        built("bidirectional", kernel=2)
