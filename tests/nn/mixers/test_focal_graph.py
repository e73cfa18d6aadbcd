"""Focal and full-range graph attention against its formula, edge by edge, over a breadth-first search."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary.base.errors import InputError, SettingsError, UnsupportedError
from armillary.nn.context import Context
from armillary.nn.mechanism import Place
from armillary.nn.mixers.focal_graph import FocalGraph, FocalGraphSettings
from armillary.nn.ops.graph import hop_distances

# two rings, a bridge between them, and node 8 by itself
EDGES = [(0, 1), (1, 2), (2, 0), (3, 4), (4, 5), (5, 6), (6, 3), (2, 3), (7, 6)]
NODES = 9


def made(**settings: Any) -> FocalGraph:
    mixer = FocalGraphSettings(**{"heads": 2, **settings}).build(Place(16, order="bidirectional"))
    generator = torch.Generator().manual_seed(3)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return mixer


def graph(*rows: list[tuple[int, ...]]) -> Tensor:
    """Rows of edges, filled up with −1."""
    longest = max(len(row) for row in rows)
    width = len(rows[0][0])
    return torch.tensor([row + [(-1,) * width] * (longest - len(row)) for row in rows])


def paths(edges: list[tuple[int, ...]], nodes: int, directed: bool = False) -> list[list[int]]:
    """Shortest paths by breadth-first search, −1 where there is none."""
    ties: list[list[int]] = [[] for _ in range(nodes)]
    for a, b, *_ in edges:
        ties[a].append(b)
        if not directed:
            ties[b].append(a)
    found = []
    for start in range(nodes):
        distance = [-1] * nodes
        distance[start] = 0
        queue = [start]
        for node in queue:
            for other in ties[node]:
                if distance[other] < 0:
                    distance[other] = distance[node] + 1
                    queue.append(other)
        found.append(distance)
    return found


def published(mixer: FocalGraph, x: Tensor, edges: list[tuple[int, ...]]) -> Tensor:
    """One row x [N, D], head by head, node by node."""
    near, nodes, each = paths(edges, len(x), mixer.directed), len(x), mixer.width
    q, k, v = x @ mixer.q.weight.t(), x @ mixer.k.weight.t(), x @ mixer.v.weight.t()
    kinds = {}
    for a, b, *kind in edges:
        for ends in [(a, b)] if mixer.directed else [(a, b), (b, a)]:
            kinds[ends] = max(kinds.get(ends, 0), kind[0] if kind else 0)
    rows = []
    for i in range(nodes):
        heads = []
        for h in range(mixer.heads):
            part = slice(h * each, h * each + each)
            seen = [j for j in range(nodes) if h >= mixer.near or 0 <= near[i][j] <= mixer.hops]
            scores = []
            for j in seen:
                score = q[i, part] @ k[j, part]
                if mixer.edge_q is not None and mixer.edge_k is not None and (i, j) in kinds:
                    score = (
                        score + q[i, part] @ mixer.edge_q[h, kinds[i, j]] + k[j, part] @ mixer.edge_k[h, kinds[i, j]]
                    )
                scores.append(score / math.sqrt(each))
            weights = torch.softmax(torch.stack(scores), 0)
            heads.append(sum(w * v[j, part] for w, j in zip(weights, seen, strict=True)))
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ mixer.o.weight.t()


@pytest.mark.parametrize(
    "settings",
    [{"hops": 1}, {"hops": 2, "focal": 2}, {"hops": 3, "directed": True}, {"hops": 2, "types": 3}],
    ids=lambda settings: ",".join(settings),
)
def test_it_is_the_formula(settings: dict[str, Any], agree: Any) -> None:
    mixer = made(**settings)
    x = torch.randn(2, NODES, 16, requires_grad=True)
    rows: list[list[tuple[int, ...]]] = [EDGES, EDGES[:4]]
    if "types" in settings:
        rows = [[(*edge, index % 3) for index, edge in enumerate(row)] for row in rows]
        rows[1].append((0, 1, 2))  # of two edges between two nodes the higher type counts
    found = mixer(x, Context(side={"edges": graph(*rows)}))
    expected = torch.stack([published(mixer, row, edges) for row, edges in zip(x, rows, strict=True)])
    agree(found, expected)
    wanted = [x, *mixer.parameters()]
    weights = torch.randn(found.shape)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), wanted) for y in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, 1e-4)


@pytest.mark.parametrize("directed", [False, True])
def test_distances_are_those_of_a_breadth_first_search(directed: bool) -> None:
    expected = torch.tensor(paths(EDGES, NODES, directed))
    found = hop_distances(graph(EDGES), NODES, 9, directed=directed)[0]
    assert torch.equal(found, expected)
    near = hop_distances(graph(EDGES), NODES, 2, directed=directed)[0]
    assert torch.equal(near, expected.masked_fill(expected > 2, -1))


@pytest.mark.parametrize("hops", [0, 1, 2, 3, 5])
def test_paths_given_and_worked_out_are_the_same(hops: int, agree: Any) -> None:
    x, edges = torch.randn(1, NODES, 16), graph(EDGES)
    inside = made(hops=hops)(x, Context(side={"edges": edges}))
    given = made(hops=hops, graph="distances")(x, Context(side={"distances": hop_distances(edges, NODES, 6)}))
    agree(given, inside)


def test_no_hops_are_the_own_value(agree: Any) -> None:
    mixer = made(hops=0, focal=2)
    x = torch.randn(1, NODES, 16)
    agree(mixer(x, Context(side={"edges": graph(EDGES)})), mixer.o(mixer.v(x)))


def test_nodes_have_no_order(agree: Any) -> None:
    mixer, x = made(hops=2), torch.randn(1, NODES, 16)
    order = torch.randperm(NODES)
    back = order.argsort().tolist()
    moved = [(back[a], back[b]) for a, b in EDGES]
    found = mixer(x[:, order], Context(side={"edges": graph(moved)}))
    agree(found, mixer(x, Context(side={"edges": graph(EDGES)}))[:, order])


def test_nodes_are_the_real_tokens(agree: Any) -> None:
    """Padding on either side has no number, an edge to a node beyond the row is none, and a row of padding gives
    zeros."""
    x, edges = torch.randn(3, NODES, 16), graph(EDGES, EDGES, EDGES)
    padding = torch.ones(3, NODES, dtype=torch.bool)
    padding[0, :3], padding[2] = False, False
    for name in ("edges", "distances"):
        mixer = made(hops=2, graph=name)
        inside = [edge for edge in EDGES if max(edge) < 6]
        side = edges if name == "edges" else hop_distances(graph(inside, EDGES, EDGES), NODES, 6)
        y = mixer(x, Context(side={name: side}, padding=padding))
        agree(y[:1, 3:], mixer(x[:1, 3:], Context(side={name: side[:1]})))
        agree(y[1:2], mixer(x[1:2], Context(side={name: side[1:2]})))
        assert bool((y[2] == 0).all()) and bool(y.isfinite().all())


def test_a_graph_that_does_not_fit_says_so() -> None:
    x = torch.randn(2, NODES, 16)
    edges = graph(EDGES, EDGES)
    for settings, given, message in (
        ({}, edges[:1], r"pass both ends of each edge, \[2, edges, 2\]"),
        ({}, edges[..., :1], "pass both ends"),
        ({}, edges.float(), "pass int64"),
        ({"types": 2}, edges, "both ends and the type"),
        ({"types": 2}, torch.cat([edges, edges[..., :1]], -1), "2 types of edges, counted from 0"),
        ({"graph": "distances"}, torch.zeros(2, 4, 4, dtype=torch.int64), "at least 9 nodes"),
    ):
        mixer = made(**settings)
        with pytest.raises(InputError) as error:
            mixer(x, Context(side={mixer.graph: given}))
        assert error.match("side tensor") and error.value.hint is not None
        assert re.search(message, error.value.hint)
    with pytest.raises(UnsupportedError, match="needs the side tensor 'edges'"):
        made()(x, Context())


def test_what_it_cannot_do_says_why() -> None:
    with pytest.raises(UnsupportedError, match="cannot be causal: a graph is given whole"):
        FocalGraphSettings().build(Place(16))
    with pytest.raises(SettingsError, match="must be at most heads"):
        FocalGraphSettings(heads=2, focal=3)
    with pytest.raises(SettingsError, match="know neither types nor directions"):
        FocalGraphSettings(graph="distances", directed=True)
    with pytest.raises(UnsupportedError, match="does not divide into 3 heads"):
        FocalGraphSettings(heads=3).build(Place(16, order="bidirectional"))
