"""The FLOP counter against counts by hand, and declared costs of whole networks against counted ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from armillary.base.errors import UnsupportedError
from armillary.base.settings import parse
from armillary.nn.block import Block, BranchSettings
from armillary.nn.context import Context
from armillary.nn.cost import Cost, count, linear_flops
from armillary.nn.describe import describe
from armillary.nn.linear import LowRankSettings
from armillary.nn.mechanism import Place, channels, mixers
from armillary.nn.network import ModelSettings, build
from armillary.testing.cases import Case, Trial

A, B = torch.randn(3, 4), torch.randn(4, 5)


@pytest.mark.parametrize(
    "call, flops",
    [
        (lambda: A @ B, 2 * 3 * 4 * 5),
        (lambda: F.linear(A, B.t()), 2 * 3 * 4 * 5),
        (lambda: F.linear(A, B.t(), torch.ones(5)), 2 * 3 * 4 * 5 + 15),
        (lambda: torch.bmm(A[None], B[None]), 2 * 3 * 4 * 5),
        (lambda: A + A, 12),
        (lambda: A.sum(), 12),
        (lambda: A.mean(-1), 12),
        (lambda: torch.softmax(A, -1), 5 * 12),
        (lambda: torch.cumsum(A, 0), 12),
        (lambda: torch.tanh(A), 12),
        (lambda: torch.linalg.vector_norm(A, dim=-1), 24),
        (lambda: A.t().reshape(-1)[2:].clone(), 0),
        (lambda: A > 0, 0),
        (lambda: torch.where(A > 0, A, 0.0), 0),
        (lambda: A.double(), 0),
        (lambda: torch.arange(9).cumsum(0).max(), 0),
        (lambda: B[torch.tensor([0, 2])], 0),
    ],
)
def test_the_counter_follows_its_rule(call: Callable[[], Any], flops: float) -> None:
    assert count(call) == flops


def test_costs_add_up() -> None:
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)
    assert linear_flops(3, 5, 7) == 2 * 3 * 5 * 7
    assert linear_flops(3, 5, 7, bias=True) == 2 * 3 * 5 * 7 + 35


MODELS: dict[str, dict[str, Any]] = {
    "llama": {"block": {"mixer": {"kind": "attention", "kv_heads": 2, "position": "rope"}, "channel": "gated"}},
    "gpt2": {
        "block": {
            "mixer": {"kind": "attention", "bias": True},
            "channel": {"kind": "ffn", "bias": True},
            "norm": "layernorm",
        },
        "position": "learned",
        "norm": "layernorm",
    },
    "hybrid": {
        "blocks": {
            "s": {"mixer": "retention", "channel": "gated"},
            "l": {"mixer": {"kind": "attention", "position": "alibi", "softcap": 5.0}, "norm_at": "sandwich"},
        },
        "pattern": ["s", "l"],
        "embed_scale": 4.0,
        "embed_norm": "rmsnorm",
        "head": {"kind": "language_model", "softcap": 20.0, "bias": True},
    },
    "encoder": {"form": "encoder", "position": "sinusoidal", "head": {"kind": "classification", "classes": 3}},
    "scaled": {"block": {"branches": [{"name": "only", "channel": "ffn", "scale": 0.5}]}},
    "translator": {
        "form": "encoder_decoder",
        "block": {"mixer": {"kind": "attention", "position": "rope"}, "cross": "attention", "channel": "ffn"},
        "encoder": {"depth": 1},
    },
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [16, 33])
def test_whole_networks_cost_what_they_declare(name: str, length: int) -> None:
    settings = parse(ModelSettings, {"width": 32, "depth": 2, "vocabulary": 40, "context": 64, **MODELS[name]})
    model, ids = build(settings), torch.randint(0, 40, (1, length))
    more = {"source": ids} if settings.encoder is not None else {}
    declared = settings.cost(settings.place(), length, 4)
    assert count(lambda: model(ids, **more)) == pytest.approx(declared.flops, rel=0.02)
    if settings.form == "encoder":
        assert declared.state_bytes == 0
        return
    state = model.init_state(1, capacity=length, **more)
    with torch.no_grad():
        model.extend(ids, state)
    assert state.nbytes == pytest.approx(declared.state_bytes, rel=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_a_description_needs_no_storage_and_is_true(name: str) -> None:
    settings = parse(ModelSettings, {"width": 32, "depth": 2, "vocabulary": 40, "context": 64, **MODELS[name]})
    said, model = describe(settings, length=48, batch=2), build(settings)
    assert said.parameters == said.active == sum(p.numel() for p in model.parameters())
    assert said.length == 48 and len(said.blocks) == 2
    assert said.flops_per_token == pytest.approx(settings.cost(settings.place(), 48).flops / 48)
    assert said.training_bytes == 16 * said.parameters + said.activation_bytes


def test_described_activations_are_those_kept() -> None:
    """Against what autograd keeps for one block of the real network, storages counted once."""
    settings = parse(ModelSettings, {"width": 32, "depth": 1, "vocabulary": 40, **MODELS["llama"]})
    model = build(settings)
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            alive.append(tensor)
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.hidden(torch.randint(0, 40, (2, 24)))
    said = describe(settings, length=24, batch=2, bf16=False)
    assert said.activation_bytes == pytest.approx(sum(kept.values()), rel=0.05)
    recomputed = describe(settings.derive(depth=4), length=24, batch=2, bf16=False, recompute=True)
    assert recomputed.activation_bytes < describe(settings.derive(depth=4), length=24, batch=2).activation_bytes


def test_a_block_counts_its_norms_and_sums() -> None:
    settings = parse(ModelSettings, {"width": 32, "depth": 1, "vocabulary": 40, **MODELS["llama"]})
    block = next(iter(build(settings).blocks))
    assert isinstance(block, Block)
    place = settings.place()
    declared = settings.layers()[0].cost(place, 20, 4).flops
    assert count(lambda: block(torch.randn(1, 20, 32), Context())) == pytest.approx(declared, rel=0.01)


OF_EXPERTS = {"moa", "emergent", "expert_choice", "moe", "task_moe"}  # pick products, which are dense


@pytest.mark.parametrize("registry, kind", [(r, k) for r in (mixers, channels) for k in sorted(dict(r))])
def test_products_of_low_rank_cost_what_they_take(registry: Any, kind: str) -> None:
    """Declared FLOPs of a branch against counted ones, within 2% of what dense products would take."""
    for example in registry.get(kind).examples():
        for width, length in ((16, 15), (32, 32)):
            place = {**example.place, "length": 64}
            cross = place.pop("cross", False)
            products = {"all": LowRankSettings(ratio=2.0)}
            case = Case(registry.role, kind, dataclasses.replace(example, place={**example.place, "linear": products}))
            branch = BranchSettings(
                name="here", look="memory" if cross else "self", **{registry.role: example.settings}
            )
            if kind in OF_EXPERTS:
                with pytest.raises(UnsupportedError, match="held by experts|dense products only"):
                    case.build(width=width)
                continue
            trial = Trial(case, batch=1, length=length, width=width, source=length)
            dense, declared = (
                branch.cost(Place(width, linear=each, **place), length, 4).flops for each in ({}, products)
            )
            around = dense - Case(registry.role, kind, example).cost(width, length, 4).flops
            assert declared < dense
            assert declared - around == pytest.approx(count(trial.whole), abs=0.02 * dense), (kind, example.name)
