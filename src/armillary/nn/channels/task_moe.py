"""A mixture of experts whose router knows the task of a token, and whose tasks share experts within a bound.

The side tensor `tasks` [B] or [B, T] int64 says what a row or a token is for, −1 where nobody knows, which
stands for the mean of all tasks. In training and on held-out text it is the data's sources, and a batch that
does not say is refused; in other calls, not given, none is known. An encoder–decoder may call it in its
decoder, but cannot be trained on tasks.
`routed_by: task_and_token` adds a learned score of the task to the router's score of the token (Gupta et
al. 2022, Sparsely Activated Mixture-of-Experts are Robust Multi-Task Learners, whose gate reads an
embedding of the task: added scores are its one-layer form), `task` routes by the task alone (Kudugunta
et al. 2021, Beyond Distillation: Task-level Mixture-of-Experts for Efficient Inference, whose experts that no
task at hand uses need not be served), `token` does not look at the task.

`parity` bounds how unequally experts serve tasks. Of the picks of each task a share goes to each expert;
where the largest share among tasks is more than `parity` times the smallest, what is beyond is a loss. So
in training updates with `parity_weight` large enough the ratio is held to the bound, as it is measured
over the tasks that a call holds; it is an objective and no guarantee for a single batch. The log says what
it is: `task_parity`, the largest ratio of any expert, and `task_load`, the load (busiest expert over the
mean) of the task that fares worst. No paper defines this bound for routers; it is demographic parity (Dwork
et al. 2012, Fairness Through Awareness) of the choice of experts.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from armillary.base.errors import InputError
from armillary.nn.channels.moe import MoE, MoESettings
from armillary.nn.context import Context
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example
from armillary.nn.linear import Embedding
from armillary.nn.mechanism import Capabilities, Place, channels
from armillary.nn.ops import readable
from armillary.nn.ops.routing import disparity
from armillary.nn.state import State
from armillary.nn.tape import Buffer, NoStep, Tape


@channels.register
class TaskMixtureSettings(MoESettings):
    """Experts that a router picks by the task, the token or both."""

    kind: ClassVar[str] = "task_moe"
    source: ClassVar[str] = "Gupta et al. 2022, Sparsely Activated Mixture-of-Experts are Robust Multi-Task Learners"
    oracle: ClassVar[str] = "tests/nn/channels/test_task_moe.py: scores, shares and the bound as loops over tasks"
    tasks: int = Field(2, gt=0, description="how many tasks there are")
    routed_by: Literal["task_and_token", "task", "token"] = Field(
        "task_and_token", description="what the router looks at"
    )
    parity: float | None = Field(
        None, ge=1, description="bound on the largest over the smallest share of an expert among tasks; by default none"
    )
    parity_weight: float = Field(1.0, ge=0, description="weight of the load beyond that bound")

    @model_validator(mode="after")
    def _heard(self) -> TaskMixtureSettings:
        if self.routed_by == "task" and self.jitter:
            raise ValueError("jitter moves what the router reads of a token, and this one reads the task alone")
        return self

    @classmethod
    def examples(cls) -> list[Example]:
        small: dict[str, Any] = {"experts": 4, "hidden": 8, "tasks": 3}
        return [
            Example("both", cls(parity=1.5, **small), side=_by_row),
            Example("task_alone", cls(routed_by="task", **small), side=_by_row),
        ]

    def can(self) -> Capabilities:
        return dataclasses.replace(super().can(), takes=("tasks",))

    def build(self, place: Place) -> TaskMoE:
        return TaskMoE(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        flops = super().cost(place, length, itemsize).flops
        if self.routed_by == "task":
            flops -= linear_flops(place.width, self.experts, length)
        elif self.routed_by == "task_and_token":
            flops += length * self.experts
        return Cost(flops + (0 if self.routed_by == "token" else self.tasks * self.experts))


def _by_row(batch: int, length: int) -> dict[str, Tensor]:
    return {"tasks": torch.tensor([2, -1, 0, 1])[torch.arange(batch) % 4]}


class TaskMoE(MoE):
    """x [B, T, D] → [B, T, D]; side tensor `tasks`. `counts` has a row for every task and one for none."""

    def __init__(self, settings: TaskMixtureSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.tasks, self.routed_by = settings.tasks, settings.routed_by
        self.parity, self.parity_weight = settings.parity, settings.parity_weight
        if self.routed_by == "task":
            self.router = None
        if self.routed_by != "token":
            self.task = Embedding(self.tasks, settings.experts, role="router", deviation=0.5)
        self.count_groups(self.tasks + 1)

    def which(self, x: Tensor, ctx: Context) -> Tensor:
        """The task of every token of x, [B, T]; −1: unknown. Raises InputError for what is no task."""
        given = ctx.side.get("tasks")
        if given is None:
            return torch.full(x.shape[:2], -1, dtype=torch.int64, device=x.device)
        if given.dtype != torch.int64 or tuple(given.shape) not in ((x.shape[0],), tuple(x.shape[:2])):
            raise InputError(
                f"the side tensor 'tasks' has shape {tuple(given.shape)} and type {given.dtype}",
                where=self.path,
                hint=f"pass int64 of shape [{x.shape[0]}] or {list(x.shape[:2])}",
            )
        if readable(given) and not -1 <= int(given.min()) <= int(given.max()) < self.tasks:
            raise InputError(
                f"there is a task {int(given.max()) if given.max() >= self.tasks else int(given.min())}, and this "
                f"router knows 0 to {self.tasks - 1} (−1: unknown)",
                where=self.path,
                hint="set tasks of the channel, or task of each of data.sources",
            )
        return given if given.dim() == 2 else given[:, None].expand(x.shape[:2])

    def scores(self, x: Tensor, ctx: Context) -> Tensor:
        if self.routed_by == "token":
            return super().scores(x, ctx)
        wide = self.task.weight.to(torch.promote_types(x.dtype, torch.float32))
        table = torch.cat([wide, wide.mean(0, keepdim=True)])
        tasks = self.which(x, ctx)
        added = table[torch.where(tasks < 0, self.tasks, tasks)]
        return added if self.routed_by == "task" else super().scores(x, ctx) + added

    def record(self, tape: Tape, x: Buffer, state: State | None) -> Buffer:
        if self.routed_by != "token":
            raise NoStep("experts that are picked by the task")
        return super().record(tape, x, state)

    def loss(self, probabilities: Tensor, experts: Tensor, scores: Tensor, real: Tensor | None, ctx: Context) -> Tensor:
        usual = super().loss(probabilities, experts, scores, real, ctx)
        if self.parity is None:
            return usual
        tasks = self.which(probabilities, ctx)
        if real is not None:
            tasks = torch.where(real, tasks, -1)
        beyond = disparity(probabilities.flatten(0, 1), experts.flatten(0, 1), tasks.flatten(), self.tasks, self.parity)
        return usual + self.parity_weight * beyond

    def owners(self, experts: Tensor, ctx: Context) -> Tensor:
        tasks = self.which(experts, ctx)
        return torch.where(tasks < 0, self.tasks, tasks)[..., None].expand_as(experts)

    def observe_groups(self, picks: Tensor) -> dict[str, float]:
        """`task_load` and `task_parity` over the tasks that were there; an expert that a task never picked
        counts as picked once."""
        known = picks[:-1][picks[:-1].sum(1) > 0]
        if not len(known):
            return {}
        total = known.sum(1, keepdim=True).double()
        shares, least = known / total, known.clamp(min=1) / total
        found = {"task_load": float(shares.max()) * picks.shape[1]}
        if len(known) > 1:
            found["task_parity"] = float((shares.amax(0) / least.amin(0)).max())
        return found
