"""Self-positioning points against the formulas of Park et al. 2023, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary.base.errors import InputError, SettingsError, UnsupportedError
from armillary.nn.context import Context
from armillary.nn.mechanism import Place
from armillary.nn.mixers.self_positioning import ChannelWise, SelfPositioning, SelfPositioningSettings, nearest
from armillary.nn.sides.helix import HelixSettings
from armillary.nn.taps import Taps

TOKENS = 9


def made(**settings: Any) -> SelfPositioning:
    given = {"points": 3, "features": 4, "neighbours": 4, "radius": 1.2, "sharpness": 0.7, **settings}
    mixer = SelfPositioningSettings(**given).build(Place(16, order="bidirectional"))
    generator = torch.Generator().manual_seed(3)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return mixer


def channel_wise(part: ChannelWise, here: Tensor, f: Tensor, there: list[Tensor], keys: list[Tensor]) -> Tensor:
    """Σ_m softmax_m(Q[δ_m − x; ψ_m; ψ_m − f]/τ) ⊙ R[δ_m − x; ψ_m; ψ_m − f] of one token, with the first layers
    as matrices on the concatenation: what the mixer adds to its key on account of the query is the last part's."""
    last = -part.query.weight
    first = torch.cat([part.offset.weight, part.key.weight - last, last], 1)
    scores, values = [], []
    for x, key in zip(there, keys, strict=True):
        hidden = torch.relu(first @ torch.cat([x - here, key, key - f]) + part.query.bias)
        of_score, of_value = hidden.chunk(2)
        scores.append(part.score.weight @ of_score / part.temperature)
        values.append(part.value.weight @ of_value + part.value.bias)
    return (torch.softmax(torch.stack(scores), 0) * torch.stack(values)).sum(0)


def published(mixer: SelfPositioning, x: Tensor, at: Tensor) -> Tensor:
    """One row x [T, D] at [T, 3]."""
    how = mixer.settings
    f = x @ mixer.inward.weight.t()
    where, what = [], []
    for z in mixer.points:
        alike = torch.softmax(torch.stack([z @ each for each in f]), 0)
        point = sum(weight * place for weight, place in zip(alike, at, strict=True))
        near = [torch.exp(-how.sharpness * (point - place).square().sum()) for place in at]
        where.append(point)
        what.append(sum(g * h * each for g, h, each in zip(near, alike, f, strict=True)))
    rows = []
    for t in range(len(x)):
        y = channel_wise(mixer.far, at[t], f[t], where, what)
        if mixer.near is not None:
            others = sorted(range(len(x)), key=lambda j: float((at[j] - at[t]).square().sum()))[: how.neighbours]
            others = [j for j in others if float((at[j] - at[t]).norm()) <= how.radius]
            local = channel_wise(mixer.near, at[t], f[t], [at[j] for j in others], [f[j] for j in others])
            share = torch.sigmoid(mixer.share)
            y = (1 - share) * local + share * y
        rows.append(mixer.o.weight @ y)
    return torch.stack(rows)


def cloud(rows: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, TOKENS, 16, requires_grad=True), torch.randn(rows, TOKENS, 3)


@pytest.mark.parametrize("settings", [{}, {"neighbours": 0}, {"temperature": 0.3, "neighbours": 40}])
def test_it_is_the_formula(settings: dict[str, Any], agree: Any) -> None:
    mixer, (x, at) = made(**settings), cloud()
    found = mixer(x, Context(side={"coordinates": at}))
    expected = torch.stack([published(mixer, row, place) for row, place in zip(x, at, strict=True)])
    agree(found, expected)
    wanted = [x, *mixer.parameters()]
    weights = torch.randn(found.shape)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), wanted) for y in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 1e-4)


def test_tokens_have_no_order_and_space_no_origin(agree: Any) -> None:
    mixer, (x, at) = made(), cloud()
    watch, moved = Taps(["*.points"]), Taps(["*.points"])
    y = mixer(x, Context(side={"coordinates": at}, taps=watch))
    order = torch.randperm(TOKENS)
    agree(mixer(x[:, order], Context(side={"coordinates": at[:, order]})), y[:, order])
    by = torch.tensor([3.0, -2.0, 0.5])
    agree(mixer(x, Context(side={"coordinates": at + by}, taps=moved)), y)
    agree(moved.seen[".points"], watch.seen[".points"] + by)


def test_points_stand_among_the_tokens() -> None:
    """Inside the convex hull: along any direction no further out than the furthest token."""
    mixer, (x, at) = made(points=8), cloud()
    watch = Taps(["*.points"])
    mixer(x, Context(side={"coordinates": at}, taps=watch))
    along = torch.nn.functional.normalize(torch.randn(50, 3), dim=1).t()
    assert bool(((watch.seen[".points"] @ along).amax(1) <= (at @ along).amax(1) + 1e-5).all())


def test_neighbours_are_the_nearest_first_ones_first() -> None:
    at = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0]]])
    near, seen = nearest(at, None, 3, 1.5)
    assert near[0].tolist() == [[0, 1, 2], [1, 0, 2], [2, 1, 3], [3, 2, 1]]
    assert seen[0].tolist() == [[True, True, False], [True] * 3, [True] * 3, [True, True, False]]
    _, seen = nearest(at, torch.tensor([[True, False, True, False]]), 9, 5.0)
    assert seen.sum(-1).tolist() == [[2, 2, 2, 2]]


def test_tokens_that_stand_together_read_each_other(agree: Any) -> None:
    """Equal distances, of 0 here, are told apart by the order of the tokens, whatever is beside the row."""
    mixer, (x, _) = made(neighbours=3), cloud()
    at = torch.zeros(2, TOKENS, 3)
    y = mixer(x, Context(side={"coordinates": at}))
    agree(mixer(x[1:], Context(side={"coordinates": at[1:]})), y[1:])
    padded = torch.cat([torch.randn(2, 4, 16), x], 1)
    real = torch.arange(TOKENS + 4).expand(2, -1) >= 4
    agree(mixer(padded, Context(side={"coordinates": at}, padding=real))[:, 4:], y)


def test_a_row_of_padding_gives_zeros() -> None:
    mixer, (x, at) = made(), cloud()
    padding = torch.tensor([[True] * TOKENS, [False] * TOKENS])
    y = mixer(x, Context(side={"coordinates": at}, padding=padding))
    assert bool((y[1] == 0).all()) and bool(y.isfinite().all())
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert bool(slope.isfinite().all()) and bool((slope[1] == 0).all())


def test_a_text_wound_around_a_drum() -> None:
    at = HelixSettings(period=8, radius=0.5, rise=0.25).make(torch.zeros(2, 20, dtype=torch.int64), None)
    assert at.shape == (2, 20, 3)
    assert torch.allclose(at[0, 11] - at[0, 3], torch.tensor([0.0, 0.0, 0.25]), atol=1e-6)
    assert torch.allclose(at[..., :2].norm(dim=-1), torch.tensor(0.5))
    steps = (at[0, 1:] - at[0, :-1]).norm(dim=-1)
    assert torch.allclose(steps, steps[0].expand_as(steps), atol=1e-5)


def test_what_it_cannot_do_says_why() -> None:
    mixer, (x, at) = made(), cloud()
    for given in (at[..., :2], at[:1], at[:, :4], at.long()):
        with pytest.raises(InputError, match="the side tensor 'coordinates' is"):
            mixer(x, Context(side={"coordinates": given}))
    with pytest.raises(UnsupportedError, match="needs the side tensor 'coordinates'"):
        mixer(x, Context())
    with pytest.raises(UnsupportedError, match="cannot be causal: its points stand where all tokens"):
        SelfPositioningSettings().build(Place(16))
    for wrong in ({"points": 0}, {"neighbours": -1}, {"radius": 0.0}):
        with pytest.raises(SettingsError, match="greater than"):
            SelfPositioningSettings(**wrong)
