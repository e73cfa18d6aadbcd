"""Clusters of one size: k-means in which every centre gets as many rows as every other.

Bradley, Bennett & Demiriz 2000, Constrained K-Means Clustering. Which rows go to which centre is a
transport problem; it is solved exactly by moving rows along cycles of clusters for as long as that
helps (Klein 1967), from the last assignment, so that later rounds move little.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from armillary.base.errors import InputError

ROUNDS = 1000  # of assigning and averaging, at most
EPSILON = 1e-9  # what a cycle must gain, so that rounding moves nothing for ever

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def balanced_clusters(rows: Tensor, clusters: int, seed: int = 0) -> tuple[Tensor, float]:
    """rows [N, D], by direction → (order [N] int64, likeness).

    order: the rows of the first cluster, then those of the second, …, N / clusters of each, ascending
    within one; likeness: the mean cosine of rows to the mean direction of their cluster. Raises InputError
    for a number of clusters that does not divide N.
    """
    count = rows.shape[0]
    if clusters < 1 or count % clusters:
        raise InputError(f"{count} hidden features do not divide into {clusters} experts", hint=f"a divisor of {count}")
    x = torch.nn.functional.normalize(rows.detach().cpu().double(), dim=1).numpy()
    centres = _spread(x, clusters, np.random.default_rng(seed))
    owner = _greedy(x @ centres.T)
    for _ in range(ROUNDS):
        before = owner
        means = np.zeros_like(centres)
        np.add.at(means, owner, x)
        # Every mean is given to as many rows, so that of squared distances only the products with rows count.
        owner = assign(x @ means.T / (count // clusters), owner)
        if np.array_equal(owner, before):
            break
    directions = np.zeros_like(centres)
    np.add.at(directions, owner, x)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True).clip(min=1e-12)
    likeness = float((x * directions[owner]).sum(1).mean())
    return torch.from_numpy(np.argsort(owner, kind="stable").astype(np.int64)), likeness


def assign(gain: Floats, owner: Ints) -> Ints:
    """The assignment of the greatest total gain [N, E] with as many rows in each cluster as in `owner` [N]."""
    owner = owner.copy()
    clusters = gain.shape[1]
    if clusters == 1:
        return owner
    best = np.full((clusters, clusters), -np.inf)  # of moving one row from a to b
    mover = np.zeros((clusters, clusters), np.int64)

    def refresh(a: int) -> None:
        members = np.flatnonzero(owner == a)
        moves = gain[members] - gain[members, a][:, None]
        mover[a] = members[moves.argmax(0)]
        best[a] = moves.max(0)
        best[a, a] = 0.0

    for cluster in range(clusters):
        refresh(cluster)
    while (cycle := _cycle(best)) is not None:
        moved = [(int(mover[a, b]), b) for a, b in cycle]
        for row, b in moved:
            owner[row] = b
        for a, _ in cycle:
            refresh(a)
    return owner


def _cycle(best: Floats) -> list[tuple[int, int]] | None:
    """Edges of a cycle whose gains sum to more than nothing, or None (Bellman 1958, Ford 1956)."""
    clusters = len(best)
    pairs = np.triu(best + best.T, 1)  # two clusters that swap are by far the most common
    a, b = np.unravel_index(int(pairs.argmax()), pairs.shape)
    if pairs[a, b] > EPSILON:
        return [(int(a), int(b)), (int(b), int(a))]
    reach = np.zeros(clusters)
    parent = np.full(clusters, -1)
    for _ in range(clusters):
        through = reach[:, None] + best
        found = through.max(0)
        better = found > reach + EPSILON / clusters
        if not better.any():
            return None
        parent = np.where(better, through.argmax(0), parent)
        reach = np.where(better, found, reach)
    node = int(np.flatnonzero(better)[0])
    for _ in range(clusters):  # back far enough to stand on a cycle
        node = int(parent[node])
    nodes = [node]
    while (node := int(parent[node])) != nodes[0]:
        nodes.append(node)
    nodes.reverse()
    edges = list(zip(nodes, [*nodes[1:], nodes[0]], strict=True))
    return edges if sum(best[a, b] for a, b in edges) > EPSILON / clusters else None


def _spread(x: Floats, clusters: int, drawn: np.random.Generator) -> Floats:
    """First centres that are far apart (Arthur & Vassilvitskii 2007, k-means++)."""
    chosen = [int(drawn.integers(len(x)))]
    apart = np.full(len(x), np.inf)
    for _ in range(clusters - 1):
        apart = np.minimum(apart, ((x - x[chosen[-1]]) ** 2).sum(1))
        total = apart.sum()
        chosen.append(int(drawn.choice(len(x), p=apart / total)) if total > 0 else int(drawn.integers(len(x))))
    return x[chosen]


def _greedy(gain: Floats) -> Ints:
    """Rows that care most choose first."""
    count, clusters = gain.shape
    free = np.full(clusters, count // clusters)
    owner = np.zeros(count, np.int64)
    care = gain.max(1) - gain.mean(1)
    for row in np.argsort(-care, kind="stable"):
        open_ = np.where(free > 0, gain[row], -np.inf)
        owner[row] = int(open_.argmax())
        free[owner[row]] -= 1
    return owner
