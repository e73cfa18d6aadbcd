"""Rotary positions (Su et al. 2021, RoFormer), with both pairings and length scaling.

Scaling: linear (Chen et al. 2023, Extending Context Window via Positional Interpolation); ntk
(bloc97 2023: the base grows so that only the slow frequencies stretch); llama3 (Dubey et al. 2024,
The Llama 3 Herd of Models: slow frequencies stretched, fast ones kept, a smooth band between); yarn
(Peng et al. 2023, YaRN: the same by a ramp over rotations, and a temperature on the scores).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from armillary.base.errors import UnsupportedError
from armillary.base.settings import Settings
from armillary.nn.cost import Cost
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import Place, Position, PositionSettings, positions
from armillary.nn.tape import Buffer, Tape


class RopeScaling(Settings):
    """How angles change so that a model reaches beyond the length it was trained on."""

    kind: Literal["linear", "ntk", "llama3", "yarn"] = Field(description="which rule")
    factor: float = Field(gt=0, description="by how much the reach grows")
    trained_length: int = Field(8192, gt=0, description="length trained on before (llama3, yarn)")
    low: float = Field(1.0, gt=0, description="llama3: fewer turns than this are stretched fully")
    high: float = Field(4.0, gt=0, description="llama3: more turns than this are kept")
    beta_fast: float = Field(32.0, gt=0, description="yarn: more turns than this are kept")
    beta_slow: float = Field(1.0, gt=0, description="yarn: fewer turns than this are stretched fully")
    temperature: float | None = Field(None, gt=0, description="yarn: factor on q and k; by default 0.1·ln(factor)+1")


@positions.register
class RopeSettings(PositionSettings):
    """Pairs of features of q and k turn by an angle proportional to the position."""

    kind: ClassVar[str] = "rope"
    source: ClassVar[str] = "Su et al. 2021, RoFormer: Enhanced Transformer with Rotary Position Embedding"
    oracle: ClassVar[str] = (
        "tests/nn/positions/test_rope.py: transformers' frequencies and scalings, GPT-J's interleaved pairs"
    )
    sites: ClassVar[frozenset[str]] = frozenset({"rotate"})
    base: float = Field(10000.0, gt=0, description="wavelengths grow geometrically up to 2π·base")
    pairing: Literal["half", "interleaved"] = Field(
        "half", description="which features form a pair: i with i+K/2, or 2i with 2i+1"
    )
    fraction: float = Field(1.0, gt=0, le=1, description="share of each head that turns")
    scaling: RopeScaling | None = Field(None, description="length scaling")

    @model_validator(mode="after")
    def _coherent(self) -> RopeSettings:
        if self.scaling is not None and self.scaling.kind == "llama3" and self.scaling.low >= self.scaling.high:
            raise ValueError("scaling.low must be below scaling.high")
        return self

    @classmethod
    def examples(cls) -> list[Example]:
        short = {"trained_length": 16}
        return [
            Example("half", cls()),
            Example("interleaved", cls(pairing="interleaved", base=500.0)),
            Example("half_of_each_head", cls(fraction=0.5)),
            Example("linear", cls(scaling=RopeScaling(kind="linear", factor=4.0))),
            Example("ntk", cls(scaling=RopeScaling(kind="ntk", factor=4.0))),
            Example("llama3", cls(scaling=RopeScaling(kind="llama3", factor=4.0, **short))),
            Example("yarn", cls(scaling=RopeScaling(kind="yarn", factor=4.0, beta_fast=2.0, **short))),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        kinds: list[Literal["linear", "ntk", "llama3", "yarn"]] = ["linear", "ntk", "llama3", "yarn"]
        plain = Example("plain", cls())
        return [Limit(kind, Example(kind, cls(scaling=RopeScaling(kind=kind, factor=1.0))), plain) for kind in kinds]

    def build(self, place: Place, heads: int = 1, head_width: int = 0) -> Rope:
        return Rope(self, self.turning(head_width, place.path))

    def turning(self, head_width: int, where: str = "") -> int:
        """How many features of a head turn."""
        width = int(head_width * self.fraction)
        if width < 2 or width % 2:
            raise UnsupportedError(
                f"rope turns pairs, but {width} of {head_width} features per head would turn",
                where=where or None,
                hint="make heads × fraction give an even number of features",
            )
        if width == 2 and self.scaling is not None and self.scaling.kind == "ntk":
            raise UnsupportedError("ntk scaling needs more than one pair of features", where=where or None)
        return width

    def cost(self, place: Place, length: int, heads: int, kv_heads: int, head_width: int) -> Cost:
        width = self.turning(head_width)
        angles = length * (3 * width // 2)
        return Cost(angles + length * (heads + kv_heads) * 3 * width)

    def frequencies(self, width: int) -> tuple[list[float], float]:
        """Angle per position for each of width/2 pairs, and the factor on q and k."""
        base, scaling = self.base, self.scaling
        if scaling is not None and scaling.kind == "ntk":
            base = base * scaling.factor ** (width / (width - 2))
        speed = [base ** (-feature / width) for feature in range(0, width, 2)]
        if scaling is None or scaling.kind == "ntk":
            return speed, 1.0
        if scaling.kind == "linear":
            return [s / scaling.factor for s in speed], 1.0
        if scaling.kind == "llama3":
            turns = [scaling.trained_length * s / (2 * math.pi) for s in speed]
            kept = [_clamped((t - scaling.low) / (scaling.high - scaling.low)) for t in turns]
            return [k * s + (1 - k) * s / scaling.factor for k, s in zip(kept, speed, strict=True)], 1.0

        def pair_of(turns: float) -> float:
            return width * math.log(scaling.trained_length / (turns * 2 * math.pi)) / (2 * math.log(base))

        first = max(math.floor(pair_of(scaling.beta_fast)), 0)
        last = min(math.ceil(pair_of(scaling.beta_slow)), width - 1)
        stretched = [_clamped((pair - first) / max(last - first, 1e-3)) for pair in range(width // 2)]
        speed = [k * s / scaling.factor + (1 - k) * s for k, s in zip(stretched, speed, strict=True)]
        return speed, scaling.temperature or (0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0)


def _clamped(x: float) -> float:
    return min(1.0, max(0.0, x))


class Rope(Position):
    """Rotates q and k; angles are formed in float32 from the positions of the call."""

    sites = RopeSettings.sites

    def __init__(self, settings: RopeSettings, width: int) -> None:
        super().__init__()
        self.width = width
        self.interleaved = settings.pairing == "interleaved"
        speed, self.factor = settings.frequencies(width)
        # Not a buffer: casting the weights to bf16, or building on the meta device, must leave it alone.
        self.speed = torch.tensor(speed, dtype=torch.float32, device="cpu")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rope:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0)).device
        if device.type != "meta":
            self.speed = self.speed.to(device)
        return self

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].float() * self.speed.to(q.device)  # [B or 1, T, width/2]
        cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
        if self.factor != 1.0:
            cos, sin = cos * self.factor, sin * self.factor
        return self._turn(q, cos, sin), self._turn(k, cos, sin)

    def record(self, tape: Tape, x: Buffer, heads: int) -> None:
        """Turn x [tokens, heads · K] in place."""
        tape.rotate(x, tape.angles(self.speed, self.factor), heads, interleaved=self.interleaved)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        part = x[..., : self.width].to(kind)
        if self.interleaved:
            a, b = part[..., 0::2], part[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        else:
            a, b = part.chunk(2, -1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        turned = turned.to(x.dtype)
        return turned if self.width == x.shape[-1] else torch.cat([turned, x[..., self.width :]], -1)
