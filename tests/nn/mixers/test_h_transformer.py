"""Hierarchical attention against its definition, written out for every pair of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.nn.context import Context
from armillary.nn.mechanism import Place
from armillary.nn.mixers.h_transformer import HTransformer, HTransformerSettings
from armillary.nn.taps import Taps


def made(block: int, order: str = "causal", heads: int = 2, width: int = 8) -> HTransformer:
    mixer = HTransformerSettings(heads=heads, block=block).build(Place(width, order=order))
    generator = torch.Generator().manual_seed(3)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.6, generator=generator)
    return mixer


def weights(q: Tensor, k: Tensor, block: int, causal: bool) -> Tensor:
    """exp(q̃·k̃/√K) for one row's q, k [T, K]; tokens that share a block meet as they are, others as the
    means (queries only where both ways) of the 2^l tokens around them, l the level of their siblings."""
    length = len(q)
    rows = []
    for t in range(length):
        row = []
        for j in range(length):
            apart = (t // block) ^ (j // block)
            level = max(0, apart.bit_length() - 1)
            there = slice((j >> level) << level, ((j >> level) + 1) << level)
            here = slice((t >> level) << level, ((t >> level) + 1) << level)
            key = k[there].mean(0) if apart else k[j]
            query = q[here].mean(0) if apart and not causal else q[t]
            seen = j <= t or not causal
            row.append((query @ key / q.shape[1] ** 0.5).exp() * seen)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def published(mixer: HTransformer, x: Tensor, causal: bool) -> Tensor:
    outputs = []
    for row in x:
        q, k, v = (p(row).unflatten(-1, (mixer.heads, -1)).unbind(1) for p in (mixer.q, mixer.k, mixer.v))
        heads = []
        for query, key, value in zip(q, k, v, strict=True):
            matrix = weights(query, key, mixer.block, causal)
            heads.append(matrix @ value / matrix.sum(-1, keepdim=True))
        outputs.append(mixer.o(torch.cat(heads, -1)))
    return torch.stack(outputs)


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
@pytest.mark.parametrize("block, length", [(1, 9), (2, 16), (2, 21), (3, 20), (4, 3), (4, 13), (16, 5)])
def test_it_is_the_hierarchy_pair_by_pair(order: str, block: int, length: int, agree: Any) -> None:
    mixer = made(block, order).double()
    x = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
    slopes = torch.randn(2, length, 8, dtype=torch.float64)
    found, expected = mixer(x, Context()), published(mixer, x, order == "causal")
    agree(found, expected, 1e-10)
    wanted = [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * slopes).sum(), wanted)
    theirs = torch.autograd.grad((expected * slopes).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 1e-9)


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
@pytest.mark.parametrize("block, length", [(1, 32), (2, 37), (4, 64), (5, 33)])
def test_without_scores_every_token_counts_once(order: str, block: int, length: int, agree: Any) -> None:
    mixer = made(block, order)
    nn.init.zeros_(mixer.q.weight)
    x = torch.randn(2, length, 8)
    matrix = mixer.sight(x, Context())
    seen = torch.ones(length, length)
    seen = seen.tril() if order == "causal" else seen
    agree(matrix, (seen / seen.sum(-1, keepdim=True)).expand(2, 2, -1, -1), 1e-5)


def test_equal_keys_within_nodes_make_it_exact(agree: Any) -> None:
    """Then a mean is its tokens, and nothing is left of the approximation."""
    mixer = made(2)
    x = torch.randn(1, 8, 8)
    x[:, 1:4] = x[:, :1]
    x[:, 5] = x[:, 4]
    q, k = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (mixer.q, mixer.k))
    later = torch.ones(8, 8, dtype=torch.bool).triu(1)
    expected = torch.softmax((q @ k.transpose(2, 3) / 2).masked_fill(later, -torch.inf), -1)
    agree(mixer.sight(x, Context()), expected, 1e-5)
    assert not torch.allclose(mixer.sight(torch.randn(1, 8, 8), Context()), expected, atol=1e-2)


@pytest.mark.parametrize("cuts", [[1] * 43, [20, 1, 1, 21], [7, 36], [43]])
def test_long_chunks_and_steps_are_the_whole(cuts: list[int], agree: Any) -> None:
    mixer = made(4).double()
    x = torch.randn(2, 43, 8, dtype=torch.float64)
    with torch.no_grad():
        state, start, pieces = mixer.init_state(2, 4, torch.float64, "cpu"), 0, []
        for count in cuts:
            positions = torch.arange(start, start + count)[None]
            pieces.append(mixer.extend(x[:, start : start + count], state, Context(positions=positions)))
            start += count
        agree(torch.cat(pieces, 1), published(mixer, x, True), 1e-10)


def test_the_state_grows_with_the_logarithm() -> None:
    mixer = made(4)
    sizes = []
    for length in (16, 32, 64, 128):
        state = mixer.init_state(1, length, torch.float32, "cpu")
        mixer.extend(torch.randn(1, length, 8), state, Context())
        sizes.append(state.nbytes)
    group = 2 * 4 * 8 * 4  # keys and values of 4 tokens of width 8 in float32
    assert sizes == [group * (1 + levels) for levels in (3, 4, 5, 6)]


def test_a_row_without_tokens_gives_zeros() -> None:
    for order in ("causal", "bidirectional"):
        padding = torch.tensor([[True] * 9, [False] * 9])
        x = torch.randn(2, 9, 8, requires_grad=True)
        y = made(2, order)(x, Context(padding=padding))
        assert bool((y[1] == 0).all()) and bool(y.isfinite().all())
        y.sum().backward()
        assert bool(x.grad.isfinite().all())
        y = made(2, order)(x, Context(padding=padding, documents=torch.zeros(2, 9, dtype=torch.int64)))
        assert bool((y[1] == 0).all()) and bool(y.isfinite().all())


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
def test_padding_inside_packed_rows(order: str, agree: Any) -> None:
    """Each document, its padding taken out, is as it would be alone."""
    mixer = made(2, order)
    x = torch.randn(1, 20, 8)
    documents = torch.repeat_interleave(torch.tensor([4, 2]), torch.tensor([11, 9]))[None]
    padding = torch.ones(1, 20, dtype=torch.bool)
    padding[0, [0, 7, 19]] = False
    y = mixer(x, Context(documents=documents, padding=padding))
    for document in (4, 2):
        part = ((documents == document) & padding)[0].nonzero()[:, 0]
        agree(y[:, part], mixer(x[:, part], Context()), 1e-5)


def test_weights_of_tokens_that_are_gone_are_refused() -> None:
    mixer = made(2)
    state = mixer.init_state(1, 4, torch.float32, "cpu")
    with pytest.raises(UnsupportedError, match="cannot be edited"):
        mixer.extend(torch.randn(1, 3, 8), state, Context(taps=Taps(edits=[("*.weights", torch.clone)])))


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(UnsupportedError, match="does not divide into 3 heads"):
        HTransformerSettings(heads=3).build(Place(16))
    with pytest.raises(UnsupportedError, match="cannot be extended"):
        made(2, "bidirectional").init_state(1, 4, torch.float32, "cpu")
    for wrong in ({"block": 0}, {"heads": 0}):
        with pytest.raises(SettingsError, match="greater than 0"):
            HTransformerSettings(**wrong)
