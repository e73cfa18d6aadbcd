"""Heads against formulas written out, over padded rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from armillary.base.settings import parse
from armillary.nn.heads.base import HeadSettings, pooled
from armillary.nn.linear import Embedding
from armillary.nn.mechanism import Place
from armillary.nn.network import ModelSettings, build

H = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()


@pytest.mark.parametrize("padding", [None, LEFT, LEFT.flip(1)])
@pytest.mark.parametrize("how", ["mean", "first", "last"])
def test_pooling_takes_real_tokens_only(how: str, padding: Any, agree: Any) -> None:
    rows = []
    for row in range(3):
        real = H[row] if padding is None else H[row, padding[row]]
        rows.append({"mean": real.mean(0), "first": real[0], "last": real[-1]}[how])
    agree(pooled(H, padding, how), torch.stack(rows))


def made(data: dict[str, Any]) -> tuple[Any, Embedding]:
    embedding = Embedding(11, 8)
    head = parse(HeadSettings, data).build(Place(8), 11, embedding)
    for module in (embedding, head):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
    return head, embedding


def test_language_model_heads(agree: Any) -> None:
    tied, embedding = made({"kind": "language_model"})
    agree(tied(H), H @ embedding.weight.t())
    free, _ = made({"kind": "language_model", "tied": False, "bias": True, "softcap": 2.0})
    agree(free(H), 2 * torch.tanh((H @ free.product.weight.t() + free.product.bias) / 2))


def test_classification_and_embedding_heads(agree: Any) -> None:
    classify, _ = made({"kind": "classification", "classes": 4, "pool": "first"})
    agree(classify(H, LEFT), pooled(H, LEFT, "first") @ classify.product.weight.t() + classify.product.bias)
    unit, _ = made({"kind": "embedding"})
    agree(unit(H, LEFT).norm(dim=-1), torch.ones(3))
    agree(unit(H, LEFT) * pooled(H, LEFT, "mean").norm(dim=-1, keepdim=True), pooled(H, LEFT, "mean"))
    raw, _ = made({"kind": "embedding", "pool": "last", "normalise": False})
    agree(raw(H), H[:, -1])


@pytest.mark.parametrize("head, shape", [({"kind": "classification", "classes": 4}, (2, 4)), ("embedding", (2, 16))])
def test_an_encoder_reads_a_sequence_off_through_its_head(head: Any, shape: tuple[int, int], agree: Any) -> None:
    data = {"form": "encoder", "width": 16, "depth": 1, "vocabulary": 20, "head": head}
    model, ids = build(parse(ModelSettings, data)), torch.randint(0, 20, (2, 6))
    padding = torch.arange(6) < torch.tensor([[6], [4]])
    y = model(ids, padding=padding)
    assert y.shape == shape
    agree(y[1:], model(ids[1:, :4]))
