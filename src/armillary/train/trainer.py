"""One update, whole: gradients of a batch, guards, clipping, AdamW, and what modules do after a step.

Everything random in an update comes from (seed, step), so a run goes on from its weights, AdamW's
moments and the number of the step alone, and nothing is lost by stopping anywhere.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from armillary.base.errors import CheckpointError, InputError, TrainingError
from armillary.checkpoints.assemble import pick_device
from armillary.data.batch import Batch
from armillary.nn.network import Network
from armillary.nn.training import Training
from armillary.objectives.base import Prepared, Vocabulary
from armillary.recipe.training import TrainingSettings
from armillary.train import compiling, distributed
from armillary.train.distributed import World
from armillary.train.heldout import told
from armillary.train.optimiser import build_optimiser, parameter_groups, set_rate
from armillary.train.precision import settled

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
MOMENTS = ("exp_avg", "exp_avg_sq")
RECENT = 64  # losses that the running median is taken of
FEWEST = 16  # losses before anything can be called a spike
MOST_SKIPPED = 20  # updates left out one after another before training gives up

Notice = Callable[[str], None]


@dataclass(frozen=True)
class Update:
    """What one call of `step` did.

    step: updates done, this one included; loss: mean nats of the targets; grad_norm: before
    clipping; rate: learning rate; tokens: seen by the network; skipped: why the weights did not
    move, or None; metrics: the objective's own, as means.
    """

    step: int
    loss: float
    grad_norm: float
    rate: float
    tokens: int
    skipped: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


class Trainer:
    """Moves a model by the rules of `training`: `loss = trainer.step(ids)`.

    model: a Network, or what holds one as `.network`; it stays on its device when training.device
    is auto. vocabulary: what the objective must know of the tokenizer. scales: factor on the
    learning rate by parameter name pattern. notice: takes sentences for the user.
    """

    def __init__(
        self,
        model: nn.Module,
        training: TrainingSettings,
        *,
        vocabulary: Vocabulary | None = None,
        seed: int = 0,
        scales: Mapping[str, float] | None = None,
        world: World | None = None,
        notice: Notice | None = None,
    ) -> None:
        network = model if isinstance(model, Network) else getattr(model, "network", None)
        if not isinstance(network, Network):
            raise InputError(f"a trainer needs a model, found {type(model).__name__}", hint="pass arm.build(…)")
        training = settled(training)
        training.objective.check(network.settings)
        self.model, self.network, self.training, self.seed = model, network, training, seed
        self.world = world or World()
        self.notice: Notice = notice or (lambda text: None)
        if training.device != "auto":
            network.to(pick_device(training.device))
            network.tie()
        network.compute(DTYPES[training.precision])
        network.recompute_blocks(training.recompute == "blocks")
        self.compiled = compiling.choose(network, training, ranks=self.world.size)
        if self.compiled.on:
            network.compile_blocks()
        if self.world.size > 1:
            distributed.shard(network, self.world)
        network.check_ties()
        size = network.settings.vocabulary or 0
        self.objective = training.objective.build(vocabulary or Vocabulary(size))
        groups = parameter_groups(network, training.optimiser, scales)
        self.names: dict[str, nn.Parameter] = {
            name: parameter for group in groups for name, parameter in zip(group["names"], group["params"], strict=True)
        }
        self.optimiser = build_optimiser(groups, training.optimiser)
        found = (getattr(module, "after_step", None) for module in network.modules())
        self.hooks: list[Callable[[int, int], object]] = [hook for hook in found if callable(hook)]
        asked = (getattr(module, "observe", None) for module in network.modules())
        self.observers: list[Callable[[], Mapping[str, float]]] = [ask for ask in asked if callable(ask)]
        self.steps_done = 0
        self.progress = None if training.seconds is None else 0.0  # of the time, moved on by who holds the clock
        self.last: Update | None = None
        self.stop_asked = False  # what this process asks for; `stop_agreed` is what all of them know
        self.stop_agreed = False
        self._recent: list[float] = []
        self._skipped_in_row = 0
        self._warned: set[str] = set()
        self._proved = not self.compiled.on

    # -- one update

    def step(self, batch: Tensor | Batch) -> float:
        """One update from a batch of token windows; returns the mean loss of its targets in nats.

        batch: ids [B, T] int64 (for the causal objective context + 1 tokens a row) or a Batch. With
        several processes each is given the same whole batch and computes its rows. Raises
        TrainingError when the loss or the gradient is not finite (unless guards.nan is skip), with
        the weights as they were.
        """
        step, steps = self.steps_done, self.training.steps
        if step >= steps and self.training.seconds is None:
            raise TrainingError(f"all {steps} steps are done", hint="training.steps says how many there are")
        batch = self._checked(batch)
        if not (self.model.training and self.network.training):
            self.model.train()
            self.network.train()
        with self._seeded(step):
            sums, divisor, tokens = self._gradients(batch, step)
        loss, grad_norm, metrics = self._judged(sums, divisor)
        why = self._fault(loss, grad_norm)
        rate = self.training.rate(step, self.progress)
        if why is None:
            self._clip(grad_norm)
            set_rate(self.optimiser, rate)
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.steps_done += 1
        if self.progress:  # how many there will be, as far as can be told
            steps = max(self.steps_done, round(step / self.progress))
        for hook in self.hooks:
            hook(self.steps_done, steps)
        self.last = Update(self.steps_done, loss, grad_norm, rate, tokens, why, metrics)
        return loss

    def observe(self) -> dict[str, float]:
        """What modules saw in the last update (the load of experts), of each name the largest."""
        found: dict[str, float] = {}
        for ask in self.observers:
            for name, value in ask().items():
                found[name] = max(found.get(name, value), value)
        return found

    def _gradients(self, batch: Batch, step: int) -> tuple[dict[str, float], float, int]:
        """Leaves the gradient of the mean loss in the parameters; returns loss, weight and metrics
        summed over the whole update, the divisor used, and how many tokens the network saw."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "objective", step))
        prepared = told(beside(self.objective.prepare(batch, generator), batch), batch, self.network)
        divisor = float(prepared.weights.sum()) or 1.0
        scale = self.world.size / divisor  # processes' gradients are averaged, and a sum is wanted
        rows = prepared.ids.shape[0]
        own = torch.arange(self.world.rank, rows, self.world.size)
        parts = own.split(self.training.micro_batch or len(own))
        sums: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            taken = take(prepared, None if len(part) == rows else part, rows, self.network.device)
            self.world.sync_gradients(self.network, number + 1 == len(parts))
            seed = derived_seed(self.seed, "call", step, self.world.rank, number)
            share = float(prepared.weights[part].sum()) * scale
            training = Training.of(seed, share, self.network.device)
            taken = dataclasses.replace(taken, inputs={**taken.inputs, "training": training})
            for name, value in self._backward(taken, scale).items():
                value = value.to(self.network.device, torch.float32)
                sums[name] = sums[name] + value if name in sums else value
        flat = torch.stack([*sums.values(), torch.tensor(float(self.stop_asked), device=self.network.device)])
        self.world.add(flat)
        *values, asked = flat.tolist()  # here the processor waits for the device
        self.stop_agreed = asked > 0
        return dict(zip(sums, values, strict=True)), divisor, prepared.ids.numel()

    def _backward(self, prepared: Prepared, scale: float) -> dict[str, Tensor]:
        try:
            loss = self.objective.loss(self.network, prepared)
            (loss.sum * scale).backward()
        except Exception as error:
            if self._proved or not compiling.failed_to_compile(error):
                raise
            reason = str(error).strip().splitlines()[0][:200]
            if self.training.compile == "yes":
                raise TrainingError(
                    f"the blocks cannot be compiled: {reason}", hint="set training.compile=no"
                ) from error
            self.notice(f"blocks run eagerly after all: compiling failed ({reason})")
            compiling.uncompile(self.network)
            self.compiled = compiling.CompileChoice(False, "blocks run eagerly: compiling failed")
            self._proved = True
            self.optimiser.zero_grad(set_to_none=True)
            return self._backward(prepared, scale)
        self._proved = True
        return {"sum": loss.sum.detach(), "weight": loss.weight.detach(), **loss.metrics}

    def _judged(self, sums: dict[str, float], divisor: float) -> tuple[float, float, dict[str, float]]:
        """Mean loss, gradient norm and mean metrics."""
        weight = sums.pop("weight") or 1.0
        loss = sums.pop("sum") / weight
        grads = [p.grad for p in self.names.values() if p.grad is not None]
        norm = distributed.whole(torch.nn.utils.get_total_norm(grads)) if grads else torch.zeros(())
        grad_norm = float(norm)
        if abs(weight / divisor - 1) > 1e-6 and math.isfinite(weight):
            # The objective divides by something that it knows only after the network has run.
            torch._foreach_mul_(grads, divisor / weight)
            grad_norm *= divisor / weight
        return loss, grad_norm, {name: value / weight for name, value in sums.items()}

    def _fault(self, loss: float, grad_norm: float) -> str | None:
        """Why this update must not be made; raises where the guards say stop."""
        guards, number = self.training.guards, self.steps_done + 1
        why: str | None = None
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            what = "the loss" if not math.isfinite(loss) else "the gradient"
            why = f"{what} is not finite"
            if guards.nan == "stop":
                self.optimiser.zero_grad(set_to_none=True)
                raise TrainingError(why, where=f"step {number}", hint="a lower learning rate often mends this")
        elif guards.spike is not None and len(self._recent) >= FEWEST:
            usual = statistics.median(self._recent)
            if loss > guards.spike * usual:
                said = f"the loss rose to {loss:.4g}, usually {usual:.4g}"
                if guards.on_spike == "stop":
                    self.optimiser.zero_grad(set_to_none=True)
                    raise TrainingError(said, where=f"step {number}", hint="set guards.on_spike to skip or warn")
                why = said if guards.on_spike == "skip" else None
                if why is None:
                    self.notice(f"step {number}: {said}")
        if why is None:
            self._skipped_in_row = 0
            self._recent = [*self._recent[-(RECENT - 1) :], loss]
            if grad_norm == 0.0 and "zero" not in self._warned:
                self._warned.add("zero")
                self.notice(f"step {number}: the gradient is exactly zero, so the model does not learn")
            return None
        self._skipped_in_row += 1
        if self._skipped_in_row >= MOST_SKIPPED:
            self.optimiser.zero_grad(set_to_none=True)
            raise TrainingError(f"{MOST_SKIPPED} updates in a row were left out: {why}", where=f"step {number}")
        self.notice(f"step {number} is left out: {why}")
        return why

    def _clip(self, grad_norm: float) -> None:
        limit = self.training.optimiser.clip
        if limit is not None and grad_norm > limit:
            grads = [p.grad for p in self.names.values() if p.grad is not None]
            torch._foreach_mul_(grads, limit / (grad_norm + 1e-6))

    def _checked(self, batch: Tensor | Batch) -> Batch:
        batch = batch if isinstance(batch, Batch) else Batch(batch)
        ids, vocabulary = batch.ids, self.network.settings.vocabulary or 0
        if ids.dim() != 2 or ids.dtype != torch.int64 or not ids.numel():
            raise InputError(
                f"a batch of shape {tuple(ids.shape)} and type {ids.dtype}",
                hint="pass int64 ids of shape [batch, time]",
            )
        for name, tensor in batch.side.items():
            if tensor.shape[:1] != ids.shape[:1]:
                raise InputError(
                    f"the side tensor '{name}' has shape {tuple(tensor.shape)} for {len(ids)} rows",
                    hint="its first axis is the batch",
                )
        if ids.device.type == "cpu" and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise InputError(f"the batch holds an id outside the vocabulary of {vocabulary}")
        if self.objective.tokens(1) > ids.shape[1]:
            raise InputError(f"windows of {ids.shape[1]} token(s) ask for nothing", hint="give longer ones")
        if len(ids) % self.world.size:
            raise InputError(f"{len(ids)} rows cannot be shared by {self.world.size} processes")
        return batch

    @contextmanager
    def _seeded(self, step: int) -> Iterator[None]:
        """Noise of this update (dropout) from (seed, step, rank); the caller's generators stay as they were."""
        device = self.network.device
        devices = [device] if device.type in ("cuda", "xpu") else []
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            torch.manual_seed(derived_seed(self.seed, "noise", step, self.world.rank))
            yield

    # -- stopping and going on

    def state(self, *, weights: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name and plain data, enough to go on bit for bit.

        Names: `weights.X` (parameters and persistent buffers, when asked for), `exp_avg.X` and
        `exp_avg_sq.X`. The tensors are the live ones; clone what must outlast the next step.
        """
        tensors: dict[str, Tensor] = {}
        if weights:
            twins = self.network.tied_names()
            tensors |= {
                f"weights.{name}": value.detach()
                for name, value in self.network.state_dict().items()
                if name not in twins
            }
        updates: dict[str, int] = {}
        for name, parameter in self.names.items():
            held = self.optimiser.state.get(parameter)
            if held:
                updates[name] = int(held["step"])
                tensors |= {f"{moment}.{name}": held[moment] for moment in MOMENTS}
        info = {
            "step": self.steps_done,
            "seed": self.seed,
            "updates": updates,
            "recent": list(self._recent),
            "skipped_in_row": self._skipped_in_row,
        }
        return tensors, info

    def load_state(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; without `weights.X` the network keeps its own.

        Raises CheckpointError naming what is missing, extra or of another shape; nothing is changed then.
        """
        updates: dict[str, int] = dict(info["updates"])
        wanted = {f"{moment}.{name}": self.names[name] for name in updates if name in self.names for moment in MOMENTS}
        given = {name: value for name, value in tensors.items() if not name.startswith("weights.")}
        stored = {name.removeprefix("weights."): v for name, v in tensors.items() if name.startswith("weights.")}
        unknown = [name for name in updates if name not in self.names]
        if unknown:
            raise CheckpointError(f"the optimiser's state has an unknown parameter '{unknown[0]}'")
        missing, extra = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
        if missing or extra:
            one = (missing or extra)[0]
            raise CheckpointError(f"the optimiser's state {'lacks' if missing else 'has an unknown'} '{one}'")
        own = self.network.state_dict() if stored else {}
        for name in self.network.tied_names():
            own.pop(name, None)
        if own.keys() != stored.keys():
            one = sorted(own.keys() ^ stored.keys())[0]
            raise CheckpointError(f"the weights {'lack' if one in own else 'have an unknown'} '{one}'")
        for name, like in [*wanted.items(), *own.items()]:
            value = given[name] if name in wanted else stored[name]
            if value.shape != like.shape:
                raise CheckpointError(f"'{name}' has shape {tuple(value.shape)}, not {tuple(like.shape)}")
        with torch.no_grad():
            for name, like in own.items():
                like.copy_(distributed.spread(stored[name], like))
        for name, count in updates.items():
            parameter = self.names[name]
            held: dict[str, Any] = {"step": torch.tensor(float(count), device=parameter.device)}
            for moment in MOMENTS:
                held[moment] = distributed.spread(given[f"{moment}.{name}"], parameter).clone()
            self.optimiser.state[parameter] = held
        self.steps_done = int(info["step"])
        self._recent = [float(loss) for loss in info["recent"]]
        self._skipped_in_row = int(info["skipped_in_row"])
        self.network.check_ties()


def derived_seed(*parts: object) -> int:
    """A 63-bit seed from what it is for: neighbouring steps and runs share nothing."""
    text = "armillary train 1|" + "|".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def beside(prepared: Prepared, batch: Batch) -> Prepared:
    """With the side tensors that the batch brings."""
    if not batch.side:
        return prepared
    side = {**prepared.inputs.get("side", {}), **batch.side}
    return dataclasses.replace(prepared, inputs={**prepared.inputs, "side": side})


def take(prepared: Prepared, rows: Tensor | None, count: int, device: torch.device) -> Prepared:
    """Some rows of a prepared batch (None: all), on the device."""

    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            picked = value if rows is None or not value.dim() or value.shape[0] != count else value[rows]
            return picked.to(device, non_blocking=True)
        if isinstance(value, Mapping):
            return {name: part(item) for name, item in value.items()}
        return value

    return Prepared(part(prepared.ids), part(prepared.targets), part(prepared.weights), part(prepared.inputs))


__all__ = ["Trainer", "Update", "derived_seed", "take"]
