"""The matrix state with decay: its chunks against the loop over tokens, for every request at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.nn.ops import decay as module
from armillary.nn.ops.decay import decay_attend, decay_attend_plain

B, T, H, K, V = 2, 23, 3, 4, 5


def tensors() -> list[Tensor]:
    shapes = [(B, T, H, K), (B, T, H, K), (B, T, H, V)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("chunk", [4, 7, 64])
@pytest.mark.parametrize("documents", [None, [5, 1, 17], [23], [4, 4, 15]])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("varying", [False, True])
def test_chunks_give_the_loop(
    varying: bool, started: bool, documents: list[int] | None, chunk: int, agree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    q, k, v = tensors()
    rates = (-torch.rand(B, T, H) * 3 if varying else -torch.tensor([0.03, 0.5, 4.0]).expand(1, T, H)).clone()
    rates.requires_grad_()
    state = torch.randn(B, H, K, V, requires_grad=True) if started else None
    ids = None
    if documents is not None:
        ids = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents)).expand(B, T)
    learned = [q, k, v, rates, *([] if state is None else [state])]
    found, last = decay_attend(q, k, v, rates, state=state, documents=ids)
    expected, end = decay_attend_plain(q, k, v, rates, state=state, documents=ids)
    agree(found, expected)
    agree(last, end)
    one, two = torch.randn_like(expected), torch.randn_like(end)
    ours = torch.autograd.grad((found * one).sum() + (last * two).sum(), learned)
    theirs = torch.autograd.grad((expected * one).sum() + (end * two).sum(), learned)
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 3e-5)


def test_fast_decay_over_a_long_chunk_stays_finite() -> None:
    """exp of a positive sum of decays would overflow above the diagonal."""
    q, k, v = tensors()
    y, state = decay_attend(q, k, v, torch.full((1, T, H), -40.0))
    assert bool(y.isfinite().all()) and bool(state.isfinite().all())
    alone = (q * k).sum(-1, keepdim=True) * v  # everything before the token has decayed away
    torch.testing.assert_close(y, alone, rtol=1e-4, atol=1e-5)
    for slope in torch.autograd.grad(y.sum() + state.sum(), [q, k, v]):
        assert bool(slope.isfinite().all())


def test_a_token_without_key_and_decay_leaves_the_state_alone() -> None:
    q, k, v = tensors()
    state = torch.randn(B, H, K, V)
    for length in (1, 5):
        _, after = decay_attend(q[:, :length], 0 * k[:, :length], v[:, :length], torch.zeros(1, length, H), state=state)
        assert torch.equal(after, state)
