"""Softmax over time, per feature: the halved chunks against the loop over tokens and the explicit softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.nn.ops import columns as module
from armillary.nn.ops import plain_ops
from armillary.nn.ops.columns import column_attend

B, T, H, K, V = 2, 43, 3, 5, 4


def ids(sizes: list[int] | None) -> Tensor | None:
    if sizes is None:
        return None
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).expand(B, T)


def explicit(q: Tensor, k: Tensor, v: Tensor, causal: bool, documents: Tensor | None) -> Tensor:
    """Every softmax written out: for each query, over the tokens that it may see."""
    rows = []
    for t in range(T):
        seen = torch.arange(T) <= t if causal else torch.ones(T, dtype=torch.bool)
        seen = seen.expand(B, T) if documents is None else seen & (documents == documents[:, t : t + 1])
        weights = torch.softmax(k.masked_fill(~seen[..., None, None], -torch.inf), 1)
        rows.append(torch.einsum("bhk,bshk,bshv->bhv", q[:, t], weights, v))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("chunk", [2, 16, 64])
@pytest.mark.parametrize("documents", [None, [5, 1, 37], [16, 16, 11]])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [1.0, 60.0])
def test_all_forms_are_the_softmax(
    size: float, causal: bool, documents: list[int] | None, chunk: int, agree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    q = torch.rand(B, T, H, K, requires_grad=True)
    k = (torch.randn(B, T, H, K) * size).requires_grad_()
    v = torch.randn(B, T, H, V, requires_grad=True)
    expected = explicit(q, k, v, causal, ids(documents))
    weights = torch.randn_like(expected)
    slopes = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for plainly in (False, True):
        with plain_ops() if plainly else torch.enable_grad():
            found, _ = column_attend(q, k, v, causal=causal, documents=ids(documents))
            ours = torch.autograd.grad((found * weights).sum(), (q, k, v))
        agree(found, expected, 3e-5)
        for a, b in zip(ours, slopes, strict=True):
            agree(a, b, 1e-4)


def test_pieces_go_on_where_they_stopped(agree: Any) -> None:
    q, k, v = torch.rand(B, T, H, K), 10 * torch.randn(B, T, H, K), torch.randn(B, T, H, V)
    whole, end = column_attend(q, k, v)
    state, pieces = None, []
    for start, stop in ((0, 1), (1, 9), (9, 10), (10, T)):
        part = slice(start, stop)
        y, state = column_attend(q[:, part], k[:, part], v[:, part], state=state)
        pieces.append(y)
    agree(torch.cat(pieces, 1), whole, 2e-5)
    assert state is not None and end is not None
    for a, b in zip(state, end, strict=True):
        agree(a, b, 2e-5)


def test_averages_stay_averages_over_a_long_text() -> None:
    """Equal values come back, whatever has been rounded on the way."""
    q = torch.softmax(torch.randn(1, 5000, 2, 8), -1)
    y, _ = column_attend(q, 3 * torch.randn(1, 5000, 2, 8), torch.ones(1, 5000, 2, 3))
    torch.testing.assert_close(y, torch.ones_like(y), rtol=2e-4, atol=0)
