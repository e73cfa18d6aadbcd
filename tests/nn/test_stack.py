"""Stacks: pattern, overrides, shared parameters, recomputation, and how many graphs a compiler sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.base.errors import SettingsError
from armillary.base.settings import parse
from armillary.nn.mixers.attention import Attention
from armillary.nn.mixers.retention import Retention
from armillary.nn.network import ModelSettings, Network, build
from armillary.nn.taps import Taps

V = 20
LOOK = {"mixer": {"kind": "attention", "position": "rope"}, "channel": "gated"}
STATE = {"mixer": "retention", "channel": "gated"}
WIDE = {"mixer": {"kind": "attention", "head_width": 8}, "channel": {"kind": "ffn", "hidden": 20}}


def network(**data: Any) -> Network:
    return build(parse(ModelSettings, {"width": 16, "vocabulary": V, "depth": 2, **data}))


def tokens(length: int = 9) -> Tensor:
    return torch.randint(0, V, (2, length), generator=torch.Generator().manual_seed(1))


def test_a_pattern_is_cycled_and_overridden() -> None:
    model = network(depth=7, blocks={"s": STATE, "l": LOOK}, pattern=["s", "s", "l"], overrides={"4": WIDE})
    kinds = [type(block.get_submodule("mixer.inner")) for block in model.blocks]
    s, a = Retention, Attention
    assert kinds == [s, s, a, s, a, a, s]
    assert model.blocks.get_submodule("4.mixer.inner").width == 8
    assert model.blocks.kinds == 3
    names = [name for name in dict(model.named_parameters()) if name.startswith("blocks.4.")]
    assert "blocks.4.channel.inner.up.weight" in names and "blocks.4.channel.inner.gate.weight" not in names
    assert model(tokens()).shape == (2, 9, V)


def test_depth_sets_the_scale_of_what_writes_to_the_stream() -> None:
    """Products that write to the residual stream start smaller by √(2·depth); each stack has its own depth."""
    model = build(
        parse(
            ModelSettings,
            {
                "width": 64,
                "vocabulary": V,
                "depth": 8,
                "form": "encoder_decoder",
                "block": {**LOOK, "cross": {"kind": "attention"}},
                "encoder": {"depth": 2, "block": LOOK},
            },
        )
    )
    for stack, depth in ((model.blocks, 8), (model.encoder, 2)):
        q = stack.get_parameter("0.mixer.inner.q.weight")
        o = stack.get_parameter("0.mixer.inner.o.weight")
        assert float(q.detach().std()) == pytest.approx(64**-0.5, rel=0.1)
        assert float(o.detach().std()) == pytest.approx(64**-0.5 / (2 * depth) ** 0.5, rel=0.1)


# -- sharing


def test_shared_modules_are_one_set_of_parameters() -> None:
    plain = network(depth=4, block=LOOK)
    model = network(
        depth=4, block=LOOK, share={"ffn": ["blocks.*.channel"], "pair": ["blocks.0.mixer", "blocks.2.mixer"]}
    )
    first = model.get_parameter("blocks.0.channel.inner.up.weight")
    assert all(model.get_parameter(f"blocks.{i}.channel.inner.up.weight") is first for i in range(4))
    assert model.get_parameter("blocks.2.mixer.norm.weight") is model.get_parameter("blocks.0.mixer.norm.weight")
    assert model.get_parameter("blocks.1.mixer.norm.weight") is not model.get_parameter("blocks.0.mixer.norm.weight")

    def size(network: Network, part: str) -> int:
        return sum(p.numel() for p in network.get_submodule(part).parameters())

    saved = 3 * size(plain, "blocks.0.channel") + size(plain, "blocks.0.mixer")
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters()) - saved
    assert model.tied_names()["blocks.3.channel.inner.up.weight"] == "blocks.0.channel.inner.up.weight"
    model.check_ties()


def test_shared_parameters_learn_from_every_use(agree: Any) -> None:
    """The gradient is the sum of those of a network without sharing that holds equal values."""
    shared = network(depth=3, block=LOOK, share={"all": ["blocks.*"]})
    apart = network(depth=3, block=LOOK)
    with torch.no_grad():
        own = dict(shared.named_parameters(remove_duplicate=False))
        for name, parameter in apart.named_parameters():
            parameter.copy_(own[name])
    for model in (shared, apart):
        model(tokens()).square().sum().backward()
    for name, parameter in shared.named_parameters():
        if name.startswith("blocks.0."):
            rest = name.removeprefix("blocks.0.")
            grads = [apart.get_parameter(f"blocks.{i}.{rest}").grad for i in range(3)]
            agree(parameter.grad, sum(g for g in grads if g is not None), 1e-4)


def test_sharing_that_came_apart_is_noticed_and_mended() -> None:
    model = network(depth=2, block=LOOK, share={"ffn": ["blocks.*.channel"]})
    up = model.get_submodule("blocks.1.channel.inner.up")
    up.weight = torch.nn.Parameter(up.weight.detach().clone())  # type: ignore[union-attr,operator]
    with pytest.raises(AssertionError, match=r"blocks.1.channel.inner.up.weight is no longer blocks.0"):
        model.check_ties()
    model.tie()
    model.check_ties()


@pytest.mark.parametrize(
    "share, message",
    [
        ({"a": ["blocks.0.channel"]}, "matches 1 modules"),
        ({"a": ["blocks.*.chanel"]}, "matches 0 modules"),
        ({"a": ["blocks.0", "blocks.1"]}, "have different parameters"),
    ],
)
def test_sharing_that_cannot_be_is_explained(share: dict[str, list[str]], message: str) -> None:
    with pytest.raises(SettingsError) as error:
        network(blocks={"l": LOOK, "s": STATE}, pattern=["l", "s"], share=share)
    assert message in str(error.value) and error.value.path == ("model", "share", "a")


# -- recomputation and compilation


def test_recomputation_keeps_less_and_changes_nothing(agree: Any) -> None:
    model, kept = network(depth=4, block=LOOK), []
    grads, sizes = [], []
    for on in (False, True):
        model.recompute_blocks(on)
        model.zero_grad()
        kept.clear()

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(tokens()).square().sum()
        loss.backward()
        sizes.append(sum(kept))
        grads.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*grads, strict=True):
        agree(a, b)
    assert sizes[1] < sizes[0] / 3


@pytest.fixture
def counted() -> Iterator[tuple[Callable[..., Any], list[str]]]:
    """A backend that runs graphs as they are and keeps their text."""
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    yield backend, graphs
    torch._dynamo.reset()


def test_identical_blocks_share_one_graph(counted: Any) -> None:
    backend, graphs = counted
    model, ids = network(depth=12, block=LOOK), tokens()
    expected = model(ids)
    model.compile_blocks(backend=backend, fullgraph=True)
    assert torch.equal(model(ids), expected)
    assert len(graphs) == 1
    for _ in range(3):
        model(ids).sum().backward()
    assert len(graphs) == 1
    with torch.no_grad():
        model(ids)
    assert len(graphs) == 2


def test_kinds_of_blocks_and_networks_do_not_use_up_the_compilers_limit(counted: Any) -> None:
    """The limit is 8 graphs of one function; beyond it the compiler falls back to eager, or raises with fullgraph."""
    backend, graphs = counted
    kinds = {f"k{i}": {"mixer": "attention", "channel": {"kind": "ffn", "hidden": 8 + 4 * i}} for i in range(10)}
    model, ids = network(depth=20, blocks=kinds, pattern=list(kinds)), tokens()
    model.compile_blocks(backend=backend, fullgraph=True)
    expected_graphs = len(kinds)
    with torch.no_grad():
        model(ids)
    assert len(graphs) == expected_graphs
    for count in range(1, 11):
        another = network(depth=2, block=LOOK)
        another.compile_blocks(backend=backend, fullgraph=True)
        with torch.no_grad():
            another(ids)
        assert len(graphs) == expected_graphs + count


def test_taps_leave_the_compiled_form(counted: Any) -> None:
    backend, graphs = counted
    model, ids = network(depth=2, block=LOOK), tokens()
    expected = model(ids)
    model.compile_blocks(backend=backend, fullgraph=True)
    model(ids)
    for _ in range(3):
        taps = Taps(["blocks.*.mixer.weights"])
        assert torch.equal(model(ids, taps=taps), expected)
        assert len(taps.seen) == 2
    assert len(graphs) == 1
    model.recompute_blocks()
    model(ids).sum().backward()
