"""Gated linear attention (Yang et al. 2024, Gated Linear Attention Transformers with Hardware-Efficient Training).

Each head holds a matrix S whose rows decay by themselves: S ← Diag(α_t)·S + kᵀv, y = q S, with α_t =
σ(x W₁ W₂ + b)^(1/τ), a gate of low rank. The output passes a norm per head and a swish gate. Keys take
half the model's width, q is scaled by 1/√K, as in the released code; so is the norm an RMSNorm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from armillary.base.errors import UnsupportedError
from armillary.native.tape import Map
from armillary.nn.activation import ACTIVATIONS
from armillary.nn.context import Context
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import Capabilities, Frozen, MixerSettings, NormSettings, Place, mixers
from armillary.nn.norms.layernorm import LayerNormSettings
from armillary.nn.norms.rmsnorm import RMSNormSettings
from armillary.nn.ops.channel_decay import channel_attend
from armillary.nn.recurrent import MatrixMixer
from armillary.nn.state import State
from armillary.nn.steps.recurrent import mapped, matrix, sums
from armillary.nn.tape import Buffer, Tape, record


@mixers.register
class GatedLinearSettings(MixerSettings):
    """norm(q S) · swish(r), S ← Diag(α)·S + kᵀv."""

    kind: ClassVar[str] = "gla"
    source: ClassVar[str] = "Yang et al. 2024, Gated Linear Attention Transformers with Hardware-Efficient Training"
    oracle: ClassVar[str] = "tests/nn/mixers/test_gla.py: the paper's recurrence and its form with every pair"
    capabilities: ClassVar[Capabilities] = Capabilities(state="fixed", rollback="snapshot")
    heads: int = Field(4, gt=0, description="heads")
    expand_keys: float = Field(0.5, gt=0, description="width of the keys relative to the model's")
    expand: float = Field(1.0, gt=0, description="width of the values relative to the model's")
    rank: int = Field(16, gt=0, description="rank of the product that makes the decays")
    temperature: float = Field(16.0, gt=0, description="τ: decays are σ(·)^(1/τ), slower the larger it is")
    norm: NormSettings = Field(RMSNormSettings(), description="norm of each head's output")

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("published", cls(heads=2, rank=4)),
            Example("steep", cls(heads=1, rank=2, temperature=0.2, expand=2.0, norm=LayerNormSettings())),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("every_pair", Example("two_heads", cls(heads=2, rank=4)), _every_pair)]

    def features(self, width: int) -> tuple[int, int]:
        """Key and value features per head."""
        keys, values = int(width * self.expand_keys), int(width * self.expand)
        if not keys or keys % self.heads or values % self.heads:
            raise UnsupportedError(
                f"{keys} key and {values} value features do not divide into {self.heads} heads",
                hint="change width, heads, expand_keys or expand",
            )
        return keys // self.heads, values // self.heads

    def build(self, place: Place) -> GatedLinear:
        return GatedLinear(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        key, value = self.features(place.width)
        width, keys, values = place.width, self.heads * key, self.heads * value
        flops = 2 * linear_flops(width, keys, length) + 2 * linear_flops(width, values, length)
        flops += linear_flops(values, width, length)
        flops += linear_flops(width, self.rank, length) + linear_flops(self.rank, keys, length, bias=True)
        # Scaled q; per feature the logarithm of σ, its scale, exponential; decay, outer product, sum, product with q.
        flops += length * (keys * 4.0 + self.heads * 5.0 * key * value)
        flops += length * 2 * values + self.norm.flops(value, length * self.heads)
        return Cost(flops, 4.0 * self.heads * key * value)


class GatedLinear(MatrixMixer):
    """x [B, T, D] → [B, T, D]; its state is one float32 matrix [B, H, K, V]."""

    sized = "heads, expand_keys and expand"

    def __init__(self, settings: GatedLinearSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.temperature = settings.temperature
        self.heads = self.value_groups = settings.heads
        self.key_width, self.value_width = settings.features(place.width)
        keys, values = self.heads * self.key_width, self.heads * self.value_width
        self.q = place.product(place.width, keys, "q")
        self.k = place.product(place.width, keys, "k")
        self.v = place.product(place.width, values, "v")
        self.gate = place.product(place.width, values, "gate")
        self.o = place.product(values, place.width, "o")
        self.decay_in = place.product(place.width, settings.rank, "decay")
        self.decay_out = place.product(settings.rank, keys, "decay", bias=True)
        self.norm = settings.norm.build(self.value_width)
        self.swish = ACTIVATIONS["silu"]

    def values(self, x: Tensor, ctx: Context, state: State | None = None) -> Tensor:
        return self.v(x).unflatten(-1, (self.heads, self.value_width))  # type: ignore[no-any-return]

    def freeze(self, x: Tensor, ctx: Context, state: State | None = None) -> Frozen:
        shape = (self.heads, self.key_width)
        q = self.q(x).unflatten(-1, shape) * self.key_width**-0.5
        k = self.k(x).unflatten(-1, shape)
        if ctx.taps is not None:
            q, k = ctx.taps(f"{self.path}.q", q), ctx.taps(f"{self.path}.k", k)
        wide = torch.promote_types(x.dtype, torch.float32)
        decay = F.logsigmoid(self.decay_out(self.decay_in(x)).to(wide)).unflatten(-1, shape) * (1 / self.temperature)
        if ctx.taps is not None:
            decay = ctx.taps(f"{self.path}.decay", decay)
        real = ctx.present(x)
        if real is not None:  # a token that is not there neither decays the state nor enters it
            decay, k = decay * real[..., None, None], k * real[..., None, None].to(k.dtype)
        return Frozen({"q": q, "k": k, "decay": decay, "documents": ctx.documents})

    def mixed(self, parts: Mapping[str, Any], values: Tensor, matrix: Tensor | None) -> tuple[Tensor, Tensor]:
        return channel_attend(
            parts["q"], parts["k"], values, parts["decay"], state=matrix, documents=parts["documents"]
        )

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return self.o(self.norm(mixed).flatten(2) * self.swish(self.gate(x)))  # type: ignore[no-any-return]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"matrix": (self.heads, self.key_width, self.value_width)}

    def record(self, tape: Tape, x: Buffer, state: State) -> Buffer:
        (held,) = sums(tape, state, "matrix")
        narrow = record(self.decay_in, tape, x)
        q = record(self.q, tape, x, unit=self.key_width, factor=self.key_width**-0.5)
        k = record(self.k, tape, x, unit=self.key_width)
        v, gate = (record(product, tape, x, unit=self.value_width) for product in (self.v, self.gate))
        fades = mapped(tape, record(self.decay_out, tape, narrow, unit=self.key_width), Map.FADE, 1 / self.temperature)
        mixed = matrix(tape, q, k, v, held, fades=fades, by_key=True)
        record(self.norm, tape, mixed, over=(self.heads, self.value_width))
        return record(self.o, tape, tape.activate(gate, self.swish, mixed))  # type: ignore[no-any-return]


def _every_pair(mixer: GatedLinear, x: Tensor, ctx: Context) -> Tensor:
    """Weights Σ_f q_tf k_sf Π_{s < r ≤ t} α_rf, every pair and feature written out."""
    parts, values = mixer.freeze(x, ctx).parts, mixer.values(x, ctx)
    total = parts["decay"].cumsum(1)
    fades = (total[:, :, None] - total[:, None]).exp()
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)[..., None, None]
    weights = torch.einsum("bthk,bshk,btshk->bhts", parts["q"], parts["k"], fades.masked_fill(later, 0))
    return mixer.finish((weights @ values.transpose(1, 2)).transpose(1, 2), x, ctx)
