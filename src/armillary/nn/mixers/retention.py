"""Decay linear attention: retention (Sun et al. 2023, Retentive Network: A Successor to Transformer).

Each head holds a matrix S that decays by a fixed factor: S ← γ·S + kᵀv, y = q S; the same numbers
in parallel, in chunks and token by token. As published, heads decay at 1 − 2^(−5−h), q and k are
rotated, k is scaled by 1/√K, and the output passes a norm per head and a swish gate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from armillary.base.errors import UnsupportedError
from armillary.nn.activation import ACTIVATIONS
from armillary.nn.context import Context
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import (
    Capabilities,
    Frozen,
    MixerSettings,
    NormSettings,
    Place,
    PositionSettings,
    mixers,
)
from armillary.nn.norms.layernorm import LayerNormSettings
from armillary.nn.norms.rmsnorm import RMSNormSettings
from armillary.nn.ops.decay import decay_attend
from armillary.nn.positions.none import NoPositionSettings
from armillary.nn.positions.rope import RopeSettings
from armillary.nn.recurrent import MatrixMixer
from armillary.nn.state import State
from armillary.nn.tape import Buffer, Tape, record


@mixers.register
class RetentionSettings(MixerSettings):
    """norm(q S) · swish(g), S ← γ·S + kᵀv."""

    kind: ClassVar[str] = "retention"
    source: ClassVar[str] = "Sun et al. 2023, Retentive Network: A Successor to Transformer"
    oracle: ClassVar[str] = "tests/nn/mixers/test_retention.py: equations 5, 6 and 8 of the paper, as loops over tokens"
    capabilities: ClassVar[Capabilities] = Capabilities(state="fixed", rollback="snapshot")
    heads: int = Field(4, gt=0, description="heads, each with its own decay")
    expand: float = Field(2.0, gt=0, description="width of the values relative to the model's")
    position: PositionSettings | None = Field(RopeSettings(), description="how q and k turn: rope or none")
    norm: NormSettings = Field(RMSNormSettings(), description="norm of each head's output")

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("published", cls(heads=2), compiled=True),
            Example("plain", cls(heads=4, expand=1.0, position=NoPositionSettings(), norm=LayerNormSettings())),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("parallel", Example("one_head", cls(heads=1, position=NoPositionSettings())), _parallel)]

    def features(self, width: int) -> tuple[int, int]:
        """Key and value features per head."""
        values = int(width * self.expand)
        if width % self.heads or values % self.heads:
            raise UnsupportedError(
                f"a width of {width} (values {values}) does not divide into {self.heads} heads",
                hint="change width, heads or expand",
            )
        return width // self.heads, values // self.heads

    def build(self, place: Place) -> Retention:
        return Retention(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        key, value = self.features(place.width)
        width, values = place.width, self.heads * value
        flops = 2 * linear_flops(width, width, length) + 2 * linear_flops(width, values, length)
        flops += linear_flops(values, width, length)
        # Per token and head: decay, outer product and sum of the state, then its product with q.
        flops += length * self.heads * (5.0 * key * value + 1)
        flops += length * (width + 2 * values) + self.norm.flops(value, length * self.heads)
        if self.position is not None:
            flops += self.position.cost(place, length, self.heads, self.heads, key).flops
        return Cost(flops, 4.0 * self.heads * key * value)


class Retention(MatrixMixer):
    """x [B, T, D] → [B, T, D]; its state is one float32 matrix [B, H, K, V]."""

    sized = "heads and expand"

    def __init__(self, settings: RetentionSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.heads = self.value_groups = settings.heads
        self.key_width, self.value_width = settings.features(place.width)
        values = self.heads * self.value_width
        self.q = place.product(place.width, place.width, "q")
        self.k = place.product(place.width, place.width, "k")
        self.v = place.product(place.width, values, "v")
        self.gate = place.product(place.width, values, "gate")
        self.o = place.product(values, place.width, "o")
        self.norm = settings.norm.build(self.value_width)
        sites = settings.position.sites if settings.position is not None else frozenset()
        if sites - {"rotate"}:
            raise UnsupportedError("retention takes rotations only", where=place.path, hint="position: rope or none")
        self.position = (
            settings.position.build(place.at("position"), self.heads, self.key_width)
            if settings.position is not None and sites
            else None
        )
        self.swish = ACTIVATIONS["silu"]
        self._log_decay = [math.log1p(-(2.0 ** (-5 - head))) for head in range(self.heads)]

    def values(self, x: Tensor, ctx: Context, state: State | None = None) -> Tensor:
        return self.v(x).unflatten(-1, (self.heads, self.value_width))  # type: ignore[no-any-return]

    def freeze(self, x: Tensor, ctx: Context, state: State | None = None) -> Frozen:
        q = self.q(x).unflatten(-1, (self.heads, self.key_width))
        k = self.k(x).unflatten(-1, (self.heads, self.key_width)) * self.key_width**-0.5
        if self.position is not None:
            q, k = self.position.rotate(q, k, ctx.where(x))
        if ctx.taps is not None:
            q, k = ctx.taps(f"{self.path}.q", q), ctx.taps(f"{self.path}.k", k)
        decay = torch.tensor(self._log_decay, dtype=torch.float32, device=x.device)
        decay = decay.expand(1, x.shape[1], self.heads)
        valid = ctx.present(x)
        if valid is not None:
            # A token that is not there neither decays the state nor enters it.
            decay = decay * valid[..., None]
            k = k * valid[..., None, None].to(k.dtype)
        return Frozen({"q": q, "k": k, "decay": decay, "documents": ctx.documents})

    def mixed(self, parts: Mapping[str, Any], values: Tensor, matrix: Tensor | None) -> tuple[Tensor, Tensor]:
        return decay_attend(parts["q"], parts["k"], values, parts["decay"], state=matrix, documents=parts["documents"])

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return self.o(self.norm(mixed).flatten(2) * self.swish(self.gate(x)))  # type: ignore[no-any-return]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"matrix": (self.heads, self.key_width, self.value_width)}

    def record(self, tape: Tape, x: Buffer, state: State) -> Buffer:
        (matrix,) = tape.hold(state, "matrix")
        q, k = (record(product, tape, x, unit=self.key_width) for product in (self.q, self.k))
        v, gate = (record(product, tape, x, unit=self.value_width) for product in (self.v, self.gate))
        if self.position is not None:
            record(self.position, tape, q, self.heads)
            record(self.position, tape, k, self.heads)
        decays = [math.exp(each) for each in self._log_decay]
        mixed = tape.retain(q, k, v, matrix, decays, self.key_width**-0.5)
        record(self.norm, tape, mixed, over=(self.heads, self.value_width))
        return record(self.o, tape, tape.activate(gate, self.swish, mixed))  # type: ignore[no-any-return]


def _parallel(mixer: Retention, x: Tensor, ctx: Context) -> Tensor:
    """(q kᵀ / √K ⊙ D) v with D[n, m] = γ^(n−m), the paper's parallel form of its first head."""
    q, k, v = (x @ product.weight.t() for product in (mixer.q, mixer.k, mixer.v))
    steps = torch.arange(x.shape[1])
    decay = ((1 - 2**-5) ** (steps[:, None] - steps)).tril()
    mixed = (q @ k.transpose(1, 2) / mixer.key_width**0.5 * decay) @ v
    gate = x @ mixer.gate.weight.t()
    return (mixer.norm(mixed) * gate * torch.sigmoid(gate)) @ mixer.o.weight.t()  # type: ignore[no-any-return]
