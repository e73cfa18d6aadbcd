"""The neighbours of a token, along its row or around it in a grid, and weighted sums over them.

A row-major grid of a given width is a row whose token at position p stands in line p // width and column
p % width, so a neighbour above it lies `width` tokens back. What stands outside the row, the grid or the
token's document, or is padding, is no neighbour. A causal neighbourhood keeps the part that comes no later
in the row: in a grid, the lines above and the token's own line up to itself (van den Oord et al. 2016,
Pixel Recurrent Neural Networks). Its state is the tail of `ops.short_conv`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.base.errors import InputError, UnsupportedError
from armillary.nn.ops.short_conv import short_conv

Grid = tuple[int, int]


@dataclass(frozen=True)
class Neighbourhood:
    """shifts: how many tokens further along the row each neighbour stands; columns: and how many columns
    further in a grid of `grid` (lines, columns), where there is one."""

    shifts: tuple[int, ...]
    columns: tuple[int, ...] = ()
    grid: Grid | None = None

    @staticmethod
    def of(kernel: int, order: str, grid: Grid | None = None, where: str = "") -> Neighbourhood:
        """The last `kernel` tokens of a causal row, `kernel` tokens around one that looks both ways, or a
        square of that side in a grid.

        Raises UnsupportedError for an even kernel without a middle.
        """
        causal, reach = order == "causal", kernel // 2
        if grid is None and causal:
            return Neighbourhood(tuple(range(1 - kernel, 1)))
        if kernel % 2 == 0:
            raise UnsupportedError(f"a kernel of {kernel} has no middle", where=where, hint="use an odd kernel")
        if grid is None:
            return Neighbourhood(tuple(range(-reach, reach + 1)))
        square = [(line, column) for line in range(-reach, reach + 1) for column in range(-reach, reach + 1)]
        if causal:
            square = [one for one in square if one <= (0, 0)]
        return Neighbourhood(tuple(a * grid[1] + b for a, b in square), tuple(b for _, b in square), grid)

    @property
    def size(self) -> int:
        return len(self.shifts)

    @property
    def centre(self) -> int:
        """Which of the neighbours is the token itself."""
        return [*zip(self.shifts, self.columns or self.shifts, strict=True)].index((0, 0))

    @property
    def before(self) -> int:
        """How many tokens back it reaches."""
        return max(0, -min(self.shifts))

    @property
    def after(self) -> int:
        """How many tokens ahead it reaches."""
        return max(0, max(self.shifts))

    def line(self, x: Tensor, tail: Tensor | None = None) -> Tensor:
        """x [B, T, …] with zeros, or the tail [B, before, …], around it: [B, before + T + after, …]."""
        around = [0, 0] * (x.dim() - 2)
        if tail is not None:
            return torch.cat([tail.to(x.dtype), x], 1)
        return F.pad(x, (*around, self.before, self.after))

    def seen(
        self,
        positions: Tensor,
        *,
        documents: Tensor | None = None,
        padding: Tensor | None = None,
        ends: bool = False,
    ) -> Tensor | None:
        """Which neighbours are there, [B or 1, T, size] bool; None when only the row's ends are in the way,
        unless `ends` asks for these too.

        positions: [B or 1, T]; documents: [B, T] ids; padding: [B, T], True for real tokens.
        """
        if self.grid is None and documents is None and padding is None and not ends:
            return None
        length, device = positions.shape[1], positions.device
        places = torch.arange(length, device=device)[:, None] + torch.tensor(self.shifts, device=device)
        found = torch.ones(1, 1, 1, dtype=torch.bool, device=device)
        if self.grid is not None:
            column = positions[..., None] % self.grid[1] + torch.tensor(self.columns, device=device)
            found = (column >= 0) & (column < self.grid[1])
        index = places.clamp(0, length - 1)
        if documents is not None or padding is not None or ends:
            found = found & ((places >= 0) & (places < length))
        if documents is not None:
            found = found & (documents[:, index] == documents[..., None])
        if padding is not None:
            found = found & padding[:, index]
        return found

    def fits(self, length: int, where: str) -> None:
        """Refuse a row that has more tokens than the grid has places."""
        fits_in(self.grid, length, where)

    def stacked(self, line: Tensor, seen: Tensor | None) -> Tensor:
        """line [B, before + T + after, C] → every token's neighbours [B, T, size, C], zeros for those not seen."""
        length = line.shape[1] - self.before - self.after
        parts = torch.stack([line[:, self.before + shift :][:, :length] for shift in self.shifts], 2)
        return parts if seen is None else parts.masked_fill(~seen[..., None], 0)

    def weighted(self, line: Tensor, weights: Tensor, seen: Tensor | None) -> Tensor:
        """Σ_n w_n · (neighbour n), summed in float32 at least, in line's dtype.

        line: [B, before + T + after, G, C]; weights: [B or 1, T or 1, G, size] → [B, T, G, C].
        """
        length = line.shape[1] - self.before - self.after
        if seen is not None:
            weights = weights.masked_fill(~seen[:, :, None], 0)
        wide = torch.promote_types(line.dtype, torch.float32)
        weights = weights.to(wide)
        y: Tensor | None = None
        for number, shift in enumerate(self.shifts):
            start = self.before + shift
            term = line[:, start : start + length].to(wide) * weights[..., number, None]
            y = term if y is None else y + term
        assert y is not None
        return y.to(line.dtype)

    def convolved(
        self,
        x: Tensor,
        kernel: Tensor,
        positions: Tensor,
        *,
        documents: Tensor | None = None,
        padding: Tensor | None = None,
        tail: Tensor | None = None,
    ) -> Tensor:
        """A depthwise convolution: x [B, T, C], kernel [C, size] → [B, T, C]; tail: [B, before, C] what came
        before, or None for nothing; the rest as for `seen`."""
        if self.grid is None and self.after == 0:
            x = x if padding is None else x.masked_fill(~padding[..., None], 0)
            return short_conv(x, kernel, silu=False, tail=tail, documents=documents)
        seen = self.seen(positions, documents=documents, padding=padding)
        return self.weighted(self.line(x, tail)[..., None], kernel[None, None], seen)[..., 0]

    def flops(self, channels: int, tokens: float) -> float:
        """FLOPs of `weighted` and of `convolved` over `tokens` tokens of so many channels."""
        return tokens * channels * (2.0 * self.size - 1)


def fits_in(grid: Grid | None, length: int, where: str) -> None:
    """Refuse a row that has more tokens than the grid has places."""
    if grid is not None and length > grid[0] * grid[1]:
        raise InputError(
            f"{length} tokens do not fit a grid of {grid[0]} lines and {grid[1]} columns",
            where=where,
            hint="set grid to the lines and columns of the input",
        )


@dataclass(frozen=True)
class Front:
    """Rows whose real tokens were moved to the front, in order, so that padding decides no place.

    x: [B, T, D], zeros behind the real tokens; count: [B] of these; real: [B, T] which they are; order: [B, T]
    where they came from. count, real and order are None when there was no padding.
    """

    x: Tensor
    count: Tensor | None = None
    real: Tensor | None = None
    order: Tensor | None = None

    @staticmethod
    def of(x: Tensor, padding: Tensor | None) -> Front:
        if padding is None:
            return Front(x)
        order = padding.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        count = padding.sum(1)
        real = torch.arange(x.shape[1], device=x.device) < count[:, None]
        moved = x.take_along_dim(order[..., None], 1).masked_fill(~real[..., None], 0)
        return Front(moved, count, real, order)

    def back(self, y: Tensor) -> Tensor:
        """y [B, T, D] of the moved tokens, where they came from."""
        return y if self.order is None else y.take_along_dim(self.order.argsort(1)[..., None], 1)
