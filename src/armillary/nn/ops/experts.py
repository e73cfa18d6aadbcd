"""Products with the weights that each row chose: the rows of one expert are one matrix product.

The plain form gathers a weight per row. The fast form is one opaque operator, since how many rows
an expert gets is data: it sorts the rows by expert, so that work and weights read follow the
choices (Gale et al. 2022, MegaBlocks; Tan et al. 2024, Scattered Mixture-of-Experts).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from armillary.nn.ops import plain


def expert_product(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    """y[n, j] = W[experts[n, j]] x[n]: x [N, I], weight [E, O, I], experts [N, k] int64 → [N, k, O] in
    x's dtype."""
    if plain():
        each = weight.to(x.dtype)[experts.flatten()]  # [N·k, O, I]
        rows = x[:, None].expand(-1, experts.shape[1], -1).reshape(-1, x.shape[1], 1)
        return torch.bmm(each, rows).view(*experts.shape, weight.shape[1])
    return _product(x, weight, experts)  # type: ignore[no-any-return]


def _groups(experts: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    """Each expert that was chosen, and which of the N·k choices are its own."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    start = 0
    for expert, rows in enumerate(torch.bincount(flat, minlength=count).tolist()):
        if rows:
            yield expert, order[start : start + rows]
        start += rows


@torch.library.custom_op("armillary::expert_product", mutates_args=())
def _product(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    chosen = experts.shape[1]
    y = x.new_empty(experts.numel(), weight.shape[1])
    for expert, places in _groups(experts, weight.shape[0]):
        y[places] = x[places // chosen] @ weight[expert].to(x.dtype).t()
    return y.view(*experts.shape, weight.shape[1])


@_product.register_fake
def _(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    return x.new_empty(*experts.shape, weight.shape[1])


@torch.library.custom_op("armillary::expert_product_backward", mutates_args=())
def _product_backward(grad: Tensor, x: Tensor, weight: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    chosen = experts.shape[1]
    slopes = grad.reshape(experts.numel(), weight.shape[1])
    grad_x = x.new_empty(experts.numel(), x.shape[1])
    grad_weight = torch.zeros_like(weight)
    for expert, places in _groups(experts, weight.shape[0]):
        inward = slopes[places]
        grad_x[places] = inward @ weight[expert].to(x.dtype)
        grad_weight[expert] = inward.t() @ x[places // chosen]
    return grad_x.view(*experts.shape, x.shape[1]).sum(1), grad_weight


@_product_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, experts = ctx.saved_tensors
    return (*_product_backward(grad, x, weight, experts), None)


_product.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.armillary.expert_product)
def _flops(x: Any, weight: Any, experts: Any, *, out_shape: Any = None, **_: Any) -> int:
    return int(2 * experts[0] * experts[1] * weight[1] * weight[2])


@register_flop_formula(torch.ops.armillary.expert_product_backward)
def _flops_backward(grad: Any, x: Any, weight: Any, experts: Any, *, out_shape: Any = None, **_: Any) -> int:
    return int(4 * experts[0] * experts[1] * weight[1] * weight[2])
