"""Gated DeltaNet: a matrix state that fades and is written by the delta rule.

Yang, Kautz & Hatamizadeh 2024, Gated Delta Networks: Improving Mamba2 with Delta Rule. S ← g·S + kᵀ β
(v − k g S), y = q S: a token replaces a share β of what the state holds for its key. q, k and v pass a
short convolution, q and k have length 1, decays come from steps as in Mamba-2; the output passes a norm
per head and then a swish gate. `fading: false` and `gated: false` leave DeltaNet (Yang et al. 2024,
Parallelizing Linear Transformers with the Delta Rule over Sequence Length). Several value heads may
share a key head, as in Qwen3-Next, whose layer this is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from armillary.base.errors import UnsupportedError
from armillary.nn.activation import ACTIVATIONS
from armillary.nn.context import Context
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import Capabilities, Frozen, MixerSettings, NormSettings, Place, mixers
from armillary.nn.norms.rmsnorm import RMSNormSettings
from armillary.nn.ops.delta import delta_attend
from armillary.nn.ops.short_conv import short_conv_flops
from armillary.nn.recurrent import MatrixMixer, ShortConvolution, StepDecay
from armillary.nn.state import State
from armillary.nn.steps.recurrent import gates, matrix, sums
from armillary.nn.tape import Buffer, Tape, record

TINY = 1e-6  # added to the squared lengths of q and k


@mixers.register
class GatedDeltaSettings(MixerSettings):
    """norm(q S) · swish(z), S ← g·S + kᵀ β (v − k g S)."""

    kind: ClassVar[str] = "gated_delta"
    source: ClassVar[str] = "Yang, Kautz & Hatamizadeh 2024, Gated Delta Networks: Improving Mamba2 with Delta Rule"
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_gated_delta.py: transformers' Qwen3-Next gated delta net, outputs and gradients; the "
        "formula of DeltaNet"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(state="fixed", rollback="snapshot")
    heads: int = Field(4, gt=0, description="value heads, each with a state of its own")
    key_heads: int | None = Field(
        None, gt=0, description="query and key heads, each of which serves some; by default all"
    )
    head_width: int = Field(64, gt=0, description="features of q and k per head")
    expand: float = Field(2.0, gt=0, description="value features per head relative to those of keys")
    taps: int = Field(4, gt=0, description="tokens that the short convolutions see")
    fading: bool = Field(True, description="whether the state fades; false: DeltaNet")
    gated: bool = Field(True, description="whether the output passes a swish gate")
    decays: tuple[float, float] = Field((0.01, 16.0), description="rates of decay start uniformly between these")
    steps: tuple[float, float] = Field((0.001, 0.1), description="steps start log-uniformly between these")
    norm: NormSettings = Field(RMSNormSettings(), description="norm of each head's output")

    @model_validator(mode="after")
    def _coherent(self) -> GatedDeltaSettings:
        StepDecay.check(self.decays, self.steps)
        if self.heads % (self.key_heads or 1):
            raise ValueError(f"{self.heads} heads do not divide among {self.key_heads} key_heads")
        return self

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("published", cls(heads=2, key_heads=1, head_width=4)),
            Example("deltanet", cls(heads=2, head_width=4, expand=1.0, taps=2, fading=False, gated=False)),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("loop", Example("one_head", cls(heads=1, head_width=4)), _loop)]

    def features(self) -> tuple[int, int]:
        """Features of all key heads and of one head's values."""
        value = int(self.head_width * self.expand)
        if not value:
            raise UnsupportedError("heads have no value features", hint="raise expand or head_width")
        return (self.key_heads or self.heads) * self.head_width, value

    def build(self, place: Place) -> GatedDelta:
        return GatedDelta(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        width, heads, key = place.width, self.heads, self.head_width
        keys, value = self.features()
        values = heads * value
        flops = 2 * linear_flops(width, keys, length) + linear_flops(width, values, length)
        flops += linear_flops(width, heads, length) + linear_flops(values, width, length)
        flops += short_conv_flops(2 * keys + values, self.taps, length, bias=False)
        # q and k to length 1, q scaled; per token and head β, the decay, what the state holds, writing, reading
        flops += length * (keys * 7.0 + 4.0 * keys / key)
        flops += length * heads * (7.0 * key * value + 2 * value + 2)
        flops += self.norm.flops(value, length * heads)
        if self.fading:
            flops += linear_flops(width, heads, length) + StepDecay.flops(heads, length)
        if self.gated:
            flops += linear_flops(width, values, length) + 2.0 * length * values
        state = 4.0 * values * key + (self.taps - 1) * (2 * keys + values) * itemsize
        return Cost(flops, state)


class GatedDelta(MatrixMixer):
    """x [B, T, D] → [B, T, D]; state: a float32 matrix [B, H, K, V] and the convolutions' tails.

    Sight is by the values after their convolution: what is written is linear in them.
    """

    sized = "heads, key_heads, head_width, expand and taps"

    def __init__(self, settings: GatedDeltaSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.heads = self.value_groups = settings.heads
        self.key_heads, self.key_width = settings.key_heads or settings.heads, settings.head_width
        keys, self.value_width = settings.features()
        values = self.heads * self.value_width
        self.q = place.product(place.width, keys, "q")
        self.k = place.product(place.width, keys, "k")
        self.v = place.product(place.width, values, "v")
        self.write = place.product(place.width, self.heads, "write")
        self.o = place.product(values, place.width, "o")
        self.conv_q = ShortConvolution(keys, settings.taps, "conv_q")
        self.conv_k = ShortConvolution(keys, settings.taps, "conv_k")
        self.conv_v = ShortConvolution(values, settings.taps, "conv_v")
        self.norm = settings.norm.build(self.value_width)
        self.step = place.product(place.width, self.heads, "step") if settings.fading else None
        self.decay = StepDecay(self.heads, settings.decays, settings.steps) if settings.fading else None
        self.gate = place.product(place.width, values, "gate") if settings.gated else None
        self.swish = ACTIVATIONS["silu"]

    def values(self, x: Tensor, ctx: Context, state: State | None = None) -> Tensor:
        return self.conv_v(self.v(x), ctx, state).unflatten(-1, (self.heads, self.value_width))  # type: ignore[no-any-return]

    def freeze(self, x: Tensor, ctx: Context, state: State | None = None) -> Frozen:
        q = self._unit(self.conv_q(self.q(x), ctx, state)) * self.key_width**-0.5
        k = self._unit(self.conv_k(self.k(x), ctx, state))
        if ctx.taps is not None:
            q, k = ctx.taps(f"{self.path}.q", q), ctx.taps(f"{self.path}.k", k)
        beta = torch.sigmoid(self.write(x).to(q.dtype))
        if self.step is not None and self.decay is not None:
            decay = self.decay.log_decays(self.decay(self.step(x)))
        else:
            decay = torch.zeros_like(beta)
        if ctx.taps is not None:
            beta = ctx.taps(f"{self.path}.beta", beta)
            if self.decay is not None:
                decay = ctx.taps(f"{self.path}.decay", decay)
        real = ctx.present(x)
        if real is not None:  # a token that is not there neither decays the state nor writes to it
            beta, decay = beta * real[..., None], decay * real[..., None]
        return Frozen({"q": q, "k": k, "beta": beta, "decay": decay, "documents": ctx.documents})

    def _unit(self, x: Tensor) -> Tensor:
        """[B, T, …] → [B, T, key heads, K] of length 1, in float32 at least."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (self.key_heads, self.key_width))
        return wide * torch.rsqrt((wide * wide).sum(-1, keepdim=True) + TINY)  # type: ignore[no-any-return]

    def mixed(self, parts: Mapping[str, Any], values: Tensor, matrix: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k = (parts[name].repeat_interleave(self.heads // self.key_heads, 2) for name in ("q", "k"))
        return delta_attend(q, k, values, parts["decay"], parts["beta"], state=matrix, documents=parts["documents"])

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        y = self.norm(mixed).flatten(2)
        return self.o(y if self.gate is None else y * self.swish(self.gate(x)))  # type: ignore[no-any-return]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "matrix": (self.heads, self.key_width, self.value_width),
            **{conv.name: conv.shape() for conv in (self.conv_q, self.conv_k, self.conv_v)},
        }

    def record(self, tape: Tape, x: Buffer, state: State) -> Buffer:
        (held,) = sums(tape, state, "matrix")
        q = self.conv_q.record(tape, record(self.q, tape, x, unit=self.key_width), state)
        k = self.conv_k.record(tape, record(self.k, tape, x, unit=self.key_width), state)
        v = self.conv_v.record(tape, record(self.v, tape, x, unit=self.value_width), state)
        over = (self.key_heads, self.key_width)
        for line, power in ((q, -1.0), (k, -0.5)):  # length 1 is an RMS norm with this gain; q / √K
            gain = torch.full((self.key_width,), self.key_width**power)
            tape.norm(line, gain, None, centred=False, epsilon=TINY / self.key_width, over=over)
        shares = record(self.write, tape, x, unit=1)
        if self.step is not None and self.decay is not None:
            fades = self.decay.record(tape, record(self.step, tape, x, unit=1), shares)
        else:
            fades = gates(tape, self.heads, None, shares)
        gate = None if self.gate is None else record(self.gate, tape, x, unit=self.value_width)
        mixed = matrix(tape, q, k, v, held, groups=self.key_heads, fades=fades, delta=True)
        record(self.norm, tape, mixed, over=(self.heads, self.value_width))
        return record(self.o, tape, mixed if gate is None else tape.activate(gate, self.swish, mixed))  # type: ignore[no-any-return]


def _loop(mixer: GatedDelta, x: Tensor, ctx: Context) -> Tensor:
    """S_t = S_{t−1} g_t (I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ, the paper's own equation, with its transposed state."""
    parts, values = mixer.freeze(x, ctx).parts, mixer.values(x, ctx)
    q, k, v = parts["q"][:, :, 0], parts["k"][:, :, 0], values[:, :, 0]
    beta, decay = parts["beta"], parts["decay"].exp()
    state, rows = torch.zeros(len(x), v.shape[2], k.shape[2]), []
    for t in range(x.shape[1]):
        turn = torch.eye(k.shape[2]) - beta[:, t, :, None] * k[:, t, :, None] * k[:, t, None]
        state = decay[:, t, :, None] * (state @ turn) + beta[:, t, :, None] * v[:, t, :, None] * k[:, t, None]
        rows.append((state @ q[:, t, :, None])[..., 0])
    return mixer.finish(torch.stack(rows, 1)[:, :, None], x, ctx)
