"""A stack: named blocks repeated by a pattern to a depth, with overrides and shared parameters."""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from armillary.base.errors import SettingsError
from armillary.base.settings import Settings
from armillary.nn import reversible
from armillary.nn.block import Block, BlockSettings, BlockState
from armillary.nn.channels.gated import GatedSettings
from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost
from armillary.nn.mechanism import Place
from armillary.nn.mixers.attention import AttentionSettings
from armillary.nn.positions.rope import RopeSettings
from armillary.nn.tape import Buffer, NoStep, Tape

GRAPHS = 8  # of one kind of block: with and without gradients, documents, several lengths
DEFAULT_BLOCK = BlockSettings(mixer=AttentionSettings(position=RopeSettings()), channel=GatedSettings())


class StackSettings(Settings):
    """Which blocks, how many, in which order."""

    depth: int = Field(6, ge=0, description="number of blocks; 0: the embedding alone")
    block: BlockSettings | None = Field(None, description="the one kind of block, or")
    blocks: dict[str, BlockSettings] | None = Field(None, description="several kinds by name, and")
    pattern: tuple[str, ...] | None = Field(None, description="their order, cycled to the depth")
    overrides: dict[int, BlockSettings] = Field({}, description="other blocks at single indices")
    share: dict[str, tuple[str, ...]] = Field(
        {}, description="groups of modules with one set of parameters, by name patterns such as blocks.*.channel"
    )
    topology: Literal["sequential", "reversible"] = Field(
        "sequential",
        description="how blocks are connected; reversible: two streams, activations are computed back, not kept",
    )

    @model_validator(mode="after")
    def _coherent(self) -> StackSettings:
        if self.block is not None and (self.blocks is not None or self.pattern is not None):
            raise ValueError("give either block, or blocks with a pattern, not both")
        if self.pattern is not None and self.blocks is None:
            raise ValueError("a pattern needs blocks to name")
        if self.blocks is not None:
            if not self.blocks:
                raise ValueError("blocks is empty")
            if self.pattern is None and len(self.blocks) > 1:
                raise ValueError(f"several blocks need a pattern, for example pattern: [{', '.join(self.blocks)}]")
            for name in self.pattern or ():
                if name not in self.blocks:
                    raise ValueError(f"the pattern names '{name}', but blocks has {', '.join(self.blocks)}")
        for index in self.overrides:
            if not 0 <= index < self.depth:
                raise ValueError(f"overrides names block {index}, but the blocks are 0 to {self.depth - 1}")
        if self.topology == "reversible" and any(
            branch.norm_at == "post" for block in self.layers() for branch in block.all()
        ):
            raise ValueError("a reversible stack cannot have norm_at: post, which cannot be taken back")
        return self

    def layers(self) -> list[BlockSettings]:
        """The block of every index."""
        if self.blocks is None:
            kinds = [self.block or DEFAULT_BLOCK]
        else:
            kinds = [self.blocks[name] for name in (self.pattern or tuple(self.blocks))]
        return [self.overrides.get(index, kinds[index % len(kinds)]) for index in range(self.depth)]

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        total = Cost()
        for block in self.layers():
            total = total + block.cost(place, length, itemsize)
        if self.topology == "reversible":
            total = total + Cost(2.0 * length * place.width)  # the mean of the streams
        return total


class Stack(nn.Module):
    """Blocks in order; each may have a compiled form, which is left whenever taps are set."""

    def __init__(self, settings: StackSettings, place: Place) -> None:
        super().__init__()
        for index, block in enumerate(settings.layers()):
            self.add_module(str(index), block.build(_layer(place, index, settings.depth)))
        kinds: list[BlockSettings] = []
        for block in settings.layers():
            if block not in kinds:
                kinds.append(block)
        self.kinds = len(kinds)
        self.reversible = settings.topology == "reversible"
        self.recompute = False
        self._compiled: Callable[..., Tensor] | None = None

    def __iter__(self) -> Iterator[Block]:
        return iter(self._modules.values())  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self._modules)

    def compile_blocks(self, **options: Any) -> None:
        """Compile every block on its own; identical blocks share one compiled graph.

        options: for torch.compile. Several kinds of block, and several networks in one process, would
        pass the compiler's limit on graphs of one function and fall back to eager without a word, so
        the limit grows with the kinds and graphs are counted for this stack alone.
        """
        limits = {"recompile_limit": GRAPHS * max(1, self.kinds), "isolate_recompiles": True}
        known = inspect.signature(torch.compile).parameters
        limits = {name: value for name, value in limits.items() if name in known}
        target: Callable[..., Tensor] = reversible.contribution if self.reversible else _called
        if self.reversible and "recompile_limit" in limits:  # a graph for every step of a block
            limits["recompile_limit"] = GRAPHS * sum({block: len(reversible.steps(block)) for block in self}.values())
        self._compiled = torch.compile(target, **(limits | options))

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        if self.reversible:
            return reversible.run(list(self), x, ctx, self._compiled)
        for block in self:
            x = self.step(block, x, ctx)
        return x

    def step(self, block: Block, x: Tensor, ctx: Context) -> Tensor:
        """One block, compiled and recomputed as this stack is set."""
        call = block if self._compiled is None or ctx.taps is not None else partial(self._compiled, block)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(call, x, ctx, use_reentrant=False)  # type: ignore[no-any-return]
        return call(x, ctx)

    def extend(self, x: Tensor, states: list[BlockState], ctx: Context) -> Tensor:
        if self.reversible:
            return reversible.extend(list(self), x, states, ctx)
        for block, state in zip(self, states, strict=True):
            x = block.extend(x, state, ctx)
        return x

    def record(self, tape: Tape, x: Buffer, states: list[BlockState]) -> None:
        if self.reversible:
            raise NoStep("a reversible stack")
        for block, state in zip(self, states, strict=True):
            block.record(tape, x, state)

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> list[BlockState]:
        return [block.init_state(batch, capacity, dtype, device, memory) for block in self]


def _called(block: Block, x: Tensor, ctx: Context) -> Tensor:
    y: Tensor = block(x, ctx)
    return y


def share(root: nn.Module, groups: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    """Give the modules of each group the parameters of its first; returns (name, first's name) pairs."""
    pairs: list[tuple[str, str]] = []
    for group, patterns in groups.items():
        found = [
            name
            for pattern in patterns
            for name, _ in root.named_modules()
            if name and fnmatch.fnmatchcase(name, pattern) and name.count(".") == pattern.count(".")
        ]
        if len(found) < 2:
            raise SettingsError(
                f"share '{group}' matches {len(found)} modules ({', '.join(patterns)})",
                path=("model", "share", group),
                hint="name at least two, for example blocks.*.channel",
            )
        first = root.get_submodule(found[0])
        wanted = {name: tuple(p.shape) for name, p in first.named_parameters()}
        for other in found[1:]:
            module = root.get_submodule(other)
            if {name: tuple(p.shape) for name, p in module.named_parameters()} != wanted:
                raise SettingsError(
                    f"share '{group}': {other} and {found[0]} have different parameters",
                    path=("model", "share", group),
                )
            for name in wanted:
                pairs.append((f"{other}.{name}", f"{found[0]}.{name}"))
    return pairs


def _layer(place: Place, index: int, depth: int) -> Place:
    return dataclasses.replace(place, layer=index, depth=depth).at(f"blocks.{index}")
