"""Linformer against equation 7 of Wang et al. 2020, head by head, and against softmax attention at full rank."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.base.errors import InputError, SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context, Memory
from armillary.nn.mechanism import Place, initialise
from armillary.nn.mixers.linformer import Linformer, LinformerSettings
from armillary.nn.network import ModelSettings, build
from armillary.nn.taps import Taps

LENGTH = 12
Sharing = Literal["none", "headwise", "key_value"]
SHARINGS: tuple[Sharing, ...] = ("none", "headwise", "key_value")


def made(sharing: Sharing = "headwise", rank: int = 5, cross: bool = False) -> Linformer:
    place = Place(8, order="bidirectional", length=LENGTH, cross=cross)
    mixer = LinformerSettings(heads=2, rank=rank, sharing=sharing).build(place)
    generator = torch.Generator().manual_seed(3)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return mixer


def published(mixer: Linformer, x: Tensor, source: Tensor) -> Tensor:
    """head_i = softmax(Q Wᵢ (Eᵢ K Wᵢ)ᵀ / √d) · Fᵢ V Wᵢ for single rows x [T, D] and source [S, D]."""
    heads = []
    for i in range(2):
        part = slice(4 * i, 4 * i + 4)
        along_keys = mixer.along.keys[i if len(mixer.along.keys) > 1 else 0][:, : len(source)]
        along_values = along_keys
        if mixer.along.values is not None:
            along_values = mixer.along.values[i if len(mixer.along.values) > 1 else 0][:, : len(source)]
        q, k, v = x @ mixer.q.weight[part].t(), source @ mixer.k.weight[part].t(), source @ mixer.v.weight[part].t()
        heads.append(torch.softmax(q @ (along_keys @ k).t() / 4**0.5, -1) @ (along_values @ v))
    return torch.cat(heads, -1) @ mixer.o.weight.t()


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("length", [LENGTH, 7, 1])
def test_it_is_equation_seven(sharing: Sharing, length: int, agree: Any) -> None:
    mixer = made(sharing)
    x = torch.randn(3, length, 8, requires_grad=True)
    slopes = torch.randn(3, length, 8)
    found, expected = mixer(x, Context()), torch.stack([published(mixer, row, row) for row in x])
    agree(found, expected)
    wanted = [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * slopes).sum(), wanted)
    theirs = torch.autograd.grad((expected * slopes).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 5e-5)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_memory_is_projected_once(sharing: Sharing, agree: Any) -> None:
    mixer = made(sharing, cross=True)
    x, hidden = torch.randn(2, 5, 8), torch.randn(2, 9, 8)
    padding = torch.arange(9) < torch.tensor([[9], [4]])
    memory = Memory(hidden, padding)
    expected = torch.stack([published(mixer, x[0], hidden[0]), published(mixer, x[1], hidden[1, :4])])
    agree(mixer(x, Context(memory=memory)), expected)
    with torch.no_grad():
        state = mixer.init_state(2, 5, torch.float32, "cpu", memory)
        steps = [mixer.extend(x[:, t : t + 1], state, Context()) for t in range(5)]
    agree(torch.cat(steps, 1), expected)
    assert state.nbytes == 2 * 2 * 5 * 8 * 4  # rank rows of keys and values, whatever the memory's length


def test_full_rank_identities_make_softmax_attention(agree: Any) -> None:
    mixer = made(rank=LENGTH)
    with torch.no_grad():
        mixer.along.keys.copy_(torch.eye(LENGTH))
        assert mixer.along.values is not None
        mixer.along.values.copy_(torch.eye(LENGTH))
    x = torch.randn(2, LENGTH, 8)
    q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (mixer.q, mixer.k, mixer.v))
    y = F.scaled_dot_product_attention(q, k, v)
    agree(mixer(x, Context()), mixer.o(y.transpose(1, 2).flatten(2)))


def test_sharing_shares() -> None:
    sizes = {sharing: sum(p.numel() for p in made(sharing).parameters()) - 4 * 64 for sharing in SHARINGS}
    assert sizes == {"none": 4 * 5 * LENGTH, "headwise": 2 * 5 * LENGTH, "key_value": 5 * LENGTH}


def test_layers_can_share_a_projection() -> None:
    data = {
        "form": "encoder",
        "width": 8,
        "depth": 2,
        "vocabulary": 5,
        "context": LENGTH,
        "block": {"mixer": {"kind": "linformer", "heads": 2, "rank": 3}, "channel": {"kind": "ffn"}},
        "share": {"along": ["blocks.*.mixer.inner.along"]},
    }
    network = build(parse(ModelSettings, data))
    first, second = (network.get_submodule(f"blocks.{i}.mixer.inner") for i in range(2))
    assert first.along.keys is second.along.keys and first.q.weight is not second.q.weight


def test_the_projection_keeps_lengths() -> None:
    """The lemma behind it: at the start |E k|² is |k|² on average."""
    mixer = LinformerSettings(heads=2, rank=256).build(Place(8, order="bidirectional", length=64))
    initialise(mixer, 1)
    k = torch.randn(64, 500)
    assert float((mixer.along.keys[0] @ k).square().sum(0).mean() / k.square().sum(0).mean()) == pytest.approx(
        1, abs=0.03
    )


def test_a_row_without_tokens_gives_zeros() -> None:
    padding = torch.tensor([[True] * 6, [False] * 6])
    y = made()(torch.randn(2, 6, 8), Context(padding=padding))
    assert bool((y[1] == 0).all()) and bool(y.isfinite().all())


def test_what_it_cannot_do_says_why() -> None:
    with pytest.raises(UnsupportedError, match="cannot be causal: each of its rows mixes all tokens"):
        LinformerSettings().build(Place(16))
    with pytest.raises(UnsupportedError, match="does not divide into 3 heads"):
        LinformerSettings(heads=3).build(Place(16, order="bidirectional"))
    with pytest.raises(InputError, match="columns for 12 tokens, not for 13"):
        made()(torch.randn(1, 13, 8), Context())
    for wrong in ({"rank": 0}, {"heads": 0}):
        with pytest.raises(SettingsError, match="greater than 0"):
            LinformerSettings(**wrong)
    mixer = made(cross=True)
    state = mixer.init_state(1, 4, torch.float32, "cpu", Memory(torch.randn(1, 3, 8)))
    with pytest.raises(UnsupportedError, match="cannot be edited"):
        mixer.extend(torch.randn(1, 2, 8), state, Context(taps=Taps(edits=[("*.weights", torch.clone)])))
