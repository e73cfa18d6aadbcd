"""Pruned attention against PyTorch's attention under the mask written out, and the masks that stand first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.mechanism import MixerSettings, Order, Place, initialise
from armillary.nn.mixers.pruned import Pruned, PrunedSettings

WIDTH, LENGTH = 16, 8


def made(order: Order = "causal", **settings: Any) -> Pruned:
    given = {"heads": 2, "length": LENGTH, "mask": "random", "keep": 0.5} | settings
    mixer = PrunedSettings(**given).build(Place(WIDTH, order=order))
    initialise(mixer, 1)
    return mixer


def written_out(mixer: Pruned, positions: Tensor, causal: bool) -> Tensor:
    """Bool [H, T, T] by a loop over pairs."""
    count = len(positions)
    mask = torch.zeros(mixer.heads, count, count, dtype=torch.bool)
    for t in range(count):
        for s in range(count):
            i, j = int(positions[t]), int(positions[s])
            if i < LENGTH and j < LENGTH:
                seen = mixer.kept[:, i, j]
            else:
                seen = mixer.distances[:, max(-LENGTH, min(LENGTH, i - j)) + LENGTH]
            mask[:, t, s] = seen & (not causal or s <= t)
    return mask


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
@pytest.mark.parametrize("start", [0, 3])
def test_it_is_masked_attention(order: Order, start: int, agree: Any) -> None:
    mixer = made(order)
    count = 20
    positions = torch.arange(start, start + count)
    x = torch.randn(2, count, WIDTH, requires_grad=True)
    mask = written_out(mixer, positions, order == "causal")
    q, k, v = ((x @ part.weight.t()).unflatten(-1, (2, 8)).transpose(1, 2) for part in (mixer.q, mixer.k, mixer.v))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask) @ torch.eye(8)
    expected = expected.transpose(1, 2).flatten(2) @ mixer.o.weight.t()
    found = mixer(x, Context(positions=positions[None]))
    agree(found, expected, 1e-5)
    weights, wanted = torch.randn_like(found), [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * weights).sum(), wanted)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 1e-4)


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.6])
def test_controls_keep_the_share_they_say(order: Order, keep: float) -> None:
    length = 128
    pairs = torch.ones(length, length, dtype=torch.bool)
    pairs = pairs.tril() if order == "causal" else pairs
    for mask in ("window", "random"):
        mixer = made(order, length=length, mask=mask, keep=keep)
        kept = mixer.kept & pairs
        assert float(kept.sum() / (2 * pairs.sum())) == pytest.approx(keep, abs=0.02)
        assert kept.diagonal(dim1=1, dim2=2).all() and mixer.distances[:, length].all()
    others = [made(mask="random", keep=0.5, seed=seed).kept for seed in (1, 1, 2)]
    assert torch.equal(others[0], others[1]) and not torch.equal(others[0], others[2])


def test_a_mask_is_no_parameter_and_is_stored() -> None:
    mixer = made()
    assert {"kept", "distances"} <= mixer.state_dict().keys()
    assert not {"kept", "distances"} & {name for name, _ in mixer.named_parameters()}
    assert mixer.to(torch.bfloat16).kept.dtype == torch.bool


def test_what_cannot_be_built_says_why() -> None:
    for words in ({"length": 0}, {"keep": 0.0}, {"keep": 1.5}, {"heads": 0}, {"mask": "some"}):
        with pytest.raises(SettingsError, match=next(iter(words))):
            parse(MixerSettings, {"kind": "pruned", **words})
    with pytest.raises(UnsupportedError, match="cannot be prefix"):
        made("prefix")
