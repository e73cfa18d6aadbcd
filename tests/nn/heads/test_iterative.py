"""The iterative recursive attention head, against its steps written out over PyTorch's GRU cell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from armillary.base.errors import SettingsError
from armillary.base.settings import parse
from armillary.nn.heads.base import HeadSettings
from armillary.nn.heads.iterative import IterativeHead, IterativeHeadSettings
from armillary.nn.mechanism import Place

WIDTH = 6


def built(**settings: object) -> IterativeHead:
    head = IterativeHeadSettings(**{"classes": 3, **settings}).build(Place(WIDTH), 10, nn.Module())
    generator = torch.Generator().manual_seed(2)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.7, generator=generator)
    return head


def written_out(head: IterativeHead, h: Tensor) -> Tensor:
    """One row h [T, D] at a time."""
    cell = nn.GRUCell(WIDTH, WIDTH)
    weights = {
        "weight_ih": head.found.weight,
        "bias_ih": head.found.bias,
        "weight_hh": head.held.weight,
        "bias_hh": head.held.bias,
    }
    state, rows = head.start, list(h)
    for _ in range(head.steps):
        scores = torch.stack([state @ (head.k.weight @ row) for row in rows]) / WIDTH**0.5
        r = sum(weight * row for weight, row in zip(torch.softmax(scores, 0), rows, strict=True))
        state = torch.func.functional_call(cell, weights, (r[None], state[None]))[0]
        if head.recursive and head.steps > 1:
            gate = torch.sigmoid(head.gate.weight @ r + head.gate.bias)
            rows.append(gate * torch.relu(head.summary.weight @ r + head.summary.bias) + (1 - gate) * r)
    return head.product.weight @ state + head.product.bias


@pytest.mark.parametrize("recursive", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_it_is_the_steps(steps: int, recursive: bool) -> None:
    head = built(steps=steps, recursive=recursive)
    h = torch.randn(3, 5, WIDTH, requires_grad=True)
    found, expected = head(h), torch.stack([written_out(head, row) for row in h])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    wanted = [h, *head.parameters()]
    ours = torch.autograd.grad(found.square().sum(), wanted, allow_unused=True)
    theirs = torch.autograd.grad(expected.square().sum(), wanted, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_one_look_pools_by_a_single_query() -> None:
    head, h = built(steps=1), torch.randn(2, 5, WIDTH)
    (weights,) = head.looks(h)
    expected = torch.softmax(h @ head.k.weight.t() @ head.start / WIDTH**0.5, -1)
    torch.testing.assert_close(weights, expected)


def test_a_look_sees_the_tokens_and_the_summaries_before_it() -> None:
    h, padding = torch.randn(2, 5, WIDTH), torch.tensor([[True] * 5, [True, True, False, False, False]])
    looks = built(steps=3).looks(h, padding)
    assert [tuple(look.shape) for look in looks] == [(2, 5), (2, 6), (2, 7)]
    for look in looks:
        torch.testing.assert_close(look.sum(-1), torch.ones(2))
        assert bool((look[1, 2:5] == 0).all())
    assert bool((looks[2][:, 5:] > 0).all())
    assert [look.shape[1] for look in built(steps=3, recursive=False).looks(h)] == [5, 5, 5]


def test_padding_alone_gives_finite_scores() -> None:
    assert bool(built()(torch.randn(1, 3, WIDTH), torch.zeros(1, 3, dtype=torch.bool)).isfinite().all())


def test_no_looks_is_a_mistake() -> None:
    with pytest.raises(SettingsError, match="steps"):
        parse(HeadSettings, {"kind": "iterative", "steps": 0})
