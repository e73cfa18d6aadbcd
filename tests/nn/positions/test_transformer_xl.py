"""Transformer-XL's relative positions against XLNet's attention in `transformers`, and the formula as loops."""

from __future__ import annotations

import math
from typing import Any

import torch

from armillary.nn.context import Context
from armillary.nn.mechanism import Place
from armillary.nn.mixers.attention import AttentionSettings
from armillary.nn.positions.transformer_xl import TransformerXLPositionSettings

HEADS, WIDTH = 4, 32


def test_scores_and_gradients_are_xlnets(agree: Any, load: Any, shake: Any) -> None:
    """The layer of XLNet took the relative attention of Transformer-XL over as it was."""
    from transformers import XLNetConfig
    from transformers.models.xlnet.modeling_xlnet import XLNetModel, XLNetRelativeAttention

    length = 19
    config = XLNetConfig(d_model=WIDTH, n_head=HEADS, dropout=0.0, n_layer=1, d_inner=8, vocab_size=8)
    theirs = XLNetRelativeAttention(config)
    shake(theirs)
    torch.nn.init.ones_(theirs.layer_norm.weight)
    torch.nn.init.zeros_(theirs.layer_norm.bias)
    ours = AttentionSettings(heads=HEADS, position=TransformerXLPositionSettings()).build(Place(WIDTH))
    names = {f"{part}.weight": part for part in ("q", "k", "v")} | {"position.r.weight": "r"}
    table = {name: getattr(theirs, part).flatten(1).t() for name, part in names.items()}
    table |= {"o.weight": theirs.o.flatten(1), "position.u": theirs.r_w_bias, "position.v": theirs.r_r_bias}
    load(ours, table)
    x = torch.randn(2, length, WIDTH, requires_grad=True)
    later = torch.ones(length, length).triu(1)[:, :, None, None]
    r = XLNetModel(config).relative_positional_encoding(length, length, bsz=2)
    expected = theirs(x.transpose(0, 1), None, later, None, r, None)[0].transpose(0, 1)
    found = torch.nn.functional.layer_norm(x + ours(x, Context()), (WIDTH,), eps=config.layer_norm_eps)
    agree(found, expected)
    weights = torch.randn_like(expected)
    ours_of = [x, ours.q.weight, ours.position.u, ours.position.v, ours.position.r.weight, ours.o.weight]
    theirs_of = [x, theirs.q, theirs.r_w_bias, theirs.r_r_bias, theirs.r, theirs.o]
    slopes = torch.autograd.grad((found * weights).sum(), ours_of)
    wanted = torch.autograd.grad((expected * weights).sum(), theirs_of)
    for index, (a, b) in enumerate(zip(slopes, wanted, strict=True)):
        if index in (1, 4):
            b = b.flatten(1).t()
        agree(a, b.reshape(a.shape), 1e-4)


def test_one_score_is_the_papers_formula(agree: Any, shake: Any) -> None:
    """(q_i + u)·k_j + (q_i + v)·W_R r(i − j), pair by pair."""
    position = TransformerXLPositionSettings().build(Place(8), 2, 4)
    shake(position)
    q, k = torch.randn(1, 5, 2, 4), torch.randn(1, 5, 2, 4)
    places = torch.tensor([[3, 4, 9, 10, 40]])
    met, scores = position.relate(q, places, places)
    found = torch.einsum("bthk,bshk->bhts", met, k) + scores(torch.arange(5), torch.arange(5))
    expected = torch.zeros(1, 2, 5, 5)
    for h in range(2):
        for i in range(5):
            for j in range(5):
                distance = int(places[0, i] - places[0, j])
                angles = [distance / 10000 ** (2 * f / 8) for f in range(4)]
                r = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
                moved = (position.r.weight @ r).view(2, 4)[h]
                expected[0, h, i, j] = (q[0, i, h] + position.u[h]) @ k[0, j, h]
                expected[0, h, i, j] += (q[0, i, h] + position.v[h]) @ moved
    agree(found, expected)


def test_far_into_a_stream_scores_keep_their_digits(agree: Any) -> None:
    """Only differences count: a million tokens on, the same scores."""
    position = TransformerXLPositionSettings().build(Place(16), 2, 8)
    with torch.no_grad():
        for parameter in position.parameters():
            parameter.normal_()
    q, steps = torch.randn(1, 6, 2, 8), torch.arange(6)
    near = position.relate(q, steps[None], steps[None])[1](steps, steps)
    far = position.relate(q, steps[None] + 1_000_000, steps[None] + 1_000_000)[1](steps, steps)
    agree(far, near)
