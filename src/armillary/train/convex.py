"""Training a layer of attention to its global optimum, with a proof.

Ergen, Neyshabur & Mehta 2022, Convexifying Transformers: Improving Optimization and Understanding of
Transformer Networks.

The layer classifies (or scores) a sequence X [T, D] by heads that attend by place, not by content:

    f(X) = b + Σ_m (a_mᵀ X u_m) c_m,   a_m ≥ 0 over the T tokens, summing to 1,

with weight decay: mean loss + decay/2 · Σ_m (‖u_m‖² + ‖c_m‖²). In its heads this is not convex, and
gradient descent may end anywhere. In Z_t = Σ_m a_mt u_m c_mᵀ [D, C] it is: f is linear, and the least
that heads can pay for Z is Σ_t ‖Z_t‖_* (the nuclear norm; for one output the length), since sharing
attention between tokens never costs less than a head for each. So

    min over Z, b of   mean loss(b + Σ_t X_tᵀ Z_t) + decay · Σ_t ‖Z_t‖_*

has the same optimum, is solved to any accuracy, and leaves whole tokens unused. `gates` random gates
1[x·g ≥ 0] make it nonlinear: heads of gated values, which stay convex because the gates are not
learned. Where the paper's regulariser depends on its setting, the one here follows from weight decay
as above. Solved by accelerated proximal gradients (Beck & Teboulle 2009, FISTA; restarts as O'Donoghue
& Candès 2015), and certified by the duality gap: no heads, however many and however trained, can go
below `bound`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from armillary.base.errors import InputError, TrainingError

LossName = Literal["squared", "cross_entropy"]
CHECK = 10  # steps between two looks at the gap


@dataclass(frozen=True)
class Heads:
    """The heads of an optimum, M of them: attention [M, T], values [M, D], outputs [M, C], and the gate that each
    looks through, [M] int64 (all 0 without gates)."""

    attention: Tensor
    values: Tensor
    outputs: Tensor
    gates: Tensor


@dataclass(frozen=True)
class ConvexAttention:
    """A trained layer: call it on x [B, T, D] for outputs [B, C] (scores of classes, or predictions).

    weights: Z [gates, T, D, C] float64; intercept: [C]; gates: [gates, D], or None; decay: as used;
    objective: at these weights; bound: no weights go below it; gap: between the two; steps: taken.
    """

    weights: Tensor
    intercept: Tensor
    gates: Tensor | None
    decay: float
    objective: float
    bound: float
    steps: int

    @property
    def gap(self) -> float:
        return self.objective - self.bound

    def __call__(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        tokens, width = self.weights.shape[1:3]
        if x.dim() != 3 or x.shape[1:] != (tokens, width):
            raise InputError(f"x has shape {tuple(x.shape)}", hint=f"pass sequences [batch, {tokens}, {width}]")
        return _features(x, padding, self.gates) @ self.weights.flatten(0, 2) + self.intercept

    def attention(self) -> Tensor:
        """[T]: the share of each token in all that the layer reads; most are exactly 0."""
        sizes: Tensor = torch.linalg.matrix_norm(self.weights, "nuc").sum(0)
        return sizes / sizes.sum().clamp(min=1e-300)

    def heads(self) -> Heads:
        """Heads that compute the same and pay the same: as many as the ranks of all Z_t together."""
        u, s, v = torch.linalg.svd(self.weights, full_matrices=False)
        gate, token, rank = (s > 1e-12 * s.max().clamp(min=1e-300)).nonzero(as_tuple=True)
        root = s[gate, token, rank].sqrt()[:, None]
        attention = torch.nn.functional.one_hot(token, self.weights.shape[1]).to(s.dtype)
        return Heads(attention, u[gate, token, :, rank] * root, v[gate, token, rank] * root, gate)


def convex_attention(
    x: Tensor,
    y: Tensor,
    *,
    decay: float | None = None,
    padding: Tensor | None = None,
    gates: int = 0,
    seed: int = 0,
    tolerance: float = 1e-6,
    steps: int = 20000,
) -> ConvexAttention:
    """Train one layer of attention to its global optimum.

    x: [N, T, D] features of sequences (hidden states of a model, say); y: [N] int64 classes 0 … C − 1 for
    cross-entropy, or [N] or [N, C] numbers for half the squared error; decay: weight of the penalty, by
    default a tenth of the least that leaves nothing but the intercept; padding: [N, T], True for real
    tokens, the others count for nothing; gates: random gates, 0 for a linear layer; tolerance: the gap
    at which the optimum counts as reached, as a share of the objective without weights.

    Raises InputError for data that does not fit, TrainingError when `steps` do not reach the tolerance.
    """
    loss, targets = _checked(x, y, padding)
    for name, value, least in (("gates", gates, 0), ("steps", steps, 1)):
        if value < least:
            raise InputError(f"{name} must be at least {least}, found {value}")
    if not 0 < tolerance < 1 or (decay is not None and not 0 < decay < math.inf):
        raise InputError(f"tolerance and decay must be positive, found {tolerance} and {decay}")
    open_gates: Tensor | None = None
    if gates:
        generator = torch.Generator().manual_seed(seed)
        open_gates = torch.randn(gates, x.shape[2], generator=generator, dtype=torch.float64).to(x.device)
    problem = _Problem(_features(x, padding, open_gates), targets, loss, (max(1, gates) * x.shape[1], x.shape[2]))
    weights, done = problem.solve(decay, tolerance, steps)
    shape = (max(1, gates), x.shape[1], x.shape[2], targets.shape[1])
    return ConvexAttention(
        weights=weights.view(shape),
        intercept=done.intercept,
        gates=open_gates,
        decay=done.decay,
        objective=done.objective,
        bound=done.bound,
        steps=done.steps,
    )


def _checked(x: Tensor, y: Tensor, padding: Tensor | None) -> tuple[LossName, Tensor]:
    """The loss that y asks for, and y as [N, C] float64 (classes as ones and zeros)."""
    if x.dim() != 3 or not x.numel() or not x.dtype.is_floating_point or not bool(x.isfinite().all()):
        raise InputError(
            f"x is {x.dtype} of shape {tuple(x.shape)}", hint="pass finite numbers [sequences, tokens, features]"
        )
    if padding is not None and (padding.shape != x.shape[:2] or padding.dtype != torch.bool):
        raise InputError(f"padding has shape {tuple(padding.shape)}", hint=f"pass bool {list(x.shape[:2])}")
    if y.shape[:1] != x.shape[:1] or y.dim() > 2 or not y.numel():
        raise InputError(f"y has shape {tuple(y.shape)} for {len(x)} sequences", hint="pass one row for each")
    if y.dtype.is_floating_point:
        if not bool(y.isfinite().all()):
            raise InputError("y holds numbers that are not finite")
        return "squared", y.double().view(len(y), -1)
    if y.dim() != 1 or int(y.min()) < 0:
        raise InputError(f"y is {y.dtype} of shape {tuple(y.shape)}", hint="pass classes [sequences], counted from 0")
    counts = torch.bincount(y.long())
    if len(counts) < 2 or bool((counts == 0).any()):
        raise InputError(
            f"the classes 0 … {len(counts) - 1} do not all occur", hint="number those that occur, at least two, from 0"
        )
    return "cross_entropy", torch.nn.functional.one_hot(y.long()).double()


def _features(x: Tensor, padding: Tensor | None, gates: Tensor | None) -> Tensor:
    """x [N, T, D] → what the outputs are linear in, [N, gates·T·D] float64."""
    x = x.detach().double()
    if padding is not None:
        x = x.masked_fill(~padding[..., None], 0.0)
    if gates is None:
        return x.flatten(1)
    seen = x @ gates.t() >= 0  # [N, T, gates]
    return (x[:, None] * seen.permute(0, 2, 1)[..., None]).flatten(1)


@dataclass(frozen=True)
class _Point:
    """A look at one set of weights."""

    decay: float
    objective: float
    bound: float
    intercept: Tensor
    steps: int


class _Problem:
    """mean loss(A Z + b) + decay · Σ_blocks ‖Z_block‖_*, with b always at its best."""

    def __init__(self, features: Tensor, targets: Tensor, loss: LossName, blocks: tuple[int, int]) -> None:
        self.a, self.y, self.loss, self.blocks = features, targets, loss, blocks
        self.rows = len(features)
        small = features @ features.t() if features.shape[0] < features.shape[1] else features.t() @ features
        curvature = 1.0 if loss == "squared" else 0.5  # the most that the loss bends along any direction
        self.bend = curvature * float(torch.linalg.eigvalsh(small)[-1]) / self.rows
        self._intercept = torch.zeros(targets.shape[1], dtype=torch.float64, device=features.device)

    def solve(self, decay: float | None, tolerance: float, steps: int) -> tuple[Tensor, _Point]:
        weights = torch.zeros(self.a.shape[1], self.y.shape[1], dtype=torch.float64, device=self.a.device)
        start, _, slope = self._slope(weights)
        if decay is None:
            decay = 0.1 * float(self._sizes(slope).max())
        if self.bend == 0 or decay == 0:  # x says nothing
            return weights, _Point(decay, start, start, self._intercept, 0)
        goal = tolerance * max(start, 1e-300)
        ahead, momentum, point = weights, 1.0, self._look(weights, decay, 0)
        for step in range(1, steps + 1):
            if point.objective - point.bound <= goal:
                break
            _, _, slope = self._slope(ahead)
            after = self._shrunk(ahead - slope / self.bend, decay / self.bend)
            moved = after - weights
            if float(((ahead - after) * moved).sum()) > 0:  # the momentum leads uphill: start again without it
                momentum = 1.0
            following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            ahead, weights = after + (momentum - 1) / following * moved, after
            momentum = following
            if step % CHECK == 0 or step == steps:
                point = self._look(weights, decay, step)
        if point.objective - point.bound > goal:
            raise TrainingError(
                f"after {steps} steps the optimum is known to {point.objective - point.bound:.3g}, not to {goal:.3g}",
                hint="allow more steps, a larger decay or a larger tolerance",
            )
        return weights, point

    def _slope(self, weights: Tensor) -> tuple[float, Tensor, Tensor]:
        """Mean loss at the best intercept, its derivative by the outputs [N, C] (times N), and by the weights."""
        outputs = self.a @ weights
        if self.loss == "squared":
            self._intercept = (self.y - outputs).mean(0)
            errors = outputs + self._intercept - self.y
            return float(errors.square().sum()) / (2 * self.rows), errors, self.a.t() @ errors / self.rows
        self._intercept = _best_intercept(outputs, self.y, self._intercept)
        outputs = outputs + self._intercept
        value = float((torch.logsumexp(outputs, 1) - (outputs * self.y).sum(1)).mean())
        errors = torch.softmax(outputs, 1) - self.y
        return value, errors, self.a.t() @ errors / self.rows

    def _look(self, weights: Tensor, decay: float, step: int) -> _Point:
        """The objective, and a bound from the dual: the errors, shrunk until no token could gain from a weight."""
        value, errors, slope = self._slope(weights)
        objective = value + decay * float(_nuclear(self._split(weights)).sum())
        most = decay / max(float(self._sizes(slope).max()), 1e-300)
        if self.loss == "squared":
            square, along = float(errors.square().sum()), float((errors * self.y).sum())
            share = max(-most, min(most, -along / square)) if square else 0.0
            bound = -(share**2 * square / 2 + share * along) / self.rows
        else:
            chances = (min(1.0, most) * errors + self.y).clamp(min=0)
            bound = -float(torch.special.xlogy(chances, chances).sum()) / self.rows
        return _Point(decay, objective, bound, self._intercept, step)

    def _split(self, weights: Tensor) -> Tensor:
        """[blocks, D, C]."""
        return weights.view(*self.blocks, -1)

    def _sizes(self, slope: Tensor) -> Tensor:
        """The largest singular value of each block."""
        split = self._split(slope)
        sizes: Tensor = torch.linalg.matrix_norm(split, 2) if split.shape[2] > 1 else _lengths(split)
        return sizes

    def _shrunk(self, weights: Tensor, by: float) -> Tensor:
        """Every singular value of every block less `by`, 0 at the least."""
        split = self._split(weights)
        if split.shape[2] == 1:
            kept = (1 - by / _lengths(split).clamp(min=1e-300)).clamp(min=0)
            return (split * kept[:, None, None]).flatten(0, 1)
        u, s, v = torch.linalg.svd(split, full_matrices=False)
        shrunk: Tensor = u * (s - by).clamp(min=0)[:, None] @ v
        return shrunk.flatten(0, 1)


def _nuclear(split: Tensor) -> Tensor:
    sizes: Tensor = torch.linalg.matrix_norm(split, "nuc") if split.shape[2] > 1 else _lengths(split)
    return sizes


def _lengths(split: Tensor) -> Tensor:
    """[blocks, D, 1] → [blocks]."""
    sizes: Tensor = torch.linalg.vector_norm(split, dim=(1, 2))
    return sizes


def _best_intercept(outputs: Tensor, y: Tensor, start: Tensor) -> Tensor:
    """argmin over b [C] of the mean cross-entropy of outputs + b, by Newton's method with halved steps."""
    b = start - start.mean()
    classes = y.shape[1]
    level = torch.ones(classes, classes, dtype=b.dtype, device=b.device) / classes  # b + constant is the same

    def value(b: Tensor) -> float:
        return float((torch.logsumexp(outputs + b, 1) - ((outputs + b) * y).sum(1)).mean())

    for _ in range(60):
        chances = torch.softmax(outputs + b, 1)
        slope = (chances - y).mean(0)
        bend = torch.diag(chances.mean(0)) - chances.t() @ chances / len(y)
        step: Tensor = torch.linalg.lstsq(bend + level, slope[:, None]).solution[:, 0]
        gain = float(slope @ step)
        if gain < 1e-12:  # so near that a whole step, whose error is the square, ends at rounding
            return b - step
        now, scale = value(b), 1.0
        while scale > 1e-9 and value(b - scale * step) > now - 0.25 * scale * gain:
            scale /= 2
        b = b - scale * step
    return b
