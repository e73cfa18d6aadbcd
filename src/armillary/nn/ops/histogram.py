"""Running histograms: how much of each kind was seen up to every token, with exponential forgetting.

n_t = γ·n_{t−1} + a_t. The fast form is a triangular product inside chunks and one sum per chunk between
them; the plain form is the loop over tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from armillary.nn.ops import plain

CHUNK = 64


def running_histogram(
    added: Tensor,
    decay: float,
    *,
    state: Tensor | None = None,
    documents: Tensor | None = None,
    live: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """added [B, T, N] → n [B, T, N] and its value after the last token [B, N].

    state: [B, N] before the first token, None = zeros; documents: [B, T], a new id begins anew; live:
    [B, T], a token that is not there neither adds nor forgets.
    """
    batch, length, kinds = added.shape
    if live is not None:
        added = added * live[..., None]
    # exponent of γ between tokens: how many real ones lie between
    age = torch.ones(batch, length, dtype=added.dtype, device=added.device) if live is None else live.to(added.dtype)
    held = added.new_zeros(batch, kinds) if state is None else state
    if plain():
        return _plain(added, decay, age, held, documents)
    outputs = []
    last = None if documents is None else documents[:, 0]
    # Split, not sliced: the backward pass of a slice fills a tensor of the whole length.
    for start, piece in zip(range(0, length, CHUNK), added.split(CHUNK, 1), strict=True):
        part = slice(start, min(length, start + CHUNK))
        ages = age[:, part].cumsum(1)
        size = ages.shape[1]
        allowed = torch.ones(size, size, dtype=torch.bool, device=added.device).tril()[None]
        inward = torch.pow(decay, ages)
        if documents is not None and last is not None:
            ids = documents[:, part]
            allowed = allowed & (ids[:, :, None] == ids[:, None])
            inward = inward * (ids == last[:, None])
            last = ids[:, -1]
        passed = torch.pow(decay, (ages[:, :, None] - ages[:, None]).clamp(min=0)) * allowed
        found = passed @ piece + inward[..., None] * held[:, None]
        held = found[:, -1]
        outputs.append(found)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)), held


def _plain(added: Tensor, decay: float, age: Tensor, held: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(added.shape[1]):
        factor = torch.pow(decay, age[:, t])
        if documents is not None and t > 0:
            factor = factor * (documents[:, t] == documents[:, t - 1])
        held = factor[:, None] * held + added[:, t]
        outputs.append(held)
    return torch.stack(outputs, 1), held
