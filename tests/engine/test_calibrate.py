"""What is chosen from measured times: expected choices are read off the times that are given in their place."""

import time
from collections.abc import Callable

import pytest
import torch

from armillary.engine import calibrate, replay
from armillary.engine.slots import Slots
from armillary.nn.network import ModelSettings, Network, build
from armillary.nn.tape import Tape

WEIGHT = torch.ones(8, 8)


def network() -> Network:
    """With weights that bf16 holds exactly."""
    block = {"mixer": {"kind": "attention", "heads": 2}, "channel": {"kind": "gated", "hidden": 32}}
    made = build(ModelSettings(width=32, depth=1, vocabulary=64, context=64, block=block), seed=0)
    return made.to(torch.bfloat16).to(torch.float32)


def as_they_are(monkeypatch: pytest.MonkeyPatch, product: Callable[..., float]) -> None:
    """What a product would take, in place of the product and of its time."""
    monkeypatch.setattr(calibrate, "_product", product)
    monkeypatch.setattr(calibrate, "best", dict)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({4: 1.0, 2: 1.0, 1: 1.0}, 4),  # fewer must be clearly quicker
        ({4: 1.0, 2: 0.97, 1: 2.0}, 4),
        ({4: 1.0, 2: 0.8, 1: 2.0}, 2),
        ({4: 1.0, 2: 0.8, 1: 0.5}, 1),
    ],
)
def test_fewer_threads_are_taken_where_they_are_quicker(
    times: dict[int, float], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "REST", 0)
    monkeypatch.setattr(calibrate, "best", lambda calls: {threads: times[threads] for threads in calls})
    assert calibrate.chosen_threads(Tape(1, 1, threads=4, dry=True)) == expected


def test_who_has_a_processor_for_a_while_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads look slow twice, and then they do not."""
    seen = iter([{2: 3.0, 1: 1.0}, {2: 2.0, 1: 1.0}, {2: 0.6, 1: 1.0}])
    monkeypatch.setattr(calibrate, "REST", 0)
    monkeypatch.setattr(calibrate, "best", lambda calls: next(seen))
    assert calibrate.chosen_threads(Tape(1, 1, threads=2, dry=True)) == 2
    assert not list(seen)


def test_the_best_of_each_counts_in_turn() -> None:
    order = list[str]()

    def call(name: str, takes: list[float]) -> None:
        order.append(name)
        time.sleep(takes.pop() if takes else 0.02)

    slow, quick = [0.02] * 3, [0.001, 0.02, 0.02]
    found = calibrate.best({"slow": lambda: call("slow", slow), "quick": lambda: call("quick", quick)})
    assert order[:4] == ["slow", "quick"] * 2 and order.count("slow") == order.count("quick") >= calibrate.FEW
    assert found["quick"] < 0.015 < found["slow"]


def test_steps_are_timed_by_the_tape_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many threads as are tried; and row 0 is as it was."""
    monkeypatch.setattr(replay, "most_threads", lambda network: 2)
    tried, inner = list[int](), Tape.run
    monkeypatch.setattr(Tape, "run", lambda tape, *given: tried.append(tape.threads) or inner(tape, *given))
    block = {"mixer": {"kind": "retention", "heads": 2}, "channel": {"kind": "gated", "hidden": 32}}
    made = build(ModelSettings(width=32, depth=1, vocabulary=64, context=64, block=block), seed=0).eval()
    slots = Slots(made, 2, 64, weights="float32")
    assert {1, 2} == set(tried)
    assert slots.replay is not None and slots.replay.tape.threads == slots.replay.threads
    assert all(not part.any() for _, _, state in slots.state.each() for part in state.tensors.values())


def test_small_networks_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert calibrate.most_threads(network()) == 1
    monkeypatch.setattr(calibrate, "ALONE", 0)
    assert calibrate.most_threads(network()) == 4


@pytest.mark.parametrize("quicker", ["float32", "bf16"])
def test_the_quicker_weights_are_taken_and_the_others_not_kept(quicker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "ALONE", 0)
    monkeypatch.setattr(calibrate, "tiles", lambda: False)

    def product(weight: torch.Tensor, kind: str, packed: calibrate.Packed, rows: int) -> float:
        packed[(weight.data_ptr(), *weight.shape, kind)] = (0, (weight,))
        return rows * (1.0 if kind == quicker else 2.0)

    as_they_are(monkeypatch, product)
    packed: calibrate.Packed = {}
    assert calibrate.chosen_weights(network(), WEIGHT, packed) == quicker
    assert {key[-1] for key in packed} == {quicker}


@pytest.mark.parametrize("quicker", ["bf16", "int8"])
def test_where_losses_do_no_harm_the_quickest_are_taken(quicker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network()
    with torch.no_grad():
        next(made.parameters()).add_(1e-4)
    assert calibrate.chosen_weights(made, WEIGHT, {}, loose=True) == "bf16"  # too small to measure
    monkeypatch.setattr(calibrate, "ALONE", 0)
    times = {"bf16": 2.0, "int8": 2.0, quicker: 1.0}
    as_they_are(monkeypatch, lambda weight, kind, packed, rows: rows * times[kind])
    assert calibrate.chosen_weights(made, WEIGHT, {}, loose=True) == quicker


@pytest.mark.parametrize(("last", "expected"), [(2.0**-7, "bf16"), (2.0**-10, "float16"), (2.0**-11, "float32")])
def test_what_16_bits_would_lose_is_kept(last: float, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 holds 7 places behind the first, fp16 10."""
    costs = {"float32": 3.0, "float16": 2.0, "bf16": 1.0}
    as_they_are(monkeypatch, lambda weight, kind, packed, rows: costs[kind])
    made = network()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(1.0)
        next(made.parameters()).add_(last)
    assert calibrate.chosen_weights(made, WEIGHT, {}) == expected


def test_only_weights_that_steps_multiply_with_are_held_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding of its own is looked up, however large it is."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(replay, "chosen_weights", lambda network, largest, *given: seen.append(largest) or "float32")
    block = {"mixer": {"kind": "attention", "heads": 2}, "channel": {"kind": "gated", "hidden": 32}}
    settings = ModelSettings(width=32, depth=1, vocabulary=500, context=64, block=block, head={"tied": False})
    made = build(settings, seed=0)
    Slots(made, 1, 64)
    assert [weight.data_ptr() for weight in seen] == [made.head.product.weight.data_ptr()]


def test_what_can_have_no_tape_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "ALONE", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.delattr(calibrate, "best")
    look = {"kind": "attention", "heads": 2}
    block = {"mixer": look, "channel": "gated"}
    model = ModelSettings(width=32, depth=1, vocabulary=64, context=64, block=block, driver="feedback")
    assert Slots(build(model, seed=0).eval(), 1, 64).replay is None
