"""Routing attention against nearest centroids, their last tokens and their moves, as loops over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.mechanism import MixerSettings, Place, initialise
from armillary.nn.mixers.routing import Routing, RoutingSettings
from armillary.nn.network import ModelSettings, build
from armillary.nn.training import Training
from armillary.recipe.training import TrainingSettings
from armillary.train import Trainer


def made(**settings: Any) -> Routing:
    mixer = RoutingSettings(**{"heads": 2, "centroids": 4, "window": 3, **settings}).build(Place(16))
    initialise(mixer, 3)
    return mixer


def queries(mixer: Routing, x: Tensor, head: int) -> Tensor:
    """LayerNorm without scale, as published: [T, K]."""
    part = slice(head * mixer.width, (head + 1) * mixer.width)
    return F.layer_norm(x @ mixer.q.weight[part].t(), (mixer.width,), eps=1e-5)


def nearest(mixer: Routing, q: Tensor, head: int) -> list[int]:
    """The centroid at the least distance of each token."""
    return [int(((one - mixer.centroids[head]) ** 2).sum(-1).argmin()) for one in q.detach()]


def looped(mixer: Routing, x: Tensor) -> Tensor:
    rows = []
    for row in x:
        heads = []
        for h in range(mixer.heads):
            q, v = queries(mixer, row, h), row @ mixer.v.weight[h * mixer.width : (h + 1) * mixer.width].t()
            homes, outputs = nearest(mixer, q, h), []
            for t in range(len(row)):
                seen = [s for s in range(t) if homes[s] == homes[t]][-3:] or [t]
                outputs.append(torch.softmax(q[t] @ q[seen].t() / mixer.width**0.5, -1) @ v[seen])
            heads.append(torch.stack(outputs))
        rows.append(torch.cat(heads, -1) @ mixer.o.weight.t())
    return torch.stack(rows)


def test_forward_is_the_nearest_centroids_band(agree: Any) -> None:
    mixer = made()
    x = torch.randn(2, 40, 16, requires_grad=True)
    weights = torch.randn(2, 40, 16)
    found, expected = mixer(x, Context()), looped(mixer, x)
    agree(found, expected, 2e-5)
    wanted = [x, *mixer.parameters()]
    ours = torch.autograd.grad((found * weights).sum(), wanted)
    for a, b in zip(ours, torch.autograd.grad((expected * weights).sum(), wanted), strict=True):
        agree(a, b, 1e-4)


def test_centroids_move_to_what_is_near_in_updates_only(agree: Any) -> None:
    mixer, x = made(decay=0.9), torch.randn(2, 30, 16)
    before = mixer.centroids.clone()
    mixer(x, Context())
    mixer.after_step(1, 10)
    assert torch.equal(mixer.centroids, before)  # outside an update nothing is gathered
    padding = torch.arange(30) < torch.tensor([[30], [11]])
    for _ in range(2):  # a block that is computed again counts again, which no mean notices
        mixer(x, Context(padding=padding, training=Training.of(1)))
    expected = before.clone()
    for h in range(2):
        members: dict[int, list[Tensor]] = {}
        for row, real in zip(x, padding, strict=True):
            q = queries(mixer, row[real], h).detach()
            for home, one in zip(nearest(mixer, q, h), q, strict=True):
                members.setdefault(home, []).append(one)
        for home, ones in members.items():
            moved = 0.9 * before[h, home] + 0.1 * torch.stack(ones).mean(0)
            expected[h, home] = moved / moved.norm() * 8**0.5
    mixer.after_step(2, 10)
    agree(mixer.centroids, expected, 1e-5)
    assert not torch.equal(mixer.centroids, before)
    after = mixer.centroids.clone()
    mixer.after_step(3, 10)
    assert torch.equal(mixer.centroids, after)  # gathered anew in each update


def test_broken_updates_leave_the_centroids_whole() -> None:
    mixer = made()
    mixer(torch.full((1, 5, 16), torch.nan), Context(training=Training.of(1)))
    mixer.after_step(1, 10)
    assert mixer.centroids.isfinite().all() and (mixer.near == 0).all()


@pytest.mark.parametrize("topology", ["sequential", "reversible"])
@pytest.mark.parametrize("compiled", [False, True])
def test_training_gathers_the_groups(topology: str, compiled: bool) -> None:
    """Through the trainer, compiled blocks included: centroids come nearer to their tokens."""
    settings = parse(
        ModelSettings,
        {
            "width": 16,
            "depth": 2,
            "vocabulary": 12,
            "topology": topology,
            "block": {"mixer": {"kind": "routing", "heads": 2, "centroids": 3, "window": 4, "decay": 0.5}},
        },
    )
    network = build(settings, seed=1)
    trainer = Trainer(network, TrainingSettings(context=20, batch=4, steps=8, precision="float32", compile="no"))
    if compiled:
        torch._dynamo.reset()
        network.compile_blocks(backend="aot_eager", fullgraph=True)
    ids = torch.randint(0, 12, (4, 21), generator=torch.Generator().manual_seed(2))
    mixer: Any = network.blocks.get_submodule("0.mixer.inner")
    distances, moved = [], []
    for _ in range(6):
        before = mixer.centroids.clone()
        trainer.step(ids)
        moved.append(float((mixer.centroids - before).abs().max()))
        with torch.no_grad():
            x = network.blocks.get_submodule("0.mixer.norm")(network.embed(ids))
            q, _ = mixer.shaped(mixer.q(x).unflatten(-1, (2, 8)))
            products = q.transpose(1, 2) @ mixer.centroids.transpose(1, 2)
            distances.append(float(products.amax(-1).mean()))
    assert min(moved) > 0
    assert distances[-1] > distances[0]
    tensors, _ = trainer.state()
    assert "weights.blocks.0.mixer.inner.centroids" in tensors
    torch._dynamo.reset()


def test_settings_that_cannot_be() -> None:
    for name in ("centroids", "window", "heads"):
        with pytest.raises(SettingsError, match="greater than 0"):
            parse(MixerSettings, {"kind": "routing", name: 0})
    with pytest.raises(UnsupportedError, match="cannot be bidirectional"):
        RoutingSettings().build(Place(16, order="bidirectional"))
