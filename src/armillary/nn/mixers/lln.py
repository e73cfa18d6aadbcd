"""Linear Log-Normal attention: features exp(αq) and exp(βk) whose weights spread like softmax's (Nahshan et al. 2024).

Softmax weights of normal q and k are log-normal, with log-variance σ_q²σ_k². Those of the features
have one of about a·(α²σ_q² + β²σ_k²) + b; so σ̃² = (σ_q²σ_k² − b) / (2a), α = σ̃/σ_q, β = σ̃/σ_k match
the two. LLN+Diag averages this with softmax attention inside blocks of tokens.

The published a and b belong to heads of 64 features; by default they are fitted to the head's width,
see `fitted`. The published code takes σ and a stabiliser from the whole batch, later tokens
included. Here σ are running averages over updates, which stand still otherwise, and the stabiliser
is the largest key so far. A block counts tokens from the start of a document, or of the row.
"""

from __future__ import annotations

import functools
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost
from armillary.nn.example import Example, Limit
from armillary.nn.mask import Causal, Documents, Keys, Mask, Window
from armillary.nn.mechanism import Capabilities, Frozen, Place, mixers
from armillary.nn.mixers.linear import TINY, KernelAttention, KernelSettings, tokens_so_far
from armillary.nn.ops.attend import attend
from armillary.nn.ops.linear import linear_attend
from armillary.nn.state import FixedState, State

PUBLISHED = (0.14855178, -0.35487039)  # the released code's a and b, for heads of 64
SLOWEST = 0.01  # share of an update in the running averages once there were a hundred


@mixers.register
class LLNSettings(KernelSettings):
    """φ(q) Σ φ(k)ᵀ v / φ(q) Σ φ(k), φ(q) = exp(αq), φ(k) = exp(βk); averaged with softmax in blocks."""

    kind: ClassVar[str] = "lln"
    source: ClassVar[str] = "Nahshan et al. 2024, Linear Log-Normal Attention with Unbiased Concentration"
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_lln.py: the paper's equations with every pair written out, outputs and gradients; "
        "log-variances of softmax and of the features by simulation"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(bidirectional=True, state="fixed", rollback="snapshot")
    diagonal: bool = Field(True, description="average with softmax attention inside blocks (LLN+Diag)")
    block: int | None = Field(None, gt=0, description="tokens of a block; by default as many as a head has features")
    constants: Literal["fitted", "published"] = Field("fitted", description="a and b: of the head's width, or of 64")

    @classmethod
    def examples(cls) -> list[Example]:
        both = {"order": "bidirectional"}
        return [
            Example("diagonal", cls(heads=2, block=5)),
            Example("alone", cls(diagonal=False)),
            Example("published", cls(constants="published")),
            Example("diagonal_bidirectional", cls(heads=2, block=3), both),
            Example("alone_bidirectional", cls(diagonal=False), both),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("matrix", Example("one_head", cls(heads=1, diagonal=False)), _matrix)]

    def build(self, place: Place) -> LogNormal:
        return LogNormal(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        each = self.size(place.width)
        block = self.block or each
        flops = self.products(place.width, length) + self.kernel_flops(place, length, each, True)
        flops += length * self.heads * 5.0 * each  # α, β; the queries' largest feature, difference, exponential
        state = self.state_bytes(place, each, True)
        if self.diagonal:
            pairs = length // block * block**2 + (length % block) ** 2
            flops += self.heads * (pairs * (4.0 * each + 6) + 2 * length * each)
            if place.order == "causal":
                state += 2.0 * self.heads * block * each * itemsize + 8
        return Cost(flops, state)


class LogNormal(KernelAttention):
    """State beside the sums: keys and values of the block at hand, [B, H, block, K], and the tokens seen, [B].

    Buffers: `deviations` (σ_q, σ_k), `updates` that they are an average of, and `sums` of what the
    update at hand has shown: number, sum and sum of squares of the entries of q and of k.
    """

    logarithmic = True
    deviations: Tensor
    updates: Tensor
    sums: Tensor

    def __init__(self, settings: LLNSettings, place: Place) -> None:
        each = settings.size(place.width)
        super().__init__(settings, place, each, TINY)
        self.block = (settings.block or each) if settings.diagonal else None
        self.slope, self.intercept = fitted(each) if settings.constants == "fitted" else PUBLISHED
        self.register_buffer("deviations", torch.ones(2))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("sums", torch.zeros(2, 3))

    def reset(self, generator: torch.Generator | None) -> None:
        self.deviations.fill_(1.0)  # of a product of normed inputs, as it starts
        self.updates.zero_()
        self.sums.zero_()

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        """After an update: what its calls have shown enters the running averages."""
        sums = self.sums.double()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        count, total, squares = sums.unbind(1)
        self.sums.zero_()
        if not bool((count > 0).all()):
            return
        self.updates += 1
        share = max(1 / int(self.updates), SLOWEST)
        found = (squares / count - (total / count).square()).clamp(min=1e-12).sqrt()
        self.deviations.lerp_(found.to(self.deviations), share)

    def temperatures(self) -> tuple[Tensor, Tensor]:
        """α and β, in float32 at least."""
        sigma = self.deviations.to(torch.promote_types(self.deviations.dtype, torch.float32))
        matched = ((sigma.prod().square() - self.intercept) / (2 * self.slope)).clamp(min=1e-6).sqrt() / sigma
        return matched[0], matched[1]

    def queries(self, q: Tensor) -> Tensor:
        scaled = q.to(torch.promote_types(q.dtype, torch.float32)) * self.temperatures()[0]
        return scaled.add_(-scaled.detach().amax(-1, keepdim=True)).exp_()

    def keys(self, k: Tensor) -> Tensor:
        return k.to(torch.promote_types(k.dtype, torch.float32)) * self.temperatures()[1]

    def kernel(self, q: Tensor, k: Tensor, x: Tensor, ctx: Context, before: Tensor | None) -> dict[str, Tensor | None]:
        real = ctx.present(x)
        if ctx.training is not None:
            self._look(q, k, real)
        return {**super().kernel(q, k, x, ctx, before), "whole_q": q, "whole_k": k, "real": real}

    @torch.no_grad()
    def _look(self, q: Tensor, k: Tensor, real: Tensor | None) -> None:
        for row, part in enumerate((q, k)):
            wide = part.detach().to(self.sums.dtype)
            kept = wide if real is None else wide * real[..., None, None]
            count = float(part.numel()) if real is None else real.sum() * part.shape[2] * part.shape[3]
            self.sums[row] += torch.stack([torch.zeros_like(kept.sum()) + count, kept.sum(), kept.square().sum()])

    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        mixed = super().mix(frozen, values)
        if self.block is None or frozen.weights is not None:
            return mixed
        return (mixed + self._diagonal(frozen, values)) * 0.5

    def _diagonal(self, frozen: Frozen, values: Tensor) -> Tensor:
        """Softmax attention inside blocks, [B, T, H, V]."""
        assert self.block is not None
        parts = frozen.parts
        q, k, real, documents = parts["whole_q"], parts["whole_k"], parts["real"], parts["documents"]
        if real is None and documents is None:
            whole = q.shape[1] // self.block * self.block
            pieces = []
            for part, size in ((slice(0, whole), self.block), (slice(whole, None), q.shape[1] - whole)):
                if q[:, part].shape[1]:
                    pieces.append(self._blocks(q[:, part], k[:, part], values[:, part], size))
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
        there = torch.ones_like(documents) if real is None else real.long()
        index = tokens_so_far(there, documents) - 1
        begins = (index % self.block == 0) & there.bool()
        block = begins.long().cumsum(1)
        mask: Mask = Documents(block, block)
        causal = self.order == "causal"
        if real is None:  # without gaps a block is near
            mask = mask & Window(self.block - 1, 0 if causal else self.block - 1)
        else:
            mask = mask & Keys(real) if not causal else mask & Keys(real) & Causal()
        return self._attend(q, k, values, mask)

    def _blocks(self, q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
        """Every `size` tokens of [B, T, H, ·] by themselves."""
        batch, length = q.shape[:2]
        q, k, v = (z.reshape(batch * (length // size), size, *z.shape[2:]) for z in (q, k, v))
        y = self._attend(q, k, v, Causal() if self.order == "causal" else None)
        return y.reshape(batch, length, *y.shape[2:])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        return attend(q, k, v, mask=mask, scale=self.width**-0.5)[0].transpose(1, 2)

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        state = super().init_state(batch, capacity, dtype, device, memory)
        if self.block is not None:
            shape = (batch, self.heads, self.block, self.width)
            state.tensors |= {name: torch.zeros(shape, dtype=dtype, device=device) for name in ("k", "v")}
            state.tensors["count"] = torch.zeros(batch, dtype=torch.int64, device=device)
        return state

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        assert isinstance(state, FixedState)
        values = self.values(x, ctx)
        if ctx.taps is not None:
            values = self.tapped_values(values, ctx)
        parts = self._frozen(x, ctx, state.tensors["scale"]).parts
        mixed, held = linear_attend(
            parts["q"],
            parts["k"],
            values,
            eps=self.eps,
            scale=parts["scale"],
            state=state.tensors["matrix"],
            before=state.tensors["scale"],
        )
        assert held is not None
        state.put("matrix", held)
        state.put("scale", parts["scale"][:, -1])
        if self.block is not None:
            mixed = (mixed + self._continued(parts["whole_q"], parts["whole_k"], values, state, ctx)) * 0.5
        if ctx.taps is not None:
            mixed = ctx.taps(f"{self.path}.mixed", mixed)
        return self.finish(mixed, x, ctx)

    def _continued(self, q: Tensor, k: Tensor, v: Tensor, state: FixedState, ctx: Context) -> Tensor:
        """The diagonal half of a chunk: its tokens take their places behind those of the block at hand, in
        a grid of whole blocks, so that rows may stand at different places of theirs."""
        assert self.block is not None
        batch, length = q.shape[:2]
        count = state.tensors["count"]
        added = torch.full_like(count, length) if ctx.lengths is None else ctx.lengths.to(count)
        used = (count % self.block)[:, None]
        size = self.block * ((self.block + length - 2) // self.block + 2)  # one block more, to begin if this one fills
        place = torch.arange(size, device=q.device)[None]
        source = torch.where(place < used, place, place - used + self.block)  # among block entries, then the chunk
        filled = place < used + added[:, None]
        source = torch.where(filled, source, 0)[:, :, None, None].expand(-1, -1, self.heads, self.width)
        empty = ~filled[:, :, None, None]
        grid = {}
        for name, part in (("k", k), ("v", v)):
            joined = torch.cat([state.tensors[name].transpose(1, 2).to(part.dtype), part], 1)
            grid[name] = joined.gather(1, source).masked_fill(empty, 0)
        joined = torch.cat([q.new_zeros(batch, self.block, self.heads, self.width), q], 1)
        y = self._blocks(joined.gather(1, source), grid["k"], grid["v"], self.block)
        steps = torch.arange(length, device=q.device)[None] + used
        y = y.gather(1, steps[:, :, None, None].expand(-1, -1, self.heads, self.width))
        current = (used + added[:, None]) // self.block * self.block + torch.arange(self.block, device=q.device)
        current = current[:, :, None, None].expand(-1, -1, self.heads, self.width)
        for name, part in grid.items():
            state.put(name, part.gather(1, current).transpose(1, 2).to(state.tensors[name].dtype))
        state.put("count", count + added)
        return y


@functools.lru_cache
def fitted(width: int) -> tuple[float, float]:
    """a and b with Var log Σ_f exp(s z_f) ≈ a·s² + b for `width` normal z_f: αq + βk has s² = α²σ_q² + β²σ_k².

    Least squares over the s at which the variance, simulated with a fixed seed, lies from 1/2 to 2:
    around that of softmax weights at σ_q = σ_k = 1, which is 1. The variance is convex in s², so b ≤ 0.
    """
    samples = max(4096, min(16384, 2**21 // width))
    z = np.random.default_rng(0).standard_normal((samples, width), dtype=np.float32)
    s = np.linspace(0.5, 5.5, 21, dtype=np.float32)
    top = z.max(1)  # log Σ exp(s z) = s·top + log Σ exp(s (z − top))
    below = z - top[:, None]
    spread = np.array([np.var(each * top + np.log(np.exp(each * below).sum(1))) for each in s], dtype=np.float64)
    near = (spread >= 0.5) & (spread <= 2)
    a, b = np.polyfit(s[near].astype(np.float64) ** 2, spread[near], 1)
    return round(float(a), 4), round(float(b), 4)


def _matrix(mixer: LogNormal, x: Tensor, ctx: Context) -> Tensor:
    """One causal head with every pair written out."""
    q, k, v = (x @ product.weight.t() for product in (mixer.q, mixer.k, mixer.v))
    alpha, beta = mixer.temperatures()
    weights = torch.logsumexp((alpha * q)[:, :, None] + (beta * k)[:, None], -1)
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    mixed = torch.softmax(weights.masked_fill(later, -torch.inf), -1) @ v
    return mixed @ mixer.o.weight.t()  # type: ignore[no-any-return]
