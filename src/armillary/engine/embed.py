"""Texts that stand alone, as vectors: what `Model.embed` and the server give alike."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from armillary.base.errors import InputError
from armillary.native.tape import alone
from armillary.nn.heads.base import Pool, pooled
from armillary.nn.heads.embedding import EmbeddingHeadSettings
from armillary.nn.network import Network
from armillary.text import Tokenizer

_turn = threading.RLock()  # one at a time: each uses all the threads there are, and what it computes takes memory


def whole(tokenizer: Tokenizer, ids: Sequence[int], longest: int | None = None) -> list[int]:
    """A text between the tokens that its tokenizer puts around it; cut to `longest` in all."""
    before, after = tokenizer.around
    room = None if longest is None else max(1, longest - len(before) - len(after))
    return [*before, *ids[:room], *after]


def texts(network: Network, tokenizer: Tokenizer, many: Iterable[str]) -> list[list[int]]:
    """Ids of each text, as an embedding head asks for them. Raises InputError for an empty one."""
    head, longest = network.settings.head, None
    if isinstance(head, EmbeddingHeadSettings):
        longest, many = head.longest, [head.prompt + text for text in many]
    rows = [whole(tokenizer, ids, longest) for ids in tokenizer.encode_batch(many)]
    if not rows or not all(rows):
        raise InputError("there is an empty text", hint="give at least one token of text")
    return rows


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids → ids [N, T] int64 and padding [N, T] bool, True for real tokens."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    padding = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        padding[index, : len(row)] = True
    return ids.to(device), padding.to(device)


@torch.no_grad()
def embed(
    network: Network,
    rows: Sequence[Sequence[int]],
    pool: Pool = "mean",
    hidden: Callable[..., Tensor] | None = None,
) -> Tensor:
    """One vector per row of ids, [N, D] float32; a network with an embedding head pools by itself.

    hidden: in place of `network.hidden`, for one that is watched.
    """
    ids, padding = padded(rows, network.device)
    with _turn:
        states = (hidden or network.hidden)(ids, padding=padding)
        own = isinstance(network.settings.head, EmbeddingHeadSettings)
        found: Tensor = (network.head(states, padding) if own else pooled(states, padding, pool)).float()
        alone()  # an engine's steps may go on meanwhile
    return found
