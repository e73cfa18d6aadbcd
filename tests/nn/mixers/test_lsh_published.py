"""The published LSH layer against transformers' Reformer from the same weights and the same seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.base.errors import UnsupportedError
from armillary.nn.context import Context
from armillary.nn.mechanism import Place
from armillary.nn.mixers.lsh_published import LSHPublished, LSHPublishedSettings

transformers = pytest.importorskip("transformers")

WIDTH, HEADS, EACH = 24, 3, 8


def pair(load: Any, buckets: int | tuple[int, ...], rounds: int, before: int, after: int) -> tuple[LSHPublished, Any]:
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    config = transformers.ReformerConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        attention_head_size=EACH,
        num_hashes=rounds,
        num_buckets=buckets if isinstance(buckets, int) else list(buckets),
        lsh_attn_chunk_length=8,
        lsh_num_chunks_before=before,
        lsh_num_chunks_after=after,
        hash_seed=5,
        is_decoder=False,
        lsh_attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    theirs = LSHSelfAttention(config)
    settings = LSHPublishedSettings(
        heads=HEADS, rounds=rounds, buckets=buckets, chunk=8, before=before, after=after, seed=5
    )
    ours = settings.build(Place(WIDTH, order="bidirectional"))
    weights = {"q.weight": theirs.query_key.weight, "v.weight": theirs.value.weight, "o.weight": torch.eye(WIDTH)}
    load(ours, weights)
    return ours, theirs


@pytest.mark.parametrize(
    "buckets, rounds, before, after, length",
    [(4, 1, 1, 0, 40), (8, 3, 1, 0, 64), ((2, 4), 2, 1, 1, 48), (4, 2, 0, 0, 32), (4, 2, 1, 0, 8), (4, 2, 1, 0, 5)],
)
def test_forward_is_the_reformers(
    buckets: Any, rounds: int, before: int, after: int, length: int, load: Any, agree: Any
) -> None:
    ours, theirs = pair(load, buckets, rounds, before, after)
    x = torch.randn(2, length, WIDTH, requires_grad=True)
    weights = torch.randn(2, length, WIDTH)
    found, expected = ours(x, Context()), theirs(x).hidden_states
    agree(found, expected, 2e-5)
    mine = torch.autograd.grad((found * weights).sum(), [x, ours.q.weight, ours.v.weight])
    wanted = [x, theirs.query_key.weight, theirs.value.weight]
    for a, b in zip(mine, torch.autograd.grad((expected * weights).sum(), wanted), strict=True):
        agree(a, b, 1e-4)


def test_a_last_chunk_that_is_not_full(load: Any, agree: Any) -> None:
    """As their model does it: filled up, with a mask."""
    ours, theirs = pair(load, 4, 2, 1, 0)
    x = torch.randn(2, 37, WIDTH)
    filled = torch.cat([x, torch.zeros(2, 3, WIDTH)], 1)
    mask = (torch.arange(40) < 37).long().expand(2, -1)
    with torch.no_grad():
        agree(ours(x, Context()), theirs(filled, attention_mask=mask).hidden_states[:, :37], 2e-5)


def test_a_chunk_that_holds_all_is_dense_shared_attention(agree: Any) -> None:
    mixer = LSHPublishedSettings(heads=1, chunk=64).build(Place(8, order="bidirectional"))
    generator = torch.Generator().manual_seed(1)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x = torch.randn(1, 12, 8)
    q, v = x @ mixer.q.weight.t(), x @ mixer.v.weight.t()
    others: Tensor = ~torch.eye(12, dtype=torch.bool)
    scores = q @ torch.nn.functional.normalize(q, dim=-1).transpose(1, 2)
    expected = torch.softmax(scores.masked_fill(~others, -torch.inf), -1) @ v @ mixer.o.weight.t()
    agree(mixer(x, Context()), expected, 1e-5)


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="cannot be causal"):
        LSHPublishedSettings().build(Place(16))
    mixer = LSHPublishedSettings().build(Place(16, order="bidirectional"))
    x = torch.zeros(2, 10, 16)
    with pytest.raises(UnsupportedError, match="padded"):
        mixer(x, Context(padding=torch.ones(2, 10, dtype=torch.bool)))
    with pytest.raises(UnsupportedError, match="packed"):
        mixer(x, Context(documents=torch.zeros(2, 10, dtype=torch.int64)))
    with pytest.raises(UnsupportedError, match="does not divide"):
        LSHPublishedSettings(heads=3).build(Place(16, order="bidirectional"))
