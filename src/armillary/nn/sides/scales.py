"""Channels of a text: the same tokens at several scales, each a stream of averages over longer windows."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from armillary.nn.side import SideSettings, sides


@sides.register
class ScalesSettings(SideSettings):
    """channels [B, C, T, F] float32: frame t of channel c is the mean code of the tokens up to `widths[c] // 2`
    away from token t (by their number in the row), and says where it is.

    A token's code is a fixed random vector, drawn from `seed`; half the features are sines and cosines of
    the place. With gives: padding, which frames are real, [B, C, T] bool.
    """

    kind: ClassVar[str] = "scales"
    oracle: ClassVar[str] = "tests/nn/mixers/test_multi_channel.py: averages by hand, codes as unlike as random ones"
    widths: tuple[int, ...] = Field(
        (3, 9, 27), min_length=1, description="odd: tokens that a frame of each channel averages"
    )
    features: int = Field(16, gt=3, multiple_of=4, description="of a frame")
    gives: Literal["channels", "padding"] = Field("channels", description="the frames, or which of them are real")
    seed: int = Field(0, ge=0, description="of the tokens' codes")

    @model_validator(mode="after")
    def _coherent(self) -> ScalesSettings:
        for width in self.widths:
            if width < 1 or width % 2 == 0:
                raise ValueError(f"widths must be odd and above 0, so that a frame has a middle, not {width}")
        return self

    def make(self, ids: Tensor, padding: Tensor | None) -> Tensor:
        batch, count = ids.shape
        if padding is None:
            tokens, real = ids, torch.ones_like(ids, dtype=torch.bool)
        else:
            order = (~padding).to(torch.uint8).argsort(dim=1, stable=True)  # real tokens first, as they are numbered
            tokens, real = ids.gather(1, order), padding.gather(1, order)
        if self.gives == "padding":
            return real[:, None].expand(-1, len(self.widths), -1)
        half = self.features // 2
        codes = _codes(tokens, half, self.seed) * real[..., None]
        sums = torch.nn.functional.pad(codes.cumsum(1), (0, 0, 1, 0))
        counts = torch.nn.functional.pad(real.long().cumsum(1), (1, 0))
        steps = torch.arange(count, device=ids.device)
        angles = steps[:, None] / 1000.0 ** (torch.arange(half // 2, device=ids.device) / (half // 2))
        where = torch.cat([angles.sin(), angles.cos()], -1).expand(batch, -1, -1)
        channels = []
        for width in self.widths:
            low, high = (steps - width // 2).clamp(min=0), (steps + width // 2 + 1).clamp(max=count)
            mean = (sums[:, high] - sums[:, low]) / (counts[:, high] - counts[:, low]).clamp(min=1)[..., None]
            channels.append(torch.cat([mean, where], -1))
        return torch.stack(channels, 1) * real[:, None, :, None]


def _codes(ids: Tensor, features: int, seed: int) -> Tensor:
    """±1 for each token and feature, by mixing the bits of (seed, token, feature): no table, any vocabulary."""
    mixed = ids[..., None] * 0x9E3779B1 + torch.arange(features, device=ids.device) * 0x85EBCA6B + seed * 0xC2B2AE35
    for shift in (15, 13, 16):
        mixed = ((mixed ^ (mixed >> shift)) * 0x2C1B3C6D) & 0xFFFFFFFF
    return ((mixed >> 16) & 1).float() * 2 - 1
