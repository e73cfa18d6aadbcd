"""The one seam through which every trainable product is built.

Adapters, quantisation and shard plans are rewrites of these settings, so nothing else in `nn`
may hold a `torch.nn.Linear` or `torch.nn.Embedding`. Masters keep their own dtype; they are cast
to the dtype of the activations at the point of use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from armillary.base.errors import UnsupportedError
from armillary.base.registry import Registry
from armillary.base.settings import Choice
from armillary.native.rows import few_rows_product, fits
from armillary.nn.ops import plain
from armillary.nn.ops.experts import Groups, expert_product, grouped_product
from armillary.nn.tape import Buffer, NoStep, Tape

linears: Registry[LinearSettings] = Registry("linear", "armillary.nn.linear", default="dense")

FEW_ROWS = 4  # up to here one pass over the weights beats the matrix kernels of a CPU
OUTPUT_ROLES = ("o", "down")  # products that write to the residual stream


class LinearSettings(Choice):
    """How one product is represented; the role (q, k, v, o, up, gate, down, head) picks the settings."""

    choices: ClassVar[Registry[LinearSettings]] = linears
    leaves: ClassVar[frozenset[str]] = frozenset()  # roles that stay dense when the kind is given for `all`

    def build(self, inputs: int, outputs: int, *, role: str, bias: bool, depth: int) -> nn.Module:
        raise NotImplementedError

    def build_experts(self, experts: int, inputs: int, outputs: int, *, role: str, bias: bool, depth: int) -> nn.Module:
        """As many products of one shape, of which every row takes some (see `ExpertLinear`)."""
        raise UnsupportedError(
            f"'{self.kind}' products cannot be held by experts", hint="use kind: dense for this role"
        )


@linears.register
class DenseSettings(LinearSettings):
    """A plain weight matrix."""

    kind: ClassVar[str] = "dense"
    oracle: ClassVar[str] = "tests/nn/test_linear.py: PyTorch's linear"

    def build(self, inputs: int, outputs: int, *, role: str, bias: bool, depth: int) -> Linear:
        return Linear(inputs, outputs, role=role, bias=bias, depth=depth)

    def build_experts(
        self, experts: int, inputs: int, outputs: int, *, role: str, bias: bool, depth: int
    ) -> ExpertLinear:
        return ExpertLinear(experts, inputs, outputs, role=role, bias=bias, depth=depth)


@linears.register
class LowRankSettings(LinearSettings):
    """W = U V with U [outputs, r] and V [r, inputs], trained as such from the start.

    The rank is the same for all products of the role, or follows from `ratio`: the largest with which U
    and V hold at most 1/ratio of the parameters of W (at least 1). The paper does not say how ranks were
    chosen. Given for `all`, the head, routers and the small products of single heads (`part`) stay dense; a
    head cannot be factorised.
    """

    kind: ClassVar[str] = "low_rank"
    source: ClassVar[str] = (
        "Liu et al. 2024, FinGPT-HPC: Efficient Pretraining and Finetuning Large Language Models for Financial "
        "Applications with High-Performance Computing"
    )
    oracle: ClassVar[str] = "tests/nn/test_linear.py: the dense product of U V; of any matrix at full rank"
    leaves: ClassVar[frozenset[str]] = frozenset({"head", "router", "part"})
    ratio: float = Field(2.64, ge=1, description="how many times fewer parameters than a dense product, at least")
    rank: int | None = Field(None, gt=0, description="the rank itself, in place of a ratio")

    def of(self, inputs: int, outputs: int) -> int:
        """The rank of a product of this shape."""
        if self.rank is None:
            return max(1, int(inputs * outputs / (self.ratio * (inputs + outputs))))
        if self.rank > min(inputs, outputs):
            raise UnsupportedError(
                f"a product of {inputs} by {outputs} has no rank of {self.rank}",
                hint=f"at most {min(inputs, outputs)}, or a ratio in place of a rank",
            )
        return self.rank

    def build(self, inputs: int, outputs: int, *, role: str, bias: bool, depth: int) -> LowRank:
        if role == "head":
            raise UnsupportedError("the head cannot be of low rank", hint="name other roles, or all of the rest: all")
        return LowRank(inputs, outputs, self.of(inputs, outputs), role=role, bias=bias, depth=depth)


class Linear(nn.Module):
    """y = x Wᵀ + b for x [..., inputs]; W [outputs, inputs].

    Starts from a normal distribution of variance 1/inputs; products that write to the residual
    stream start smaller by √(2·depth), so that the stream's variance does not grow with depth
    (Radford et al. 2019, Language Models are Unsupervised Multitask Learners).
    """

    def __init__(self, inputs: int, outputs: int, *, role: str, bias: bool = False, depth: int = 1) -> None:
        super().__init__()
        self.role = role
        self.inputs, self.outputs = inputs, outputs
        self.deviation = inputs**-0.5 * ((2 * depth) ** -0.5 if role in OUTPUT_ROLES else 1.0)
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.normal_(self.weight, std=self.deviation, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and self._few(x):
            y = few_rows_product(x.reshape(-1, self.inputs), self.weight).view(*x.shape[:-1], self.outputs)
            return y if bias is None else y + bias
        return F.linear(x, self.weight.to(x.dtype), bias)

    def record(self, tape: Tape, x: Buffer, *, unit: int | None = None, factor: float = 1.0) -> Buffer:
        if type(self) is not Linear:
            raise NoStep(f"{type(self).__name__} has no native step")
        return tape.product(x, self.weight, self.bias, unit=unit, factor=factor)

    def _few(self, x: Tensor) -> bool:
        """Decoding: so few rows that reading the weight once is all the work."""
        return (
            not plain()
            and x.numel() <= FEW_ROWS * self.inputs
            and type(self.weight.data) is Tensor
            and self.weight.is_contiguous()
            and self.weight.dtype in (x.dtype, torch.float32)
            and x.dtype != torch.float64
            and fits(self.weight)
            and fits(x)
        )

    def extra_repr(self) -> str:
        return f"{self.inputs} → {self.outputs}, role={self.role}, bias={self.bias is not None}"


class LowRank(nn.Module):
    """y = U (V x) + b for x [..., inputs]; `narrow` holds V [r, inputs], `widen` U [outputs, r] and b.

    V x starts with the variance of x and U as a dense product of r inputs does, so that y starts with
    the variance of a dense product's, in every role.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, *, role: str, bias: bool = False, depth: int = 1) -> None:
        super().__init__()
        self.role = role
        self.inputs, self.outputs, self.rank = inputs, outputs, rank
        self.narrow = Linear(inputs, rank, role="narrow")
        self.widen = Linear(rank, outputs, role=role, bias=bias, depth=depth)

    def forward(self, x: Tensor) -> Tensor:
        return self.widen(self.narrow(x))  # type: ignore[no-any-return]

    def record(self, tape: Tape, x: Buffer, *, unit: int | None = None, factor: float = 1.0) -> Buffer:
        return self.widen.record(tape, self.narrow.record(tape, x), unit=unit, factor=factor)

    def resemble(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Become the product of this rank that is nearest to a dense one: weight [outputs, inputs], bias
        [outputs] (Eckart & Young 1936); the singular values are shared evenly."""
        u, s, v = torch.linalg.svd(weight.detach().double(), full_matrices=False)
        root = s[: self.rank].sqrt()
        with torch.no_grad():
            self.widen.weight.copy_(u[:, : self.rank] * root)
            self.narrow.weight.copy_(root[:, None] * v[: self.rank])
            if self.widen.bias is not None:
                self.widen.bias.copy_(torch.zeros_like(self.widen.bias) if bias is None else bias)

    def spared(self) -> float:
        """FLOPs for each row by which this takes less than a dense product."""
        return 2.0 * (self.inputs * self.outputs - self.rank * (self.inputs + self.outputs))

    def extra_repr(self) -> str:
        return f"{self.inputs} → {self.rank} → {self.outputs}, role={self.role}"


def spared(module: nn.Module, tokens: float, rows: Mapping[str, float]) -> float:
    """FLOPs by which the products in `module` take less than dense ones, each of which sees every token once
    but those that `rows` names (or whose list it names), which see so many rows."""
    less = 0.0
    for name, part in module.named_modules():
        if isinstance(part, LowRank):
            less += part.spared() * rows.get(name, rows.get(name.rpartition(".")[0], tokens))
    return less


class ExpertLinear(nn.Module):
    """y = x W_eᵀ + b_e for the experts e that each row chose; W [E, outputs, inputs].

    experts has one axis more than x's rows (x [..., inputs], experts [..., k]: every row goes to k
    experts, y [..., k, outputs]) or just as many (x [..., k, inputs], experts [..., k]: every row has
    its own, y [..., k, outputs]). Work and weights read follow the choices, not E. Each W_e starts as
    a `Linear` of the role does.
    """

    def __init__(
        self, experts: int, inputs: int, outputs: int, *, role: str, bias: bool = False, depth: int = 1
    ) -> None:
        super().__init__()
        self.role = role
        self.experts, self.inputs, self.outputs = experts, inputs, outputs
        self.deviation = inputs**-0.5 * ((2 * depth) ** -0.5 if role in OUTPUT_ROLES else 1.0)
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(experts, outputs)) if bias else None

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.normal_(self.weight, std=self.deviation, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        own = experts.dim() == x.dim() - 1
        chosen = experts.reshape(-1, 1) if own else experts.reshape(-1, experts.shape[-1])
        y = expert_product(x.reshape(-1, self.inputs), self.weight, chosen).view(*experts.shape, self.outputs)
        return y if self.bias is None else y + self.bias.to(x.dtype)[experts]

    def grouped(self, rows: Tensor, groups: Groups) -> Tensor:
        """The same for rows [M, inputs] that stand sorted by their experts → [M, outputs]."""
        y = grouped_product(rows, self.weight, groups)
        return y if self.bias is None else y + self.bias.to(rows.dtype)[groups.owners]

    def single(self, row: Tensor, expert: int) -> Tensor:
        """[1, inputs] through one expert, where `reads_once` says that it can be."""
        y = few_rows_product(row, self.weight[expert])
        return y if self.bias is None else y + self.bias[expert].to(row.dtype)

    def stacked(self, rows: Tensor) -> Tensor:
        """As many rows for every expert: [E, M, inputs] → [E, M, outputs]."""
        y = torch.bmm(rows, self.weight.to(rows.dtype).transpose(1, 2))
        return y if self.bias is None else y + self.bias.to(rows.dtype)[:, None]

    def extra_repr(self) -> str:
        return f"{self.experts} × {self.inputs} → {self.outputs}, role={self.role}, bias={self.bias is not None}"


class Embedding(nn.Module):
    """Rows of a table: ids [...] int64 → [..., width]."""

    def __init__(self, entries: int, width: int, *, role: str = "embed", deviation: float | None = None) -> None:
        super().__init__()
        self.role = role
        self.entries, self.width = entries, width
        self.deviation = width**-0.5 if deviation is None else deviation
        self.weight = nn.Parameter(torch.empty(entries, width))

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.normal_(self.weight, std=self.deviation, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)

    def extra_repr(self) -> str:
        return f"{self.entries} × {self.width}, role={self.role}"
