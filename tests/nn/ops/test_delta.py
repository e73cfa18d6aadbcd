"""The delta rule: triangular chunks against the loop over tokens, and both against `transformers`' Qwen3-Next."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from armillary.nn.ops import delta as module
from armillary.nn.ops.delta import delta_attend, delta_attend_plain

B, T, H, K, V = 2, 23, 3, 4, 5


def tensors(length: int = T) -> list[Tensor]:
    q, k, v = (torch.randn(B, length, H, width) for width in (K, K, V))
    made = [q, F.normalize(k, dim=-1), v, -2 * torch.rand(B, length, H), torch.rand(B, length, H)]
    return [x.requires_grad_() for x in made]


@pytest.mark.parametrize(("chunk", "segment"), [(4, 8), (7, 14), (64, 512)])
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
    learned = tensors()
    state = torch.randn(B, H, K, V, requires_grad=True) if started else None
    ids = None
    if documents is not None:
        ids = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents)).expand(B, T)
    found, last = delta_attend(*learned, state=state, documents=ids)
    expected, end = delta_attend_plain(*learned, state=state, documents=ids)
    agree(found, expected)
    agree(last, end)
    one, two = torch.randn_like(expected), torch.randn_like(end)
    learned += [] if state is None else [state]
    ours = torch.autograd.grad((found * one).sum() + (last * two).sum(), learned)
    theirs = torch.autograd.grad((expected * one).sum() + (end * two).sum(), learned)
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 3e-5)


@pytest.mark.parametrize("peer", [torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule])
def test_it_is_the_peers_rule(peer: Any, agree: Any) -> None:
    learned = tensors(70)
    q, k, v, decay, beta = learned
    state = torch.randn(B, H, K, V)
    expected, end = peer(q, k, v, decay, beta, initial_state=state, output_final_state=True)
    found, last = delta_attend(q * K**-0.5, k, v, decay, beta, state=state)
    agree(found, expected)
    agree(last, end)
    weights = torch.randn_like(found)
    ours = torch.autograd.grad((found * weights).sum(), learned)
    theirs = torch.autograd.grad((expected * weights).sum(), learned)
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 5e-5)


def test_steep_decays_and_a_full_overwrite_stay_finite(agree: Any) -> None:
    """β = 1 with no decay replaces what a key held; exp(−Γ) alone would overflow."""
    q, k, v, _, _ = tensors()
    decay = torch.full((B, T, H), -40.0)
    y, state = delta_attend(q, k, v, decay, torch.ones(B, T, H))
    agree(y, (q * k).sum(-1, keepdim=True) * v)
    for slope in torch.autograd.grad(y.sum() + state.sum(), [q, k, v]):
        assert bool(slope.isfinite().all())
    same = k[:, :1].expand_as(k)
    _, held = delta_attend(q, same, v, torch.zeros(B, T, H), torch.ones(B, T, H))
    agree((same[:, -1, :, None] @ held)[:, :, 0], v[:, -1], 2e-5)
