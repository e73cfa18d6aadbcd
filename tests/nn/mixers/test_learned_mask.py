"""Learned masks against dense attention under the thresholded mask, the relaxed form as loops, and in training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary.base.errors import InputError, SettingsError
from armillary.nn.context import Context
from armillary.nn.mechanism import Place, initialise
from armillary.nn.mixers.attention import AttentionSettings
from armillary.nn.mixers.learned_mask import LearnedMask, LearnedMaskSettings
from armillary.nn.network import ModelSettings, build
from armillary.nn.training import Training, uniform

T, WIDTH = 12, 16


def made(order: str = "causal", length: int = T, **settings: Any) -> LearnedMask:
    chosen = LearnedMaskSettings(**{"heads": 2, **settings})
    mixer = chosen.build(Place(WIDTH, order=order, length=length, path="here"))
    initialise(mixer, 1)
    generator = torch.Generator().manual_seed(3)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return mixer


def entries(table: Tensor, order: str) -> Tensor:
    """[H, T, T] from the logits of distances or of pairs, a token itself always open, by loops."""
    found = torch.zeros(2, T, T)
    for h in range(2):
        for i in range(T):
            for j in range(T):
                ahead = order == "causal" and j > i
                value = table[h, abs(i - j)] if table.dim() == 2 else table[h, i, j]
                found[h, i, j] = 0.0 if ahead else 1.0 if i == j else float(value)
    return found


def attention(mixer: LearnedMask, x: Tensor, added: Tensor) -> Tensor:
    q, k, v = (product(x).unflatten(-1, (2, 8)).transpose(1, 2) for product in (mixer.q, mixer.k, mixer.v))
    return mixer.o((torch.softmax(q @ k.transpose(2, 3) / math.sqrt(8) + added, -1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
@pytest.mark.parametrize("structured", [True, False])
def test_outside_updates_it_is_attention_under_the_threshold(structured: bool, order: str, agree: Any) -> None:
    mixer, x = made(order, structured=structured), torch.randn(2, T, WIDTH)
    open_ = entries((mixer.gate.logits > 0).float(), order)
    with torch.no_grad():
        agree(mixer(x, Context()), attention(mixer, x, torch.where(open_ > 0, 0.0, -torch.inf)), 2e-5)
        assert torch.equal(mixer.sight(x[:1], Context())[0] > 0, open_ > 0)


@pytest.mark.parametrize("straight", [True, False])
@pytest.mark.parametrize("structured", [True, False])
def test_in_an_update_scores_lose_what_is_not_drawn(structured: bool, straight: bool, agree: Any) -> None:
    mixer = made(structured=structured, straight_through=straight, closing=30.0, temperature=0.7)
    x, training = torch.randn(2, T, WIDTH), Training.of(5)
    noise = uniform(Context(training=training), "here", "mask", mixer.gate.logits.shape, x)
    assert noise is not None
    with torch.no_grad():
        drawn = 1 / (1 + torch.exp(-(mixer.gate.logits + torch.log(noise / (1 - noise))) / 0.7))
        mask = entries((drawn > 0.5).float() if straight else drawn, "causal")
        later = torch.ones(T, T, dtype=torch.bool).triu(1)
        expected = attention(mixer, x, (-30.0 * (1 - mask)).masked_fill(later, -torch.inf))
        agree(mixer(x, Context(training=training)), expected, 2e-5)


def test_draws_are_open_as_often_as_the_logits_say() -> None:
    """Open with chance σ(α): the expected ‖M‖₁ is Σ σ(α), and λ times it is what the loss gains."""
    mixer = made(penalty=0.25)
    logits = mixer.gate.logits
    opened = torch.stack([mixer.gate.drawn(torch.rand(logits.shape), 1.0) > 0.5 for _ in range(4000)]).float().mean(0)
    chance = torch.sigmoid(logits)
    assert (opened - chance).abs().max().item() < 4 * 0.5 / 4000**0.5
    assert mixer.gate.expected().item() == pytest.approx(chance[:, 1:].sum().item(), rel=1e-5)
    y = mixer(torch.zeros(1, T, WIDTH), Context(training=Training.of(0)))
    (slope,) = torch.autograd.grad((0 * y).sum(), logits)
    expected = 0.25 * chance * (1 - chance)
    expected[:, 0] = 0
    torch.testing.assert_close(slope, expected)


def test_an_open_mask_is_plain_attention(agree: Any) -> None:
    mixer, dense = made(), AttentionSettings(heads=2).build(Place(WIDTH))
    nn.init.constant_(mixer.gate.logits, 50.0)
    dense.load_state_dict({name: value for name, value in mixer.state_dict().items() if "gate" not in name})
    x = torch.randn(2, T, WIDTH)
    for training in (None, Training.of(1)):
        agree(mixer(x, Context(training=training)), dense(x, Context()), 2e-5)


def test_without_the_diagonal_a_token_does_not_count_for_itself() -> None:
    mixer = made("bidirectional", diagonal=False)
    x = torch.randn(1, T, WIDTH)
    values = mixer.values(x, Context()).detach().requires_grad_()
    for training in (None, Training.of(2)):
        y = mixer.mix(mixer.freeze(x, Context(training=training)), values)
        slope = torch.autograd.grad(y[0, 4].sum(), values)[0][0, 4]
        assert (slope == 0).all()


@pytest.mark.parametrize("order", ["causal", "bidirectional"])
@pytest.mark.parametrize("structured", [True, False])
def test_training_reaches_the_sparsity_and_finds_what_is_needed(structured: bool, order: str) -> None:
    """The task is to repeat the token before; four fifths of the entries close, not those at distance 1."""
    torch.manual_seed(0)
    mixer = LearnedMaskSettings(heads=2, structured=structured, sparsity=0.8).build(
        Place(WIDTH, order=order, length=T, path="here")
    )
    initialise(mixer, 1)
    with torch.no_grad():
        assert int(mixer.gate.open().sum()) == int(mixer.gate.learned().sum()) * 2, "before training all are open"
    optimiser, steps = torch.optim.Adam(mixer.parameters(), 0.02), 160
    for step in range(steps):
        x = torch.randn(8, T, WIDTH)
        y = mixer(x, Context(training=Training.of(step)))
        loss = (y[:, 1:] - x[:, :-1]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        mixer.gate.after_step(step, steps)
    with torch.no_grad():
        count = int(mixer.gate.learned().sum()) * 2
        assert int(mixer.gate.open().sum()) == count - round(0.8 * count)
        assert float(mixer.gate.expected()) == pytest.approx(count - round(0.8 * count), abs=0.1)
        kept = mixer.gate.open()
        if structured:
            assert kept[:, 1].any()
        else:
            near = kept.diagonal(-1, 1, 2).float().mean()
            assert float(near) > 2 * 0.2, "the pairs that the task needs are kept far more often than others"


def test_a_frozen_mask_stays() -> None:
    """After the search: the mask that was found, in updates too, without noise, penalty or gradient."""
    found = made(sparsity=0.5)
    found.gate.after_step(9, 10)
    fixed = LearnedMaskSettings(heads=2, sparsity=0.5, frozen=True).build(Place(WIDTH, length=T, path="here"))
    fixed.load_state_dict(found.state_dict())
    x = torch.randn(2, T, WIDTH)
    before = fixed.gate.open().clone()
    y = fixed(x, Context(training=Training.of(1)))
    assert torch.equal(y, fixed(x, Context())) and torch.equal(y, found(x, Context()))
    y.sum().backward()
    assert fixed.gate.logits.grad is None
    fixed.gate.after_step(9, 10)
    assert torch.equal(before, fixed.gate.open())


def test_all_layers_can_share_one_mask() -> None:
    settings = ModelSettings(
        width=WIDTH,
        depth=3,
        vocabulary=11,
        context=T,
        block={"mixer": {"kind": "learned_mask", "heads": 2, "sparsity": 0.5}, "channel": "gated"},
        share={"mask": ("blocks.*.mixer.inner.gate",)},
    )
    network = build(settings)
    gates = [block.mixer.inner.gate for block in network.blocks]
    assert gates[0].logits is gates[1].logits is gates[2].logits
    for gate in gates:
        gate.after_step(9, 10)
    assert all(torch.equal(gate.open(), gates[0].open()) for gate in gates)
    out = network(torch.randint(0, 11, (2, T)), training=Training.of(1))
    out.square().mean().backward()
    assert float(gates[0].logits.grad.abs().sum()) > 0


def test_beyond_the_mask() -> None:
    x = torch.randn(1, T + 3, WIDTH)
    with pytest.raises(InputError, match=f"position {T + 2} is beyond the {T} positions"):
        made(structured=False)(x, Context())
    mixer = made()
    nn.init.constant_(mixer.gate.logits, 1.0)
    with torch.no_grad():
        seen = mixer.sight(x, Context())[0, 0] > 0
    assert seen[T + 2, 3] and not seen[T + 2, 2], "distances that the mask does not have are closed"


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SettingsError, match="sparsity"):
        LearnedMaskSettings(sparsity=1.0)
    with pytest.raises(SettingsError, match="temperature"):
        LearnedMaskSettings(temperature=0.0)
