"""The matrix state with a decay per feature: halved chunks against the loop over tokens, for every request at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.nn.ops import channel_decay as module
from armillary.nn.ops.channel_decay import channel_attend
from armillary.nn.ops.decay import decay_attend_plain

B, T, H, K, V = 2, 23, 3, 4, 5


def tensors(steepness: float) -> list[Tensor]:
    q, k, v = (torch.randn(B, T, H, width, requires_grad=True) for width in (K, K, V))
    return [q, k, v, (-torch.rand(B, T, H, K) * steepness).requires_grad_()]


@pytest.mark.parametrize(("chunk", "segment"), [(4, 8), (8, 16), (64, 512)])
@pytest.mark.parametrize("documents", [None, [5, 1, 17], [4, 4, 15]])
@pytest.mark.parametrize("started", [False, True])
def test_chunks_give_the_loop(
    started: bool,
    documents: list[int] | None,
    chunk: int,
    segment: int,
    agree: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    monkeypatch.setattr(module, "SEGMENT", segment)
    learned = tensors(2.0)
    state = torch.randn(B, H, K, V, requires_grad=True) if started else None
    ids = None
    if documents is not None:
        ids = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents)).expand(B, T)
    found, last = channel_attend(*learned, state=state, documents=ids)
    expected, end = decay_attend_plain(*learned, state=state, documents=ids)
    agree(found, expected)
    agree(last, end)
    one, two = torch.randn_like(expected), torch.randn_like(end)
    learned += [] if state is None else [state]
    ours = torch.autograd.grad((found * one).sum() + (last * two).sum(), learned)
    theirs = torch.autograd.grad((expected * one).sum() + (end * two).sum(), learned)
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 3e-5)


@pytest.mark.parametrize("steepness", [0.01, 30.0, 1e4])
def test_no_decay_is_too_steep(steepness: float, agree: Any) -> None:
    """Some features forget everything, others nothing; exp(−G) alone would overflow."""
    q, k, v, decay = tensors(steepness)
    decay = (decay * (torch.arange(K) % 2)).detach().requires_grad_()
    found, last = channel_attend(q, k, v, decay)
    expected, end = decay_attend_plain(*(x.double() for x in (q, k, v, decay)))
    agree(found, expected.float(), 3e-6)
    agree(last, end.float(), 3e-6)
    ours = torch.autograd.grad(found.square().sum() + last.sum(), [q, k, v, decay])
    theirs = torch.autograd.grad(expected.square().sum() + end.sum(), [q, k, v, decay])
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 3e-5)
