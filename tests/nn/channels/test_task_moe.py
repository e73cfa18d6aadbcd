"""Routing by task, and the bound on how unequally experts serve tasks, as loops over tasks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary.base.errors import InputError, SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.channels.moe import MixtureSettings
from armillary.nn.channels.task_moe import TaskMixtureSettings, TaskMoE
from armillary.nn.context import Context
from armillary.nn.mechanism import ChannelSettings, Place
from armillary.nn.network import ModelSettings, build
from armillary.nn.ops.routing import disparity
from armillary.nn.taps import Taps
from armillary.nn.training import Training

TASKS = torch.tensor([2, 0, -1, 1])
JITTERED = {"routed_by": "task", "jitter": 0.1}


def built(**settings: Any) -> TaskMoE:
    made = TaskMixtureSettings(**{"experts": 5, "hidden": 8, "tasks": 3, **settings}).build(Place(16, path="m"))
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return made


def noise(*shape: int, seed: int = 4) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_scores_are_those_of_task_and_token(agree: Any) -> None:
    ours, x = built(), noise(4, 6, 16)
    assert ours.router is not None
    table = torch.cat([ours.task.weight, ours.task.weight.mean(0, keepdim=True)])  # −1: the mean of tasks
    expected = x @ ours.router.weight.t() + table[TASKS][:, None]
    agree(ours.scores(x, Context(side={"tasks": TASKS})), expected)
    by_token = TASKS[:, None].expand(-1, 6)
    agree(ours.scores(x, Context(side={"tasks": by_token})), expected)
    agree(ours.scores(x, Context()), x @ ours.router.weight.t() + table[-1])


def test_routed_by_task_tokens_of_a_task_share_experts() -> None:
    ours, taps = built(routed_by="task"), Taps(["m.router"])
    ours(noise(4, 6, 16), Context(side={"tasks": TASKS}, taps=taps))
    gates = taps.seen["m.router"]
    assert bool((gates == gates[:, :1]).all()) and bool((gates[0] != gates[1]).any())


def test_routed_by_token_it_is_the_mixture(agree: Any) -> None:
    ours, plain = built(routed_by="token"), MixtureSettings(experts=5, hidden=8).build(Place(16))
    plain.load_state_dict(ours.state_dict())
    x = noise(4, 6, 16)
    agree(ours(x, Context(side={"tasks": TASKS})), plain(x, Context()))


@pytest.mark.parametrize("there", [[0, 1, 2], [0, 2], [1], []])
def test_the_bound_is_its_formula_with_empty_groups(there: list[int], agree: Any) -> None:
    """Tasks without a token take no part, and fewer than two cannot differ."""
    generator = torch.Generator().manual_seed(6)
    groups = torch.tensor([*there, -1])[torch.randint(0, len(there) + 1, (40,), generator=generator)]
    p = torch.softmax(2 * noise(40, 5), -1).requires_grad_()
    experts = p.topk(2).indices
    found = disparity(p, experts, groups, 3, 1.25)
    expected = torch.zeros(())
    for e in range(5) if len(there) > 1 else ():
        hard = {g: float((experts[groups == g] == e).sum()) / (2 * int((groups == g).sum())) for g in there}
        most, least = max(hard, key=lambda g: hard[g]), min(hard, key=lambda g: hard[g])
        if hard[most] > 1.25 * hard[least]:
            soft = {g: p[groups == g, e].mean() for g in (most, least)}
            soft = {g: value - value.detach() + hard[g] for g, value in soft.items()}
            expected = expected + soft[most] - 1.25 * soft[least]
    agree(found, expected)
    if len(there) > 1:
        assert float(found.detach()) > 0.1
        agree(torch.autograd.grad(found, p)[0], torch.autograd.grad(expected, p)[0])
    else:
        assert float(found.detach()) == 0
        assert bool((torch.autograd.grad(found, p)[0] == 0).all())


def test_tasks_are_observed_apart() -> None:
    ours, taps = built(), Taps(["m.router"])
    tasks = torch.tensor([2, 0, 2, -1])  # nobody has task 1
    ours(noise(4, 30, 16), Context(side={"tasks": tasks}, training=Training.of(1), taps=taps))
    picked = taps.seen["m.router"] > 0
    shares = torch.stack([picked[tasks == g].sum((0, 1)) / (2 * 30 * int((tasks == g).sum())) for g in (0, 2)])
    ours.after_step(1, 10)
    found = ours.observe()
    assert found["task_load"] == pytest.approx(5 * float(shares.max()))
    least = torch.stack([shares[0].clamp(min=1 / 60), shares[1].clamp(min=1 / 120)])
    assert found["task_parity"] == pytest.approx(float((shares.amax(0) / least.amin(0)).max()))


@pytest.mark.parametrize("parity", [None, 1.5])
def test_tasks_that_pull_apart_stay_within_the_bound(parity: float | None) -> None:
    """Each task gains by experts of its own; with a bound, no expert serves one task much more than another."""
    ours = built(experts=4, tasks=2, parity=parity, parity_weight=3.0, balance_weight=0.0)
    tasks = torch.arange(16) % 2
    optimiser = torch.optim.Adam(ours.parameters(), lr=0.02)
    ratios = []
    for step in range(80):
        x = noise(16, 32, 16, seed=step)
        scores = ours.scores(x, Context(side={"tasks": tasks}))
        wish = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])[tasks][:, None]
        pull = -(torch.softmax(scores, -1) * wish).sum(-1).mean()
        y = ours(x, Context(side={"tasks": tasks}, training=Training.of(step)))
        (pull + 0 * y.sum()).backward()
        optimiser.step()
        optimiser.zero_grad()
        ours.after_step(step, 80)
        ratios.append(ours.observe()["task_parity"])
    late = sum(ratios[-20:]) / 20
    assert late > 10 if parity is None else late < 1.15 * parity


def test_what_is_no_task_is_refused() -> None:
    ours, x = built(), noise(4, 6, 16)
    for tasks, said in (
        (torch.tensor([0, 1, 2, 3]), "there is a task 3, and this router knows 0 to 2"),
        (torch.tensor([0, 1, -2, 1]), "there is a task -2"),
        (torch.tensor([0, 1]), r"pass int64 of shape \[4\]"),
        (torch.zeros(4), "type torch.float32"),
    ):
        with pytest.raises(InputError, match=said):
            ours(x, Context(side={"tasks": tasks}))
    for settings, said in (({"parity": 0.5}, "parity"), ({"tasks": 0}, "tasks"), (JITTERED, "reads the task alone")):
        with pytest.raises(SettingsError, match=said):
            parse(ChannelSettings, {"kind": "task_moe", **settings})


def test_an_encoder_is_told_no_tasks() -> None:
    """The source of an encoder–decoder comes without side tensors, so what looks at them is refused there."""
    look = {"kind": "attention", "heads": 2}
    channel = {"kind": "task_moe", "experts": 2, "hidden": 4}
    settings: dict[str, Any] = {
        "form": "encoder_decoder",
        "width": 16,
        "depth": 1,
        "vocabulary": 9,
        "encoder": {"depth": 1, "block": {"mixer": look, "channel": channel}},
        "block": {"mixer": look, "cross": look, "channel": channel},
    }
    with pytest.raises(UnsupportedError, match=r"model\.encoder\.blocks\.0\.channel: 'task_moe' looks .*\(tasks\)"):
        build(parse(ModelSettings, settings))
    settings["encoder"]["block"]["channel"] = "ffn"
    assert build(parse(ModelSettings, settings)).takes == {"tasks"}
