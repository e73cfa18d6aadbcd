"""The selective scan: the kernel in C against the loop over tokens, and the loop against every pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.native import available
from armillary.nn.cost import count
from armillary.nn.ops import scan as module
from armillary.nn.ops.scan import selective_scan, selective_scan_flops, selective_scan_plain

NAMES = ("u", "dt", "a", "b", "c", "d", "bias", "state")
needs_library = pytest.mark.skipif(not available(), reason="there is no C compiler here")


def tensors(
    length: int, channels: int, states: int, batch: int = 2, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    made = [
        torch.randn(batch, length, channels),
        torch.randn(batch, length, channels) * 2 - 1,
        -torch.rand(channels, states).mul(3).exp(),
        torch.randn(batch, length, states),
        torch.randn(batch, length, states),
        torch.randn(channels),
        torch.randn(channels),
        torch.randn(batch, states, channels),
    ]
    return [x.to(dtype).requires_grad_() for x in made]


def ids(sizes: list[int] | None, batch: int = 2) -> Tensor | None:
    if sizes is None:
        return None
    return torch.repeat_interleave(torch.tensor([4, 9] * len(sizes))[: len(sizes)], torch.tensor(sizes)).expand(
        batch, -1
    )


def run(form: Any, parts: list[Tensor], documents: Tensor | None = None) -> list[Tensor]:
    """Outputs and all gradients, through the outputs and the last state."""
    y, end = form(*parts[:7], state=parts[7], documents=documents)
    generator = torch.Generator().manual_seed(2)
    loss = (y * torch.randn(y.shape, generator=generator)).sum() + (
        end * torch.randn(end.shape, generator=generator)
    ).sum()
    return [y, end, *torch.autograd.grad(loss, parts)]


def pairs(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, bias: Tensor, state: Tensor) -> Tensor:
    """y_t = Σ_s Σ_n c_t[n] exp(a[n] Σ_{s<r≤t} δ_r) δ_s b_s[n] u_s + d u_t, and the first state as token −1."""
    delta = F.softplus(dt + bias)
    until = delta.cumsum(1)
    y = d * u
    for t in range(u.shape[1]):
        left = (until[:, t, None] - until[:, : t + 1])[..., None] * a  # [B, s, E, N]
        entered = (delta * u)[:, : t + 1, :, None] * b[:, : t + 1, None]
        first = (until[:, t, :, None] * a).exp() * state.transpose(1, 2)
        y[:, t] = y[:, t] + (((left.exp() * entered).sum(1) + first) * c[:, t, None]).sum(-1)
    return y


def test_the_loop_is_the_formula(agree: Any) -> None:
    parts = [x.detach() for x in tensors(13, 5, 3, dtype=torch.float64)]
    y, _ = selective_scan_plain(*parts[:7], state=parts[7])
    agree(y, pairs(*parts), 1e-12)


@needs_library
@pytest.mark.parametrize("documents", [None, [5, 1, 37], [16, 16, 11]])
@pytest.mark.parametrize(("channels", "states"), [(5, 3), (32, 16), (70, 1), (33, 4)])
def test_the_kernel_is_the_loop(channels: int, states: int, documents: list[int] | None, agree: Any) -> None:
    parts, documents_ = tensors(43, channels, states), ids(documents)
    found, expected = run(selective_scan, parts, documents_), run(selective_scan_plain, parts, documents_)
    for name, a, b in zip(("y", "end", *NAMES), found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        agree(a, b, 2e-5)


@needs_library
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 32])
def test_any_length(length: int, agree: Any) -> None:
    parts = tensors(length, 6, 4)
    for a, b in zip(run(selective_scan, parts), run(selective_scan_plain, parts), strict=True):
        agree(a, b, 2e-5)


@pytest.mark.parametrize("cuts", [[1] * 20, [16, 4], [3, 1, 16]])
def test_chunks_are_the_whole(cuts: list[int], agree: Any) -> None:
    parts = tensors(20, 6, 4)
    u, dt, a, b, c, d, bias, state = parts
    expected = run(selective_scan, parts)
    pieces, end = [], state
    for some in zip(*(x.split(cuts, 1) for x in (u, dt, b, c)), strict=True):
        y, end = selective_scan(some[0], some[1], a, some[2], some[3], d, bias, state=end)
        pieces.append(y)
    found = run(lambda *_, **__: (torch.cat(pieces, 1), end), parts)
    for x, y in zip(found, expected, strict=True):
        agree(x, y, 2e-5)


def test_tokens_that_are_not_there_leave_the_state_alone() -> None:
    u, dt, a, b, c, d, bias, state = tensors(9, 40, 4)
    with torch.no_grad():
        state[0, 0] = 0
        _, end = selective_scan(u * 100, torch.full_like(dt, -torch.inf), a, b, c, d, bias, state=state)
    assert torch.equal(end, state)


@needs_library
def test_parts_of_any_layout(agree: Any) -> None:
    parts = tensors(10, 6, 4)
    turned = [x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in parts]
    for a, b in zip(run(selective_scan, turned), run(selective_scan, parts), strict=True):
        agree(a, b, 1e-6)


def test_either_result_alone_has_gradients(agree: Any) -> None:
    parts = tensors(18, 6, 4)
    for result in (0, 1):
        found, expected = (
            torch.autograd.grad(form(*parts[:7], state=parts[7])[result].sum(), parts, materialize_grads=True)
            for form in (selective_scan, selective_scan_plain)
        )
        for a, b in zip(found, expected, strict=True):
            agree(a, b, 2e-5)


def test_bf16_keeps_states_and_sums_in_float32(agree: Any) -> None:
    # In bf16 a sum of 4,000 equal terms stands still at 256 of them; and factors this near 1 would be 1.
    length = 4000
    u, dt = torch.ones(1, length, 2), torch.full((1, length, 2), -9.0)
    b = c = torch.ones(1, length, 1)
    a, zeros = torch.tensor([[-1.0], [-20.0]]), torch.zeros(2)
    y, end = selective_scan(*(x.bfloat16() for x in (u, dt)), a, b.bfloat16(), c.bfloat16(), zeros, zeros)
    assert y.dtype == torch.bfloat16 and end.dtype == torch.float32
    delta = F.softplus(torch.tensor(-9.0, dtype=torch.float64))
    steps = torch.arange(length, dtype=torch.float64)[:, None]
    expected = (delta * (delta * a[:, 0].double() * steps).exp()).cumsum(0)
    agree(end[0, 0], expected[-1].float(), 1e-4)
    agree(y[0].float(), expected.float(), 2**-8)


@needs_library
def test_bf16_gradients(agree: Any) -> None:
    parts = tensors(43, 33, 4)
    low = [x.detach().bfloat16().requires_grad_() if i in (0, 1, 3, 4) else x for i, x in enumerate(parts)]
    wide = [x.detach().float().requires_grad_() for x in low]
    for a, b in zip(run(selective_scan, low), run(selective_scan_plain, wide), strict=True):
        agree(a.float(), b, 2**-7)


@needs_library
def test_long_steps_and_hard_decays_stay_finite() -> None:
    u, dt, a, b, c, d, bias, state = tensors(40, 8, 4)
    with torch.no_grad():
        dt.mul_(1e3)
        a.mul_(1e6)
    assert all(bool(x.isfinite().all()) for x in run(selective_scan, [u, dt, a, b, c, d, bias, state]))


@needs_library
def test_no_result_depends_on_the_number_of_threads_or_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = tensors(21, 70, 4, batch=3)
    before = torch.get_num_threads()
    one = run(selective_scan, parts)
    try:
        torch.set_num_threads(3)
        three = run(selective_scan, parts)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    u, dt, a, b, c, d, bias, state = parts
    y, _ = selective_scan(u[1:2], dt[1:2], a, b[1:2], c[1:2], d, bias, state=state[1:2])
    assert torch.equal(y, one[0][1:2])


def test_without_the_library_the_loop_runs(monkeypatch: pytest.MonkeyPatch, agree: Any) -> None:
    parts = tensors(7, 5, 3)
    expected = run(selective_scan, parts)
    monkeypatch.setattr(module, "native_here", lambda x: False)
    for a, b in zip(run(selective_scan, parts), expected, strict=True):
        agree(a, b, 2e-5)


def test_flops() -> None:
    u, dt, a, b, c, d, bias, _ = (x.detach() for x in tensors(7, 5, 3))
    assert count(lambda: selective_scan(u, dt, a, b, c, d, bias)) == selective_scan_flops(5, 3, 2 * 7)
