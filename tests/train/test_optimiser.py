"""Groups of parameters, and AdamW against its published formula."""

from __future__ import annotations

import pytest
import torch

from armillary.base.errors import InputError
from armillary.base.settings import parse
from armillary.nn.network import ModelSettings, Network, build
from armillary.recipe.training import OptimiserSettings
from armillary.train.optimiser import build_optimiser, parameter_groups, set_rate


def network(**changes: object) -> Network:
    settings = {
        "width": 8,
        "depth": 2,
        "vocabulary": 11,
        "context": 16,
        "position": "learned",
        "norm": "layernorm",
        "block": {
            "mixer": {"kind": "attention", "heads": 2, "bias": True, "position": "t5"},
            "channel": "ffn",
            "norm": "layernorm",
        },
    }
    return build(parse(ModelSettings, settings | changes), seed=0)


def test_only_matrices_of_products_are_decayed() -> None:
    net = network(head={"kind": "language_model", "tied": False})
    groups = parameter_groups(net, OptimiserSettings(weight_decay=0.3))
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    others = {name for group in groups if not group["weight_decay"] for name in group["names"]}
    shapes = {name: p.dim() for name, p in net.named_parameters()}
    assert {group["weight_decay"] for group in groups} == {0.3, 0.0}
    assert decayed and all(shapes[name] >= 2 for name in decayed)
    assert "head.product.weight" in decayed
    assert {"embed.weight", "position.table.weight"} <= others
    assert any("position.table" in name for name in others if name.startswith("blocks"))  # T5's biases
    assert all("norm" not in name and not name.endswith("bias") for name in decayed)
    assert decayed | others == set(shapes)


def test_a_tied_parameter_is_there_once_and_undecayed() -> None:
    net = network()
    groups = parameter_groups(net, OptimiserSettings())
    names = [name for group in groups for name in group["names"]]
    parameters = [id(p) for group in groups for p in group["params"]]
    assert len(set(parameters)) == len(parameters) == len(list(net.parameters()))
    assert "head.product.weight" not in names
    assert next(group["weight_decay"] for group in groups if "embed.weight" in group["names"]) == 0.0


def test_a_module_may_keep_its_matrix_from_decay() -> None:
    net = network()
    product = net.get_submodule("blocks.0.channel.inner.up")
    product.undecayed = ("weight",)
    groups = parameter_groups(net, OptimiserSettings())
    assert next(g["weight_decay"] for g in groups if "blocks.0.channel.inner.up.weight" in g["names"]) == 0.0
    assert next(g["weight_decay"] for g in groups if "blocks.1.channel.inner.up.weight" in g["names"]) > 0


def test_frozen_parameters_are_left_out_and_groups_have_their_own_rate() -> None:
    net = network()
    net.embed.weight.requires_grad_(False)
    groups = parameter_groups(net, OptimiserSettings(), {"blocks.0.*": 0.5})
    assert all("embed.weight" not in group["names"] for group in groups)
    optimiser = build_optimiser(groups, OptimiserSettings())
    set_rate(optimiser, 0.2)
    for group in optimiser.param_groups:
        first = all(name.startswith("blocks.0.") for name in group["names"])
        assert group["lr"] == (0.1 if first else 0.2)
    with pytest.raises(InputError, match="blocks.9"):
        parameter_groups(net, OptimiserSettings(), {"blocks.9.*": 0.5})
    with pytest.raises(InputError, match="no parameter is trained"):
        parameter_groups(net.requires_grad_(False), OptimiserSettings())


def test_adamw_follows_its_formula() -> None:
    """Loshchilov and Hutter 2019, Algorithm 2, written out in float64."""
    settings = OptimiserSettings(betas=(0.8, 0.9), epsilon=1e-6, weight_decay=0.5)
    net = network()
    name = "blocks.0.channel.inner.up.weight"
    weight = net.get_parameter(name)
    optimiser = build_optimiser(parameter_groups(net, settings), settings)
    expected = weight.detach().double().clone()
    mean, square = torch.zeros_like(expected), torch.zeros_like(expected)
    for step in range(1, 4):
        rate = 0.1 / step
        gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
        weight.grad = gradient.clone()
        set_rate(optimiser, rate)
        optimiser.step()
        wide = gradient.double()
        mean, square = 0.8 * mean + 0.2 * wide, 0.9 * square + 0.1 * wide**2
        expected -= rate * 0.5 * expected
        expected -= rate * (mean / (1 - 0.8**step)) / ((square / (1 - 0.9**step)).sqrt() + 1e-6)
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)
