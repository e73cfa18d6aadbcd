"""Scaling with width and depth: coordinate checks as in Yang et al. 2022, and the kernel's parts over widths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from armillary.base.errors import SettingsError
from armillary.base.settings import parse
from armillary.nn.mechanism import mixers
from armillary.nn.network import ModelSettings, Network, build
from armillary.nn.taps import Taps
from armillary.recipe.training import OptimiserSettings, TrainingSettings
from armillary.train import Trainer
from armillary.train.optimiser import parameter_groups

WIDTHS = (64, 128, 256, 512)
DEPTHS = (2, 4, 8, 16)
BLOCK = {"mixer": {"kind": "attention", "heads": 4, "position": "rope"}, "channel": {"kind": "gated"}}


def made(width: int = 64, depth: int = 2, *, seed: int = 0, tied: bool = False, **changes: Any) -> Network:
    data = {
        "width": width,
        "depth": depth,
        "vocabulary": 64,
        "context": 32,
        "block": BLOCK,
        "head": {"kind": "language_model", "tied": tied},
    }
    return build(parse(ModelSettings, data | changes), seed=seed)


def slope(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Of log value against log size."""
    x, y = torch.tensor([float(size) for size in sizes]).log(), torch.tensor(values).log()
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def moved(network: Network, seed: int, steps: int = 3) -> dict[str, float]:
    """By how much activations have changed after a few updates, on average; the logits' product starts at 0."""
    torch.nn.init.zeros_(network.head.product.weight)
    training = {
        "context": 16,
        "batch": 4,
        "precision": "float32",
        "compile": "no",
        "optimiser": {"learning_rate": 5e-3},
        "schedule": {"kind": "constant", "warmup": 0},
    }
    trainer = Trainer(network, parse(TrainingSettings, training), seed=seed)
    ids = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(seed))
    last = f"blocks.{network.settings.depth - 1}"
    seen = []
    for step in range(steps + 1):
        if step in (0, steps):
            taps = Taps(["*.residual.post", "logits"])
            with torch.no_grad():
                network(ids[:, :-1], taps=taps)
            seen.append({name.replace(last, "last"): taps.seen[name].clone() for name in taps.seen})
        trainer.step(ids)
    return {name: float((seen[1][name] - seen[0][name]).abs().mean()) for name in seen[0]}


def slopes(axis: str, sizes: Sequence[int], scaling: dict[str, Any] | None) -> dict[str, float]:
    """Of every watched place that all sizes have."""
    found: dict[str, list[float]] = {}
    for size in sizes:
        for name, value in moved(made(**{axis: size}, scaling=scaling), 0).items():
            found.setdefault(name, []).append(value)
    return {name: slope(sizes, values) for name, values in found.items() if len(values) == len(sizes)}


def test_activations_move_alike_at_all_widths() -> None:
    """The coordinate check: no slope with the scaling, steep ones without."""
    found = slopes("width", WIDTHS, {"width": 64})
    assert {"blocks.0.residual.post", "last.residual.post", "logits"} == set(found)
    for name, value in found.items():
        assert abs(value) < 0.1, f"{name} grows as width^{value:.2f}"
    without = slopes("width", WIDTHS[:3], None)
    assert without["last.residual.post"] > 0.4 and without["logits"] > 0.4


def test_the_stream_moves_alike_at_all_depths() -> None:
    found = slopes("depth", DEPTHS, {"width": 64, "depth": 2})
    assert abs(found["last.residual.post"]) < 0.15 and abs(found["logits"]) < 0.15
    assert slopes("depth", DEPTHS[:3], None)["last.residual.post"] > 0.3


def test_every_group_keeps_its_part_of_the_kernel() -> None:
    """Of a sign-like step a group adds Σ rate · |slope| to an output; that sum must not depend on the width."""
    parts: dict[str, list[float]] = {}
    ids = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(2))
    for width in (128, 512):
        network = made(width, scaling={"rule": "kernel", "width": 64})
        sums: dict[str, float] = {}
        for output in network(ids)[:, -1, 5]:
            grads = torch.autograd.grad(output, list(network.parameters()), retain_graph=True)
            for (name, _), grad in zip(network.named_parameters(), grads, strict=True):
                kind = "gain" if grad.dim() == 1 else "matrix" if name.startswith("blocks") else name.split(".")[0]
                sums[kind] = sums.get(kind, 0.0) + network.rates[name] * float(grad.abs().sum())
        for kind, value in sums.items():
            parts.setdefault(kind, []).append(value)
    assert set(parts) == {"matrix", "gain", "embed", "head"}
    for kind, values in parts.items():
        assert max(values) / min(values) < 1.1, f"{kind}: {values}"


@pytest.mark.parametrize("tied", [True, False])
def test_at_the_base_sizes_nothing_changes(tied: bool) -> None:
    scaled, bare = made(tied=tied, scaling={"width": 64, "depth": 2}), made(tied=tied)
    ids = torch.randint(64, (2, 9))
    assert torch.equal(scaled(ids), bare(ids))
    assert set(scaled.rates.values()) == {1.0} and bare.rates == {}


def test_what_scales_and_how() -> None:
    """The table of the paper (Adam), at four times the base width and twice the base depth."""
    network = made(256, 4, tied=True, scaling={"width": 64, "depth": 2})
    rates, mixer = network.rates, network.blocks.get_submodule("0.mixer.inner")
    assert rates["embed.weight"] == 1 and rates["norm.weight"] == 1
    assert rates["blocks.0.mixer.norm.weight"] == pytest.approx(2**-0.5)
    assert rates["blocks.1.mixer.inner.q.weight"] == pytest.approx(2**-0.5 / 4)
    inputs = made(64).blocks.get_submodule("1.channel.inner.down").inputs  # hidden features are rounded
    grown = network.blocks.get_submodule("1.channel.inner.down").inputs / inputs
    assert rates["blocks.1.channel.inner.down.weight"] == pytest.approx(0.5 / grown)
    assert mixer.scale == pytest.approx(16**-0.5 * 16 / 64)  # 1/√K at the base, and from there 1/K
    assert network.head.scale == 1 / 4
    assert float(network.embed.weight.detach().std()) == pytest.approx(
        1 / 8, rel=0.02
    )  # as at the base: tied tables score
    # from the width to a fixed size: heads of a predicted mask
    block = {"mixer": {"kind": "attention_rnn", "hidden": 8}}
    local = made(256, block=block, scaling={"width": 64}).blocks.get_submodule("0.mixer.inner.ahead.local")
    assert float(local.weight.detach().std()) == pytest.approx(256**-0.5 / 2, rel=0.1)


def test_the_optimiser_learns_at_the_rates_and_decays_as_before() -> None:
    network = made(256, scaling={"width": 64})
    groups = parameter_groups(network, OptimiserSettings(weight_decay=0.1), {"embed.*": 0.5})
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in network.named_parameters())
    for group in groups:
        for name in group["names"]:
            assert group["scale"] == network.rates[name] * (0.5 if name == "embed.weight" else 1.0)
            if group["weight_decay"]:  # the decay of an update is rate · decay
                assert group["weight_decay"] * network.rates[name] == pytest.approx(0.1)


# Their scores are not only products of heads over √K, but of hashes, codewords, moments, sketches or pools.
UNSAID = {"additive", "lada", "lhc", "lisa", "lln", "lsh", "lsh_local", "lsh_published", "smart_bird"}
# No score grows with the width: a norm follows, features are of a fixed number, or there are no scores.
STEADY = {
    "attention_rnn", "choice", "cot", "efficient", "fixed", "gated_conv", "gated_delta", "gla", "gru", "linear", "lstm",
    "mamba", "mamba2", "ngram", "retention", "rnn", "self_positioning", "taylor",
}  # fmt: skip


@pytest.mark.parametrize("kind", mixers.names())
def test_a_mixer_says_by_what_its_scores_grow_or_is_refused_by_name(kind: str) -> None:
    """1/√K at the base, from there 1/K; and what is set is what acts."""
    example = mixers.get(kind).examples()[0]
    order = example.place.get("order", "causal")

    def network(width: int, scaling: dict[str, Any] | None = None) -> Network:
        form = {"causal": "decoder", "bidirectional": "encoder", "prefix": "prefix"}[order]
        block = {"mixer": example.settings, "channel": "ffn"}
        return made(width, 1, form=form, block=block, scaling=scaling)

    if kind in UNSAID:
        with pytest.raises(SettingsError, match=f"'{kind}' .*does not say how its scores grow"):
            network(64, {"width": 32})
        network(64, {"width": 32, "rule": "kernel"})
        return
    scaled, bare, base = network(64, {"width": 32}), network(64), network(32)
    assert (next(iter(scaled.mixers())).scaled == ()) == (kind in STEADY)
    for after, before, first in zip(scaled.mixers(), bare.mixers(), base.mixers(), strict=True):
        assert after.scaled is not None
        for name in after.scaled:
            then = getattr(before, name)
            assert getattr(after, name) == pytest.approx(then * then / getattr(first, name))
            ids = torch.arange(16)[None]
            side = scaled.blank_side(1, 16) | (example.side(1, 16) if example.side is not None else {})
            y = scaled.hidden(ids, side=side)
            setattr(after, name, 3 * getattr(after, name))
            assert not torch.equal(scaled.hidden(ids, side=side), y), f"{name} multiplies nothing"


def test_what_cannot_be_scaled_says_why() -> None:
    with pytest.raises(SettingsError, match="base width 30 cannot be built: a width of 30 does not divide into 4"):
        made(scaling={"width": 30})
    with pytest.raises(SettingsError, match="says nothing of depth"):
        made(scaling={"rule": "kernel", "depth": 2})
