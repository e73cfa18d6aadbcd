"""Attention as a marginal probability, against Bayes' rule and against every alignment one by one."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary.base.errors import InputError, SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.mechanism import Mixer, MixerSettings, Place
from armillary.nn.mixers.marginal import MarginalSettings
from armillary.nn.mixers.marginal_chain import MarginalChain, MarginalChainSettings


def drawn(mixer: Mixer) -> Any:
    generator = torch.Generator().manual_seed(3)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return mixer


def heads(x: Tensor, weight: Tensor, count: int) -> Tensor:
    return (x @ weight.t()).unflatten(-1, (count, -1)).transpose(1, 2)


def slopes(y: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad((y * weights).sum(), wanted))


# -- independent edges


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
def test_the_posterior_is_bayes_rule(order: Any, agree: Any) -> None:
    """p(j | i) = π(i − j) · exp(s_ij) / Σ, edge by edge, with offsets beyond the reach sharing a prior."""
    mixer = drawn(MarginalSettings(heads=2, reach=3).build(Place(16, order=order)))
    x = torch.randn(2, 9, 16, requires_grad=True)
    q, k, v = (heads(x, product.weight, 2) for product in (mixer.q, mixer.k, mixer.v))
    rows = []
    for i in range(9):
        seen = range(i + 1) if order == "causal" else range(9)
        joint = []
        for j in seen:
            offset = max(-3, min(3, i - j)) + (3 if order == "bidirectional" else 0)
            likelihood = ((q[:, :, i] * k[:, :, j]).sum(-1) / math.sqrt(8)).exp()
            joint.append(mixer.table[:, offset].exp() * likelihood)
        total = torch.stack(joint).sum(0)
        rows.append(sum((p / total)[..., None] * v[:, :, j] for p, j in zip(joint, seen, strict=True)))
    expected = torch.stack(rows, 2).transpose(1, 2).flatten(2) @ mixer.o.weight.t()
    found = mixer(x, Context())
    agree(found, expected)
    wanted = [x, *mixer.parameters()]
    for a, b in zip(slopes(found, wanted), slopes(expected, wanted), strict=True):
        agree(a, b, 1e-4)


def test_a_given_prior_decides_which_edges_there_are() -> None:
    mixer = drawn(MarginalSettings(heads=2, prior="given").build(Place(16, order="bidirectional")))
    prior = torch.randn(2, 6, 6)
    prior[:, 1, 4] = -torch.inf
    prior[0, 2] = -torch.inf
    matrix = mixer.sight(torch.randn(2, 6, 16), Context(side={"prior": prior}))
    assert bool((matrix[:, :, 1, 4] == 0).all()) and bool((matrix[0, :, 2] == 0).all())
    rest = torch.ones(2, 2, 6)
    rest[0, :, 2] = 0
    assert torch.allclose(matrix.sum(-1), rest)


def test_a_prior_that_does_not_fit_says_so() -> None:
    mixer = drawn(MarginalSettings(prior="given").build(Place(16)))
    x = torch.randn(2, 6, 16)
    for prior, message in (
        (torch.zeros(6, 6), "has shape"),
        (torch.zeros(1, 6, 6), "has shape"),
        (torch.zeros(2, 5, 5), "ends before position 5"),
    ):
        with pytest.raises(InputError, match=message):
            mixer(x, Context(side={"prior": prior}))
    with pytest.raises(UnsupportedError, match="needs the side tensor 'prior'"):
        mixer(x, Context())


# -- chains


def enumerated(mixer: MarginalChain, x: Tensor, order: str) -> Tensor:
    """The marginal of every pointer by summing the weights of all alignments."""
    count, reach = x.shape[1], mixer.moves.shape[1] // 2
    q, k, v = (heads(x, product.weight, mixer.heads) for product in (mixer.q, mixer.k, mixer.v))
    scores = q @ k.transpose(2, 3) / mixer.width**0.5  # [B, H, T, T]

    def marginals(steps: int) -> Tensor:
        """[B, H, steps, T] over alignments of the first `steps` tokens."""
        total, found = torch.zeros_like(scores[:, :, 0, 0]), torch.zeros_like(scores[:, :, :steps])
        found = list(found.unbind(2))
        for path in itertools.product(range(count), repeat=steps):
            if order == "causal" and any(j > t for t, j in enumerate(path)):
                continue
            jumps = [b - a for a, b in itertools.pairwise(path)]
            if any(abs(jump) > reach for jump in jumps):
                continue
            log = sum(scores[:, :, t, j] for t, j in enumerate(path)) + sum(mixer.moves[:, j + reach] for j in jumps)
            weight = log.exp()
            total = total + weight
            for t, j in enumerate(path):
                found[t] = found[t] + weight[..., None] * torch.eye(count)[j]
        return torch.stack(found, 2) / total[..., None, None]

    if order == "causal":
        weights = torch.stack([marginals(t + 1)[:, :, t] for t in range(count)], 2)
    else:
        weights = marginals(count)
    return (weights @ v).transpose(1, 2).flatten(2) @ mixer.o.weight.t()


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("reach", [1, 2])
@pytest.mark.parametrize("order", ["causal", "bidirectional"])
def test_marginals_are_those_of_all_alignments(order: Any, reach: int, length: int, agree: Any) -> None:
    mixer = drawn(MarginalChainSettings(heads=2, reach=reach).build(Place(16, order=order)))
    x = torch.randn(2, length, 16, requires_grad=True)
    found, expected = mixer(x, Context()), enumerated(mixer, x, order)
    agree(found, expected)
    wanted = [x, *mixer.parameters()]
    if length > 1:
        for a, b in zip(slopes(found, wanted), slopes(expected, wanted), strict=True):
            agree(a, b, 1e-4)


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
def test_weights_are_probabilities_at_any_score(order: Any) -> None:
    mixer = drawn(MarginalChainSettings(heads=2).build(Place(16, order=order)))
    x = (torch.randn(1, 30, 16) * 100).requires_grad_()
    matrix = mixer.sight(x, Context())
    assert torch.allclose(matrix.sum(-1), torch.ones(1, 2, 30))
    (slope,) = torch.autograd.grad(mixer(x, Context()).sum(), x)
    assert bool(slope.isfinite().all())


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
def test_a_document_that_begins_with_padding_begins_a_chain(order: Any, agree: Any) -> None:
    mixer = drawn(MarginalChainSettings(heads=2).build(Place(16, order=order)))
    x = torch.randn(1, 7, 16)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    padding = torch.tensor([[True, True, True, False, True, True, True]])
    y = mixer(x, Context(documents=documents, padding=padding))
    agree(y[:, :3], mixer(x[:, :3], Context()))
    agree(y[:, 4:], mixer(x[:, 4:], Context()))


@pytest.mark.parametrize("kind", ["marginal", "marginal_chain"])
def test_bad_settings_say_why(kind: str) -> None:
    for key in ("heads", "reach"):
        with pytest.raises(SettingsError, match=key):
            parse(MixerSettings, {"kind": kind, key: 0})
    with pytest.raises(UnsupportedError, match="does not divide into 4 heads"):
        parse(MixerSettings, {"kind": kind, "heads": 4}).build(Place(18))


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
@pytest.mark.parametrize("settings", [MarginalSettings(), MarginalChainSettings()])
def test_a_row_of_padding_alone_gives_zeros(settings: MixerSettings, order: Any) -> None:
    mixer = drawn(settings.build(Place(16, order=order)))
    padding = torch.tensor([[True] * 4, [False] * 4])
    y = mixer(torch.randn(2, 4, 16), Context(padding=padding))
    assert bool((y[1] == 0).all()) and bool((y[0] != 0).any())
