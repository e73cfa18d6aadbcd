"""Marginals of a chain: at every step a pointer into the tokens, which moves a bounded way from step to step.

A path a_1 … a_T has the weight Π_t exp(s_{t,a_t} + move[a_t − a_{t−1}]) over the keys that each step
may see. Forward messages alone give the marginals of every prefix (filtering), with backward ones
those of the whole (smoothing); Rabiner 1989, A Tutorial on Hidden Markov Models; Kim et al. 2017,
Structured Attention Networks. A step needs the one before it, so this is a loop over steps of
O(S · moves) each; all of it is in logarithms, where −LARGE stands for 0 so that slopes stay finite.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LARGE = 1e30


def forward_messages(
    scores: Tensor, moves: Tensor, seen: Tensor, start: Tensor, valid: Tensor, first: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log marginals of each prefix.

    scores: [B, H, T, S]; moves: [H, 2R + 1] log weight of a move by −R … R; seen: [B or 1, T, S] bool;
    start: [B or 1, T] bool, the steps that begin a chain, whose pointer may lie on any key seen; valid:
    [B or 1, T] bool, the steps that are there (others leave the message as it is); first: [B, H, S] the
    message before the first step, None when that begins a chain. Returns [B, H, T, S] and the message
    after the last step.
    """
    message = torch.zeros_like(scores[:, :, 0]) if first is None else first
    rows = []
    for t in range(scores.shape[2]):
        predicted = _moved(message, moves)
        predicted = torch.where(start[:, t, None, None], 0.0, predicted)
        message = torch.where(valid[:, t, None, None], _posterior(predicted + scores[:, :, t], seen[:, t]), message)
        rows.append(message)
    return torch.stack(rows, 2), message


def backward_messages(scores: Tensor, moves: Tensor, seen: Tensor, start: Tensor, valid: Tensor) -> Tensor:
    """Log weight [B, H, T, S] of all that comes after each step, up to a constant of the step."""
    message = torch.zeros_like(scores[:, :, 0])
    rows = [message]
    for t in range(scores.shape[2] - 1, 0, -1):
        back = _moved(_posterior(message + scores[:, :, t], seen[:, t]), moves.flip(1))
        back = torch.where(start[:, t, None, None], 0.0, back)
        message = torch.where(valid[:, t, None, None], back, message)
        rows.append(message)
    return torch.stack(rows[::-1], 2)


def _posterior(weight: Tensor, seen: Tensor) -> Tensor:
    """Logarithms that sum to 1 over the keys seen [B or 1, S]; −LARGE elsewhere."""
    weight = weight.masked_fill(~seen[:, None], -LARGE)
    return torch.log_softmax(weight, -1).clamp(min=-LARGE).masked_fill(~seen[:, None], -LARGE)


def _moved(message: Tensor, moves: Tensor) -> Tensor:
    """Log Σ_i exp(message_i + move[j − i]) for every key j: [B, H, S] → [B, H, S]."""
    count = moves.shape[1]
    around = F.pad(message, (count // 2, count // 2), value=-LARGE).unfold(-1, count, 1)  # i = j − R … j + R
    total = (around + moves.flip(1)[:, None].to(message.dtype)).logsumexp(-1)
    return total.clamp(min=-LARGE)
