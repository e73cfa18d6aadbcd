"""The short causal convolution as a part of mixers: its parameters, its state, and who may be seen.

See `nn.ops.short_conv` for the numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from armillary.nn.context import Context
from armillary.nn.ops.short_conv import next_tail, short_conv
from armillary.nn.state import State


class ShortConvolution(nn.Module):
    """x [B, T, C] → [B, T, C], each channel of the last `taps` tokens, then silu if asked.

    Starts as `torch.nn.Conv1d` does: uniform in ±1/√taps. The state is `name` [B, taps − 1, C].
    """

    def __init__(self, channels: int, taps: int, name: str, *, bias: bool = False, silu: bool = True) -> None:
        super().__init__()
        self.name, self.taps, self.silu = name, taps, silu
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def reset(self, generator: torch.Generator | None) -> None:
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(self.taps**-0.5), self.taps**-0.5, generator=generator)

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> Tensor:
        """The convolution of a whole sequence, or of the chunk that follows `state`, which moves on."""
        if ctx.padding is not None:
            x = x * ctx.padding[..., None].to(x.dtype)
        tail = None if state is None else state.tensors[self.name]
        y = short_conv(x, self.weight, self.bias, silu=self.silu, tail=tail, documents=ctx.documents)
        if state is not None and tail is not None:
            state.put(self.name, next_tail(x, tail, ctx.lengths))
        return y

    def shape(self) -> tuple[int, int]:
        """Of one row's state."""
        return self.taps - 1, self.weight.shape[0]
