"""Skill probes: a tiny model of a variant's mixers learns a task, in each of four patterns.

The patterns are those of CAB (Zhang et al. 2023, CAB: Comprehensive Attention Benchmarking on Long
Sequence Modeling): self and cross, each causal and not. In a causal probe the questions follow the
context; in a bidirectional one they stand before it, where a causal mixer would not know the answer;
in a cross probe they look at the context through an encoder that is plain attention for everyone.
What a mechanism cannot do is reported as refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.base.errors import ArmillaryError, UnsupportedError
from armillary.compare.statistics import over_runs, proportion
from armillary.compare.tasks import ALL, QUICK, Task
from armillary.compare.vary import Variant
from armillary.nn.block import BlockSettings
from armillary.nn.channels.gated import GatedSettings
from armillary.nn.context import Context, Memory
from armillary.nn.linear import Embedding
from armillary.nn.mechanism import Order, Place, initialise
from armillary.nn.mixers.attention import AttentionSettings
from armillary.nn.norms.rmsnorm import RMSNorm
from armillary.nn.positions.rope import RopeSettings
from armillary.nn.stack import Stack, StackSettings
from armillary.nn.training import Training
from armillary.train.trainer import derived_seed

Pattern = Literal["causal-self", "bidirectional-self", "causal-cross", "bidirectional-cross"]
Report = Callable[[float], None]

PATTERNS: dict[str, str] = {
    "causal-self": "causal, self",
    "bidirectional-self": "both ways, self",
    "causal-cross": "causal, cross",
    "bidirectional-cross": "both ways, cross",
}
TITLES = {name: task.title for name, task in (QUICK | ALL).items()}
WIDTHS = (64, 72, 80, 60, 96, 128, 192, 256)  # the first at which the mixers can be built
DEEPEST = 4
RATE, BATCH, TESTS = 3e-3, 32, 512
SOLVED = 0.995  # accuracy over the last batches at which training ends early


@dataclass(frozen=True)
class Level:
    """How hard the tasks are and how long they are learnt, by how many models each."""

    tasks: dict[str, Task]
    steps: int
    seeds: int


LEVELS = {"quick": Level(QUICK, 500, 1), "all": Level(ALL, 2000, 3)}


@dataclass(frozen=True)
class Unit:
    """One task in one pattern for the variants that have these mixers; blocks: theirs, without the rest."""

    task: str
    pattern: str
    variants: tuple[str, ...]
    blocks: tuple[BlockSettings, ...]
    level: str
    key: str

    def run(self, report: Report = lambda share: None) -> dict[str, Any]:
        """Plain data: accuracy on new texts with its interval, or why it is refused."""
        level = LEVELS[self.level]
        task = level.tasks[self.task]
        about = {"task": self.task, "pattern": self.pattern, "chance": task.chance, "level": self.level}
        about |= {"variants": list(self.variants), "title": task.title, "source": task.source}
        try:
            width = _width(self.blocks, self.pattern, task)
        except ArmillaryError as error:
            return about | {"refused": f"{error.what}; {error.hint}" if error.hint else error.what}
        rights = []
        used = 0
        for seed in range(level.seeds):
            network = ProbeNetwork(self.blocks, self.pattern, task, width)
            initialise(network, seed)
            used += learn(network, task, level.steps, seed, partial(_part, report, seed, level.seeds))
            rights.append(score(network, task, seed))
        counted = TESTS * task.questions
        if level.seeds == 1:  # rows are independent, questions of a row are not: count rows
            found = _by_row(rights[0])
        else:
            found = over_runs([float(right.float().mean()) for right in rights])
        clipped = [None if end is None else min(1.0, max(0.0, end)) for end in (found.low, found.high)]
        return about | {
            "accuracy": {"value": found.value, "low": clipped[0], "high": clipped[1], "level": found.level},
            "over": "test texts" if level.seeds == 1 else f"{level.seeds} models",
            "answers": counted,
            "updates": used // level.seeds,
            "most_updates": level.steps,
            "width": width,
            "depth": len(self.blocks),
        }


def units(level: str, variants: Sequence[Variant]) -> list[Unit]:
    """Everything to try; variants of the same mixers share their probes."""
    if level == "none":
        return []
    groups: dict[str, tuple[tuple[BlockSettings, ...], list[str]]] = {}
    for variant in variants:
        blocks = probe_blocks(variant)
        key = _key([level, *(block.to_data() for block in blocks)])
        groups.setdefault(key, (blocks, []))[1].append(variant.name)
    return [
        Unit(task, pattern, tuple(names), blocks, level, key)
        for task in LEVELS[level].tasks
        for key, (blocks, names) in groups.items()
        for pattern in PATTERNS
    ]


def probe_blocks(variant: Variant) -> tuple[BlockSettings, ...]:
    """The variant's kinds of block, each once and at least two of them, with small channel mixers."""
    kinds: list[BlockSettings] = []
    for block in variant.recipe.model.layers():
        parts = [
            branch.derive(channel=GatedSettings() if branch.channel is not None else None, dropout=0.0)
            for branch in block.all()
            if branch.look == "self"
        ]
        small = BlockSettings(branches=tuple(parts), parallel=block.parallel)
        if small not in kinds:
            kinds.append(small)
    kinds = kinds[:DEEPEST]
    return tuple(kinds if len(kinds) > 1 else kinds * 2)


class ProbeNetwork(nn.Module):
    """context [B, S] and questions [B, Q] → scores of the answers [B, Q, A]."""

    def __init__(self, blocks: tuple[BlockSettings, ...], pattern: str, task: Task, width: int) -> None:
        super().__init__()
        order: Order = "causal" if pattern.startswith("causal") else "bidirectional"
        self.cross, self.first = pattern.endswith("cross"), order == "bidirectional"
        total = task.context + task.questions
        self.embed = Embedding(task.vocabulary, width, deviation=1.0)
        self.before = Embedding(task.vocabulary, width, deviation=1.0) if task.joined else None
        self.places = Embedding(total, width, deviation=0.3)
        place = Place(width=width, depth=len(blocks), order=order, length=total)
        if self.cross:
            plain = BlockSettings(mixer=AttentionSettings(heads=4, position=RopeSettings()), channel=GatedSettings())
            self.encoder: Stack | None = Stack(
                StackSettings(depth=1, block=plain),
                Place(width=width, order="bidirectional", length=total, path="encoder"),
            )
            self.encoder_norm = RMSNorm(width, 1e-6)
            blocks = tuple(_looking(block) for block in blocks)
        else:
            self.encoder = None
        named = {f"b{i}": block for i, block in enumerate(blocks)}
        self.blocks = Stack(StackSettings(depth=len(blocks), blocks=named, pattern=tuple(named)), place)
        self.norm = RMSNorm(width, 1e-6)
        self.head = place.product(width, task.answers, "head")

    def forward(self, context: Tensor, questions: Tensor, training: Training | None = None) -> Tensor:
        count, asked = context.shape[1], questions.shape[1]
        if self.encoder is not None:
            inside = Context(ids=context, training=training)
            memory = self.encoder_norm(self.encoder(self._placed(context, 0), inside))
            x = self._placed(questions, count)
            h = self.blocks(x, Context(ids=questions, memory=Memory(memory), training=training))
        else:
            parts = [questions, context] if self.first else [context, questions]
            ids = torch.cat(parts, 1)
            h = self.blocks(self._placed(ids, 0), Context(ids=ids, training=training))
            h = h[:, :asked] if self.first else h[:, count:]
        scores: Tensor = self.head(self.norm(h))
        return scores

    def _placed(self, ids: Tensor, start: int) -> Tensor:
        x: Tensor = self.embed(ids) + self.places(torch.arange(start, start + ids.shape[1]))
        if self.before is not None:
            x = x + F.pad(self.before(ids[:, :-1]), (0, 0, 1, 0))
        return x


def learn(network: ProbeNetwork, task: Task, steps: int, seed: int, report: Report) -> int:
    """Train on fresh texts; returns the updates made, fewer than `steps` once the task is solved."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "probe", task.title))
    optimiser = torch.optim.AdamW(network.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    hooks = [hook for module in network.modules() if callable(hook := getattr(module, "after_step", None))]
    recent = 0.0
    network.train()
    for step in range(steps):
        context, questions, answers = task.draw(BATCH, generator)
        scores = network(context, questions, Training.of(derived_seed(seed, "call", step)))
        loss = F.cross_entropy(scores.flatten(0, 1).float(), answers.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        warm, rest = min(1.0, (step + 1) / 30), 1 - step / steps
        for group in optimiser.param_groups:
            group["lr"] = RATE * warm * (0.1 + 0.9 * rest)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        for hook in hooks:
            hook(step + 1, steps)
        recent = 0.9 * recent + 0.1 * float((scores.argmax(-1) == answers).float().mean())
        if step % 10 == 9:
            report((step + 1) / steps)
            if recent > SOLVED:
                return step + 1
    return steps


@torch.no_grad()
def score(network: ProbeNetwork, task: Task, seed: int) -> Tensor:
    """[TESTS, Q] bool: which questions about texts never seen are answered right."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "probe test", task.title))
    network.eval()
    found = []
    for _ in range(0, TESTS, 128):
        context, questions, answers = task.draw(128, generator)
        found.append(network(context, questions).argmax(-1) == answers)
    return torch.cat(found)


def _by_row(right: Tensor) -> Any:
    """Accuracy with an interval over texts: Wilson's where each asks once, else of their means."""
    if right.shape[1] == 1:
        return proportion(int(right.sum()), len(right))
    shares = right.float().mean(1)
    if bool((shares == shares[0]).all()):  # all alike says nothing of spread: as if each text were one answer
        return proportion(int(right.all(1).sum()) if float(shares[0]) == 1 else 0, len(right))
    return over_runs(shares.tolist())


def _looking(block: BlockSettings) -> BlockSettings:
    """The block with its mixers turned to the memory. There positions of questions and of the context
    are not of one kind, so a position inside the mixer is left out."""
    parts = []
    for branch in block.all():
        if branch.mixer is None:
            parts.append(branch)
            continue
        mixer = branch.mixer
        if not type(mixer).capabilities.cross:
            raise UnsupportedError(f"'{mixer.kind}' cannot look at a memory (cross)")
        if getattr(mixer, "position", None) is not None:
            mixer = mixer.derive(position=None)
        parts.append(branch.derive(mixer=mixer, look="memory"))
    return block.derive(branches=tuple(parts))


def _width(blocks: tuple[BlockSettings, ...], pattern: str, task: Task) -> int:
    """The first width at which everything can be built and called; raises what the first of them said."""
    refusal: ArmillaryError | None = None
    order = "causal" if pattern.startswith("causal") else "bidirectional"
    for block in blocks:
        for branch in block.all():
            if branch.mixer is not None and not getattr(type(branch.mixer).capabilities, order):
                raise UnsupportedError(f"'{branch.mixer.kind}' cannot be {order}")
    for width in WIDTHS:
        try:
            with torch.device("meta"):
                network = ProbeNetwork(blocks, pattern, task, width)
                context = torch.zeros(2, task.context, dtype=torch.int64)
                network(context, torch.zeros(2, task.questions, dtype=torch.int64))
            return width
        except ArmillaryError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _part(report: Report, number: int, count: int, share: float) -> None:
    report((number + share) / count)


def _key(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]
