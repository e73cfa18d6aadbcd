"""Pruning by data: nothing pruned is the same model, masks are the best of their size, weights are kept."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.base.errors import InputError, UnsupportedError
from armillary.base.settings import parse
from armillary.checkpoints import load, save
from armillary.compress import attention_mass, keep_largest, prune_attention
from armillary.nn.context import Context
from armillary.nn.network import ModelSettings, Network, build

LENGTH = 10


def small(**changes: Any) -> Network:
    settings = {
        "width": 16,
        "depth": 2,
        "vocabulary": 30,
        "block": {"mixer": {"kind": "attention", "heads": 2, "position": "rope"}, "channel": "gated"},
    }
    network = build(parse(ModelSettings, settings | changes), seed=3)
    with torch.no_grad():
        for block in network.blocks:
            block.mixer.inner.q.weight.mul_(4)  # attention that prefers some keys
    return network


def rows(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 30, (4, LENGTH), generator=generator) for _ in range(count)]


def test_the_mass_is_the_mean_of_the_softmax() -> None:
    network = small()
    found = attention_mass(network, rows())
    assert sorted(found) == ["blocks.0.mixer.inner", "blocks.1.mixer.inner"]
    x = network.embed(torch.cat(rows()))
    block = next(iter(network.blocks))
    mixer, h = block.mixer.inner, block.mixer.norm(x)
    q, k = (part(h).unflatten(-1, (2, 8)) for part in (mixer.q, mixer.k))
    q, k = mixer.position.rotate(q, k, torch.arange(LENGTH)[None])
    scores = torch.einsum("bthk,bshk->bhts", q, k) / 8**0.5
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    expected = torch.softmax(scores.masked_fill(later, -torch.inf), -1).mean(0)
    assert torch.allclose(found["blocks.0.mixer.inner"], expected, atol=1e-6)


def test_nothing_pruned_is_the_same_model() -> None:
    network = small()
    ids = torch.randint(0, 30, (2, 3 * LENGTH))  # longer than the calibration too
    pruned = prune_attention(network, rows(), 0.0)
    assert pruned.removed == 0 and all(share == pytest.approx(1) for share in pruned.kept_mass.values())
    assert torch.allclose(pruned.network(ids), network(ids), atol=1e-5)


@pytest.mark.parametrize("scope", ["head", "layer", "model"])
def test_pruned_pairs_get_no_attention_whatever_the_input(scope: Any) -> None:
    network = small()
    found = prune_attention(network, rows(), 0.4, scope=scope)
    assert found.removed == pytest.approx(0.4, abs=0.02)
    for name, share in found.kept_mass.items():
        assert 0.6 < share < 1  # more than the pairs' own share: what is removed was little looked at
        mixer = found.network.get_submodule(name)
        masks = []
        for seed in (1, 2):
            x = torch.randn(1, LENGTH, 16, generator=torch.Generator().manual_seed(seed))
            masks.append(mixer.sight(x, Context())[0] > 0)
        assert torch.equal(masks[0], masks[1])
        kept = mixer.kept & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        assert torch.equal(masks[0], kept) and kept.any(-1).all()
    for name, parameter in network.named_parameters():
        assert torch.equal(found.network.get_parameter(name), parameter)


def test_a_mask_holds_the_most_mass_that_its_size_can() -> None:
    """Against every mask of the same size in which each query keeps a key."""
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(1, 4, 4, generator=generator).tril()
    mass[0, 3] *= 0.01  # a query that hardly counts still keeps one key
    pairs = torch.ones(4, 4, dtype=torch.bool).tril()
    kept = keep_largest(mass, pairs, 0.5)
    assert int(kept.sum()) == 5 and kept.any(-1).all() and not (kept & ~pairs).any()
    places = pairs.nonzero().tolist()
    best = 0.0
    for chosen in combinations(places, 5):
        if {t for t, _ in chosen} == {0, 1, 2, 3}:
            best = max(best, sum(float(mass[0, t, s]) for t, s in chosen))
    assert float(mass[kept].sum()) == pytest.approx(best)


def test_later_positions_go_by_distance() -> None:
    network = small()
    found = prune_attention(network, rows(), 0.5)
    mixer = found.network.get_submodule("blocks.0.mixer.inner")
    mass = attention_mass(network, rows())["blocks.0.mixer.inner"]
    seen = mixer.sight(torch.randn(1, 3 * LENGTH, 16), Context())[0] > 0
    for head in range(2):
        means = [float(mass[head].diagonal(-d).mean()) for d in range(LENGTH)]
        largest = sorted(range(LENGTH), key=lambda d: -means[d])[:5]
        for t in range(LENGTH, 3 * LENGTH):
            assert {t - s for s in range(t + 1) if seen[head, t, s]} == set(largest) | {0}


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    found = prune_attention(small(), rows(), 0.5).network
    save(tmp_path / "model", found)
    again = load(tmp_path / "model").network
    ids = torch.randint(0, 30, (1, 25))
    with torch.no_grad():
        assert torch.equal(again(ids), found(ids))
        state = again.init_state(1)
        pieces = [
            again.extend(ids[:, :12], state),
            again.extend(ids[:, 12:13], state),
            again.extend(ids[:, 13:], state),
        ]
        assert torch.allclose(torch.cat(pieces, 1), found(ids), atol=1e-5)


def test_patterns_and_overrides_are_rewritten() -> None:
    mixer = {"kind": "attention", "heads": 2, "position": "alibi"}
    network = small(
        block=None,
        blocks={"look": {"mixer": mixer}, "keep": {"mixer": {"kind": "retention", "heads": 2}}},
        pattern=["look", "keep"],
        depth=3,
        overrides={2: {"branches": [{"name": "mixer", "mixer": mixer}, {"name": "channel", "channel": "ffn"}]}},
    )
    found = prune_attention(network, rows(), 0.5)
    kinds = [block.all()[0].mixer.kind for block in found.network.settings.layers()]  # type: ignore[union-attr]
    assert kinds == ["pruned", "retention", "pruned"]


def test_what_cannot_be_pruned_says_why() -> None:
    with pytest.raises(InputError, match="cannot be pruned"):
        prune_attention(small(), rows(), 1.0)
    with pytest.raises(InputError, match="no rows"):
        prune_attention(small(), [], 0.5)
    with pytest.raises(InputError, match="no scope"):
        prune_attention(small(), rows(), 0.5, scope="all")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="cut all rows alike"):
        prune_attention(small(), [*rows(1), rows(1)[0][:, :5]], 0.5)
    with pytest.raises(UnsupportedError, match="no dense attention"):
        prune_attention(small(block={"mixer": {"kind": "retention", "heads": 2}}), rows(), 0.5)
