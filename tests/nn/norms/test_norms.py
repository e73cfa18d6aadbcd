"""Norms against PyTorch's, values and gradients, in every type that flows through a network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.nn.norms.layernorm import LayerNormSettings
from armillary.nn.norms.rmsnorm import RMSNormSettings


def expected(kind: str, x: Tensor, module: Any) -> Tensor:
    weight = None if module.weight is None else module.weight.to(x.dtype)
    if kind == "unit_offset":
        weight = weight + 1
    if kind in ("rmsnorm", "unit_offset"):
        return F.rms_norm(x, (x.shape[-1],), weight, 1e-3)
    bias = None if module.bias is None else module.bias.to(x.dtype)
    return F.layer_norm(x, (x.shape[-1],), weight, bias, 1e-3)


SETTINGS = {
    "rmsnorm": RMSNormSettings(epsilon=1e-3),
    "layernorm": LayerNormSettings(epsilon=1e-3),
    "unbiased": LayerNormSettings(epsilon=1e-3, bias=False),
    "bare": LayerNormSettings(epsilon=1e-3, weight=False, bias=False),
    "unit_offset": RMSNormSettings(epsilon=1e-3, unit_offset=True),
}


@pytest.mark.parametrize("size", [0.01, 1.0, 300.0])
@pytest.mark.parametrize("kind", SETTINGS)
def test_values_and_gradients_are_pytorchs(kind: str, size: float, agree: Any, shake: Any) -> None:
    module = SETTINGS[kind].build(12)
    shake(module)
    x = (torch.randn(2, 5, 12) * size + size).requires_grad_()
    weights, wanted = torch.randn(2, 5, 12), [x, *module.parameters()]
    found, theirs = module(x), expected(kind, x, module)
    agree(found, theirs)
    for a, b in zip(
        torch.autograd.grad((found * weights).sum(), wanted),
        torch.autograd.grad((theirs * weights).sum(), wanted),
        strict=True,
    ):
        agree(a, b, 1e-4)
    with torch.no_grad():
        agree(module(x), theirs)
        agree(module(x[:, ::2, :]), theirs[:, ::2, :])  # rows that do not lie side by side
        agree(module(x.transpose(0, 1)), theirs.transpose(0, 1))
        agree(module(x.double()), expected(kind, x.double(), module), 1e-6)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("kind", SETTINGS)
def test_bf16_is_computed_in_float32(kind: str, gradients: bool, shake: Any) -> None:
    """One rounding at the end: the nearest bf16 of the float32 result, with masters in either type."""
    module = SETTINGS[kind].build(64)
    shake(module)
    x = torch.randn(3, 7, 64).bfloat16()
    with torch.set_grad_enabled(gradients):
        assert torch.equal(module(x), expected(kind, x.float(), module).bfloat16())
        cast = module.bfloat16()
        low = cast(x)
    assert low.dtype == torch.bfloat16
    error = (low.float() - expected(kind, x.float(), cast.float())).detach().abs()
    assert float(error.max()) < 0.03
