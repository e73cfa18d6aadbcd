"""Attention under a mask that is learned: which tokens may see which, found by gradients, then fixed.

Shi et al. 2021, SparseBERT: Rethinking the Importance Analysis in Self-attention (its differentiable attention
mask). In an update every entry M is a relaxed Bernoulli draw of a trained logit α and the scores become s −
c·(1 − M); outside updates, and in training once `frozen`, the mask is α > 0 and closed entries are not seen
at all. Structured masks have one entry per distance |i − j|, unstructured ones one per pair of positions.
The loss gains λ‖M‖₁, taken at its mean, λ Σ σ(α). The paper shares one mask among all layers: `share: {mask:
[blocks.*.mixer.inner.gate]}` in the recipe; each layer that uses a mask pays for it.

Choices that the paper leaves open: a token always sees itself, or with `diagonal: false` never does (but for a
causal row's first), so its entry is not learned and no row is empty by learning alone; tokens further apart
than a structured mask reaches do not see each other. With `straight_through` draws are 0 or 1 and pass on the
gradient of a penalty of 1, since that of c = 10⁴ would drown all others. With `sparsity` the mask ends with
that share of its entries closed, whatever λ is: after every update the threshold is moved to the rank, and
the draws by a common shift to the mean, that close so many. The share grows from none along a cubic over
the first half of the run (the schedule of Zhu & Gupta 2017, To Prune, or Not to Prune); a λ alone closes
all of a group of entries at once, and what is closed in every draw learns nothing that would open it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from armillary.base.errors import InputError
from armillary.nn.context import Context
from armillary.nn.example import Example, Limit
from armillary.nn.mask import Mask, both
from armillary.nn.mechanism import Capabilities, Place, mixers
from armillary.nn.mixers.attention import Attention, AttentionSettings, Look
from armillary.nn.ops import readable
from armillary.nn.ops.attend import Modify
from armillary.nn.positions.rope import RopeSettings
from armillary.nn.training import attach, uniform

FAR = 1e4  # a threshold below every logit
START = 1e-3  # deviation of the two logits of an entry, of which α is the difference


@mixers.register
class LearnedMaskSettings(AttentionSettings):
    """softmax(q kᵀ / √K + position − c·(1 − M)) v with a trained mask M."""

    kind: ClassVar[str] = "learned_mask"
    source: ClassVar[str] = "Shi et al. 2021, SparseBERT: Rethinking the Importance Analysis in Self-attention"
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_learned_mask.py: dense attention under the thresholded mask; the relaxed form as loops"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(
        causal=True, bidirectional=True, mask=True, state="span", rollback="truncate", noise=True
    )
    tracked: ClassVar[bool] = True
    structured: bool = Field(True, description="one entry per distance; false: one per pair of positions")
    length: int | None = Field(None, gt=0, description="positions (distances) of the mask; by default model.context")
    temperature: float = Field(1.0, gt=0, description="of the relaxed draws")
    straight_through: bool = Field(True, description="draws are 0 or 1 and pass the gradient on")
    closing: float = Field(1e4, gt=0, description="c: what a closed entry takes from a score in an update")
    penalty: float = Field(5e-5, ge=0, description="λ: loss per entry expected open")
    sparsity: float | None = Field(
        None, gt=0, lt=1, description="share of the entries that is closed in the end; null: as λ has it"
    )
    frozen: bool = Field(False, description="keep the mask as it is found, thresholded, in updates too")

    @classmethod
    def examples(cls) -> list[Example]:
        rope, both_ways, short = RopeSettings(), {"order": "bidirectional"}, {"length": 24}
        return [
            Example("structured", cls(position=rope), short, compiled=True),
            Example("relaxed", cls(straight_through=False, closing=20.0, temperature=0.5), short),
            Example("unstructured", cls(structured=False, kv_heads=2), {"length": 32}),
            Example("both_ways", cls(position=rope), both_ways | short),
            Example("no_diagonal_both_ways", cls(structured=False, diagonal=False), both_ways | {"length": 32}),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("thresholded", Example("one_head", cls(heads=1)), _thresholded)]

    def build(self, place: Place) -> LearnedMask:
        return LearnedMask(self, place)


class Gate(nn.Module):
    """The mask's logits [H, T] or [H, T, T], above which of them an entry is open, and what is taken from them
    for the draws."""

    undecayed = ("logits",)
    threshold: Tensor
    shift: Tensor

    def __init__(self, settings: LearnedMaskSettings, place: Place) -> None:
        super().__init__()
        self.length = settings.length or place.length
        self.structured, self.penalty, self.sparsity = settings.structured, settings.penalty, settings.sparsity
        self.frozen, self.causal = settings.frozen, place.order == "causal"
        shape = (settings.heads, *[self.length] * (1 if self.structured else 2))
        self.logits = nn.Parameter(torch.empty(shape), requires_grad=not self.frozen)
        start = 0.0 if self.sparsity is None else -FAR
        self.register_buffer("threshold", torch.full((), start))
        self.register_buffer("shift", torch.full((), start))

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.normal_(self.logits, std=START * math.sqrt(2), generator=generator)

    def learned(self) -> Tensor:
        """Which entries are learned: not a token's own, nor, in a causal model, those that look ahead."""
        steps = torch.arange(self.length, device=self.logits.device)
        if self.structured:
            return steps > 0
        return steps[:, None] > steps if self.causal else steps[:, None] != steps

    def expected(self) -> Tensor:
        """The expected number of open entries, []."""
        return (torch.sigmoid(self.logits.float() - self.shift.float()) * self.learned()).sum()

    def open(self) -> Tensor:
        """The thresholded mask, bool as the logits; what is not learned is closed."""
        return (self.logits > self.threshold) & self.learned()

    def drawn(self, noise: Tensor, temperature: float) -> Tensor:
        """Relaxed entries in (0, 1) from uniform noise: the logistic form of two Gumbel variables."""
        logits = self.logits.float() - self.shift.float()
        return torch.sigmoid((logits + torch.log(noise) - torch.log1p(-noise)) / temperature)

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        """Threshold and shift for the sparsity that the run has come to."""
        if self.sparsity is None or self.frozen:
            return
        left = max(0.0, 1 - 2 * (step + 1) / steps)
        logits = self.logits.float()[self.learned().expand_as(self.logits)]
        shut = round(self.sparsity * (1 - left**3) * logits.numel())
        if shut == 0:
            return
        self.threshold.copy_(logits.kthvalue(shut).values)
        wanted = logits.numel() - shut
        low, high = logits.min() - 20, logits.max() + 20
        for _ in range(50):  # the expected number of open entries falls with the shift
            middle = (low + high) / 2
            many = torch.sigmoid(logits - middle).sum() > wanted
            low, high = torch.where(many, middle, low), torch.where(many, high, middle)
        self.shift.copy_(middle)


class LearnedMask(Attention):
    """x [B, T, D] → [B, T, D]."""

    def __init__(self, settings: LearnedMaskSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.gate = Gate(settings, place)
        self.temperature, self.closing = settings.temperature, settings.closing
        self.straight_through = settings.straight_through

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        y = super().finish(mixed, x, ctx)
        if self.gate.frozen or ctx.training is None:
            return y
        return attach(y, self.gate.penalty * self.gate.expected(), ctx)

    def narrow(self, mask: Mask | None, look: Look) -> Mask | None:
        mask = super().narrow(mask, look)
        assert look.keys is not None
        self._check(look)
        if look.ctx.training is not None and not self.gate.frozen:
            return mask
        return both(mask, Open(self.gate.open(), look.queries, look.keys))

    def modify(self, look: Look) -> Modify | None:
        drawn = uniform(look.ctx, self.path, "mask", self.gate.logits.shape, self.gate.logits.detach())
        if drawn is None or self.gate.frozen:
            return None
        return partial(self._closed, look, self.gate.drawn(drawn, self.temperature))

    def _closed(self, look: Look, soft: Tensor, scores: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        assert look.keys is not None
        queries, keys = look.queries[:, rows], look.keys[:, columns]
        mask = _looked_up(soft, queries, keys).to(scores.dtype)
        passed = mask - mask.detach() if self.straight_through else 0.0
        if self.straight_through:
            mask = (mask.detach() > 0.5).to(scores.dtype)
        own = queries[:, None, :, None] == keys[:, None, None]
        return torch.where(own, scores, scores - self.closing * (1 - mask) + passed)

    def _check(self, look: Look) -> None:
        if self.gate.structured or not readable(look.queries):
            return
        last = int(look.queries.max())
        if last >= self.gate.length:
            raise InputError(
                f"position {last} is beyond the {self.gate.length} positions of the learned mask",
                hint="shorten the input, train with a larger length, or take structured: true",
            )


@dataclass(frozen=True, eq=False)
class Open(Mask):
    """The open entries of a table [H, T] or [H, T, T], and every token itself; positions [B or 1, T] and
    [B or 1, S]."""

    table: Tensor
    queries: Tensor
    keys: Tensor

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        queries, keys = self.queries[:, q], self.keys[:, k]
        return _looked_up(self.table, queries, keys) | (queries[:, None, :, None] == keys[:, None, None])


def _looked_up(table: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Entries [B or 1, H, q, S] for positions [B or 1, q] and [B or 1, S]."""
    length = table.shape[1]
    if table.dim() == 3:
        batch = torch.broadcast_shapes(queries.shape[:1], keys.shape[:1])[0]
        queries, keys = (each.clamp(max=length - 1).expand(batch, -1) for each in (queries, keys))
        return table[:, queries[:, :, None], keys[:, None]].transpose(0, 1)
    distance = (queries[:, :, None] - keys[:, None]).abs().clamp(max=length)
    return F.pad(table, (0, 1))[:, distance].transpose(0, 1)


def _thresholded(mixer: LearnedMask, x: Tensor, ctx: Context) -> Tensor:
    """softmax over the distances whose logit is above 0, and the token itself, of one causal head."""
    steps = torch.arange(x.shape[1])
    distance = steps[:, None] - steps
    seen = (distance >= 0) & ((mixer.gate.logits[0, distance.abs()] > 0) | (distance == 0))
    q, k, v = (x @ product.weight.t() for product in (mixer.q, mixer.k, mixer.v))
    scores = (q @ k.transpose(1, 2) * mixer.scale).masked_fill(~seen, -torch.inf)
    return torch.softmax(scores, -1) @ v @ mixer.o.weight.t()  # type: ignore[no-any-return]
