"""Stacks: pattern, overrides, shared parameters, recomputation, and how many graphs a compiler sees."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from armillary.base.errors import SettingsError
from armillary.base.settings import parse
from armillary.nn import reversible
from armillary.nn.context import Context
from armillary.nn.cost import count as count_flops
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


# -- reversible stacks

SIDES = {
    "branches": [
        {"name": "near", "mixer": {"kind": "window", "window": 3}},
        {"name": "far", "mixer": "retention", "beside": True},
        {"name": "channel", "channel": "gated"},
        {"name": "more", "channel": "ffn"},
    ]
}


def streams(model: Network, x: Tensor) -> Tensor:
    """y₁ = x₁ + f(x₂), y₂ = x₂ + g(y₁) by ordinary autograd, from the blocks' own branches."""
    a = b = x
    for block in model.blocks:
        for names in (
            (("near", "far"), ("channel",), ("more",)) if "near" in block.names else (("mixer",), ("channel",))
        ):
            a, b = b, a + sum(block.get_submodule(name)(b, Context()) for name in names)
    return (a + b) / 2


@pytest.mark.parametrize("block", [LOOK, STATE, SIDES], ids=["look", "state", "sides"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reversible_is_the_same_without_reversing(block: Any, dtype: torch.dtype, agree: Any) -> None:
    model = network(depth=3, block=block, topology="reversible").to(dtype)
    x = torch.randn(2, 9, 16, dtype=dtype, requires_grad=True)
    weights = torch.randn(2, 9, 16, dtype=dtype)
    wanted = [x, *model.blocks.parameters()]
    found, expected = model.blocks(x, Context()), streams(model, x)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    agree(found, expected, tolerance)
    ours = torch.autograd.grad((found * weights).sum(), wanted)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, tolerance)
    with torch.no_grad():
        agree(model.blocks(x, Context()), found, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_reversible_inputs_are_recovered(dtype: torch.dtype, tolerance: float, agree: Any) -> None:
    model = network(depth=12, block=LOOK, topology="reversible").to(dtype)
    x = torch.randn(2, 9, 16, dtype=dtype)
    a = b = x
    with torch.no_grad():
        for block in model.blocks:
            for name in ("mixer", "channel"):
                a, b = b, a + block.get_submodule(name)(b, Context())
    for back in reversible.undo(list(model.blocks), a, b, Context(), dtype):
        agree(back, x, tolerance)


def test_reversible_gradients_in_bf16_are_those_of_kept_activations() -> None:
    """The streams are float32, so what is taken back is what the branches read."""
    model = network(depth=8, block=LOOK, topology="reversible").compute(torch.bfloat16)
    loss = model(tokens()).float().square().sum()
    ours = torch.autograd.grad(loss, list(model.parameters()))
    loss = model(tokens(), taps=Taps()).float().square().sum()  # with taps nothing is taken back
    for a, b in zip(ours, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        assert float((a - b).norm()) <= 0.02 * float(b.norm())


class Live(TorchDispatchMode):
    """The most bytes of tensors, made inside the block, that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.known:
                    self.known.add(key)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.gone, key, storage.nbytes())
        return out

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak(depth: int, topology: str, **more: Any) -> int:
    """Of one forward and backward pass, less the gradients."""
    model = network(depth=depth, block={**LOOK, **more}, topology=topology)
    ids = torch.randint(0, V, (2, 64))
    with Live() as live:
        live.known = {p.untyped_storage()._cdata for p in model.parameters()}  # of which views are made
        model(ids).square().sum().backward()
    return live.peak - sum(4 * p.numel() for p in model.parameters())


def test_reversible_memory_does_not_grow_with_depth() -> None:
    kept = [peak(depth, "sequential") for depth in (2, 8, 16)]
    flat = [peak(depth, "reversible") for depth in (2, 8, 16)]
    assert kept[2] > 1.8 * kept[1] > 3 * kept[0]
    assert flat[2] < 1.05 * flat[0]


def test_reversible_blocks_extend_as_they_run(agree: Any) -> None:
    model = network(depth=3, block=SIDES, topology="reversible")
    ids = tokens(12)
    with torch.no_grad():
        state = model.init_state(2)
        pieces = [model.extend(ids[:, start:stop], state) for start, stop in ((0, 5), (5, 6), (6, 12))]
        agree(torch.cat(pieces, 1), model(ids), 1e-5)


def test_reversible_taps_watch_and_edit(agree: Any) -> None:
    model, ids = network(depth=2, block=LOOK, topology="reversible"), tokens()
    taps = Taps(["*"])
    assert torch.equal(model(ids, taps=taps), model(ids))
    assert set(taps.seen) == set(model.taps())
    seen = taps.seen
    agree(seen["blocks.0.residual.mid"], seen["embed"] + seen["blocks.0.mixer.out"], 1e-6)
    agree(seen["blocks.0.residual.post"], seen["embed"] + seen["blocks.0.channel.out"], 1e-6)
    moved = model(ids, taps=Taps(edits=[("blocks.0.residual.mid", lambda value: value * 2)]))
    assert not torch.equal(moved, model(ids))
    state = model.init_state(2)
    with torch.no_grad():
        watch = Taps(["*"])
        agree(model.extend(ids, state, taps=watch), model(ids), 1e-5)
        agree(watch.seen["blocks.1.residual.mid"], seen["blocks.1.residual.mid"], 1e-5)


def test_reversible_dropout_comes_again(agree: Any) -> None:
    """The gradient of what was computed: a numerical derivative under the same generator."""
    model = network(depth=3, block={**LOOK, "dropout": 0.5}, topology="reversible").double().train()
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    weights, direction = torch.randn(1, 5, 16, dtype=torch.float64), torch.randn(1, 5, 16, dtype=torch.float64)

    def value(y: Tensor) -> Tensor:
        torch.manual_seed(3)
        return (model.blocks(y, Context()) * weights).sum()

    y = x.clone().requires_grad_()
    loss = value(y)
    drawn = torch.get_rng_state()
    (slope,) = torch.autograd.grad(loss, [y])
    assert torch.equal(torch.get_rng_state(), drawn)  # going back leaves the generator alone
    step = 1e-6
    with torch.no_grad():
        expected = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
    agree((slope * direction).sum(), expected, 1e-7)


def test_reversible_encoder_decoder_learns_through_its_memory(agree: Any) -> None:
    """The memory's gradient comes from every block that looked at it."""
    data = {
        "form": "encoder_decoder",
        "block": {**LOOK, "cross": {"kind": "attention"}},
        "encoder": {"depth": 2, "block": LOOK, "topology": "reversible"},
        "topology": "reversible",
    }
    model = network(**data)
    names = [name for name, _ in model.named_parameters()]

    def slopes(taps: Taps | None) -> tuple[Tensor, ...]:
        loss = model(tokens(5), source=tokens(7), taps=taps).square().sum()
        return torch.autograd.grad(loss, list(model.parameters()))

    for name, a, b in zip(names, slopes(None), slopes(Taps()), strict=True):
        agree(a, b, 1e-4)
        assert float(a.abs().max()) > 0, name


def test_reversible_shared_blocks_and_compiled_ones(counted: Any, agree: Any) -> None:
    backend, graphs = counted
    model, ids = network(depth=4, block=LOOK, topology="reversible", share={"all": ["blocks.*"]}), tokens()
    expected = torch.autograd.grad(model(ids).square().sum(), list(model.parameters()))
    model.compile_blocks(backend=backend, fullgraph=True)
    for _ in range(2):
        found = torch.autograd.grad(model(ids).square().sum(), list(model.parameters()))
    for a, b in zip(found, expected, strict=True):
        agree(a, b, 1e-4)
    assert len(graphs) == 2  # the two steps of a block, in both passes
    ways = torch.autograd.grad(model(ids, taps=Taps()).square().sum(), list(model.parameters()))
    for a, b in zip(ways, expected, strict=True):
        agree(a, b, 1e-4)


def test_reversible_blocks_cannot_norm_the_sum() -> None:
    with pytest.raises(SettingsError, match="cannot have norm_at: post"):
        network(block={**LOOK, "norm_at": "post"}, topology="reversible")
    with pytest.raises(SettingsError, match="a driver steps through single blocks"):
        network(block=LOOK, topology="reversible", driver={"kind": "memory_tokens"})


def test_reversible_cost_is_counted() -> None:
    model = network(depth=3, block=LOOK, topology="reversible")
    declared = model.settings.cost(model.settings.place(), 16).flops
    counted = count_flops(lambda: model(tokens(16)[:1]))
    assert abs(declared - counted) <= 0.02 * counted
