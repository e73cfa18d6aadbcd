"""Feedback memory: every layer carries a few rows from block to block (Hwang et al. 2024, TransformerFAM).

Tokens see their own block, the `window` blocks before it, and the layer's F feedback rows. When the
last token of a block arrives, the same weights run over those rows, which see the block and one
another: what the layer gives for them is what it feeds back.

Where the paper leaves things open: the first rows are learned, for each layer; rows stand at the
position at which their block begins when tokens look at them, and at that of the block's last token
when they are written; and they are brought to unit root mean square when they are fed back, without
which their residual sum would grow with every block. Gradients flow through all blocks of a training
window, whose first block begins from the learned rows (the paper's training also begins from stored
rows of other examples; that is not done here).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from armillary.base.errors import UnsupportedError
from armillary.nn.block import Block, BlockState, Branch
from armillary.nn.context import Context
from armillary.nn.cost import Cost
from armillary.nn.driver import DriverSettings, Segmented, TokensOnly, Turn, Window, driven, drivers, pair_flops, slide
from armillary.nn.example import Example
from armillary.nn.mask import Beside, Mask, Segments
from armillary.nn.mechanism import Capabilities, Mixer, Place
from armillary.nn.stack import Stack, StackSettings
from armillary.nn.state import SlideState


@drivers.register
class FeedbackSettings(DriverSettings):
    """Blocks of tokens, a window of blocks, and rows that are fed back."""

    kind: ClassVar[str] = "feedback"
    source: ClassVar[str] = "Hwang et al. 2024, TransformerFAM: Feedback Attention Is Working Memory"
    oracle: ClassVar[str] = (
        "tests/nn/drivers/test_feedback.py: the paper's layer as loops over blocks; block sliding window attention "
        "without rows; the plain stack when one block holds all"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(packed=False, state="window", sight="jacobian")
    segment: int = Field(128, gt=0, description="tokens of a block")
    window: int = Field(1, ge=0, description="earlier blocks that a token sees")
    rows: int = Field(16, ge=0, description="feedback rows of each layer (0: block sliding window attention)")

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("published", cls(segment=4, window=1, rows=2)),
            Example("rows_only", cls(segment=5, window=0, rows=3)),
        ]

    @property
    def kept(self) -> int:
        """Tokens whose keys and values a layer holds: a whole block to write from, and the window."""
        return self.segment * max(1, self.window)

    def build(self, place: Place, settings: StackSettings) -> Feedback:
        return Feedback(self, place, settings)

    def cost(self, stack: StackSettings, place: Place, length: int, itemsize: int = 2) -> Cost:
        flops, rows = 0.0, self.rows
        for begin in range(0, length, self.segment):
            count = min(self.segment, length - begin)
            for each in stack.layers():
                flops += pair_flops(each, place, count, rows + self.kept + count)
        writes = (length - 1) // self.segment if rows else 0
        with torch.device("meta"):
            blocks = Stack(stack, place)
        for settings, block in zip(stack.layers(), blocks, strict=True):
            entries = sum(
                2.0 * rows * p.numel()
                for _, mixer in _readers(block)
                for name, p in mixer.named_parameters()
                if name in ("k.weight", "v.weight")
            )
            flops += (writes + bool(rows)) * entries
            if writes:
                flops += writes * (pair_flops(settings, place, rows, rows + self.kept) + 4.0 * rows * place.width)
        return Cost(flops, self.state_bytes(stack, place, itemsize))


class FeedbackState(SlideState):
    """A window of tokens, and the keys and values "row_…" [B, G, F, …] of the rows fed back to the layer.

    `writing`: the next call is that of the rows themselves, which see the block that just ended.
    """

    writing = False

    def see(self, parts: Any, kept: Any, lengths: Tensor | None) -> tuple[dict[str, Tensor], Mask]:
        rows = {name: self.tensors[f"row_{name}"] for name in parts}
        count = rows["k"].shape[2]
        if self.writing:
            held = {name: self.tensors[name] for name in parts}
            index = self.tensors["index"][:, 0]
            mask: Mask = Segments(self.segment, 0, index[:, -1:].expand(-1, count), index, "own")
        else:
            held, mask = super().see(parts, kept, lengths)
        if not count:
            return held, mask
        together = {name: torch.cat([rows[name], tensor], 2) for name, tensor in held.items()}
        return together, Beside(None, count, mask)

    def look_back(self, entries: dict[str, Tensor], which: Tensor | None) -> None:
        """Put the entries of new rows in the place of the old (for the given rows of the batch)."""
        for name, new in entries.items():
            old = self.tensors[f"row_{name}"]
            new = new.to(old.dtype).expand_as(old)
            if which is not None:
                new = torch.where(which.view(-1, *[1] * (new.dim() - 1)), new, old)
            if torch.is_grad_enabled():
                self.tensors[f"row_{name}"] = new
            else:
                old.copy_(new)


class Feedback(Segmented):
    """The first rows of each layer, [L, F, D]; per layer a window of keys and values and F rows."""

    def __init__(self, settings: FeedbackSettings, place: Place, stack: StackSettings) -> None:
        super().__init__(settings, place)
        self.segment, self.window, self.rows = settings.segment, settings.window, settings.rows
        self.kept = settings.kept
        self.first = nn.Parameter(torch.empty(stack.depth, self.rows, place.width)) if self.rows else None

    def reset(self, generator: torch.Generator | None) -> None:
        if self.first is not None:
            nn.init.normal_(self.first, generator=generator)

    def init_state(
        self, stack: Stack, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str
    ) -> list[BlockState]:
        more = (self.segment - 1) if self.window else 0
        return self._states(stack, batch, dtype, device, self.kept + more)

    def begun(self, stack: Stack, batch: int, x: Tensor) -> list[BlockState]:
        return self._states(stack, batch, x.dtype, x.device, self.kept)

    def piece(self, stack: Stack, x: Tensor, states: list[BlockState], ctx: Context) -> Tensor:
        if ctx.taps is not None and self.rows:
            ctx = ctx.replace(taps=TokensOnly(ctx.taps, keys=self.rows))
        return stack.extend(x, states[:-1], ctx)

    def end(self, stack: Stack, states: list[BlockState], ctx: Context, rows: Tensor | None) -> None:
        if not self.rows:
            return
        turn = states[-1]["driver"]
        assert isinstance(turn, Turn) and ctx.positions is not None
        old = turn.tensors["rows"]
        last = ctx.positions.expand(old.shape[0], self.rows)
        inner = Context(positions=last, training=ctx.training)
        written = []
        for layer, (block, held) in enumerate(zip(stack, states[:-1], strict=True)):
            for state in _feeding(held):
                state.writing = True
            y = F.rms_norm(block.extend(old[:, layer], held, inner), old.shape[-1:])
            for state in _feeding(held):
                state.writing = False
            if rows is not None:
                y = torch.where(rows[:, None, None], y, old[:, layer])
            written.append(y)
            self._read(block, held, y, last + 1, rows)
        turn.put("rows", torch.stack(written, 1))

    def _states(
        self, stack: Stack, batch: int, dtype: torch.dtype, device: torch.device | str, kept: int
    ) -> list[BlockState]:
        driven(stack, self.kind)
        window = Window(kept, self.segment, self.window * self.segment)
        states = [slide(block.init_state(batch, kept, dtype, device), window, FeedbackState) for block in stack]
        if self.first is None:
            for held in states:
                for state in _feeding(held):
                    state.tensors |= {f"row_{name}": state.tensors[name][:, :, :0] for name in state.names}
            return [*states, {"driver": Turn(batch, device)}]
        first = self.first.to(dtype).expand(batch, -1, -1, -1)
        start = torch.zeros(batch, self.rows, dtype=torch.int64, device=device)
        for layer, (block, held) in enumerate(zip(stack, states, strict=True)):
            for state in _feeding(held):
                state.tensors |= {
                    f"row_{name}": state.tensors[name][:, :, :1].repeat_interleave(self.rows, 2) for name in state.names
                }
            self._read(block, held, first[:, layer], start, None)
        return [*states, {"driver": Turn(batch, device, rows=first.clone())}]

    def _read(self, block: Block, held: BlockState, rows: Tensor, positions: Tensor, which: Tensor | None) -> None:
        """The layer's mixers look at these rows from now on."""
        for branch, mixer in _readers(block):
            state = held[branch.name]
            assert isinstance(state, FeedbackState)
            h = branch.norm(rows) if branch.norm_first else rows
            state.look_back(mixer.entries(h, Context(positions=positions)), which)


def _feeding(held: BlockState) -> list[FeedbackState]:
    return [state for state in held.values() if isinstance(state, FeedbackState)]


def _readers(block: Block) -> Iterator[tuple[Branch, Any]]:
    """The branches of a block that are mixers, and those; each must read the block's own input."""
    first = True
    for index, branch in enumerate(block.branches()):
        first = block.parallel or index == 0 or (first and branch.beside)
        if isinstance(branch.inner, Mixer):
            if not first:
                raise UnsupportedError(
                    "feedback rows enter a block through mixers that read its input",
                    where=branch.path,
                    hint="put the mixer first in its block, or set parallel: true",
                )
            yield branch, branch.inner
