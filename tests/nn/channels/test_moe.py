"""Sparse mixture of experts against transformers' Mixtral, Qwen2-MoE and DeepSeek-V3 blocks, and loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.channels.moe import MixtureSettings, MoE
from armillary.nn.context import Context
from armillary.nn.cost import count
from armillary.nn.mask import Causal
from armillary.nn.mechanism import ChannelSettings, Place
from armillary.nn.ops.routing import within_capacity
from armillary.nn.taps import Taps
from armillary.nn.training import Training

D, H, E = 16, 12, 5


def built(width: int = D, **settings: Any) -> MoE:
    made = MixtureSettings(**{"experts": E, "hidden": H, **settings}).build(Place(width, path="m"))
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    return made


def slopes(y: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad((y * weights).sum(), wanted))


def names(gate: Tensor, gate_up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """Our names of a block's tensors, as `transformers` holds them (or their gradients)."""
    into = gate_up.chunk(2, 1)
    return {
        "router.weight": gate,
        "experts.gate.weight": into[0],
        "experts.up.weight": into[1],
        "experts.down.weight": down,
    }


def compare(ours: MoE, theirs: nn.Module, more: dict[str, Tensor], agree: Any, load: Any) -> None:
    """Outputs and gradients; more: our name → their parameter beside those of the experts."""
    experts = theirs.experts
    core = [theirs.gate.weight, experts.gate_up_proj, experts.down_proj]
    load(ours, names(*core) | more)
    x = torch.randn(2, 19, D, generator=torch.Generator().manual_seed(2), requires_grad=True)
    found, expected = ours(x, Context()), theirs(x)
    agree(found, expected)
    other = slopes(expected, [x, *core, *more.values()])
    table = names(*other[1:4]) | dict(zip(more, other[4:], strict=True))
    own = dict(ours.named_parameters())
    mine = slopes(found, [x, *own.values()])
    for a, b in zip(mine, [other[0], *(table[name] for name in own)], strict=True):
        agree(a, b, 1e-4)


def test_it_is_mixtrals(agree: Any, load: Any, shake: Any) -> None:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=D, intermediate_size=H, num_local_experts=E, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    theirs = MixtralSparseMoeBlock(config)
    shake(theirs)
    compare(built(), theirs, {}, agree, load)


@pytest.mark.parametrize("normalise", [False, True])
def test_with_a_shared_expert_it_is_qwens(normalise: bool, agree: Any, load: Any, shake: Any) -> None:
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    config = Qwen2MoeConfig(
        hidden_size=D,
        moe_intermediate_size=H,
        shared_expert_intermediate_size=20,
        num_experts=E,
        num_experts_per_tok=3,
        norm_topk_prob=normalise,
    )
    config._experts_implementation = "eager"
    theirs = Qwen2MoeSparseMoeBlock(config)
    shake(theirs)
    always = theirs.shared_expert
    more = {f"shared.{name}.weight": getattr(always, f"{name}_proj").weight for name in ("gate", "up", "down")}
    more["shared_gate.weight"] = theirs.shared_expert_gate.weight
    compare(built(top=3, normalise=normalise, shared=20, shared_gate=True), theirs, more, agree, load)


def test_with_sigmoids_and_a_correction_it_is_deepseeks(agree: Any, load: Any, shake: Any) -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=D,
        moe_intermediate_size=H,
        n_routed_experts=6,
        n_shared_experts=1,
        num_experts_per_tok=3,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.7,
    )
    config._experts_implementation = "eager"
    theirs = DeepseekV3MoE(config)
    shake(theirs)
    ours = built(experts=6, top=3, scores="sigmoid", scale=1.7, shared=H, bias_rate=0.01)
    assert ours.correction is not None
    for buffer in (theirs.gate.e_score_correction_bias, ours.correction):
        buffer.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0, 0.2, -0.4]))
    always = theirs.shared_experts
    more = {f"shared.{name}.weight": getattr(always, f"{name}_proj").weight for name in ("gate", "up", "down")}
    compare(ours, theirs, more, agree, load)


def test_the_balance_loss_is_mixtrals(agree: Any) -> None:
    """Theirs counts a token's picks, ours are shares of them: k times less. z: the mean squared log-sum."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    ours = built(balance_weight=0.3, z_weight=0.2)
    x = torch.randn(2, 6, D)
    padding = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    plain = slopes(ours(x, Context(padding=padding)), [ours.router.weight])[0]
    ctx = Context(padding=padding, training=Training.of(1, 0.5))
    found = slopes(ours(x, ctx), [ours.router.weight])[0]
    scores = x @ ours.router.weight.t()
    loss = 0.3 / 2 * load_balancing_loss_func((scores.flatten(0, 1),), E, 2, padding)
    loss = loss + 0.2 * scores[padding].logsumexp(-1).square().mean()
    (expected,) = torch.autograd.grad(0.5 * loss, ours.router.weight)
    agree(found - plain, expected, 1e-3)


@pytest.mark.parametrize("gated", [False, True])
def test_biased_experts_are_their_formula(gated: bool, agree: Any) -> None:
    ours = built(gated=gated, bias=True, activation="relu", normalise=False)
    x = torch.randn(1, 7, D)
    experts, scores = ours.experts, torch.softmax(x @ ours.router.weight.t(), -1)
    expected = torch.zeros_like(x)
    for t in range(7):
        for e in scores[0, t].topk(2).indices.tolist():
            into = experts.up.weight[e] @ x[0, t] + experts.up.bias[e]
            if gated:
                into = into * (experts.gate.weight[e] @ x[0, t] + experts.gate.bias[e]).relu()
            hidden = into if gated else into.relu()
            expected[0, t] += scores[0, t, e] * (experts.down.weight[e] @ hidden + experts.down.bias[e])
    agree(ours(x, Context()), expected)


# -- load and capacity


@pytest.mark.parametrize("packed", [False, True])
def test_capacity_goes_by_position_within_a_document(packed: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    experts = torch.rand(2, 13, 4, generator=generator).topk(2).indices
    documents = torch.tensor([[7] * 5 + [3] * 8, [1] * 12 + [2]]) if packed else torch.zeros(2, 13).long()
    real = torch.rand(2, 13, generator=generator) > 0.2
    expected = torch.zeros_like(experts, dtype=torch.bool)
    for b in range(2):
        for document in documents[b].unique().tolist():
            inside = [t for t in range(13) if documents[b, t] == document and real[b, t]]
            taken = [0] * 4
            for t in inside:
                for j, e in enumerate(experts[b, t].tolist()):
                    expected[b, t, j] = taken[e] < math.ceil(0.7 * 2 * len(inside) / 4)
                    taken[e] += 1
    assert torch.equal(within_capacity(experts, 4, 0.7, documents if packed else None, real), expected)
    assert 0 < int(expected.sum()) < int(real.sum()) * 2


def test_dropped_picks_add_nothing_and_are_reported(agree: Any) -> None:
    """In updates only; a chunk is never dropped from; a later token takes no earlier one's room."""
    ours, free = built(capacity=0.5), built()
    x = torch.randn(2, 12, D)
    update = Context(training=Training.of(1), taps=Taps(["m.dropped", "m.router"]))
    y = ours(x, update)
    dropped, gates = update.taps.seen["m.dropped"], update.taps.seen["m.router"]  # type: ignore[union-attr]
    assert 0 < int(dropped.sum()) < dropped.numel()
    parts = torch.stack([_expert(ours, e)(x) for e in range(E)], 2)  # [B, T, E, D]
    experts = gates.topk(2).indices
    kept = torch.zeros_like(gates).scatter(-1, experts, (~dropped).float())
    agree(y, ((gates * kept)[..., None] * parts).sum(2))
    ours.after_step(1, 10)
    seen = ours.observe()
    assert seen["dropped_picks"] == pytest.approx(float(dropped.float().mean()))
    agree(ours(x, Context()), free(x, Context()))
    agree(ours.extend(x, None, Context()), free(x, Context()))
    assert not ours.capabilities.chunking and free.capabilities.chunking
    later = torch.cat([x[:, :9], torch.randn(2, 3, D)], 1)
    agree(ours(later, Context(training=Training.of(1)))[:, :9], y[:, :9])


@pytest.mark.parametrize("packed", [False, True])
def test_padding_takes_no_place(packed: bool, agree: Any) -> None:
    """By definition: real tokens get what they get without padding, whatever it holds and however much there is."""
    ours = built(capacity=0.5)
    x = torch.randn(1, 9, D)
    documents = torch.tensor([[1] * 4 + [2] * 5])
    told = {"training": Training.of(1)}
    alone = ours(x, Context(documents=documents if packed else None, **told))
    free = built()(x, Context(**told))
    assert not torch.allclose(alone, free), "nothing was dropped"
    for before, after in ((0, 1), (3, 0), (5, 21)):
        for scale in (0.0, 1.0, 100.0):
            padded = torch.cat([scale * torch.randn(1, before, D), x, scale * torch.randn(1, after, D)], 1)
            real = torch.tensor([[False] * before + [True] * 9 + [False] * after])
            owners = torch.cat([torch.ones(1, before), documents, torch.full((1, after), 2)], 1).long()
            y = ours(padded, Context(padding=real, documents=owners if packed else None, **told))
            agree(y[real], alone[0])
            assert bool((y[~real] == 0).all()), "padding took a place"


def test_a_capacity_refuses_an_objectives_mask() -> None:
    x = torch.randn(1, 4, D)
    with pytest.raises(UnsupportedError, match="'moe' with a capacity cannot take a mask"):
        built(capacity=1.0)(x, Context(mask=Causal()))
    assert torch.equal(built()(x, Context(mask=Causal())), built()(x, Context())), "tokens do not meet without one"


def _expert(channel: MoE, e: int) -> Any:
    gate, up, down = (product.weight[e] for product in (channel.experts.gate, channel.experts.up, channel.experts.down))
    return lambda x: (nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()


def test_the_load_of_updates_is_observed_and_moves_the_correction() -> None:
    """Every expert's correction moves by the rate towards an even load (Wang et al. 2024)."""
    ours = built(bias_rate=0.25, scores="sigmoid")
    assert ours.correction is not None
    x, taps = torch.randn(2, 9, D), Taps(["m.router"])
    padding = torch.tensor([[True] * 9, [True] * 3 + [False] * 6])
    ours(x, Context(padding=padding))
    ours.after_step(0, 10)
    assert ours.observe() == {}, "only updates are counted"
    ours(x, Context(padding=padding, training=Training.of(1), taps=taps))
    picks = (taps.seen["m.router"][padding] > 0).sum(0).float()
    ours.after_step(1, 10)
    assert torch.equal(ours.correction, 0.25 * torch.sign(picks.mean() - picks))
    assert ours.observe() == {"expert_load": pytest.approx(float(picks.max() / picks.mean()))}


def test_a_correction_alone_balances_experts() -> None:
    ours = built(balance_weight=0.0, z_weight=0.0, bias_rate=0.005)
    x = torch.randn(8, 64, D) + 0.5
    loads = []
    for step in range(80):
        with torch.no_grad():
            ours(x, Context(training=Training.of(step)))
        ours.after_step(step, 80)
        loads.append(ours.observe()["expert_load"])
    assert loads[0] > 1.5 and max(loads[-5:]) < 1.15


def test_an_expert_that_nobody_picks_costs_nothing_and_gets_no_gradient() -> None:
    ours = built()
    with torch.no_grad():
        ours.router.weight[2] = -100 * torch.ones(D)
    x = torch.rand(2, 5, D)
    ours(x, Context()).sum().backward()
    for product in (ours.experts.gate, ours.experts.up, ours.experts.down):
        assert product.weight.grad is not None
        assert bool((product.weight.grad[2] == 0).all()) and bool((product.weight.grad != 0).any())


@pytest.mark.parametrize("more", [{}, {"gated": False, "bias": True}])
def test_few_picks_read_their_weights_once_and_give_the_same(more: dict[str, Any]) -> None:
    ours = built(**more)
    x = torch.randn(2, 1, D)
    with torch.no_grad():
        quick = ours(x, Context())
        sorted_ = ours(x, Context(padding=torch.ones(2, 1, dtype=torch.bool)))
        assert torch.equal(quick, sorted_)
        assert torch.equal(ours(x, Context(taps=Taps(["*"]))), quick)
        torch.testing.assert_close(ours(x.bfloat16(), Context()).float(), quick, rtol=0.1, atol=0.1)
    torch.testing.assert_close(ours(x, Context()), quick)


def test_cost_follows_the_picks() -> None:
    """Sixteen times the experts cost a wider router and nothing else."""
    x = torch.randn(1, 12, D)
    few, many = (count(lambda e=e: built(experts=e)(x, Context())) for e in (4, 64))
    assert many - few == 12 * 60 * (2 * D + 5)
    for more in ({}, {"gated": False, "bias": True, "shared": 8, "shared_gate": True}):
        settings = MixtureSettings(experts=6, hidden=H, **more)
        made = settings.build(Place(D))
        alone = sum(p[0].numel() for name, p in made.named_parameters() if name.startswith("experts."))
        rest = sum(p.numel() for name, p in made.named_parameters() if not name.startswith("experts."))
        assert settings.active(rest + 6 * alone, D) == rest + 2 * alone


def test_a_token_picks_the_same_in_any_company() -> None:
    ours = built(width=64, experts=16)
    x = torch.randn(400, 1, 64)
    together = ours.scores(x, Context())
    for start, stop in ((0, 1), (1, 3), (3, 20), (20, 400)):
        assert torch.equal(ours.scores(x[start:stop], Context()), together[start:stop])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"experts": 2, "top": 3}, "must be at most experts"),
        ({"experts": 0}, "experts"),
        ({"top": 0}, "top"),
        ({"top": 1}, "set normalise: false"),
        ({"shared_gate": True}, "set shared"),
        ({"capacity": 0}, "capacity"),
    ],
)
def test_what_cannot_be_built_says_why(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        parse(ChannelSettings, {"kind": "moe", **settings})


def test_a_row_of_padding_alone_is_finite() -> None:
    padding = torch.tensor([[True] * 4, [False] * 4])
    ours = built(capacity=1.0)
    x = torch.randn(2, 4, D, requires_grad=True)
    y = ours(x, Context(padding=padding, training=Training.of(1)))
    assert bool((y[1] == 0).all()) and bool(y.isfinite().all())
    assert bool(torch.autograd.grad(y.sum(), x)[0].isfinite().all())
