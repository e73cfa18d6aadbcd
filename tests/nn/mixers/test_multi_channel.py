"""Attention across channels against PyTorch's attention over tokens and frames put side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.base.errors import InputError, SettingsError, UnsupportedError
from armillary.nn.context import Context
from armillary.nn.mechanism import Place
from armillary.nn.mixers.multi_channel import MultiChannel, MultiChannelSettings
from armillary.nn.sides.scales import ScalesSettings

TOKENS, CHANNELS, FRAMES, FEATURES = 6, 3, 4, 5


def made(**settings: Any) -> MultiChannel:
    given = {"heads": 2, "channels": CHANNELS, "features": FEATURES, **settings}
    mixer = MultiChannelSettings(**given).build(Place(16, order="bidirectional"))
    generator = torch.Generator().manual_seed(3)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return mixer


def published(mixer: MultiChannel, x: Tensor, streams: Tensor, real: Tensor) -> Tensor:
    """One row: x [T, D], streams [C, S, F], real [C, S]."""
    keys, values = [x @ mixer.k.weight.t()], [x @ mixer.v.weight.t()]
    made_keys = [s @ p.weight.t() + p.bias for s, p in zip(streams, mixer.keys, strict=True)]
    made_values = [s @ p.weight.t() for s, p in zip(streams, mixer.frames, strict=True)]
    for s in range(streams.shape[1]):
        there = [c for c in range(len(streams)) if real[c, s]]
        if mixer.shares is None:
            keys += [made_keys[c][s : s + 1] for c in there]
            values += [made_values[c][s : s + 1] for c in there]
        elif there:
            share = torch.softmax(mixer.shares[there], 0)
            keys.append(sum(a * made_keys[c][s : s + 1] for a, c in zip(share, there, strict=True)))
            values.append(sum(a * made_values[c][s : s + 1] for a, c in zip(share, there, strict=True)))
    q, k, v = (
        part.unflatten(-1, (2, 8)).transpose(0, 1)
        for part in (x @ mixer.q.weight.t(), torch.cat(keys), torch.cat(values))
    )
    return F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1) @ mixer.o.weight.t()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("join", ["together", "weighted"])
def test_it_is_attention_side_by_side(join: Any, padded: bool, agree: Any) -> None:
    mixer = made(join=join, padded=padded)
    x = torch.randn(2, TOKENS, 16, requires_grad=True)
    streams = torch.randn(2, CHANNELS, FRAMES, FEATURES)
    real = torch.ones(2, CHANNELS, FRAMES, dtype=torch.bool)
    side = {"channels": streams}
    if padded:
        real[0, 1, 2:], real[1, :, 3] = False, False
        side = {"channels": streams.masked_fill(~real[..., None], torch.nan), "channels_padding": real}
    found = mixer(x, Context(side=side))
    expected = torch.stack([published(mixer, *row) for row in zip(x, streams, real, strict=True)])
    agree(found, expected)
    wanted = [x, *mixer.parameters()]
    weights = torch.randn(found.shape)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), wanted) for y in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 1e-4)


def test_the_matrix_shows_which_frames_were_looked_at() -> None:
    mixer = made()
    matrix = mixer.sight(
        torch.randn(1, TOKENS, 16), Context(side={"channels": torch.randn(1, CHANNELS, FRAMES, FEATURES)})
    )
    assert matrix.shape == (1, 2, TOKENS, TOKENS + CHANNELS * FRAMES)
    assert torch.allclose(matrix.sum(-1), torch.ones(1, 2, TOKENS))


def test_channels_may_have_no_frames_at_all(agree: Any) -> None:
    x = torch.randn(1, TOKENS, 16)
    for join in ("together", "weighted"):
        mixer, none = made(join=join), torch.zeros(1, CHANNELS, 0, FEATURES)
        q, k, v = (part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (mixer.q, mixer.k, mixer.v))
        expected = mixer.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        agree(mixer(x, Context(side={"channels": none})), expected)


def test_a_row_of_padding_gives_zeros() -> None:
    x, streams = torch.randn(2, TOKENS, 16), torch.randn(2, CHANNELS, FRAMES, FEATURES)
    padding = torch.tensor([[True] * TOKENS, [False] * TOKENS])
    y = made()(x, Context(side={"channels": streams}, padding=padding))
    assert bool((y[1] == 0).all()) and bool(y.isfinite().all())


def test_scales_of_a_text() -> None:
    how = ScalesSettings(widths=(1, 3), features=8)
    ids = torch.tensor([[7, 3, 3, 9]])
    frames = how.make(ids, None)
    assert frames.shape == (1, 2, 4, 8)
    codes = frames[0, 0, :, :4]  # windows of one token are its code
    assert bool((codes.abs() == 1).all()) and torch.equal(codes[1], codes[2]) and not torch.equal(codes[0], codes[3])
    assert torch.allclose(frames[0, 1, 1, :4], codes[:3].mean(0)) and torch.allclose(
        frames[0, 1, 3, :4], codes[2:].mean(0)
    )
    padded, real = torch.tensor([[0, 0, 7, 3, 3, 9]]), torch.tensor([[False] * 2 + [True] * 4])
    assert torch.allclose(how.make(padded, real)[:, :, :4], frames) and bool(
        (how.make(padded, real)[:, :, 4:] == 0).all()
    )
    assert how.derive(gives="padding").make(padded, real)[0].tolist() == [[True] * 4 + [False] * 2] * 2
    many = ScalesSettings(widths=(1,), features=32).make(torch.arange(400)[None], None)[0, 0, :, :16]
    likeness = many @ many.t() / 16 - torch.eye(400)
    assert float(likeness.mean().abs()) < 0.01 and float(likeness.square().mean()) == pytest.approx(1 / 16, rel=0.1)


def test_what_it_cannot_do_says_why() -> None:
    x = torch.randn(2, TOKENS, 16)
    streams = torch.randn(2, CHANNELS, FRAMES, FEATURES)
    for wrong in (streams[:1], streams[:, :2], streams[..., :4], streams.long(), streams[0]):
        with pytest.raises(InputError, match="the side tensor 'channels' is"):
            made()(x, Context(side={"channels": wrong}))
    with pytest.raises(InputError, match="the side tensor 'channels_padding' is"):
        made(padded=True)(x, Context(side={"channels": streams, "channels_padding": torch.ones(2, CHANNELS)}))
    with pytest.raises(UnsupportedError, match="needs the side tensor 'channels_padding'"):
        made(padded=True)(x, Context(side={"channels": streams}))
    with pytest.raises(UnsupportedError, match="cannot be causal: its channels are given whole"):
        MultiChannelSettings().build(Place(16))
    with pytest.raises(UnsupportedError, match="does not divide into 3 heads"):
        MultiChannelSettings(heads=3).build(Place(16, order="bidirectional"))
    with pytest.raises(SettingsError, match="greater than 0"):
        MultiChannelSettings(channels=0)
    with pytest.raises(SettingsError, match="multiple of 4"):
        ScalesSettings(features=10)
