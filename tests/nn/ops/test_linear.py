"""Linear attention: its chunks against the loop over tokens, and both against the explicit matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.nn.ops import linear as module
from armillary.nn.ops import plain_ops
from armillary.nn.ops.linear import linear_attend, linear_attend_plain, running_max, whole_max

B, T, H, K, V = 2, 43, 3, 5, 4


def ids(sizes: list[int] | None) -> Tensor | None:
    if sizes is None:
        return None
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).expand(B, T)


def tensors() -> list[Tensor]:
    q, k = (torch.rand(B, T, H, K) + 0.1 for _ in range(2))
    return [x.requires_grad_() for x in (q, k, torch.randn(B, T, H, V))]


def matrix(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: Tensor | None, documents: Tensor | None, eps: float | None
) -> Tensor:
    """The formula with every pair written out."""
    weights = torch.einsum("bthk,bshk->bhts", q, k)
    if scale is not None:
        weights = weights * (scale[:, None, :].permute(0, 3, 1, 2) - scale.permute(0, 2, 1)[..., None]).exp().tril()
    if causal:
        weights = weights.tril()
    if documents is not None:
        weights = weights * (documents[:, None, :, None] == documents[:, None, None, :])
    if eps is not None:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return torch.einsum("bhts,bshv->bthv", weights, v)


@pytest.mark.parametrize("chunk", [(4, 8), (7, 21), (64, 512)])
@pytest.mark.parametrize("documents", [None, [5, 1, 37], [43], [4, 4, 35]])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("eps", [1e-6, None])
def test_chunks_give_the_loop(
    eps: float | None,
    scaled: bool,
    started: bool,
    documents: list[int] | None,
    chunk: tuple[int, int],
    agree: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk[0])
    monkeypatch.setattr(module, "SEGMENT", chunk[1])
    q, k, v = tensors()
    begun = torch.rand(B, H, K, V + (eps is not None), requires_grad=True) if started else None
    before = torch.randn(B, H) if started and scaled else None
    scale = running_max(3 * torch.randn(B, T, H), before, ids(documents)) if scaled else None
    learned = [q, k, v, *([] if begun is None else [begun])]
    call = {"eps": eps, "scale": scale, "state": begun, "before": before, "documents": ids(documents)}
    found, last = linear_attend(q, k, v, **call)  # type: ignore[arg-type]
    expected, end = linear_attend_plain(q, k, v, **call)  # type: ignore[arg-type]
    assert last is not None
    agree(found, expected)
    agree(last, end)
    one, two = torch.randn_like(expected), torch.randn_like(end)
    ours = torch.autograd.grad((found * one).sum() + (last * two).sum(), learned)
    theirs = torch.autograd.grad((expected * one).sum() + (end * two).sum(), learned)
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 5e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [None, [5, 1, 37]])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("eps", [1e-3, None])
def test_it_is_the_matrix(
    eps: float | None, scaled: bool, documents: list[int] | None, causal: bool, agree: Any
) -> None:
    if scaled and not causal:
        scaled = False
    q, k, v = tensors()
    scale = running_max(2 * torch.randn(B, T, H), None, ids(documents)) if scaled else None
    expected = matrix(q, k, v, causal, scale, ids(documents), eps)
    weights = torch.randn_like(expected)
    slopes = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for plainly in (False, True):
        with plain_ops() if plainly else torch.enable_grad():
            found, _ = linear_attend(q, k, v, causal=causal, eps=eps, scale=scale, documents=ids(documents))
            ours = torch.autograd.grad((found * weights).sum(), (q, k, v))
        agree(found, expected, 2e-5)
        for a, b in zip(ours, slopes, strict=True):
            agree(a, b, 5e-5)


def test_pieces_go_on_where_they_stopped(agree: Any) -> None:
    q, k, v = (x.detach() for x in tensors())
    top = 3 * torch.randn(B, T, H)
    scale = running_max(top)
    whole, end = linear_attend(q, k, v, scale=scale)
    state = before = None
    pieces = []
    for start, stop in ((0, 1), (1, 9), (9, 10), (10, T)):
        part = slice(start, stop)
        here = running_max(top[:, part], before)
        y, state = linear_attend(q[:, part], k[:, part], v[:, part], scale=here, state=state, before=before)
        before = here[:, -1]
        pieces.append(y)
    agree(torch.cat(pieces, 1), whole)
    agree(state, end)


def test_the_running_maximum_of_a_document() -> None:
    x = 9 * torch.randn(B, T, H)
    documents = ids([5, 1, 37])
    found, whole = running_max(x, None, documents), whole_max(x, documents)
    for start, stop in ((0, 5), (5, 6), (6, 43)):
        part, every = x[:, start:stop], whole[:, start:stop]
        over = found[:, start:stop] - part.cummax(1).values
        assert float(over.min()) >= 0 and float(over.max()) < module.STEP
        assert bool((found[:, start:stop].diff(dim=1) >= 0).all())
        assert bool((every == every[:, :1]).all()) and bool((every >= part).all())


def test_scales_of_any_size_stay_finite(agree: Any) -> None:
    """A key e^500 times heavier than all before it takes over, and what it hides is not lost to those before."""
    q, k, v = tensors()
    top = torch.zeros(B, T, H)
    top[:, 20:] = 500.0
    y, _ = linear_attend(q, k, v, scale=top)
    agree(y[:, :20], linear_attend(q[:, :20], k[:, :20], v[:, :20])[0])
    agree(y[:, 20:], linear_attend(q[:, 20:], k[:, 20:], v[:, 20:])[0])
    for slope in torch.autograd.grad(y.sum(), [q, k, v]):
        assert bool(slope.isfinite().all())


def test_nothing_to_see_gives_zeros() -> None:
    q, k, v = tensors()
    y, end = linear_attend(q, torch.zeros_like(k), v)
    assert end is not None and not y.any() and not end.any()
    for slope in torch.autograd.grad(y.sum(), [q, v], allow_unused=True):
        assert slope is not None and bool(slope.isfinite().all())


def test_low_precision_accumulates_in_float32() -> None:
    """4096 equal keys: a sum in bf16 would stop at 256."""
    q = torch.ones(1, 4096, 1, 4, dtype=torch.bfloat16)
    y, end = linear_attend(q, q, q)
    assert end is not None and end.dtype == torch.float32 and float(end[0, 0, 0, 0]) == 4096
    assert y.dtype == torch.bfloat16 and torch.equal(y, torch.ones_like(y))


def test_a_scale_that_falls_and_comes_back_inside_a_segment(agree: Any) -> None:
    """A document between two heavy ones starts from its own maximum; the ends of the segment do not tell."""
    q, k, v = tensors()
    documents = ids([10, 20, 13])
    top = torch.full((B, T, H), 8.0)
    top[:, 10:30] = -40.0
    scale = running_max(top, None, documents)
    state, before = torch.rand(B, H, K, V + 1), torch.full((B, H), 8.0)
    call = {"scale": scale, "state": state, "before": before, "documents": documents}
    found, expected = linear_attend(q, k, v, **call), linear_attend_plain(q, k, v, **call)  # type: ignore[arg-type]
    for a, b in zip(found, expected, strict=True):
        agree(a, b)
