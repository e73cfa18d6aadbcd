"""Cost: what a mechanism declares, and the counter that holds the declaration to the truth.

Counting rule: a product of [m, k] by [k, n] is 2·m·k·n; an element-wise operation is one per
output element; a reduction or scan one per input element (a norm two); a softmax five per element (maximum,
difference, exponential, sum, quotient). Views, copies, casts, gathers,
comparisons and everything on integers are free.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Cost:
    """flops: of the forward pass of one row of T tokens; state_bytes: of one row after T tokens."""

    flops: float = 0.0
    state_bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.state_bytes + other.state_bytes)


def linear_flops(inputs: int, outputs: int, tokens: int, bias: bool = False) -> float:
    """FLOPs of one product over `tokens` rows."""
    return tokens * (2.0 * inputs * outputs + (outputs if bias else 0))


_aten = torch.ops.aten
_PER_OUTPUT: dict[Any, float] = {
    _aten._softmax: 5,
    _aten._safe_softmax: 5,
    _aten._log_softmax: 5,
    _aten.cumsum: 1,
    _aten.logcumsumexp: 3,
}
_PER_INPUT = {_aten.sum, _aten.mean, _aten.amax, _aten.amin, _aten.max, _aten.var, _aten.prod, _aten.linalg_vector_norm}
_FREE = {_aten.where, _aten.masked_fill, _aten.clone, _aten.copy_, _aten._to_copy, _aten.fill_, _aten.zero_}
_FREE |= {_aten.eq, _aten.ne, _aten.lt, _aten.le, _aten.gt, _aten.ge, _aten.isinf, _aten.isnan}
_FREE |= {_aten.bitwise_and, _aten.bitwise_or, _aten.bitwise_not, _aten.logical_not, _aten.logical_and}


def _elements(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    return sum(_elements(item) for item in value) if isinstance(value, (tuple, list)) else 0


class Counter(TorchDispatchMode):
    """Counts the FLOPs of everything run inside the `with` block, element-wise work included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        first = args[0] if args else None
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
            if packet is _aten.addmm:
                self.flops += _elements(out)
        elif packet in _FREE or (isinstance(first, Tensor) and not first.is_floating_point()):
            pass
        elif packet in _PER_OUTPUT:
            self.flops += _PER_OUTPUT[packet] * _elements(out)
        elif packet in _PER_INPUT:
            self.flops += _elements(first) * (2 if packet is _aten.linalg_vector_norm else 1)
        elif torch.Tag.pointwise in func.tags and isinstance(out, Tensor) and out.is_floating_point():
            self.flops += _elements(out)
        return out


def count(call: Callable[[], Any]) -> float:
    """FLOPs of one call on the plain (oracle) path."""
    from armillary.nn.ops import plain_ops

    with plain_ops(), torch.no_grad(), Counter() as counter:
        call()
    if not math.isfinite(counter.flops):
        raise AssertionError("a FLOP count is not finite")
    return float(counter.flops)
