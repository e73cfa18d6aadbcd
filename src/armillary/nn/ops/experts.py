"""Products with the weights that each row chose: the rows of one expert are one matrix product.

The plain form gathers a weight per row. The fast form sorts the rows by expert once (`grouped`) and
multiplies neighbours, so that work and weights read follow the choices and no row is dropped (Gale et
al. 2022, MegaBlocks; Tan et al. 2024, Scattered Mixture-of-Experts). How many rows an expert gets is
data, so the product is one opaque operator; few rows read each weight once. PyTorch's own grouped
product is no faster on a CPU and knows no float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from armillary.native.rows import few_rows_product, fits
from armillary.nn.ops import plain

FEW = 4  # rows for which one pass over the weights beats the matrix kernels of a CPU


@dataclass(frozen=True)
class Groups:
    """Picks [N, k] of N rows, sorted by expert; picks that are left out stand last and belong to none.

    order [M]: which of the M = N·k picks stands at a place; places [M]: where each pick stands; ends
    [E]: where each expert's picks end; owners [M]: the expert at a place (the last one where none).
    """

    order: Tensor
    places: Tensor
    ends: Tensor
    owners: Tensor
    chosen: int

    def rows(self, x: Tensor) -> Tensor:
        """x [N, I] → [M, I]: for every place the row that picked."""
        return _Taken.apply(x, self)  # type: ignore[no-any-return,no-untyped-call]

    def sort(self, picks: Tensor) -> Tensor:
        """[M, O] by pick → by place."""
        return _Moved.apply(picks, self.order, self.places)  # type: ignore[no-any-return,no-untyped-call]

    def unsort(self, picks: Tensor) -> Tensor:
        """[M, O] by place → by pick."""
        return _Moved.apply(picks, self.places, self.order)  # type: ignore[no-any-return,no-untyped-call]


def grouped(experts: Tensor, count: int, kept: Tensor | None = None) -> Groups:
    """experts [N, k] int64 below `count`; kept [N, k]: False for picks that are left out."""
    flat = (experts if kept is None else torch.where(kept, experts, count)).flatten()
    owners, order = flat.sort(stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    ends = torch.searchsorted(owners, torch.arange(1, count + 1, device=order.device))
    return Groups(order, places, ends, owners.clamp(max=count - 1), experts.shape[1])


def grouped_product(rows: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """y[m] = W[owner of m] rows[m], 0 where none: rows [M, I], weight [E, O, I] → [M, O] in rows' dtype."""
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and fits(rows) and fits(weight):
        return _multiply(rows, weight, groups.ends)  # the operator's own call costs as much as a small product
    return _product(rows, weight, groups.ends)  # type: ignore[no-any-return]


def reads_once(rows: Tensor, weight: Tensor) -> bool:
    """Whether few rows can be multiplied in one pass over the weights."""
    kinds = (rows.dtype, torch.float32)
    return fits(rows) and fits(weight) and weight.is_contiguous() and weight.dtype in kinds


def expert_product(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    """y[n, j] = W[experts[n, j]] x[n]: x [N, I], weight [E, O, I], experts [N, k] int64 → [N, k, O] in
    x's dtype."""
    if plain():
        each = weight.to(x.dtype)[experts.flatten()]  # [N·k, O, I]
        rows = x[:, None].expand(-1, experts.shape[1], -1).reshape(-1, x.shape[1], 1)
        return torch.bmm(each, rows).view(*experts.shape, weight.shape[1])
    groups = grouped(experts, weight.shape[0])
    y = grouped_product(groups.rows(x), weight, groups)
    return groups.unsort(y).view(*experts.shape, weight.shape[1])


class _Taken(torch.autograd.Function):
    """A gather whose backward pass is a gather too: adding up at indices is slow on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(groups.places)
        ctx.chosen = groups.chosen
        return x[groups.order // groups.chosen]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return grad[places].view(-1, ctx.chosen, grad.shape[1]).sum(1), None


class _Moved(torch.autograd.Function):
    """x[there], where `back` undoes `there`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x[there]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grad[back], None, None


def _slices(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that was chosen, and where its rows stand."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


def _multiply(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    y = rows.new_empty(rows.shape[0], weight.shape[1])
    quick, last = reads_once(rows, weight), 0
    for expert, part in _slices(ends):
        last = part.stop
        if quick and part.stop - part.start <= FEW:
            y[part] = few_rows_product(rows[part], weight[expert])
        else:
            torch.mm(rows[part], weight[expert].to(rows.dtype).t(), out=y[part])
    y[last:] = 0
    return y


@torch.library.custom_op("armillary::grouped_product", mutates_args=())
def _product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return _multiply(rows, weight, ends)


@_product.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@torch.library.custom_op("armillary::grouped_product_backward", mutates_args=())
def _product_backward(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    grad = grad.contiguous()
    grad_rows = torch.empty_like(rows)
    grad_weight = torch.empty_like(weight)
    last, chosen = 0, set()
    for expert, part in _slices(ends):
        last = part.stop
        chosen.add(expert)
        torch.mm(grad[part], weight[expert].to(rows.dtype), out=grad_rows[part])
        if weight.dtype == rows.dtype:
            torch.mm(grad[part].t(), rows[part], out=grad_weight[expert])
        else:
            grad_weight[expert] = grad[part].t() @ rows[part]
    grad_rows[last:] = 0
    for expert in set(range(len(weight))) - chosen:
        grad_weight[expert] = 0
    return grad_rows, grad_weight


@_product_backward.register_fake
def _(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_product_backward(grad, *ctx.saved_tensors), None)


_product.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.armillary.grouped_product)
def _flops(rows: Any, weight: Any, ends: Any, *, out_shape: Any = None, **_: Any) -> int:
    return int(2 * rows[0] * weight[1] * weight[2])


@register_flop_formula(torch.ops.armillary.grouped_product_backward)
def _flops_backward(grad: Any, rows: Any, weight: Any, ends: Any, *, out_shape: Any = None, **_: Any) -> int:
    return int(4 * rows[0] * weight[1] * weight[2])
