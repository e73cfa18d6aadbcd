"""Heads that look at contexts: depthwise convolutions of PyTorch before attention written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.mechanism import MixerSettings, Place, initialise
from armillary.nn.mixers.attention import AttentionSettings
from armillary.nn.mixers.transformer_plus_plus import TransformerPlusPlus, TransformerPlusPlusSettings
from armillary.nn.positions.rope import RopeSettings


def built(order: Any = "causal", **settings: Any) -> TransformerPlusPlus:
    made = TransformerPlusPlusSettings(**settings).build(Place(16, order=order))
    initialise(made, 1)
    return made


def written_out(mixer: TransformerPlusPlus, x: Tensor, grid: tuple[int, int] | None, causal: bool) -> Tensor:
    """Four heads of four features, of which the last two read contexts."""

    def contexts(rows: Tensor, kernel: Tensor) -> Tensor:
        first, last = rows.split([8, 8], -1)
        weights = torch.softmax(kernel.reshape(8, -1), -1)[:, None]
        line = last.transpose(1, 2)
        if grid is not None:
            image = F.conv2d(line.unflatten(2, grid), weights.unflatten(2, (3, 3)), padding=1, groups=8)
            return torch.cat([first, image.flatten(2).transpose(1, 2)], -1)
        size = weights.shape[2]
        room = (size - 1, 0) if causal else (size // 2, size // 2)
        return torch.cat([first, F.conv1d(F.pad(line, room), weights, groups=8).transpose(1, 2)], -1)

    q = x @ mixer.q.weight.t()
    k, v = contexts(x @ mixer.k.weight.t(), mixer.k_kernel), contexts(x @ mixer.v.weight.t(), mixer.v_kernel)
    q, k, v = (each.unflatten(-1, (4, 4)).transpose(1, 2) for each in (q, k, v))
    scores = q @ k.transpose(2, 3) / 2
    if causal:
        scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1), -torch.inf)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2) @ mixer.o.weight.t()


@pytest.mark.parametrize("order, kernel, grid", [("causal", 4, None), ("bidirectional", 3, (3, 4))])
def test_half_of_the_heads_attend_to_convolved_tokens(
    order: str, kernel: int, grid: tuple[int, int] | None, agree: Any
) -> None:
    mixer = built(order, kernel=kernel, grid=grid)
    x = torch.randn(2, 12, 16, requires_grad=True)
    found, expected = mixer(x, Context()), written_out(mixer, x, grid, order == "causal")
    agree(found, expected)
    weights, wanted = torch.randn_like(found), [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * weights).sum(), wanted)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 1e-4)


@pytest.mark.parametrize("settings", [{"kernel": 1}, {"context_heads": 0}])
def test_contexts_of_one_token_are_attention(settings: dict[str, int], agree: Any, load: Any) -> None:
    mixer = built(position=RopeSettings(), **settings)
    dense = AttentionSettings(position=RopeSettings()).build(Place(16))
    load(dense, {f"{name}.weight": getattr(mixer, name).weight for name in ("q", "k", "v", "o")})
    x = torch.randn(2, 9, 16)
    agree(mixer(x, Context()), dense(x, Context()))


def test_the_state_holds_a_cache_and_a_few_rows() -> None:
    mixer = built(kernel=3)
    state = mixer.init_state(2, 10, torch.bfloat16, "cpu")
    assert state.nbytes == 2 * 2 * (2 * 10 * 16 + 2 * 2 * 8)
    mixer.extend(torch.randn(2, 10, 16), state, Context())
    with pytest.raises(UnsupportedError, match="snapshot"):
        state.truncate(torch.tensor([4, 4]))


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(SettingsError, match="context_heads"):
        parse(MixerSettings, {"kind": "transformer_plus_plus", "context_heads": 5})
    with pytest.raises(UnsupportedError, match="does not divide into 4 heads"):
        TransformerPlusPlusSettings().build(Place(18))
    with pytest.raises(UnsupportedError, match="no middle"):
        built("bidirectional", kernel=2)
