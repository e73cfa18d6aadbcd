"""Attention across channels: tokens look at one another and at several streams of frames beside them.

A channel is a stream that runs beside the text (a microphone, the hands of a signer, a sensor): the
side tensor `channels` [B, C, S, F], with `padded` also `channels_padding` [B, C, S], True for real
frames. Each channel has its own key and value products; a bias in the key tells channels apart, so a
query can prefer one. Tokens and frames compete in one softmax, within and across channels at once
(after Camgoz et al. 2020, Multi-channel Transformers for Multi-articulatory Sign Language Translation,
whose channels run at their own pace). With `join: weighted` the channels are first summed frame by
frame with learned weights, as for microphones that hear the same (after Chang et al. 2021, End-to-End
Multi-Channel Transformer for Speech Recognition). Both papers attend within and between channels in
layers of their own and have several channels ask; here the text asks, which is what an encoder of text
is for. Frames say themselves when they are: their features must hold the time where it matters.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary.base.errors import InputError, UnsupportedError
from armillary.nn.context import Context
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mask import Keys
from armillary.nn.mechanism import Capabilities, Frozen, Mixer, MixerSettings, Place, head_width, mixers
from armillary.nn.mixers.attention import AttentionSettings
from armillary.nn.ops.attend import attend


@mixers.register
class MultiChannelSettings(MixerSettings):
    """softmax(q · [keys of tokens; keys of channel 1; …] / √K) over tokens and frames together."""

    kind: ClassVar[str] = "multi_channel"
    source: ClassVar[str] = (
        "Camgoz et al. 2020, Multi-channel Transformers for Multi-articulatory Sign Language Translation; "
        "Chang et al. 2021, End-to-End Multi-Channel Transformer for Speech Recognition"
    )
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_multi_channel.py: PyTorch's attention over tokens and frames put side by side; dense "
        "attention where no frame is real"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(
        causal=False, bidirectional=True, packed=False, side=("channels",)
    )
    heads: int = Field(4, gt=0, description="heads")
    channels: int = Field(2, gt=0, description="streams beside the text")
    features: int = Field(16, gt=0, description="of a frame")
    join: Literal["together", "weighted"] = Field(
        "together", description="frames of all channels as they are, or summed over channels with learned weights"
    )
    padded: bool = Field(False, description="the side tensor channels_padding says which frames are real")

    @classmethod
    def examples(cls) -> list[Example]:
        place = {"order": "bidirectional"}
        small: dict[str, Any] = {"heads": 2, "channels": 2, "features": 3}
        return [
            Example("together", cls(**small), place, _some_channels),
            Example("weighted", cls(**small, join="weighted", padded=True), place, _padded_channels),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        alone = Example("alone", cls(heads=2, features=3, padded=True), {"order": "bidirectional"}, _no_frames)
        return [Limit("no_frames", alone, _dense)]

    def build(self, place: Place) -> MultiChannel:
        if place.cross or place.order != "bidirectional":
            what = "look at a memory" if place.cross else f"be {place.order}"
            raise UnsupportedError(
                f"'{self.kind}' cannot {what}: its channels are given whole",
                where=place.path,
                hint="use it in an encoder",
            )
        return MultiChannel(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        """With one frame per token in every channel."""
        width, each = place.width, head_width(place.width, self.heads, settable=False)
        frames = self.channels * length
        flops = 4 * linear_flops(width, width, length)
        flops += linear_flops(self.features, width, frames, bias=True) + linear_flops(self.features, width, frames)
        if self.join == "weighted":
            flops += 5.0 * self.channels * (length if self.padded else 1)  # softmax
            flops += 4.0 * frames * width
            frames = length
        return Cost(flops + self.heads * length * (length + frames) * (4.0 * each + 6))


class MultiChannel(Mixer):
    """x [B, T, D] → [B, T, D]; its values, and the columns of its matrix, are the tokens and then the frames
    (channel by channel when together). Padded tokens give zeros."""

    scaled = ("scale",)

    def __init__(self, settings: MultiChannelSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.settings = settings
        self.heads = self.value_groups = settings.heads
        self.width = head_width(place.width, settings.heads, settable=False)
        self.scale = self.width**-0.5
        if settings.padded:
            self.capabilities = dataclasses.replace(self.capabilities, side=("channels", "channels_padding"))
        self.q = place.product(place.width, place.width, "q")
        self.k = place.product(place.width, place.width, "k")
        self.v = place.product(place.width, place.width, "v")
        self.o = place.product(place.width, place.width, "o")
        width, features = place.width, settings.features
        self.keys = nn.ModuleList(place.product(features, width, "k", bias=True) for _ in range(settings.channels))
        self.frames = nn.ModuleList(place.product(features, width, "v") for _ in range(settings.channels))
        self.shares = nn.Parameter(torch.empty(settings.channels)) if settings.join == "weighted" else None

    def reset(self, generator: torch.Generator | None) -> None:
        """Channels count alike at the start."""
        if self.shares is not None:
            nn.init.zeros_(self.shares)

    def blank(self, name: str, batch: int, length: int, device: torch.device | str) -> Tensor:
        shape = (batch, self.settings.channels, length)
        if name == "channels":
            return torch.zeros(*shape, self.settings.features, device=device)
        return torch.ones(shape, dtype=torch.bool, device=device)

    def values(self, x: Tensor, ctx: Context) -> Tensor:
        return self._beside(self.v(x), self.frames, x, ctx)

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        q = self.q(x).unflatten(-1, (self.heads, self.width))
        k = self._beside(self.k(x), self.keys, x, ctx)
        if ctx.taps is not None:
            q, k = ctx.taps(f"{self.path}.q", q), ctx.taps(f"{self.path}.k", k)
        return Frozen({"q": q, "k": k, "mask": self._mask(x, ctx)})

    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        if frozen.weights is not None:
            return (frozen.weights.to(values.dtype) @ values.transpose(1, 2)).transpose(1, 2)
        q, k = (frozen.parts[name].transpose(1, 2) for name in ("q", "k"))
        y, _ = attend(q, k, values.transpose(1, 2), mask=frozen.parts["mask"], scale=self.scale)
        return y.transpose(1, 2)

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        y: Tensor = self.o(mixed.flatten(2))
        return y if ctx.padding is None else y.masked_fill(~ctx.padding[..., None], 0.0)

    def _beside(self, own: Tensor, products: nn.ModuleList, x: Tensor, ctx: Context) -> Tensor:
        """own [B, T, D] and what the channels' products make of their frames → [B, T + frames, H, K]."""
        channels, real = self._given(x, ctx)
        made = torch.stack([product(channels[:, c]) for c, product in enumerate(products)], 1)  # [B, C, S, D]
        if self.shares is None:
            made = made.flatten(1, 2)
        else:
            made = (made * self._shares(real).to(made.dtype)).sum(1)
        y: Tensor = torch.cat([own, made], 1).unflatten(-1, (self.heads, self.width))
        return y

    def _shares(self, real: Tensor | None) -> Tensor:
        """[1, C, 1, 1], or [B, C, S, 1] with padding: 0 for frames that are not real, the others sum to 1."""
        assert self.shares is not None
        logits = self.shares.to(torch.promote_types(self.shares.dtype, torch.float32))[None, :, None, None]
        if real is None:
            return torch.softmax(logits, 1)
        seen = real[..., None]
        shares = torch.softmax(logits.expand(seen.shape).masked_fill(~seen, -torch.inf), 1)
        return shares.masked_fill(~seen, 0.0)

    def _mask(self, x: Tensor, ctx: Context) -> Keys | None:
        _, real = self._given(x, ctx)
        if ctx.padding is None and real is None:
            return None
        batch, tokens = x.shape[:2]
        own = ctx.padding if ctx.padding is not None else x.new_ones((batch, tokens), dtype=torch.bool)
        if real is None:
            real = x.new_ones((batch, *ctx.side["channels"].shape[1:3]), dtype=torch.bool)
        return Keys(torch.cat([own, real.flatten(1) if self.shares is None else real.any(1)], 1))

    def _given(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        """The channels in x's type, absent frames as zeros, and which frames are real."""
        given, how = ctx.side["channels"], self.settings
        fits = given.dim() == 4 and given.shape[:2] == (len(x), how.channels) and given.shape[3] == how.features
        if not fits or not given.dtype.is_floating_point:
            raise InputError(
                f"the side tensor 'channels' is {given.dtype} of shape {tuple(given.shape)}",
                where=self.path,
                hint=f"pass numbers [{len(x)}, {how.channels}, frames, {how.features}]",
            )
        if not how.padded:
            return given.to(x.dtype), None
        real = ctx.side["channels_padding"]
        if real.shape != given.shape[:3] or real.dtype != torch.bool:
            raise InputError(
                f"the side tensor 'channels_padding' is {real.dtype} of shape {tuple(real.shape)}",
                where=self.path,
                hint=f"pass bool {list(given.shape[:3])}, True for real frames",
            )
        return given.to(x.dtype).masked_fill(~real[..., None], 0.0), real


def _some_channels(batch: int, length: int) -> dict[str, Tensor]:
    return {"channels": torch.randn(batch, 2, length, 3, generator=torch.Generator().manual_seed(4))}


def _padded_channels(batch: int, length: int) -> dict[str, Tensor]:
    """The second channel is shorter, and in rows after the first both are."""
    real = torch.ones(batch, 2, length, dtype=torch.bool)
    real[:, 1, length // 2 :], real[1:, :, -1] = False, False
    return {**_some_channels(batch, length), "channels_padding": real}


def _no_frames(batch: int, length: int) -> dict[str, Tensor]:
    return {**_some_channels(batch, length), "channels_padding": torch.zeros(batch, 2, length, dtype=torch.bool)}


def _dense(mixer: MultiChannel, x: Tensor, ctx: Context) -> Tensor:
    """Bidirectional attention with the products of the tokens."""
    other = AttentionSettings(heads=mixer.heads).build(Place(x.shape[-1], order="bidirectional"))
    other.load_state_dict({name: value for name, value in mixer.state_dict().items() if name.count(".") == 1})
    y: Tensor = other(x, Context())
    return y
