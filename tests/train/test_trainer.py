"""One update: means, accumulation, guards, clipping, and going on bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.base.errors import CheckpointError, InputError, SettingsError, TrainingError
from armillary.base.settings import parse
from armillary.data.batch import Batch
from armillary.nn.network import ModelSettings, Network, build
from armillary.objectives.base import Loss, Objective, Prepared, Vocabulary
from armillary.recipe.training import TrainingSettings
from armillary.train import Trainer

VOCABULARY = 31


def network(dropout: float = 0.0, seed: int = 1, **changes: Any) -> Network:
    settings = {
        "width": 16,
        "depth": 2,
        "vocabulary": VOCABULARY,
        "context": 16,
        "block": {"mixer": {"kind": "attention", "heads": 2}, "channel": "gated", "dropout": dropout},
    }
    return build(parse(ModelSettings, settings | changes), seed=seed)


def training(**changes: Any) -> TrainingSettings:
    plain = {"context": 12, "batch": 8, "steps": 20, "precision": "float32", "compile": "no"}
    return parse(TrainingSettings, plain | changes)


def batch(step: int = 0, rows: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCABULARY, (rows, 13), generator=generator)


def weights(net: Network) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def run(trainer: Trainer, steps: int) -> list[float]:
    return [trainer.step(batch(trainer.steps_done % 3)) for _ in range(steps)]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_it_learns() -> None:
    losses = run(Trainer(network(), training(optimiser={"learning_rate": 1e-2})), 20)
    assert losses[-1] < 0.8 * losses[0]


def test_the_loss_is_the_mean_over_targets_and_the_first_update_moves_by_the_rate() -> None:
    """Oracle: logits through PyTorch's own cross-entropy; AdamW's first step is sign-like, so no
    weight moves by more than the rate (plus decay)."""
    net = network()
    ids = batch()
    logits = net(ids[:, :-1]).detach()
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY).float(), ids[:, 1:].reshape(-1))
    before = weights(net)
    settings = training(schedule={"kind": "constant", "warmup": 0}, optimiser={"weight_decay": 0.0})
    trainer = Trainer(net, settings)
    assert trainer.step(ids) == pytest.approx(float(expected), rel=1e-6)
    moved = max(float((before[name] - p.detach()).abs().max()) for name, p in net.named_parameters())
    assert moved == pytest.approx(settings.optimiser.learning_rate, rel=1e-2)
    assert trainer.last is not None
    assert trainer.last.step == 1 and trainer.last.tokens == 96 and trainer.last.rate == 1e-3


def test_packed_documents_weigh_the_mean() -> None:
    ids, documents = batch(), torch.zeros(8, 13, dtype=torch.int64)
    documents[:, 6:] = 1
    net = network()
    hidden = net.hidden(ids[:, :-1], documents=documents[:, :-1])
    nll = net.token_nll(hidden, ids[:, 1:])
    kept = documents[:, 1:] == documents[:, :-1]
    loss = Trainer(net, training()).step(Batch(ids, documents))
    assert loss == pytest.approx(float(nll[kept].mean()), rel=1e-5)


def test_accumulation_equals_the_whole_batch() -> None:
    documents = torch.zeros(8, 13, dtype=torch.int64)
    documents[:5, 4:] = 1  # rows have different numbers of targets, so means of means would differ
    whole, parts = network(), network()
    one, many = Trainer(whole, training()), Trainer(parts, training(micro_batch=2))
    for step in range(3):
        assert one.step(Batch(batch(step), documents)) == pytest.approx(
            many.step(Batch(batch(step), documents)), rel=1e-6
        )
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


class Late(Objective):
    """Divides by something that only `loss` knows."""

    def prepare(self, batch: Batch, generator: torch.Generator) -> Prepared:
        ids, targets = batch.ids[:, :-1], batch.ids[:, 1:]
        return Prepared(ids, targets, torch.ones(targets.shape))

    def loss(self, network: Network, prepared: Prepared) -> Loss:
        found = super().loss(network, prepared)
        return Loss(found.sum, found.weight * 4, {"extra": found.weight * 8})


def test_an_objective_may_choose_its_divisor_late() -> None:
    usual, late = Trainer(network(), training()), Trainer(network(), training(micro_batch=4))
    late.objective = Late()
    loss = usual.step(batch())
    assert late.step(batch()) == pytest.approx(loss / 4, rel=1e-6)
    assert usual.last is not None and late.last is not None
    assert late.last.grad_norm == pytest.approx(usual.last.grad_norm / 4, rel=1e-4)
    assert late.last.metrics == {"extra": pytest.approx(2.0)}


def test_clipping_scales_the_gradient_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(network(), training(optimiser={"clip": 0.01}))
    seen: list[float] = []
    step = trainer.optimiser.step

    def spy() -> None:
        grads = [p.grad.double() for p in trainer.names.values() if p.grad is not None]
        seen.append(float(torch.stack([(g * g).sum() for g in grads]).sum().sqrt()))
        step()

    monkeypatch.setattr(trainer.optimiser, "step", spy)
    trainer.step(batch())
    assert trainer.last is not None and trainer.last.grad_norm > 0.1
    assert seen == [pytest.approx(0.01, rel=1e-4)]


def test_recomputed_blocks_give_the_same_weights() -> None:
    plain, again = network(dropout=0.2), network(dropout=0.2)
    one, other = Trainer(plain, training()), Trainer(again, training(recompute="blocks"))
    assert run(one, 3) == run(other, 3)
    assert_same(weights(plain), weights(again))


def test_the_rates_are_the_schedule_s() -> None:
    settings = training(schedule={"kind": "wsd", "warmup": 4, "decay": 5})
    trainer = Trainer(network(), settings)
    rates = []
    for _ in range(20):
        run(trainer, 1)
        assert trainer.last is not None
        rates.append(trainer.last.rate)
    assert rates == [settings.rate(step) for step in range(20)]
    with pytest.raises(TrainingError, match="all 20 steps"):
        run(trainer, 1)


def test_bf16_activations_keep_float32_masters() -> None:
    net = network()
    trainer = Trainer(net, training(precision="bf16"))
    run(trainer, 2)
    assert net.dtype == torch.bfloat16
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert all(held["exp_avg"].dtype == torch.float32 for held in trainer.optimiser.state.values())


def test_hooks_hear_of_every_step() -> None:
    net = network()
    heard: list[tuple[int, int]] = []
    net.get_submodule("blocks.1").after_step = lambda step, steps: heard.append((step, steps))
    run(Trainer(net, training()), 3)
    assert heard == [(1, 20), (2, 20), (3, 20)]


def test_the_caller_s_generator_is_untouched_and_noise_depends_on_seed_and_step() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first = Trainer(network(dropout=0.5), training(), seed=1).step(batch())
    assert torch.equal(torch.rand(2), expected)
    assert Trainer(network(dropout=0.5), training(), seed=1).step(batch()) == first
    assert Trainer(network(dropout=0.5), training(), seed=2).step(batch()) != first


@pytest.mark.parametrize("form", ["causal", "masked"])
def test_state_goes_on_bit_for_bit(form: str) -> None:
    changes = {"form": "encoder"} if form == "masked" else {}
    settings = training(objective=form)
    vocabulary = Vocabulary(VOCABULARY, mask=1, special=(0, 1))
    whole = network(dropout=0.1, **changes)
    one = Trainer(whole, settings, vocabulary=vocabulary, seed=4)
    expected = run(one, 8)
    first = Trainer(network(dropout=0.1, **changes), settings, vocabulary=vocabulary, seed=4)
    losses = run(first, 4)
    tensors, info = first.state()
    tensors, info = copy.deepcopy(tensors), copy.deepcopy(info)
    torch.rand(3)  # nothing hangs on the global generator
    other = network(dropout=0.1, seed=9, **changes)
    second = Trainer(other, settings, vocabulary=vocabulary, seed=4)
    second.load_state(tensors, info)
    assert losses + run(second, 4) == expected
    assert_same(weights(whole), weights(other))
    held, _ = one.state()
    again, _ = second.state()
    assert_same(held, again)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda t: t.pop("exp_avg.norm.weight"), "lacks 'exp_avg.norm.weight'"),
        (lambda t: t.update({"exp_avg.other": torch.zeros(1)}), "unknown 'exp_avg.other'"),
        (lambda t: t.update({"exp_avg.norm.weight": torch.zeros(3)}), r"shape \(3,\), not \(16,\)"),
        (lambda t: t.pop("weights.norm.weight"), "lack 'norm.weight'"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(spoil: Any, message: str) -> None:
    first = Trainer(network(), training())
    run(first, 2)
    tensors, info = first.state()
    tensors = dict(tensors)
    spoil(tensors)
    net = network(seed=7)
    before = weights(net)
    second = Trainer(net, training())
    with pytest.raises(CheckpointError, match=message):
        second.load_state(tensors, info)
    assert_same(before, weights(net))
    assert second.steps_done == 0


def test_a_loss_that_is_not_finite_stops_before_the_weights_move() -> None:
    net = network()
    trainer = Trainer(net, training())
    run(trainer, 2)
    with torch.no_grad():
        net.norm.weight[0] = float("nan")  # type: ignore[union-attr, operator]
    before = weights(net)
    moments, _ = copy.deepcopy(trainer.state(weights=False))
    with pytest.raises(TrainingError, match="step 3: the loss is not finite"):
        run(trainer, 1)
    after = weights(net)
    before["norm.weight"][0] = after["norm.weight"][0] = 0.0
    assert_same(before, after)
    assert_same(moments, trainer.state(weights=False)[0])
    assert trainer.steps_done == 2


def test_a_gradient_that_is_not_finite_is_left_out_when_asked() -> None:
    net, said = network(), []
    trainer = Trainer(net, training(guards={"nan": "skip"}), notice=said.append)
    net.embed.weight.register_hook(lambda grad: grad * float("inf"))
    before = weights(net)
    trainer.step(batch())
    assert trainer.last is not None and trainer.last.skipped == "the gradient is not finite"
    assert_same(before, weights(net))
    assert trainer.steps_done == 1 and said == ["step 1 is left out: the gradient is not finite"]
    with pytest.raises(TrainingError, match="20 updates in a row"):
        run(trainer, 19)


@pytest.mark.parametrize("mode", ["warn", "skip", "stop"])
def test_a_spike_is_told_left_out_or_ends_training(mode: str) -> None:
    net, said = network(), []
    settings = training(guards={"spike": 1.5, "on_spike": mode}, optimiser={"learning_rate": 1e-6})
    trainer = Trainer(net, settings, notice=said.append)
    run(trainer, 17)
    with torch.no_grad():
        net.embed.weight.mul_(20)
    before = weights(net)
    if mode == "stop":
        with pytest.raises(TrainingError, match="the loss rose to"):
            run(trainer, 1)
    else:
        run(trainer, 1)
        assert len(said) == 1 and "the loss rose to" in said[0]
    moved = any(not torch.equal(before[name], p) for name, p in net.named_parameters())
    assert moved == (mode == "warn")


def test_a_gradient_of_zero_is_told_once() -> None:
    net, said = network(), []
    trainer = Trainer(net, training(), notice=said.append)
    for parameter in net.parameters():
        parameter.register_hook(torch.zeros_like)
    run(trainer, 3)
    assert said == ["step 1: the gradient is exactly zero, so the model does not learn"]


@pytest.mark.parametrize(
    "ids, message",
    [
        (torch.zeros(2, 13), "int64"),
        (torch.zeros(13, dtype=torch.int64), "shape"),
        (torch.full((2, 13), VOCABULARY), "outside the vocabulary of 31"),
        (torch.full((2, 13), -1), "outside the vocabulary"),
        (torch.zeros(2, 1, dtype=torch.int64), "ask for nothing"),
    ],
)
def test_bad_batches_are_refused(ids: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Trainer(network(), training()).step(ids)


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(InputError, match="needs a model, found Linear"):
        Trainer(torch.nn.Linear(2, 2), training())
    with pytest.raises(SettingsError, match="needs an encoder"):
        Trainer(network(), training(objective="masked"))


def test_calls_of_an_update_share_its_loss_and_draw_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 rows in parts of 2: four calls whose shares add up to 1, each with noise of its own, the same again."""
    told: list[list[tuple[int, float]]] = []
    for _ in range(2):
        net, calls = network(), []
        usual = net.hidden

        def hidden(ids: Tensor, calls: list = calls, usual: Any = usual, **inputs: Any) -> Tensor:
            calls.append((int(inputs["training"].seed), float(inputs["training"].share)))
            return usual(ids, **inputs)

        monkeypatch.setattr(net, "hidden", hidden)
        Trainer(net, training(micro_batch=2)).step(batch())
        told.append(calls)
    assert told[0] == told[1]
    assert [share for _, share in told[0]] == pytest.approx([0.25] * 4)
    assert len({seed for seed, _ in told[0]}) == 4


# -- side tensors


def test_rows_bring_their_own_graphs() -> None:
    """Tied tokens are equal: a hidden one can be guessed by those who are told of the edges, and by nobody else."""
    generator = torch.Generator().manual_seed(4)
    settings = parse(
        ModelSettings,
        {
            "form": "encoder",
            "width": 24,
            "depth": 1,
            "vocabulary": 9,
            "block": {"mixer": {"kind": "focal_graph", "heads": 2, "focal": 2, "hops": 1}, "channel": "gated"},
        },
    )
    how = {"objective": {"kind": "masked", "replaced": 1.0, "random": 0.0}, "context": 12, "batch": 32, "steps": 41}
    how |= {"micro_batch": 16, "optimiser": {"learning_rate": 0.01}, "schedule": {"kind": "constant", "warmup": 0}}
    losses = {}
    for told, steps in ((True, 40), (False, 8)):
        trainer = Trainer(build(settings, seed=1), training(**how), vocabulary=Vocabulary(9, mask=8, special=(8,)))
        for _ in range(steps):
            pairs = torch.stack([torch.randperm(12, generator=generator) for _ in range(32)]).view(32, 6, 2)
            ids = torch.empty(32, 12, dtype=torch.int64)
            colours = torch.randint(8, (32, 6), generator=generator)
            ids.scatter_(1, pairs.flatten(1), colours.repeat_interleave(2, 1))
            edges = pairs if told else torch.full_like(pairs, -1)
            losses[told] = trainer.step(Batch(ids, side={"edges": edges}))
    assert losses[True] < 1.0 < 1.8 < losses[False]
    with pytest.raises(InputError, match="the side tensor 'edges' has shape"):
        trainer.step(Batch(ids, side={"edges": edges[:3]}))
