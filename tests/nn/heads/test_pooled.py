"""Heads that read one vector off a sequence, against NumPy row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from armillary.nn.heads.classification import ClassificationHeadSettings
from armillary.nn.heads.embedding import EmbeddingHeadSettings
from armillary.nn.mechanism import Place

WIDTH = 6
H = torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(0))
# padded behind, before, on both sides, and not at all
PADDING = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)


def pooled(how: str, padding: torch.Tensor | None) -> NDArray[np.float32]:
    rows = []
    for index in range(4):
        real = H[index].numpy() if padding is None else H[index].numpy()[padding[index].numpy()]
        rows.append({"mean": real.mean(0), "first": real[0], "last": real[-1]}[how])
    return np.stack(rows)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("how", ["mean", "first", "last"])
def test_embedding(how: str, padded: bool) -> None:
    padding = PADDING if padded else None
    expected = pooled(how, padding)
    head = EmbeddingHeadSettings(pool=how, normalise=False).build(Place(WIDTH), 10, torch.nn.Module())  # type: ignore[arg-type]
    np.testing.assert_allclose(head(H, padding).numpy(), expected, atol=1e-6)
    unit = EmbeddingHeadSettings(pool=how).build(Place(WIDTH), 10, torch.nn.Module())  # type: ignore[arg-type]
    lengths = np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(unit(H, padding).numpy(), expected / lengths, atol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("how", ["mean", "first", "last"])
def test_classification(how: str, padded: bool) -> None:
    padding = PADDING if padded else None
    head = ClassificationHeadSettings(classes=3, pool=how).build(Place(WIDTH), 10, torch.nn.Module())  # type: ignore[arg-type]
    torch.manual_seed(1)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    named = dict(head.named_parameters())
    weight, bias = named["product.weight"].detach().numpy(), named["product.bias"].detach().numpy()
    expected = pooled(how, padding) @ weight.T + bias
    np.testing.assert_allclose(head(H, padding).detach().numpy(), expected, atol=1e-5)
