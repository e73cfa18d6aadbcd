"""A layer of attention at its optimum: the certificate, an independent solver, and gradient descent on heads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.base.errors import InputError, TrainingError
from armillary.train.convex import ConvexAttention, convex_attention

N, T, D, C = 60, 5, 4, 3


def problem(classes: bool) -> tuple[Tensor, Tensor]:
    """Sequences whose answer lies in two of their tokens."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(N, T, D, generator=generator)
    told = torch.stack([x[:, 1, 0], x[:, 3, 1] + x[:, 1, 2], x[:, 3, 3]], 1)
    told = told + 0.3 * torch.randn(N, C, generator=generator)
    return x, told.argmax(1) if classes else told


def paid(outputs: Tensor, y: Tensor, b: Tensor) -> Tensor:
    """The mean loss, by PyTorch."""
    if y.dtype.is_floating_point:
        return (outputs + b - y).square().sum(1).mean() / 2
    return torch.nn.functional.cross_entropy(outputs + b, y)


def descended(cost: Any, parts: list[Tensor], steps: int) -> float:
    """Quasi-Newton descent from where parts are."""
    optimiser = torch.optim.LBFGS(
        parts, max_iter=steps, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value: Tensor = cost()
        value.backward()
        return value

    optimiser.step(closure)
    with torch.no_grad():
        return float(cost())


def drawn(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("classes", [False, True])
def test_another_solver_finds_the_same_optimum(classes: bool) -> None:
    """‖Z‖_* is the least of (‖U‖² + ‖V‖²)/2 over Z = U Vᵀ: smooth, and of full rank without other minima."""
    x, y = problem(classes)
    found = convex_attention(x, y, tolerance=1e-9)
    u, v, b = drawn((T, D, C), (T, C, C), (C,), seed=5)

    def cost() -> Tensor:
        outputs = torch.einsum("ntd,tdr,tcr->nc", x.double(), u, v)
        y_double = y if classes else y.double()
        return paid(outputs, y_double, b) + found.decay / 2 * (u.square().sum() + v.square().sum())

    other = descended(cost, [u, v, b], 250)
    assert found.bound <= other + 1e-12
    assert other == pytest.approx(found.objective, rel=1e-5)
    assert found.gap > -1e-12 and found.gap < 1e-8


def heads_cost(x: Tensor, y: Tensor, attention: Tensor, u: Tensor, c: Tensor, b: Tensor, decay: float) -> Tensor:
    """The layer as heads: f(X) = b + Σ_m (a_mᵀ X u_m) c_m, with weight decay."""
    read = torch.einsum("mt,ntd,md->nm", attention, x.double(), u)
    target = y.double() if y.dtype.is_floating_point else y
    return paid(read @ c, target, b) + decay / 2 * (u.square().sum() + c.square().sum())


@pytest.mark.parametrize("classes", [False, True])
def test_no_run_of_gradient_descent_on_heads_goes_below(classes: bool) -> None:
    x, y = problem(classes)
    found = convex_attention(x, y, tolerance=1e-8)
    heads = found.heads()
    assert float(heads_cost(x, y, heads.attention, heads.values, heads.outputs, found.intercept, found.decay)) == (
        pytest.approx(found.objective, rel=1e-9)
    )
    runs = []
    for seed in range(3):
        logits, u, c, b = drawn((6, T), (6, D), (6, C), (C,), seed=seed)

        def cost(logits: Tensor = logits, u: Tensor = u, c: Tensor = c, b: Tensor = b) -> Tensor:
            return heads_cost(x, y, torch.softmax(logits, 1), u, c, b, found.decay)

        runs.append(descended(cost, [logits, u, c, b], 120))
    assert min(runs) >= found.bound
    assert min(runs) <= 1.05 * found.objective  # they train the same thing: the best comes close
    assert max(runs) > 1.0001 * found.objective


def test_the_start_does_not_matter_and_the_objective_is_convex() -> None:
    """From another scale of the same data, and with another order of tokens, the optimum is the same."""
    x, y = problem(False)
    found = convex_attention(x, y, decay=0.05, tolerance=1e-9)
    order = torch.tensor([3, 1, 4, 0, 2])
    moved = convex_attention(x[:, order], y, decay=0.05, tolerance=1e-9)
    assert moved.objective == pytest.approx(found.objective, abs=1e-6)
    assert torch.allclose(moved.weights, found.weights[:, order], atol=1e-3)


def test_unused_tokens_have_exactly_nothing() -> None:
    """Optimality, token by token: where the slope is below the decay the weights are 0, elsewhere it is the decay."""
    x, y = problem(False)
    found = convex_attention(x, y[:, :1], tolerance=1e-10)
    errors = found(x) - y[:, :1]
    slope = torch.einsum("ntd,nc->tdc", x.double(), errors).flatten(1).norm(dim=1) / N
    used = found.attention() > 0
    assert 0 < int(used.sum()) < T
    assert torch.allclose(slope[used], torch.tensor(found.decay, dtype=torch.float64), rtol=1e-3)
    assert bool((slope[~used] < found.decay).all())
    assert float(found.attention().sum()) == pytest.approx(1)


def test_a_large_decay_leaves_the_intercept() -> None:
    x, y = problem(True)
    found = convex_attention(x, y, decay=100.0)
    assert bool((found.weights == 0).all()) and bool((found.attention() == 0).all())
    shares = torch.bincount(y).double() / N
    assert found.objective == pytest.approx(float(-(shares * shares.log()).sum()))
    assert torch.allclose(torch.softmax(found.intercept, 0), shares)
    assert found.heads().values.shape == (0, D)


def test_gates_see_what_is_not_linear() -> None:
    """|x| of one token: nothing for a linear layer, plain for gated heads; their optimum is certified as well."""
    x = torch.randn(200, 3, 2, generator=torch.Generator().manual_seed(1))
    y = x[:, 1, 0].abs()
    linear, gated = (convex_attention(x, y, gates=gates, decay=0.003, tolerance=1e-5) for gates in (0, 8))
    assert gated.objective < 0.5 * linear.objective
    assert int(gated.attention().argmax()) == 1 and gated.weights.shape == (8, 3, 2, 1)
    heads = gated.heads()
    assert gated.gates is not None
    seen = (x.double() @ gated.gates[heads.gates].t() >= 0).double()  # [N, T, M]
    read = torch.einsum("mt,ntd,md,ntm->nm", heads.attention, x.double(), heads.values, seen)
    assert torch.allclose(read @ heads.outputs + gated.intercept, gated(x), atol=1e-9)


def test_padding_counts_for_nothing() -> None:
    x, y = problem(True)
    padding = torch.ones(N, T, dtype=torch.bool)
    padding[::2, 4] = False
    noisy = x.masked_fill(~padding[..., None], 50.0)
    found = convex_attention(noisy, y, padding=padding)
    expected = convex_attention(x.masked_fill(~padding[..., None], 0.0), y)
    assert torch.allclose(found.weights, expected.weights)
    assert torch.allclose(found(noisy, padding), expected(x.masked_fill(~padding[..., None], 0.0)))


def test_data_that_says_nothing() -> None:
    found = convex_attention(torch.zeros(6, 2, 3), torch.arange(6.0))
    assert isinstance(found, ConvexAttention) and found.gap == 0 and found.intercept.tolist() == [2.5]


def test_what_does_not_fit_says_so() -> None:
    x, y = problem(True)
    for wrong, message in (
        ((x[0], y), "x is"),
        ((x.masked_fill(x > 1, math.nan), y), "x is"),
        ((x, y[:5]), "y has shape"),
        ((x, torch.zeros(N).long()), "do not all occur"),
        ((x, y * 2), "do not all occur"),
        ((x, y - 1), "y is"),
        ((x, torch.full((N,), math.inf)), "not finite"),
    ):
        with pytest.raises(InputError, match=message):
            convex_attention(*wrong)
    for options, message in (
        ({"gates": -1}, "gates must be at least 0"),
        ({"decay": 0.0}, "must be positive"),
        ({"padding": torch.ones(N, 2)}, "padding has shape"),
    ):
        with pytest.raises(InputError, match=message):
            convex_attention(x, y, **options)
    with pytest.raises(TrainingError, match="after 3 steps the optimum is known to"):
        convex_attention(x, y, decay=1e-4, steps=3)
    with pytest.raises(InputError, match="pass sequences"):
        convex_attention(x, y)(x[:, :2])
