"""Work within positions, some tokens at a time, so that what lies between two products never exists whole.

Kitaev, Kaiser & Levskaya 2020, Reformer: The Efficient Transformer. With gradients the hidden features
of a chunk are computed again in the backward pass instead of being kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from armillary.nn.context import Context


def in_chunks(channel: Any, x: Tensor, ctx: Context) -> Tensor:
    """channel.down(channel.inner(x)) for x [B, T, D], `channel.chunk` tokens at a time (None: all at once);
    what lies between, the tap `hidden`, exists whole only while something is watched."""
    parts = [x] if channel.chunk is None or x.shape[1] <= channel.chunk else list(x.split(channel.chunk, 1))
    if ctx.taps is not None:
        hidden = ctx.taps(f"{channel.path}.hidden", torch.cat([channel.inner(part) for part in parts], 1))
        return torch.cat([channel.down(part) for part in hidden.split([part.shape[1] for part in parts], 1)], 1)
    if len(parts) == 1 or not torch.is_grad_enabled():
        return torch.cat([channel.down(channel.inner(part)) for part in parts], 1)
    done = [checkpoint(_both, channel, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.cat(done, 1)


def _both(channel: Any, part: Tensor) -> Tensor:
    return channel.down(channel.inner(part))  # type: ignore[no-any-return]
