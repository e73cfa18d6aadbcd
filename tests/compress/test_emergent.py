"""Experts out of dense weights: the same function, clusters that are the best of their size, and back again."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from armillary.base.errors import InputError, UnsupportedError
from armillary.base.settings import parse
from armillary.checkpoints import load, save
from armillary.compress import balanced_clusters, merge_experts, pick, split_experts
from armillary.compress.clusters import assign
from armillary.nn.channels.emergent import Emergent
from armillary.nn.network import ModelSettings, Network, build


def small(channel: Any = "gated", **changes: Any) -> Network:
    mixer = {"kind": "attention", "heads": 2, "position": "rope"}
    settings = {"width": 16, "depth": 2, "vocabulary": 30, "block": {"mixer": mixer, "channel": channel}}
    return build(parse(ModelSettings, settings | changes), seed=3)


def ids() -> Tensor:
    return torch.randint(0, 30, (3, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("channel", [{"kind": "ffn", "hidden": 48, "bias": True}, {"kind": "gated", "chunk": 4}])
def test_with_all_experts_it_is_the_same_function(channel: dict[str, Any]) -> None:
    network = small(channel)
    found = split_experts(network, 8)
    assert sorted(found.likeness) == ["blocks.0.channel.inner", "blocks.1.channel.inner"]
    count = [sum(p.numel() for p in each.parameters()) for each in (network, found.network)]
    assert count[0] == count[1]
    expected = network(ids())
    assert torch.allclose(found.network(ids()), expected, atol=1e-5)
    pick(found.network, 0.5)
    assert {part.top for part in found.network.modules() if isinstance(part, Emergent)} == {4}
    assert not torch.allclose(found.network(ids()), expected, atol=1e-2)


@pytest.mark.parametrize("channel", [{"kind": "ffn", "hidden": 48, "bias": True}, "gated"])
def test_splitting_and_merging_is_nothing(channel: Any) -> None:
    network = small(channel)
    back = merge_experts(split_experts(network, 4, top=1).network)
    assert back.settings == network.settings
    for name, tensor in network.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)


def test_features_that_belong_together_come_together() -> None:
    """Rows around four directions, shuffled, of any length: clusters are the four, whatever the seed."""
    drawn = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(8, 8, generator=drawn))[0][:4]
    kinds = torch.arange(4).repeat_interleave(6)[torch.randperm(24, generator=drawn)]
    rows = directions[kinds] + 0.1 * torch.randn(24, 8, generator=drawn)
    rows = rows * (0.1 + 5 * torch.rand(24, 1, generator=drawn))
    for seed in range(4):
        order, likeness = balanced_clusters(rows, 4, seed)
        assert torch.equal(order.sort().values, torch.arange(24))
        groups = kinds[order].view(4, 6)
        assert bool((groups == groups[:, :1]).all()) and likeness > 0.9
        assert bool((order.view(4, 6).diff(dim=1) > 0).all())


def test_assignments_are_the_best_of_their_sizes() -> None:
    """Against every assignment, from a bad start; swaps of two alone do not get there."""
    drawn = np.random.default_rng(0)
    every = np.array(sorted(set(permutations([0, 0, 1, 1, 2, 2]))))
    for _ in range(30):
        gain = drawn.normal(size=(6, 3))
        totals = gain[np.arange(6), every].sum(1)
        found = assign(gain, every[totals.argmin()])
        assert gain[np.arange(6), found].sum() == pytest.approx(totals.max())
    ring = np.array([[0.0, 1, -9], [-9, 0, 1], [1, -9, 0]])
    assert assign(ring, np.arange(3)).tolist() == [1, 2, 0]


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    found = split_experts(small(), 4, top=2).network
    save(tmp_path / "model", found)
    again = load(tmp_path / "model").network
    with torch.no_grad():
        assert torch.equal(again(ids()), found(ids()))
        state = again.init_state(3)
        pieces = [again.extend(ids()[:, :4], state), again.extend(ids()[:, 4:], state)]
        assert torch.allclose(torch.cat(pieces, 1), found(ids()), atol=1e-5)
    assert torch.equal(merge_experts(again)(ids()), small()(ids()))


def test_some_blocks_only_and_both_sides_of_a_pair() -> None:
    kinds = [block.all()[1].channel.kind for block in split_experts(small(), 4, layers=[1]).network.settings.layers()]  # type: ignore[union-attr]
    assert kinds == ["gated", "emergent"]
    usual = small(block=None, overrides={0: {"mixer": "attention", "channel": {"kind": "ffn", "hidden": 8}}})
    found = split_experts(usual, 4)
    assert torch.allclose(found.network(ids()), usual(ids()), atol=1e-5)
    mixer = {"kind": "attention", "heads": 2}
    pair = small(
        form="encoder_decoder",
        block={"mixer": mixer, "cross": mixer, "channel": "ffn"},
        encoder={"depth": 1, "blocks": {"a": {"branches": [{"name": "think", "channel": "ffn"}]}}},
    )
    found = split_experts(pair, 4)
    names = ["encoder.0.think.inner", "blocks.0.channel.inner", "blocks.1.channel.inner"]
    assert list(found.likeness) == names
    assert torch.allclose(found.network(ids(), source=ids()), pair(ids(), source=ids()), atol=1e-5)


def test_what_cannot_be_split_says_why() -> None:
    with pytest.raises(InputError, match="cannot be picked"):
        split_experts(small(), 4, top=5)
    with pytest.raises(InputError, match="no block 2"):
        split_experts(small(), 4, layers=[2])
    with pytest.raises(UnsupportedError, match="do not divide into 7 experts"):
        split_experts(small(), 7)
    with pytest.raises(InputError, match="do not divide"):
        balanced_clusters(torch.randn(24, 8), 7)
    with pytest.raises(UnsupportedError, match="no dense feed-forward"):
        split_experts(split_experts(small(), 4).network, 4)
    with pytest.raises(UnsupportedError, match="no experts to merge"):
        merge_experts(small())
    with pytest.raises(UnsupportedError, match="share their parameters"):
        split_experts(small(share={"one": ["blocks.*.channel.inner"]}), 4)
