"""Work within positions, some tokens at a time, so that what lies between two products never exists whole.

Kitaev, Kaiser & Levskaya 2020, Reformer: The Efficient Transformer. With gradients the hidden features
of a chunk are computed again in the backward pass instead of being kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from armillary.nn.context import Context


def in_chunks(
    up: Callable[[Tensor], Tensor],
    down: Callable[[Tensor], Tensor],
    x: Tensor,
    chunk: int | None,
    ctx: Context,
    tap: str,
) -> Tensor:
    """down(up(x)) for x [B, T, D], `chunk` tokens at a time (None: all at once); `tap` names what lies
    between, which exists whole only while it is watched."""
    parts = [x] if chunk is None or x.shape[1] <= chunk else list(x.split(chunk, 1))
    if ctx.taps is not None:
        hidden = ctx.taps(tap, torch.cat([up(part) for part in parts], 1))
        return torch.cat([down(part) for part in hidden.split([part.shape[1] for part in parts], 1)], 1)
    if len(parts) == 1:
        return down(up(x))

    def both(part: Tensor) -> Tensor:
        return down(up(part))

    if torch.is_grad_enabled():
        done = [checkpoint(both, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    else:
        done = [both(part) for part in parts]
    return torch.cat(done, 1)
