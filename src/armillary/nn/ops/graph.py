"""Graphs over the tokens of a row: who is how many hops from whom.

Nodes are numbered as the row's real tokens are, from 0: padding has no number. Everything is integers
and truth values, so nothing here has a gradient. A bounded search takes a few boolean products of
[T, T] matrices, by repeated squaring where only the reach is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor


def edge_types(edges: Tensor, nodes: int, *, directed: bool = False, padding: Tensor | None = None) -> Tensor:
    """edges [B, E, 2 or 3] int64: both ends and the type, 0 where there is no third → 1 + the type,
    [B, nodes, nodes] int64, and 0 where there is no edge; of several between two nodes the highest.

    padding [B, nodes]: how many nodes each row has, where they are fewer. An edge with an end that is
    negative or not among the nodes is none.
    """
    ends, kinds = edges[..., :2], edges[..., 2] + 1 if edges.shape[-1] > 2 else torch.ones_like(edges[..., 0])
    limit: int | Tensor = nodes if padding is None else padding.sum(1)[:, None, None]
    there = ((ends >= 0) & (ends < limit)).all(-1)
    a, b = ends.clamp(0, max(0, nodes - 1)).unbind(-1)
    found = torch.zeros(edges.shape[0], nodes * nodes, dtype=torch.int64, device=edges.device)
    kinds = kinds.masked_fill(~there, 0)
    for first, second in ((a, b),) if directed else ((a, b), (b, a)):
        found = found.scatter_reduce(1, first * nodes + second, kinds, "amax")
    return found.view(-1, nodes, nodes)


def within(adjacent: Tensor, hops: int) -> Tensor:
    """[B, N, N] bool: whether the shortest path takes at most so many hops; nobody is 0 hops from others."""
    own = torch.eye(adjacent.shape[1], dtype=torch.bool, device=adjacent.device)
    if hops == 0:
        return own.expand_as(adjacent)
    step = adjacent | own
    reach = step
    for bit in bin(hops)[3:]:  # from the second highest on, as powers are taken
        reach = _product(reach, reach)
        if bit == "1":
            reach = _product(reach, step)
    return reach


def within_flops(nodes: int, hops: int) -> float:
    """FLOPs of `within` for one row."""
    return 2.0 * nodes**3 * max(0, len(bin(hops)) - 4 + bin(hops).count("1"))


def hop_distances(edges: Tensor, nodes: int, hops: int, *, directed: bool = False) -> Tensor:
    """edges [B, E, 2] int64 → shortest paths [B, nodes, nodes] int64, −1 where one takes more than `hops`."""
    adjacent = edge_types(edges, nodes, directed=directed) > 0
    reach = torch.eye(nodes, dtype=torch.bool, device=edges.device).expand_as(adjacent)
    found = torch.where(reach, 0, -1)
    for distance in range(1, hops + 1):
        further = reach | (adjacent if distance == 1 else _product(reach, adjacent))
        found = torch.where(further & ~reach, distance, found)
        reach = further
    return found


def numbers(padding: Tensor) -> Tensor:
    """padding [B, T], True for real tokens → the number of each real token, −1 for the others."""
    return (padding.long().cumsum(1) - 1).masked_fill(~padding, -1)


def at_places(table: Tensor, padding: Tensor | None, tokens: int, fill: int) -> Tensor:
    """table [B, N, N] by the numbers of nodes → [B, T, T] by the places of tokens, `fill` where one is padding."""
    if padding is None:
        return table[:, :tokens, :tokens]
    number = numbers(padding)
    index = number.clamp(0, table.shape[1] - 1)
    batch = torch.arange(len(table), device=table.device)[:, None, None]
    real = padding[:, :, None] & padding[:, None]
    return table[batch, index[:, :, None], index[:, None]].masked_fill(~real, fill)


def by_number(table: Tensor, padding: Tensor | None, tokens: int) -> Tensor:
    """table [B, N, …] by the numbers of nodes → [B, T, …] by the places of tokens; anything where one is padding."""
    if padding is None:
        return table[:, :tokens]
    index = numbers(padding).clamp(0, table.shape[1] - 1)
    return table[torch.arange(len(table), device=table.device)[:, None], index]


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a.float() @ b.float() > 0
