"""Probe tasks: their answers against plain readings of their texts, and that learning is possible."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from armillary.compare import skills, tasks
from armillary.compare.tasks import ALL, QUICK, Task
from armillary.compare.vary import Variant
from armillary.nn.mechanism import initialise
from armillary.recipe import Recipe

Make = Callable[..., Recipe]
EVERY = [*QUICK.items(), *ALL.items()]


def read(name: str, context: list[int], question: int, task: Task) -> int:
    """The answer, from the definition of the task."""
    if name in ("recall", "induction"):
        at = context[:: 2 if name == "recall" else 1].index(question)
        return context[2 * at + 1] - (task.vocabulary - task.answers) if name == "recall" else context[at + 1]
    if name == "copy":
        blank = task.answers
        return [token for token in context if token != blank][question - blank - 1]
    if name == "needle":
        return context[context.index(task.answers) + 1]
    if name == "nesting":
        stack: list[int] = []
        for token in context:
            if token < task.answers:
                stack.append(token)
            else:
                assert stack.pop() == token - task.answers
        return stack[-1 - (question - 2 * task.answers)]
    words = ["max(", "min(", "med(", "sum("]
    stack2: list[list[int]] = [[]]
    names: list[str] = []
    for token in context:
        if token < 10:
            stack2[-1].append(token)
        elif token < 14:
            names.append(words[token - 10])
            stack2.append([])
        elif token == 14:
            values, what = stack2.pop(), names.pop()
            value = {
                "max(": max(values),
                "min(": min(values),
                "med(": sorted(values)[len(values) // 2],
                "sum(": sum(values) % 10,
            }[what]
            stack2[-1].append(value)
    return stack2[0][0]


@pytest.mark.parametrize("name, task", EVERY, ids=[*(f"quick-{n}" for n in QUICK), *(f"all-{n}" for n in ALL)])
def test_answers_follow_from_the_texts(name: str, task: Task) -> None:
    context, questions, answers = task.draw(24, torch.Generator().manual_seed(1))
    assert context.shape == (24, task.context) and questions.shape == answers.shape == (24, task.questions)
    assert int(context.max()) < task.vocabulary and int(questions.max()) < task.vocabulary
    assert int(answers.min()) >= 0 and int(answers.max()) < task.answers
    for row in range(24):
        for question, answer in zip(questions[row].tolist(), answers[row].tolist(), strict=True):
            assert read(name, context[row].tolist(), question, task) == answer
    again = task.draw(24, torch.Generator().manual_seed(1))[0]
    assert torch.equal(context, again) and not torch.equal(context, task.draw(24, torch.Generator().manual_seed(2))[0])


@pytest.mark.parametrize("pattern", skills.PATTERNS)
def test_a_probe_sees_what_its_pattern_allows(recipe: Make, pattern: str) -> None:
    """Every answer may depend on the context, and in a causal probe on no later question."""
    task = tasks.recall(3, keys=5, values=4)
    blocks = skills.probe_blocks(Variant("x", recipe()))
    assert len(blocks) == 2
    network = skills.ProbeNetwork(blocks, pattern, task, 64)
    initialise(network, 0)
    context, questions, _ = task.draw(2, torch.Generator().manual_seed(0))
    base = network(context, questions)
    assert base.shape == (2, 3, 4)
    other = context.clone()
    other[:, 1] = (other[:, 1] - 5 + 1) % 4 + 5
    assert bool(((network(other, questions) - base).abs().amax(-1) > 0).all())
    asked = questions.clone()
    asked[:, 2] = (asked[:, 2] + 1) % 5
    change = (network(context, asked) - base).abs().amax((0, 2))
    assert float(change[2]) > 0
    if pattern != "bidirectional-self":
        assert float(change[:2].max()) == 0


def test_a_probe_can_be_learnt_and_chance_is_told_from_skill(recipe: Make) -> None:
    task = tasks.recall(2, keys=4, values=3)
    network = skills.ProbeNetwork(skills.probe_blocks(Variant("x", recipe())), "causal-self", task, 64)
    initialise(network, 0)
    before = skills.score(network, task, 0).float().mean()
    used = skills.learn(network, task, 150, 0, lambda share: None)
    after = skills.score(network, task, 0).float().mean()
    assert float(before) < 0.6 and float(after) > 0.95 and used <= 150


def test_variants_of_the_same_mixers_share_their_probes(recipe: Make) -> None:
    many = [
        Variant("a", recipe()),
        Variant("b", recipe("model.width=32")),
        Variant("c", recipe("model.block.mixer=retention")),
    ]
    found = skills.units("quick", many)
    assert {unit.variants for unit in found} == {("a", "b"), ("c",)}
    assert skills.units("none", many) == []
