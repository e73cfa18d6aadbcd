"""The contextual transformer block against the paper's formula in PyTorch's convolutions and unfolding."""

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
from armillary.nn.mixers.cot import Cot, CotSettings


def built(shake: Any, order: Any = "causal", **settings: Any) -> Cot:
    made = CotSettings(**{"groups": 2, "squeeze": 6, **settings}).build(Place(16, order=order))
    initialise(made, 1)
    shake(made)
    return made


def published(mixer: Cot, x: Tensor, grid: tuple[int, int], kernel: int, past: int | None = None) -> Tensor:
    """The block on an image [B, C, h, w], or on a sequence that is an image of one line, whose neighbours
    are then the `past` tokens on the left."""
    image = x.transpose(1, 2).unflatten(2, grid)
    tall = 1 if grid[0] == 1 else kernel
    sides = (kernel // 2, kernel // 2) if past is None else (past, 0)
    room = (*sides, tall // 2, tall // 2)

    def normed(norm: Any, y: Tensor) -> Tensor:
        return norm(y.movedim(1, -1)).movedim(-1, 1)

    def point(product: Any, y: Tensor) -> Tensor:
        return F.conv2d(y, product.weight[:, :, None, None], product.bias)

    convs = torch.cat([conv.weight.unflatten(1, (tall, kernel, -1)).permute(0, 3, 1, 2) for conv in mixer.convs])
    static = F.relu(normed(mixer.static_norm, F.conv2d(F.pad(image, room), convs, groups=len(mixer.convs))))
    hidden = F.relu(normed(mixer.embed_norm, point(mixer.embed, torch.cat([image, static], 1))))
    weights = point(mixer.weigh, hidden).unflatten(1, (-1, tall * kernel))
    weights = F.layer_norm(weights.movedim(2, -1), (tall * kernel,)) * mixer.gain[:, None, None]
    weights = (weights + mixer.shift[:, None, None]).movedim(-1, 2)
    values = normed(mixer.v_norm, point(mixer.v, image))
    around = F.unfold(F.pad(values, room), (tall, kernel)).unflatten(1, (values.shape[1], -1)).unflatten(-1, grid)
    dynamic = (around * weights.repeat_interleave(mixer.share, 1)).sum(2)
    dynamic = F.silu(normed(mixer.mixed_norm, dynamic))
    both = static + dynamic
    told = both.mean((2, 3), keepdim=True)
    if past is not None:
        told = both.cumsum(3) / torch.arange(1, grid[1] + 1)
    scores = point(mixer.gate, F.relu(normed(mixer.squeeze_norm, point(mixer.squeeze, told))))
    share = torch.softmax(scores.unflatten(1, (2, -1)), 1)
    return point(mixer.o, share[:, 0] * dynamic + share[:, 1] * static).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("grid, past", [((4, 5), None), ((1, 11), None), ((1, 11), 2)])
def test_it_is_the_papers_block(grid: tuple[int, int], past: int | None, shake: Any, agree: Any) -> None:
    mixer = built(
        shake, "bidirectional" if past is None else "causal", grid=grid if grid[0] > 1 else None, kernel=3, share=4
    )
    x = torch.randn(2, grid[0] * grid[1], 16, requires_grad=True)
    found, expected = mixer(x, Context()), published(mixer, x, grid, 3, past)
    agree(found, expected)
    weights, wanted = torch.randn_like(found), [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * weights).sum(), wanted)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    largest = max(float(each.abs().max()) for each in theirs)
    for a, b in zip(ours, theirs, strict=True):
        # a bias before a norm over what it shifts alike has a gradient of 0
        assert float((a - b).abs().max()) <= 1e-4 * max(float(b.abs().max()), largest / 100)


def test_weights_of_the_token_itself_leave_its_value(shake: Any, agree: Any) -> None:
    """A delta in the middle and a gate that takes the dynamic context: o(silu(norm(norm(v))))."""
    mixer = built(shake, "bidirectional", grid=(3, 4))
    with torch.no_grad():
        mixer.gain.zero_()
        mixer.shift.zero_()
        mixer.shift[:, mixer.hood.centre] = 1
        mixer.gate.weight.zero_()
        mixer.gate.bias.copy_(torch.tensor([50.0, -50.0]).repeat_interleave(16))
    x = torch.randn(2, 12, 16)
    agree(mixer(x, Context()), mixer.o(F.silu(mixer.mixed_norm(mixer.v_norm(mixer.v(x))))))


def test_a_moved_image_moves_the_result(shake: Any, agree: Any) -> None:
    mixer = built(shake, "bidirectional", grid=(6, 7), gate="token")
    image = torch.zeros(1, 6, 7, 16)
    image[:, 1:4, 1:4] = torch.randn(3, 3, 16)
    moved = image.roll((1, 2), (1, 2))
    a, b = (mixer(each.flatten(1, 2), Context()).unflatten(1, (6, 7)) for each in (image, moved))
    agree(b[:, 2:5, 3:6], a[:, 1:4, 1:4])


def test_an_image_row_by_row(shake: Any, agree: Any) -> None:
    """A causal one sees what lies above and to the left, and takes chunks that end inside a line."""
    mixer, x = built(shake, grid=(4, 5), gate="token"), torch.randn(2, 20, 16)
    whole = mixer(x, Context())
    moved = x.clone()
    moved[:, 11] += 1  # line 2, column 1
    changed = (mixer(moved, Context()) - whole).abs().amax((0, 2)).nonzero()[:, 0]
    assert changed.tolist() == [11, 12, 15, 16, 17]
    state, parts = mixer.init_state(2, 20, torch.float32, "cpu"), []
    for start, stop in ((0, 7), (7, 8), (8, 20)):
        ctx = Context(positions=torch.arange(start, stop)[None])
        parts.append(mixer.extend(x[:, start:stop], state, ctx))
    agree(torch.cat(parts, 1), whole)


def test_a_row_of_padding_alone_is_finite(shake: Any) -> None:
    padding = torch.tensor([[True] * 4, [False] * 4])
    for order in ("causal", "bidirectional"):
        assert bool(built(shake, order)(torch.randn(2, 4, 16), Context(padding=padding)).isfinite().all())


def test_what_cannot_be_built_says_why(shake: Any) -> None:
    for key in ("groups", "share"):
        with pytest.raises(UnsupportedError, match=key):
            CotSettings(**{key: 3}).build(Place(16))
    with pytest.raises(UnsupportedError, match="no middle"):
        CotSettings(kernel=4).build(Place(16, order="bidirectional"))
    with pytest.raises(InputError, match="grid of 2 lines"):
        built(shake, grid=(2, 3))(torch.randn(1, 7, 16), Context())
    for key in ("kernel", "groups", "share", "squeeze"):
        with pytest.raises(SettingsError, match=key):
            parse(MixerSettings, {"kind": "cot", key: 0})
