"""What the chunked forms of matrix states share: a sequence cut into segments of chunks, the decays
between a chunk's tokens, and the walk from chunk to chunk.

A segment is what is worked on at once: what is made of it stays in the cache, and no intermediate
result outlives it (Yang et al. 2023, Gated Linear Attention Transformers with Hardware-Efficient
Training; Dao & Gu 2024, Transformers are SSMs).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.native.decay import fade


@dataclass(frozen=True)
class Segments:
    """T tokens in chunks of `chunk`, some chunks at a time."""

    length: int
    chunk: int
    step: int

    @staticmethod
    def of(length: int, chunk: int, segment: int) -> Segments:
        chunk = max(1, min(chunk, length))
        return Segments(length, chunk, max(chunk, segment // chunk * chunk))

    @property
    def bounds(self) -> list[tuple[int, int]]:
        return [(start, min(self.length, start + self.step)) for start in range(0, self.length, self.step)]

    def take(self, x: Tensor, start: int, stop: int) -> Tensor:
        """[B, T, …] → [B, n, C, …], zeros behind the end."""
        missing = -(stop - start) % self.chunk
        part = x[:, start:stop]
        if missing:
            part = F.pad(part, (*(0, 0) * (x.dim() - 2), 0, missing))
        return part.unflatten(1, (-1, self.chunk))  # type: ignore[no-any-return]

    def heads(self, x: Tensor, start: int, stop: int) -> Tensor:
        """[B, T, H, W] → [B, n, H, C, W], contiguous, in float32."""
        part = self.take(x, start, stop).transpose(2, 3)
        return part.to(torch.float32, memory_format=torch.contiguous_format).contiguous()

    def give(self, target: Tensor, x: Tensor, start: int, stop: int) -> None:
        """x [B, n, H, C, W] into target [B, T, H, W]."""
        if (stop - start) % self.chunk == 0:
            target[:, start:stop].unflatten(1, (-1, self.chunk)).copy_(x.transpose(2, 3))
        else:
            target[:, start:stop] = x.transpose(2, 3).flatten(1, 2)[:, : stop - start]

    def documents(self, ids: Tensor | None, start: int, stop: int) -> Borders | None:
        """Who meets whom in a segment of packed rows; ids [B, T]."""
        if ids is None:
            return None
        missing = -(stop - start) % self.chunk
        part = ids[:, start:stop]
        if missing:
            part = torch.cat([part, part[:, -1:].expand(-1, missing)], 1)
        part = part.unflatten(1, (-1, self.chunk))  # [B, n, C]
        first = ids[:, max(0, start - 1)][:, None, None]
        former = torch.cat([first, part[:, :-1, -1:]], 1)
        last = part[..., -1:]
        return Borders(part[..., :, None] == part[..., None, :], part == former, part == last, last == former)


@dataclass(frozen=True)
class Borders:
    """pairs [B, n, C, C]: tokens of one document; inward, outward [B, n, C]: of that of the state before
    the chunk, of the state after it; through [B, n, 1]: the chunk begins and ends in one."""

    pairs: Tensor
    inward: Tensor
    outward: Tensor
    through: Tensor


@dataclass(frozen=True)
class Decays:
    """How far things fade in a chunk, each at most 1 and 0 across documents' borders.

    pairs [B, n, H, C, C]: from token j to token i ≥ j, 0 above the diagonal; inward [B, n, H, C]: of
    the state before the chunk, at each token; outward: of each token, in the state after it; through
    [B, n, H, 1]: of the state, across it.
    """

    pairs: Tensor
    inward: Tensor
    outward: Tensor
    through: Tensor

    @staticmethod
    def of(log_decay: Tensor, borders: Borders | None) -> Decays:
        """log_decay [B, n, C, H], at most 0."""
        total = log_decay.double().cumsum(2).transpose(2, 3)  # [B, n, H, C]; differences of large sums are taken
        pairs = fade(total)
        inward, through = total, total[..., -1:]
        outward = through - total
        if borders is not None:
            pairs.mul_(borders.pairs[:, :, None])
            inward = inward.masked_fill(~borders.inward[:, :, None], -torch.inf)
            outward = outward.masked_fill(~borders.outward[:, :, None], -torch.inf)
            through = through.masked_fill(~borders.through[:, :, None], -torch.inf)
        return Decays(pairs, inward.float().exp(), outward.float().exp(), through.float().exp())


def walk(added: Tensor, through: Tensor, state: Tensor, back: bool = False) -> Tensor:
    """state ← through·state + added, chunk by chunk along axis 1: the states before, between and after the
    chunks, one more than added has; if back, likewise from the last chunk to the first."""
    count = added.shape[1]
    held = torch.empty(added.shape[0], count + 1, *added.shape[2:], dtype=added.dtype, device=added.device)
    held[:, count if back else 0] = state
    for i in range(count - 1, -1, -1) if back else range(count):
        before, after = (held[:, i + 1], held[:, i]) if back else (held[:, i], held[:, i + 1])
        torch.addcmul(added[:, i], before, through[:, i], out=after)
    return held


def product(a: Tensor, b: Tensor) -> Tensor:
    """[…, i, j] by […, j, k], all leading axes alike, as one product of three axes."""
    made: Tensor = torch.bmm(a.flatten(0, -3), b.flatten(0, -3)).unflatten(0, a.shape[:-2])
    return made
