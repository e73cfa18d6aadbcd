"""Noise is a function of seed and place, auxiliary losses come once and by share; expectations from the definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from armillary.nn.context import Context
from armillary.nn.training import Training, attach, gumbel, uniform

X = torch.zeros(3, 5)


def drawn(seed: int, path: str = "blocks.0.mixer", name: str = "gate") -> Tensor:
    found = uniform(Context(training=Training.of(seed)), path, name, (4, 1000), X)
    assert found is not None
    return found


def test_noise_follows_from_seed_path_and_name_alone() -> None:
    before = torch.get_rng_state()
    one = drawn(1)
    torch.manual_seed(5)
    assert torch.equal(drawn(1), one)
    for other in (drawn(2), drawn(1, "blocks.1.mixer"), drawn(1, name="keys")):
        assert not torch.equal(other, one)
    torch.set_rng_state(before)
    drawn(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_is_uniform_and_gumbel() -> None:
    u, context = drawn(7), Context(training=Training.of(7))
    assert float(u.min()) > 0 and float(u.max()) < 1
    # mean and variance of the distributions, five standard errors of 4,000 draws
    assert float(u.mean()) == pytest.approx(0.5, abs=5 * (1 / 12 / 4000) ** 0.5)
    g = gumbel(context, "blocks.0.mixer", "gate", (4, 1000), X)
    assert g is not None
    assert float(g.mean()) == pytest.approx(0.57722, abs=5 * (1.645 / 4000) ** 0.5)


def test_outside_an_update_there_is_neither() -> None:
    y, loss = torch.ones(2, requires_grad=True), torch.ones((), requires_grad=True)
    assert uniform(Context(), "here", "gate", (2,), X) is None and gumbel(Context(), "here", "gate", (2,), X) is None
    assert attach(y, loss, Context()) is y


@pytest.mark.parametrize("recomputed", [False, True])
def test_an_auxiliary_loss_comes_once_and_by_its_share(recomputed: bool) -> None:
    x = torch.arange(1.0, 4.0, requires_grad=True)
    ctx = Context(training=Training.of(0, share=0.25))

    def call(x: Tensor) -> Tensor:
        noise = uniform(ctx, "here", "gate", (3,), x)
        assert noise is not None
        return attach(x * noise, x.square().sum(), ctx)

    y = checkpoint(call, x, use_reentrant=False) if recomputed else call(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    noise = uniform(ctx, "here", "gate", (3,), X)
    assert noise is not None
    torch.testing.assert_close(slope, noise + 0.25 * 2 * x.detach())
