"""Helpers for comparing a module with a peer's: the same weights in, the same outputs and gradients out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Agree = Callable[..., None]
Load = Callable[[nn.Module, Mapping[str, Any]], None]


@pytest.fixture
def agree() -> Agree:
    """Largest difference at most `tolerance` times the largest expected value."""

    def near(found: Tensor | None, expected: Tensor | None, tolerance: float = 1e-5) -> None:
        assert found is not None and expected is not None
        found, expected = found.detach(), expected.detach()
        assert found.shape == expected.shape
        size = max(float(expected.abs().max()), 1e-3)
        assert float((found - expected).abs().max()) <= tolerance * size

    return near


@pytest.fixture
def load() -> Load:
    """Copy a peer's tensors in by our names; every parameter must be given and every tensor used."""

    def copy(module: nn.Module, table: Mapping[str, Any]) -> None:
        own = dict(module.named_parameters())
        assert set(own) == set(table), set(own) ^ set(table)
        with torch.no_grad():
            for name, tensor in table.items():
                assert own[name].shape == tensor.shape, name
                own[name].copy_(tensor)

    return copy


@pytest.fixture
def shake() -> Callable[[nn.Module], None]:
    """Move every parameter off its starting value, where a bias of 0 or a gain of 1 would hide mistakes."""

    def noise(module: nn.Module) -> None:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.2)

    return noise
