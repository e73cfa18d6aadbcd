"""Mamba-2: a selective state space whose heads decay by one number each (Dao & Gu 2024, Transformers are SSMs).

S ← exp(Δ_t A)·S + Δ_t B_tᵀ x_t, y_t = C_t S + D x_t: a matrix state with decay in which C is the query,
B the key and Δx the value, so the same chunks serve it as serve linear attention. x, B and C pass a
short convolution first; the output is gated by z, then normed in groups. Products are apart where the
published code has one for all: `gate` is z, `v` x, `k` B, `q` C, `step` Δ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from armillary.base.errors import UnsupportedError
from armillary.nn.context import Context
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import Capabilities, Frozen, MixerSettings, Place, mixers
from armillary.nn.ops.decay import decay_attend
from armillary.nn.ops.short_conv import short_conv_flops
from armillary.nn.recurrent import MatrixMixer, ShortConvolution, StepDecay
from armillary.nn.state import State
from armillary.nn.steps.recurrent import matrix, scaled, sums
from armillary.nn.tape import Buffer, Tape, record


@mixers.register
class Mamba2Settings(MixerSettings):
    """norm(silu(z) · (C S + D x)), S ← exp(Δ A)·S + Δ Bᵀx."""

    kind: ClassVar[str] = "mamba2"
    source: ClassVar[str] = (
        "Dao & Gu 2024, Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State "
        "Space Duality"
    )
    oracle: ClassVar[str] = "tests/nn/mixers/test_mamba2.py: transformers' Mamba-2 layer, outputs and gradients"
    capabilities: ClassVar[Capabilities] = Capabilities(state="fixed", rollback="snapshot")
    expand: float = Field(2.0, gt=0, description="width of the values relative to the model's")
    head_width: int = Field(64, gt=0, description="value features per head, which share a decay")
    state_width: int = Field(128, gt=0, description="features of B and C: rows of a head's matrix state")
    groups: int = Field(1, gt=0, description="groups of heads that share B and C, each normed by itself")
    taps: int = Field(4, gt=0, description="tokens that the short convolution sees")
    decays: tuple[float, float] = Field((1.0, 16.0), description="−A starts uniformly between these")
    steps: tuple[float, float] = Field((0.001, 0.1), description="steps Δ start log-uniformly between these")
    step_limits: tuple[float, float | None] = Field((0.0, None), description="steps are kept between these")
    epsilon: float = Field(1e-5, gt=0, description="added to the mean square of the norm")

    @model_validator(mode="after")
    def _coherent(self) -> Mamba2Settings:
        StepDecay.check(self.decays, self.steps)
        low, limit = self.step_limits
        if low < 0 or (limit is not None and limit <= low):
            end = "null" if limit is None else f"{limit:g}"
            raise ValueError(f"step_limits must be two numbers ≥ 0 in order, not {low:g} and {end}")
        return self

    @classmethod
    def examples(cls) -> list[Example]:
        small: dict[str, Any] = {"head_width": 8, "state_width": 4}
        return [
            Example("published", cls(**small)),
            Example("groups", cls(groups=2, taps=2, step_limits=(0.05, 1.0), **small)),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("every_pair", Example("one_group", cls(head_width=8, state_width=4)), _every_pair)]

    def heads(self, width: int) -> int:
        values = int(width * self.expand)
        if values % self.head_width:
            raise UnsupportedError(
                f"{values} value features do not divide into heads of {self.head_width}",
                hint="change width, expand or head_width",
            )
        heads = values // self.head_width
        if heads % self.groups:
            raise UnsupportedError(
                f"{heads} heads do not divide into {self.groups} groups",
                hint="change groups, head_width, expand or width",
            )
        return heads

    def build(self, place: Place) -> Mamba2:
        return Mamba2(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        heads, width = self.heads(place.width), place.width
        values, keys = heads * self.head_width, self.groups * self.state_width
        channels = values + 2 * keys
        flops = 2 * linear_flops(width, values, length) + 2 * linear_flops(width, keys, length)
        flops += linear_flops(width, heads, length) + linear_flops(values, width, length)
        flops += short_conv_flops(channels, self.taps, length)
        flops += StepDecay.flops(heads, length, limited=True)
        # Per token and head: decay, outer product and sum of the state, then its product with C.
        flops += length * heads * (5.0 * self.state_width * self.head_width + 1)
        flops += length * values * 3.0  # Δx, D x and their sum
        flops += length * (6.0 * values + 2 * self.groups)  # gate and norm
        state = 4.0 * values * self.state_width + (self.taps - 1) * channels * itemsize
        return Cost(flops, state)


class Mamba2(MatrixMixer):
    """x [B, T, D] → [B, T, D]; state: a float32 matrix [B, H, N, P] and the convolutions' tails.

    Sight is by what reaches the output of a head: values are x after its convolution, and the skip D
    lies on the matrix's diagonal.
    """

    sized = "expand, head_width, state_width, groups and taps"

    def __init__(self, settings: Mamba2Settings, place: Place) -> None:
        super().__init__(settings, place)
        self.settings = settings
        self.heads = self.value_groups = settings.heads(place.width)
        self.groups, self.keys, self.width = settings.groups, settings.state_width, settings.head_width
        values, keys = self.heads * self.width, self.groups * self.keys
        self.gate = place.product(place.width, values, "gate")
        self.v = place.product(place.width, values, "v")
        self.k = place.product(place.width, keys, "k")
        self.q = place.product(place.width, keys, "q")
        self.step = place.product(place.width, self.heads, "step")
        self.o = place.product(values, place.width, "o")
        self.conv_v = ShortConvolution(values, settings.taps, "conv_v", bias=True)
        self.conv_k = ShortConvolution(keys, settings.taps, "conv_k", bias=True)
        self.conv_q = ShortConvolution(keys, settings.taps, "conv_q", bias=True)
        self.decay = StepDecay(self.heads, settings.decays, settings.steps, settings.step_limits)
        self.skip = nn.Parameter(torch.empty(self.heads))
        self.norm_weight = nn.Parameter(torch.empty(values))

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.ones_(self.skip)
        nn.init.ones_(self.norm_weight)

    def values(self, x: Tensor, ctx: Context, state: State | None = None) -> Tensor:
        return self.conv_v(self.v(x), ctx, state).unflatten(-1, (self.heads, self.width))  # type: ignore[no-any-return]

    def freeze(self, x: Tensor, ctx: Context, state: State | None = None) -> Frozen:
        q = self.conv_q(self.q(x), ctx, state).unflatten(-1, (self.groups, self.keys))
        k = self.conv_k(self.k(x), ctx, state).unflatten(-1, (self.groups, self.keys))
        if ctx.taps is not None:
            q, k = ctx.taps(f"{self.path}.q", q), ctx.taps(f"{self.path}.k", k)
        step = self.decay(self.step(x))
        real = ctx.present(x)
        if real is not None:
            step = step * real[..., None]  # a token that is not there neither decays the state nor enters it
        if ctx.taps is not None:
            step = ctx.taps(f"{self.path}.step", step)
            if real is not None:  # whatever an edit made of it
                step = step * real[..., None]
        decay = self.decay.log_decays(step)
        return Frozen({"q": q, "k": k, "step": step, "decay": decay, "documents": ctx.documents})

    def mixed(self, parts: Mapping[str, Any], values: Tensor, matrix: Tensor | None) -> tuple[Tensor, Tensor]:
        v = values * parts["step"][..., None]
        y, end = decay_attend(parts["q"], parts["k"], v, parts["decay"], state=matrix, documents=parts["documents"])
        return y + values * self.skip.to(y.dtype)[:, None], end

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        gated = mixed.flatten(2) * F.silu(self.gate(x).to(mixed.dtype))
        grouped = gated.unflatten(-1, (self.groups, -1))
        scale = torch.rsqrt((grouped * grouped).mean(-1, keepdim=True) + self.settings.epsilon)
        normed = (grouped * scale).flatten(2) * self.norm_weight.to(mixed.dtype)
        return self.o(normed.to(x.dtype))  # type: ignore[no-any-return]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "matrix": (self.heads, self.keys, self.width),
            **{conv.name: conv.shape() for conv in (self.conv_v, self.conv_k, self.conv_q)},
        }

    def record(self, tape: Tape, x: Buffer, state: State) -> Buffer:
        (held,) = sums(tape, state, "matrix")
        unit = self.keys if self.groups == self.heads else None
        q = self.conv_q.record(tape, record(self.q, tape, x, unit=unit), state)
        k = self.conv_k.record(tape, record(self.k, tape, x, unit=unit), state)
        v = self.conv_v.record(tape, record(self.v, tape, x, unit=self.width), state)
        fades = self.decay.record(tape, record(self.step, tape, x, unit=1))
        mixed = matrix(tape, q, k, v, held, groups=self.groups, fades=fades)
        scaled(tape, mixed, self.skip, v)
        gated = tape.activate(record(self.gate, tape, x, unit=self.width), F.silu, mixed)
        epsilon = self.settings.epsilon
        if self.groups == 1:
            gated = tape.norm(gated, self.norm_weight, None, centred=False, epsilon=epsilon)
        else:
            over = (self.groups, gated.width // self.groups)
            tape.norm(gated, None, None, centred=False, epsilon=epsilon, over=over)
            scaled(tape, gated, self.norm_weight)
        return record(self.o, tape, gated)  # type: ignore[no-any-return]


def _every_pair(mixer: Mamba2, x: Tensor, ctx: Context) -> Tensor:
    """(L ∘ C Bᵀ) Δx + D x with L[t, s] = exp(Σ_{s < r ≤ t} Δ_r A), the paper's quadratic form, one group."""
    frozen, values = mixer.freeze(x, ctx).parts, mixer.values(x, ctx)
    total = frozen["decay"].cumsum(1).transpose(1, 2)
    fades = (total[..., :, None] - total[..., None, :]).exp().tril()
    weights = fades * (frozen["q"][:, :, 0] @ frozen["k"][:, :, 0].transpose(1, 2))[:, None]
    mixed = (weights @ (values * frozen["step"][..., None]).transpose(1, 2)).transpose(1, 2)
    return mixer.finish(mixed + values * mixer.skip[:, None], x, ctx)
