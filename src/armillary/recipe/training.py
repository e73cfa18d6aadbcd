"""Everything that decides how a model is trained, once it is known what is trained on what."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from armillary.base.errors import SettingsError
from armillary.base.settings import Settings
from armillary.objectives import ObjectiveSettings
from armillary.objectives.causal import CausalSettings
from armillary.recipe.schedules import ScheduleSettings
from armillary.recipe.schedules.cosine import CosineSettings

Momentum = Annotated[float, Field(ge=0, lt=1)]

_DEVICE = re.compile(r"(?:auto|cpu|mps|(?:cuda|xpu)(?::\d+)?)\Z")


class OptimiserSettings(Settings):
    """AdamW (Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization).

    Matrices are decayed; vectors (norms, biases) are not.
    """

    learning_rate: float = Field(1e-3, gt=0, description="rate at the top of the schedule")
    betas: tuple[Momentum, Momentum] = Field(
        (0.9, 0.95), description="how much of the running mean of the gradient and of its square is kept"
    )
    epsilon: float = Field(1e-8, gt=0, description="added to the denominator")
    weight_decay: float = Field(0.1, ge=0, description="decay of matrices, times the learning rate")
    clip: float | None = Field(1.0, gt=0, description="largest norm of the gradient; null: not clipped")


class GuardSettings(Settings):
    """What happens when training goes wrong."""

    nan: Literal["stop", "skip"] = Field(
        "stop", description="a loss or gradient that is not finite: stop, or skip the update"
    )
    spike: float | None = Field(
        3.0, gt=1, description="a loss this many times its running median is a spike; null: none is"
    )
    on_spike: Literal["warn", "skip", "stop"] = Field("warn", description="what a spike leads to")
    stall: int | None = Field(
        None, gt=0, description="stop after this many evaluations without a better held-out loss; null: never"
    )


class TrainingSettings(Settings):
    """One run: how long, on what sequences, how fast, how often looked at."""

    objective: ObjectiveSettings = Field(CausalSettings(), description="what the model learns to predict")
    context: int = Field(512, gt=0, description="tokens in a sequence")
    batch: int = Field(16, gt=0, description="sequences in an update")
    micro_batch: int | None = Field(
        None, gt=0, description="sequences at once, gradients summed up to `batch`, which it divides; null: all"
    )
    steps: int = Field(2000, gt=0, description="updates")
    seconds: float | None = Field(
        None,
        gt=0,
        description="time in updates after which the run ends, the schedule following the clock; null: steps decide",
    )
    precision: Literal["auto", "float32", "bf16"] = Field(
        "auto",
        description="dtype of activations; parameters and the optimiser stay float32; auto: bf16 where it is computed "
        "in hardware",
    )
    optimiser: OptimiserSettings = Field(OptimiserSettings(), description="AdamW")
    schedule: ScheduleSettings = Field(CosineSettings(), description="how the learning rate moves")
    evaluate_every: int | None = Field(200, gt=0, description="steps between evaluations; null: only at the end")
    evaluate_tokens: int = Field(65536, gt=0, description="held-out tokens that an evaluation during training reads")
    samples_every: int | None = Field(500, gt=0, description="steps between sample texts; null: only at the end")
    sample_prompts: tuple[str, ...] = Field((), description="beginnings of the sample texts; none: an empty one")
    sample_tokens: int = Field(64, gt=0, description="tokens in a sample text")
    checkpoint_every: int | None = Field(500, gt=0, description="steps between checkpoints; null: only at the end")
    keep: int | None = Field(2, gt=0, description="how many of the latest checkpoints are kept; null: all")
    log_every: int = Field(10, gt=0, description="steps between lines of metrics.jsonl")
    tensorboard: bool = Field(False, description="write TensorBoard events too")
    recompute: Literal["none", "blocks"] = Field(
        "none", description="blocks: activations inside a block are computed again in the backward pass"
    )
    compile: Literal["auto", "yes", "no"] = Field("auto", description="compile the blocks; auto: where that pays")
    guards: GuardSettings = Field(GuardSettings(), description="what happens when training goes wrong")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    threads: int | None = Field(None, gt=0, description="CPU threads; null: one for each core")

    @model_validator(mode="after")
    def _coherent(self) -> TrainingSettings:
        if self.micro_batch is not None and self.batch % self.micro_batch:
            whole = [str(size) for size in range(1, self.batch + 1) if self.batch % size == 0]
            raise SettingsError(
                f"{self.micro_batch} does not divide batch: {self.batch}",
                path=("micro_batch",),
                hint=f"one of {', '.join(whole)}",
            )
        try:
            self.schedule.check(self.steps)
        except SettingsError as error:
            hint = error.hint or f"the run is training.steps: {self.steps} long"
            raise SettingsError(error.what, path=("schedule", *error.path), hint=hint) from None
        if not _DEVICE.match(self.device):
            raise SettingsError(
                f"unknown device '{self.device}'", path=("device",), hint="auto, cpu, cuda, cuda:1, mps"
            )
        return self

    @property
    def accumulate(self) -> int:
        """How many micro-batches make an update."""
        return self.batch // (self.micro_batch or self.batch)

    def rate(self, step: int, progress: float | None = None) -> float:
        """The learning rate of update `step` (counted from 0).

        progress: of a run that ends by the clock, the share of its time that is over; its schedule is
        that of `steps` updates, stretched over the time.
        """
        if progress is not None:
            step = min(int(progress * self.steps), self.steps - 1)
        return self.optimiser.learning_rate * self.schedule.share(step, self.steps)
