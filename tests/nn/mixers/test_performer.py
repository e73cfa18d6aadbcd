"""Performer: its features against the exponential kernel, its op against the explicit matrix of the features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.base.errors import SettingsError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.mechanism import MixerSettings, Order, Place, initialise
from armillary.nn.mixers.attention import AttentionSettings
from armillary.nn.mixers.performer import Performer, PerformerSettings, orthogonal_directions


def built(order: Order = "causal", seed: int = 3, width: int = 16, **changes: Any) -> Performer:
    mixer = PerformerSettings(**{"heads": 2, "features": 32, **changes}).build(Place(width, order=order))
    initialise(mixer, seed)
    return mixer


def features(mixer: Performer, x: Tensor, hyperbolic: bool, relu: bool) -> Tensor:
    """φ as the paper writes it, without any stabiliser, in float64."""
    x = x.double() / mixer.width**0.25
    rows = []
    for direction in mixer.directions.double():
        rows.append(x @ direction)
    projected = torch.stack(rows, -1)
    if relu:
        return torch.where(projected > 0, projected, 0) + mixer.offset
    pair = torch.cat([projected, -projected], -1) if hyperbolic else projected
    return torch.exp(-(x**2).sum(-1, keepdim=True) / 2) * torch.exp(pair)


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
@pytest.mark.parametrize("variant", [{}, {"hyperbolic": True}, {"kernel": "relu"}])
@pytest.mark.parametrize("length", [7, 150])
def test_it_is_the_matrix_of_its_features(length: int, variant: dict[str, Any], order: Order, agree: Any) -> None:
    mixer = built(order, **variant)
    x = torch.randn(2, length, 16, requires_grad=True)
    heads = []
    for h in range(2):
        q, k, v = (x @ product.weight[8 * h : 8 * h + 8].t() for product in (mixer.q, mixer.k, mixer.v))
        q, k = (features(mixer, z, "hyperbolic" in variant, "kernel" in variant) for z in (q, k))
        weights = q @ k.transpose(1, 2)
        weights = weights.tril() if order == "causal" else weights
        heads.append((weights / weights.sum(-1, keepdim=True)).float() @ v)
    expected = torch.cat(heads, -1) @ mixer.o.weight.t()
    found = mixer(x, Context())
    agree(found, expected, 2e-5)
    slopes, wanted = torch.randn_like(expected), [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * slopes).sum(), wanted)
    theirs = torch.autograd.grad((expected * slopes).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 2e-4)


def estimates(q: Tensor, k: Tensor, draws: int, count: int, orthogonal: bool, hyperbolic: bool = False) -> Tensor:
    """[draws, len(q)] of φ(q)·φ(k), each from directions of its own."""
    found = []
    for draw in range(draws):
        generator = torch.Generator().manual_seed(draw)
        rows = count // 2 if hyperbolic else count
        if orthogonal:
            w = orthogonal_directions(rows, q.shape[1], generator)
        else:
            w = torch.randn(rows, q.shape[1], generator=generator, dtype=torch.float64)
        a, b = (torch.cat([z @ w.t(), -z @ w.t()], 1) if hyperbolic else z @ w.t() for z in (q, k))
        a, b = a - q.square().sum(1, keepdim=True) / 2, b - k.square().sum(1, keepdim=True) / 2
        found.append((a + b).exp().mean(1))
    return torch.stack(found)


@pytest.mark.parametrize("hyperbolic", [False, True])
@pytest.mark.parametrize("orthogonal", [False, True])
def test_features_estimate_the_exponential_without_bias(orthogonal: bool, hyperbolic: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = (0.35 * torch.randn(20, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    found = estimates(q, k, 4000, 16, orthogonal, hyperbolic)
    error = (found.mean(0) - (q * k).sum(1).exp()) / (found.std(0) / 4000**0.5)
    assert float(error.abs().max()) < 4.5  # standard errors, over 20 pairs


def test_errors_fall_with_features_and_with_orthogonality() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = (0.2 * torch.randn(20, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    few, many = (estimates(q, k, 3000, count, False).var(0) for count in (8, 32))
    assert float((few / many).mean()) == pytest.approx(4.0, rel=0.15)  # error ∝ 1/√m
    straight = estimates(q, k, 3000, 8, True).var(0)
    less = straight / few
    assert float(less.log().mean()) < -0.05 and float((less < 1).double().mean()) > 0.7


def test_directions_are_orthogonal_in_blocks_and_normal_in_length() -> None:
    made = orthogonal_directions(20, 8, torch.Generator().manual_seed(2))
    assert made.shape == (20, 8)
    for block in (made[:8], made[8:16], made[16:]):
        products = block @ block.t()
        torch.testing.assert_close(products, torch.diag(products.diagonal()), atol=1e-12, rtol=0)
    lengths = orthogonal_directions(4000, 8, torch.Generator().manual_seed(2)).square().sum(1)
    assert float(lengths.mean()) == pytest.approx(8, rel=0.05) and float(lengths.var()) == pytest.approx(16, rel=0.15)


def test_many_features_come_close_to_softmax_attention() -> None:
    x = torch.randn(2, 40, 32) * 0.35
    exact = AttentionSettings(heads=4, position=None).build(Place(32))
    errors = []
    for count in (64, 4096):
        mixer = built(width=32, heads=4, features=count)
        exact.load_state_dict({name: p for name, p in mixer.state_dict().items() if name.endswith("weight")})
        expected = exact(x, Context())
        errors.append(float(((mixer(x, Context()) - expected).norm() / expected.norm()).detach()))
    assert errors[1] < 0.05 and errors[1] < errors[0] / 3


def test_directions_are_redrawn_by_the_trainer_only_and_follow_from_what_is_stored() -> None:
    mixer, x = built(redraw=3), torch.randn(1, 5, 16)
    first = mixer.directions.clone()
    mixer(x, Context())
    for step in (1, 2):
        mixer.after_step(step, 10)
    assert torch.equal(mixer.directions, first)
    mixer.after_step(3, 10)
    second = mixer.directions.clone()
    assert not torch.equal(second, first) and int(mixer.draws) == 1
    again = built(redraw=3, seed=5)
    again.load_state_dict(mixer.state_dict())
    assert torch.equal(again(x, Context()), mixer(x, Context()))
    for each in (mixer, again):
        each.after_step(6, 10)
    assert torch.equal(again.directions, mixer.directions) and not torch.equal(mixer.directions, second)
    kept = built(redraw=None)
    first = kept.directions.clone()
    kept.after_step(1000, 1000)
    assert torch.equal(kept.directions, first)


def test_a_given_seed_means_the_same_directions_whatever_the_weights() -> None:
    one, two = built(seed=1), built(seed=2)
    assert not torch.equal(one.directions, two.directions)
    fixed = [PerformerSettings(heads=2, seed=9).build(Place(16, layer=layer)) for layer in (0, 0, 1)]
    for i, mixer in enumerate(fixed):
        initialise(mixer, i)
    assert torch.equal(fixed[0].directions, fixed[1].directions)
    assert not torch.equal(fixed[0].directions, fixed[2].directions)  # layers differ


@pytest.mark.parametrize("size", [30.0, 300.0])
def test_the_causal_stabiliser_is_causal_and_nothing_overflows(size: float) -> None:
    """A later key whose features dwarf the rest changes nothing before it."""
    mixer, x = built(), torch.randn(1, 100, 16)
    base = mixer(x, Context())
    moved = x.clone()
    moved[:, 60:] *= size
    y = mixer(moved, Context())
    assert bool(y.isfinite().all())
    torch.testing.assert_close(y[:, :60], base[:, :60], rtol=0, atol=1e-6)


def test_bad_settings_say_why() -> None:
    with pytest.raises(SettingsError, match="estimate softmax only"):
        parse(MixerSettings, {"kind": "performer", "kernel": "relu", "hyperbolic": True})
    with pytest.raises(SettingsError, match="7 is odd"):
        parse(MixerSettings, {"kind": "performer", "features": 7, "hyperbolic": True})
    with pytest.raises(SettingsError, match="features"):
        parse(MixerSettings, {"kind": "performer", "features": 0})
