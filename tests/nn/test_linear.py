"""The product seam: values in every type and shape, its fast path for few rows, and where it may not go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from armillary.base.errors import UnsupportedError
from armillary.base.settings import parse
from armillary.nn.cost import count
from armillary.nn.linear import (
    OUTPUT_ROLES,
    DenseSettings,
    Embedding,
    ExpertLinear,
    Linear,
    LinearSettings,
    LowRank,
    LowRankSettings,
)
from armillary.nn.mechanism import Place, channels, mixers
from armillary.nn.network import ModelSettings, build


def product(inputs: int = 24, outputs: int = 17, bias: bool = True) -> Linear:
    made = Linear(inputs, outputs, role="q", bias=bias)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (1, 1, 24), (2, 2, 24), (5, 3, 24), (0, 24)])
def test_values_are_pytorchs(shape: tuple[int, ...], bias: bool, gradients: bool, agree: Any) -> None:
    module, x = product(bias=bias), torch.randn(shape)
    with torch.set_grad_enabled(gradients):
        y = module(x)
        assert y.shape == (*shape[:-1], 17) and y.dtype == torch.float32
        if x.numel():
            agree(y, F.linear(x, module.weight, module.bias))
        low = module(x.bfloat16())
        assert low.dtype == torch.bfloat16
        if x.numel():
            agree(low.float(), F.linear(x, module.weight, module.bias), 0.02)


def test_float64_is_not_rounded_on_the_way(agree: Any) -> None:
    module, x = product(), torch.randn(1, 24).double()
    with torch.no_grad():
        agree(module(x), F.linear(x, module.weight.double(), module.bias.double()), 1e-12)


def test_rows_and_weights_that_do_not_lie_in_order(agree: Any) -> None:
    """A weight given as a transposed view, and every other row of an input, mean what they mean elsewhere."""
    module = product(bias=False)
    stored = torch.randn(24, 17)
    module.weight = torch.nn.Parameter(stored.t())
    x = torch.randn(4, 24)
    with torch.no_grad():
        agree(module(x[::2]), x[::2] @ stored)
        agree(module(x.t()[:, :1].expand(24, 24)[:1]), x.t()[:, :1].expand(24, 24)[:1] @ stored)


def test_the_start_has_the_stated_variance() -> None:
    generator = torch.Generator().manual_seed(1)
    for role, depth, expected in (("q", 8, 256**-0.5), ("o", 8, 256**-0.5 / 4), ("down", 2, 256**-0.5 / 2)):
        made = DenseSettings().build(256, 128, role=role, bias=True, depth=depth)
        made.reset(generator)
        assert float(made.weight.detach().std()) == pytest.approx(expected, rel=0.02)
        assert made.bias is not None and not bool(made.bias.any())
    table = Embedding(500, 64)
    table.reset(generator)
    assert float(table.weight.detach().std()) == pytest.approx(64**-0.5, rel=0.02)


def test_a_role_picks_its_settings() -> None:
    """The kind named for a role wins over that of all; the recipe reaches every product."""

    class Marked(DenseSettings):
        def build(self, inputs: int, outputs: int, *, role: str, bias: bool, depth: int) -> Linear:
            made = super().build(inputs, outputs, role=role, bias=bias, depth=depth)
            made.marked = True  # type: ignore[assignment]
            return made

    place = Place(16, linear={"q": Marked(), "all": DenseSettings()})
    assert hasattr(place.product(16, 16, "q"), "marked")
    assert not hasattr(place.product(16, 16, "k"), "marked")
    model = build(parse(ModelSettings, {"width": 16, "depth": 1, "vocabulary": 9, "linear": {"all": "dense"}}))
    assert sum(isinstance(module, Linear) for module in model.modules()) == 4 + 3 + 1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_experts_products_are_those_of_one_after_another(own: bool, bias: bool, agree: Any) -> None:
    """Values and gradients against a loop over rows; an expert that nobody chose gets a gradient of 0."""
    experts = ExpertLinear(6, 24, 17, role="up", bias=bias)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    chosen = torch.randint(0, 5, (2, 7, 3))
    x = torch.randn(*(chosen.shape if own else chosen.shape[:2]), 24, requires_grad=True)
    rows = []
    for row, picks in zip(x.reshape(14, -1, 24), chosen.view(14, 3).tolist(), strict=True):
        for place, pick in enumerate(picks):
            each = row[place if own else 0]
            rows.append(F.linear(each, experts.weight[pick], None if experts.bias is None else experts.bias[pick]))
    expected, found = torch.stack(rows).view(2, 7, 3, 17), experts(x, chosen)
    agree(found, expected)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((found * weights).sum(), [x, *experts.parameters()])
    theirs = torch.autograd.grad((expected * weights).sum(), [x, *experts.parameters()])
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b)
    assert bool((ours[1][5] == 0).all())
    low = experts(x.bfloat16(), chosen)
    assert low.dtype == torch.bfloat16
    agree(low.float(), expected, 0.02)
    assert experts(x[:0], chosen[:0]).shape == (0, 7, 3, 17)


def test_a_kind_of_product_that_experts_cannot_hold_says_so() -> None:
    class Other(LinearSettings):
        kind = "other"

    with pytest.raises(UnsupportedError, match="'other' products cannot be held by experts"):
        Place(16, linear={"q": Other()}).experts(4, 16, 16, "q")


def test_low_rank_at_full_rank_is_any_dense_product(agree: Any) -> None:
    """From the singular value decomposition; at less, the error is that of the values left out."""
    dense, x = product(24, 17), torch.randn(5, 24)
    whole = LowRankSettings(rank=17).build(24, 17, role="q", bias=True, depth=1)
    whole.resemble(dense.weight, dense.bias)
    agree(whole(x), dense(x))
    part = LowRankSettings(rank=5).build(24, 17, role="q", bias=False, depth=1)
    part.resemble(dense.weight)
    values = torch.linalg.svdvals(dense.weight.detach())
    left = (dense.weight - part.widen.weight @ part.narrow.weight).detach().norm()
    assert float(left) == pytest.approx(float(values[5:].norm()), rel=1e-4)


@pytest.mark.parametrize("shape", [(512, 512), (512, 256), (512, 1408), (24, 17)])
@pytest.mark.parametrize("ratio", [1.0, 2.64, 5.0])
def test_the_rank_is_the_largest_that_the_ratio_allows(shape: tuple[int, int], ratio: float) -> None:
    inputs, outputs = shape
    made = LowRankSettings(ratio=ratio).build(inputs, outputs, role="q", bias=False, depth=1)
    count = sum(p.numel() for p in made.parameters())
    assert count == made.rank * (inputs + outputs)
    assert inputs * outputs / count >= ratio > inputs * outputs / (count + inputs + outputs)


def test_low_rank_products_start_with_the_variance_of_dense_ones() -> None:
    x = torch.randn(4096, 256, generator=torch.Generator().manual_seed(0))
    for role, depth, expected in (("q", 8, 1.0), ("down", 2, 0.5)):
        made = LowRankSettings().build(256, 128, role=role, bias=True, depth=depth)
        generator = torch.Generator().manual_seed(1)
        for part in made.children():
            part.reset(generator)
        assert float(made(x).detach().std()) == pytest.approx(expected, rel=0.05)


def test_a_recipe_makes_every_product_of_low_rank_but_head_and_routers() -> None:
    """Parameters and FLOPs are those that were counted, with an encoder and a memory too."""
    block = {"mixer": {"kind": "attention", "heads": 2}, "channel": "gated"}
    model = {"width": 32, "depth": 2, "vocabulary": 50, "block": block, "linear": {"all": {"kind": "low_rank"}}}
    pair = {"form": "encoder_decoder", "block": block | {"cross": block["mixer"]}, "encoder": {"block": block}}
    for settings in (parse(ModelSettings, model), parse(ModelSettings, model | pair)):
        network = build(settings)
        kinds = {name.rpartition(".")[2] for name, part in network.named_modules() if isinstance(part, LowRank)}
        assert kinds == {"q", "k", "v", "o", "gate", "up", "down"}
        assert type(network.head.product) is Linear
        ids = torch.randint(0, 50, (1, 12))
        given = {"source": ids} if settings.encoder is not None else {}
        counted = count(lambda network=network, ids=ids, given=given: network(ids, **given))
        assert settings.cost(settings.place(), 12).flops == pytest.approx(counted, rel=0.01)
    chosen = Place(16, linear={"all": LowRankSettings(), "down": DenseSettings()})
    assert type(chosen.product(16, 64, "up")) is LowRank
    assert type(chosen.product(64, 16, "down")) is type(chosen.product(16, 4, "router")) is Linear


def test_what_cannot_be_of_low_rank_says_why() -> None:
    with pytest.raises(UnsupportedError, match="has no rank of 20"):
        LowRankSettings(rank=20).build(24, 17, role="q", bias=False, depth=1)
    with pytest.raises(UnsupportedError, match="head cannot be of low rank"):
        Place(16, linear={"head": LowRankSettings()}).product(16, 50, "head")
    with pytest.raises(UnsupportedError, match="'low_rank' products cannot be held by experts"):
        Place(16, linear={"all": LowRankSettings()}).experts(4, 16, 16, "q")


@pytest.mark.parametrize("registry", [mixers, channels], ids=lambda registry: registry.role)
def test_only_what_writes_to_the_residual_stream_starts_smaller(registry: Any) -> None:
    """By definition: such a product has as many outputs as the stream has features, here a number of no other."""
    for name, settings in dict(registry).items():
        for example in settings.examples():
            place = Place(**{"width": 48, "length": 64, **example.place})
            with torch.device("meta"):
                made = example.settings.build(place)
            for path, part in made.named_modules():
                if isinstance(part, (Linear, ExpertLinear)) and part.role in OUTPUT_ROLES:
                    assert part.outputs == 48, f"{name} ({example.name}): {path} has the role {part.role}"
