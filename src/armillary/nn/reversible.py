"""Reversible stacks: two streams, of which each is computed back from the other, so no activation is kept.

Gomez et al. 2017, The Reversible Residual Network: Backpropagation Without Storing Activations;
Kitaev, Kaiser & Levskaya 2020, Reformer: y₁ = x₁ + f(x₂), y₂ = x₂ + g(y₁). Both streams start as the
embedding. At the end the Reformer concatenates them, which doubles the head; here they are averaged,
so that norm and head stay as they are. A block of any number of branches is a row of such steps,
each adding to the stream that the step before did not touch; branches side by side are one step.

The backward pass takes every step back, x₁ = y₁ − f(x₂), and computes f once more with gradients: a
third more work for memory that does not grow with depth. The streams are float32 (float64) whatever
the branches compute in, so that what is taken back is what was added to 1e-5. Noise of an update is a
function of its seed and comes again by itself; dropout draws from the global generator, whose state
is kept for every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from armillary.base.errors import UnsupportedError
from armillary.nn.block import Block, BlockState
from armillary.nn.context import Context, Memory

Contribution = Callable[[Block, tuple[str, ...], Tensor, Context], Tensor]


def contribution(block: Block, names: tuple[str, ...], x: Tensor, ctx: Context) -> Tensor:
    """The sum of some branches of a block, all reading x."""
    total: Tensor | None = None
    for name in names:
        h: Tensor = block.get_submodule(name)(x, ctx)
        total = h if total is None else total + h
    assert total is not None
    return total


def steps(block: Block) -> list[tuple[str, ...]]:
    """The branches of a block by what they read."""
    found: list[tuple[str, ...]] = []
    for branch in block.branches():
        if found and (branch.beside or block.parallel):
            found[-1] += (branch.name,)
        else:
            found.append((branch.name,))
    return found


def run(blocks: list[Block], x: Tensor, ctx: Context, compiled: Contribution | None) -> Tensor:
    """The blocks over x [B, T, D]; `compiled` stands in for `contribution` where it can."""
    if ctx.taps is not None:
        return _close(*_tapped(blocks, *_open(x), ctx, x.dtype), x.dtype)
    dropping = any(branch.dropout and branch.training for block in blocks for branch in block.branches())
    call = contribution if compiled is None or dropping else compiled
    work = _Work([(block, names) for block in blocks for names in steps(block)], call, ctx, x.dtype, dropping)
    if not torch.is_grad_enabled():
        return _close(*work.forward(*_open(x)), x.dtype)
    parameters = work.parameters()
    memory = () if ctx.memory is None else (ctx.memory.hidden,)
    a, b = _Reversible.apply(work, *_open(x), *memory, *parameters)  # type: ignore[no-untyped-call]
    return _close(a, b, x.dtype)


def extend(blocks: list[Block], x: Tensor, states: list[BlockState], ctx: Context) -> Tensor:
    """The next chunk of every row."""
    a, b = _open(x)
    for block, state in zip(blocks, states, strict=True):
        if ctx.taps is not None:
            b = ctx.taps(f"{block.path}.residual.pre", b)
        for names in steps(block):
            if ctx.taps is not None:
                b = _middle(block, names, b, ctx)
            total = a
            given = b.to(x.dtype)
            for name in names:
                total = total + block.get_submodule(name)(given, ctx, state.get(name), True)
            a, b = b, total
        if ctx.taps is not None:
            b = ctx.taps(f"{block.path}.residual.post", b)
    return _close(a, b, x.dtype)


def undo(blocks: list[Block], a: Tensor, b: Tensor, ctx: Context, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The streams before the blocks from those behind them."""
    work = _Work([(block, names) for block in blocks for names in steps(block)], contribution, ctx, dtype, False)
    with torch.no_grad():
        for block, names in reversed(work.steps):
            a, b = b - work.of(block, names, a), a
    return a, b


def _open(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide, wide


def _close(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return ((a + b) * 0.5).to(dtype)


def _tapped(blocks: list[Block], a: Tensor, b: Tensor, ctx: Context, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same numbers by ordinary autograd: what an edit changed cannot be taken back. `residual.pre`,
    `.mid` and `.post` are the stream that the first step reads, the last reads, and the last wrote."""
    assert ctx.taps is not None
    for block in blocks:
        b = ctx.taps(f"{block.path}.residual.pre", b)
        for names in steps(block):
            b = _middle(block, names, b, ctx)
            a, b = b, a + contribution(block, names, b.to(dtype), ctx)
        b = ctx.taps(f"{block.path}.residual.post", b)
    return a, b


def _middle(block: Block, names: tuple[str, ...], b: Tensor, ctx: Context) -> Tensor:
    assert ctx.taps is not None
    if names[-1] == block.names[-1] and len(block.names) > len(names):
        return ctx.taps(f"{block.path}.residual.mid", b)
    return b


@dataclass
class _Work:
    """One call: what is computed, and what of it must be the same when it is computed again."""

    steps: list[tuple[Block, tuple[str, ...]]]
    call: Contribution
    ctx: Context
    dtype: torch.dtype
    dropping: bool
    states: list[list[Tensor]] = dataclasses.field(default_factory=list)

    def parameters(self) -> list[nn.Parameter]:
        found: dict[int, nn.Parameter] = {}
        for parameter in (p for block, _ in self.steps for p in block.parameters() if p.requires_grad):
            if hasattr(parameter, "placements"):
                raise UnsupportedError(
                    "a reversible stack cannot be sharded over processes", hint="set model.topology: sequential"
                )
            found[id(parameter)] = parameter
        return list(found.values())

    def of(self, block: Block, names: tuple[str, ...], x: Tensor, memory: Tensor | None = None) -> Tensor:
        ctx = self.ctx
        if memory is not None:
            assert ctx.memory is not None
            ctx = ctx.replace(memory=Memory(memory, ctx.memory.padding))
        return self.call(block, names, x.to(self.dtype), ctx)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        for block, names in self.steps:
            a, b = b, a + self.of(block, names, b)
        return a, b

    def traced(self, number: int, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """One step as both passes compute it, so that they take the same kernels: what it reads (x and the
        memory, as leaves of a graph of their own) and its result."""
        block, names = self.steps[number]
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            looked = None if memory is None else memory.detach().requires_grad_(memory.requires_grad)
            return self.of(block, names, x, looked), x, looked


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: _Work, a: Tensor, b: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        ctx.work = work
        ctx.rest = rest  # the parameters themselves: saved tensors come back as other objects
        memory = rest[0] if work.ctx.memory is not None else None
        for number in range(len(work.steps)):
            if work.dropping:
                work.states.append(_states(a.device))
            a, b = b, a + work.traced(number, b, memory)[0].detach()
        ctx.save_for_backward(a, b)
        return a, b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_a: Tensor, grad_b: Tensor) -> tuple[Tensor | None, ...]:
        work, (a, b) = ctx.work, ctx.saved_tensors
        slopes: dict[int, Tensor] = {}
        memory = ctx.rest[0] if work.ctx.memory is not None else None
        for number in reversed(range(len(work.steps))):
            block, names = work.steps[number]
            with _replayed(work, number, a.device):
                h, x, looked = work.traced(number, a, memory)
            used = [p for name in names for p in block.get_submodule(name).parameters() if p.requires_grad]
            wanted = [x, *used]
            if looked is not None and looked.requires_grad:
                wanted.append(looked)
            found = torch.autograd.grad(h, wanted, grad_b.to(h.dtype), allow_unused=True)
            owners = [*used, memory] if len(wanted) > len(used) + 1 else used
            for owner, slope in zip(owners, found[1:], strict=True):
                if slope is not None:
                    slopes[id(owner)] = slopes[id(owner)] + slope if id(owner) in slopes else slope
            a, b = b - h.detach(), a
            grad_a, grad_b = grad_b, grad_a if found[0] is None else grad_a + found[0]
        return None, grad_a, grad_b, *(slopes.get(id(one)) for one in ctx.rest)


def _states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


class _replayed:
    """The generators as they were before a step of the forward pass; afterwards as they are now."""

    def __init__(self, work: _Work, number: int, device: torch.device) -> None:
        self.states = work.states[number] if work.dropping else None
        self.device = device

    def __enter__(self) -> None:
        if self.states is not None:
            self.before = _states(self.device)
            self._set(self.states)

    def __exit__(self, *_: object) -> None:
        if self.states is not None:
            self._set(self.before)

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], self.device)
