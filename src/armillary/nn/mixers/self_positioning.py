"""Attention over a few points that place themselves among the tokens (SPoTr): O(T·points), not O(T²).

Park et al. 2023, Self-positioning Point-based Transformer for Point Cloud Understanding. Tokens stand
somewhere in space: the side tensor `coordinates` [B, N, 3], by the number of each real token in its
row. Every learned vector z_m puts its point at δ_m = Σ_n softmax_n(z_m·f_n) x_n and gathers there what
is both alike and near, ψ_m = Σ_n exp(−γ ‖δ_m − x_n‖²) softmax_n(z_m·f_n) f_n. Tokens then read the
points by attention that weighs each channel by itself, and their neighbours in space by the same
means; a learned share mixes the two. Nothing depends on where the origin is or on the order of tokens.

Left open or changed here: perceptrons have one hidden layer and no batch norm, which would mix rows;
the first layer's parts for a key and for its difference from the query are merged, which loses
nothing; neighbours are the nearest within the radius, where the published search takes the first that
it finds; the gradient also flows through the weights that gather ψ, which the released code stops.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary.base.errors import InputError, UnsupportedError
from armillary.nn.context import Context
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example
from armillary.nn.mechanism import Capabilities, Mixer, MixerSettings, Place, mixers
from armillary.nn.ops import readable
from armillary.nn.ops.graph import by_number

PAIRED = ("offset", "score", "value")  # products of what a token reads, for each


@mixers.register
class SelfPositioningSettings(MixerSettings):
    """(1 − s) · attention to neighbours + s · attention to self-positioning points, channel by channel."""

    kind: ClassVar[str] = "self_positioning"
    source: ClassVar[str] = "Park et al. 2023, Self-positioning Point-based Transformer for Point Cloud Understanding"
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_self_positioning.py: the paper's formulas token by token, with its concatenated features"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(
        causal=False, bidirectional=True, packed=False, sight="jacobian", side=("coordinates",)
    )
    points: int = Field(16, gt=0, description="self-positioning points")
    features: int = Field(64, gt=0, description="channels that are weighed by themselves")
    sharpness: float = Field(16.0, gt=0, description="how fast what a point gathers falls with squared distance (γ)")
    temperature: float = Field(1.0, gt=0, description="divides the scores of channel-wise attention")
    neighbours: int = Field(32, ge=0, description="how many neighbours a token reads (0: points alone)")
    radius: float = Field(0.1, gt=0, description="how far away a neighbour may be")

    @classmethod
    def examples(cls) -> list[Example]:
        both = {"order": "bidirectional"}
        return [
            Example("published", cls(points=3, features=8, neighbours=4, radius=1.5), both, _some_places),
            Example("points", cls(points=2, features=8, neighbours=0, temperature=0.5), both, _some_places),
        ]

    def rows(self, place: Place, length: int) -> Mapping[str, float]:
        around, far = float(min(self.neighbours, length) * length), float(self.points * length)
        pairs = {f"{part}.{name}": n for part, n in (("far", far), ("near", around)) for name in PAIRED}
        return {**pairs, "far.key": self.points}

    def build(self, place: Place) -> SelfPositioning:
        if place.cross or place.order != "bidirectional":
            what = "look at a memory" if place.cross else f"be {place.order}"
            raise UnsupportedError(
                f"'{self.kind}' cannot {what}: its points stand where all tokens together put them",
                where=place.path,
                hint="use it in an encoder",
            )
        return SelfPositioning(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        each, near = self.features, min(self.neighbours, length)
        pairs = float(self.points * length)
        flops = 2 * linear_flops(place.width, each, length)
        flops += pairs * (2.0 * each + 5 + 6)  # scores, softmax, points
        flops += pairs * (3 + 6 + 2 + 1 + 2.0 * each)  # offsets, distances, nearness, and what is gathered
        flops += linear_flops(each, 2 * each, self.points) + self._reading(pairs, length)
        if near:
            flops += 8.0 * length * length + 3.0 * near * length
            flops += linear_flops(each, 2 * each, length) + self._reading(float(near * length), length)
            flops += 3.0 * length * each
        return Cost(flops)

    def _reading(self, pairs: float, length: int) -> float:
        """FLOPs of one channel-wise attention beyond the product of its keys."""
        each = self.features
        flops = linear_flops(each, 2 * each, length, bias=True)
        flops += pairs * (12.0 * each + 6 * each + 4.0 * each * each + each)
        return flops + pairs * each * (7 + (self.temperature != 1.0))


class ChannelWise(nn.Module):
    """Σ_m softmax_m(score) ⊙ value, where score and value [features] are perceptrons of (offset in space,
    key, query)."""

    def __init__(self, settings: SelfPositioningSettings, place: Place) -> None:
        super().__init__()
        each = settings.features
        self.temperature = settings.temperature
        self.offset = place.product(3, 2 * each, "offset")
        self.key = place.product(each, 2 * each, "k")
        self.query = place.product(each, 2 * each, "q", bias=True)
        self.score = place.product(each, each, "score")  # a bias would be the same for all and cancel
        self.value = place.product(each, each, "v", bias=True)

    def forward(self, offsets: Tensor, keys: Tensor, queries: Tensor, seen: Tensor | None) -> Tensor:
        """offsets [B, T, M, 3], keys [B, T or 1, M, 2C] as `key` gives them, queries [B, T, C], seen [B, T, M]
        bool → [B, T, C]."""
        hidden = torch.relu(self.offset(offsets) + keys + self.query(queries)[:, :, None])
        of_scores, of_values = hidden.chunk(2, -1)
        scores = self.score(of_scores)
        scores = scores if scores.dtype == torch.float64 else scores.float()
        if self.temperature != 1.0:
            scores = scores / self.temperature
        weights = _softmax(scores, None if seen is None else seen[..., None], 2)
        values = self.value(of_values)
        y: Tensor = (weights.to(values.dtype) * values).sum(2)
        return y


class SelfPositioning(Mixer):
    """x [B, T, D] → [B, T, D]; padded tokens give zeros."""

    scaled = ()

    def __init__(self, settings: SelfPositioningSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.settings = settings
        self.inward = place.product(place.width, settings.features, "in")
        self.points = nn.Parameter(torch.empty(settings.points, settings.features))
        self.far = ChannelWise(settings, place)
        self.near = ChannelWise(settings, place) if settings.neighbours else None
        self.share = nn.Parameter(torch.empty(())) if settings.neighbours else None
        self.o = place.product(settings.features, place.width, "o")

    def reset(self, generator: torch.Generator | None) -> None:
        """Scores of order 1; both branches in equal shares."""
        nn.init.normal_(self.points, std=self.settings.features**-0.5, generator=generator)
        if self.share is not None:
            nn.init.zeros_(self.share)

    def blank(self, name: str, batch: int, length: int, device: torch.device | str) -> Tensor:
        return torch.zeros(batch, length, 3, device=device)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        self.accept(ctx)
        places = self._places(x, ctx)
        f = self.inward(x)
        y = self._points(f, places, ctx)
        if self.near is not None:
            assert self.share is not None
            near = self._neighbours(f, places, ctx.padding)
            y = near + torch.sigmoid(self.share).to(y.dtype) * (y - near)
        if ctx.taps is not None:
            y = ctx.taps(f"{self.path}.mixed", y)
        out: Tensor = self.o(y)
        return out if ctx.padding is None else out.masked_fill(~ctx.padding[..., None], 0.0)

    def _points(self, f: Tensor, places: Tensor, ctx: Context) -> Tensor:
        """f [B, T, C] at places [B, T, 3] → what each token reads off the points, [B, T, C]."""
        scores = self.points.to(f.dtype) @ f.transpose(1, 2)
        weights = _softmax(scores.to(places.dtype), None if ctx.padding is None else ctx.padding[:, None], 2)
        points = weights @ places
        if ctx.taps is not None:
            points = ctx.taps(f"{self.path}.points", points)
        offsets = points[:, None] - places[:, :, None]  # [B, T, M, 3]
        near = torch.exp(-self.settings.sharpness * offsets.square().sum(-1)).transpose(1, 2)
        gathered = (near * weights).to(f.dtype) @ f
        out: Tensor = self.far(offsets.to(f.dtype), self.far.key(gathered)[:, None], f, None)
        return out

    def _neighbours(self, f: Tensor, places: Tensor, padding: Tensor | None) -> Tensor:
        """What each token reads off those around it, [B, T, C]."""
        assert self.near is not None
        near, seen = nearest(places, padding, self.settings.neighbours, self.settings.radius)
        batch = torch.arange(len(f), device=f.device)[:, None, None]
        offsets = places[batch, near] - places[:, :, None]
        keys = self.near.key(f)[batch, near]
        out: Tensor = self.near(offsets.to(f.dtype), keys, f, seen)
        return out

    def _places(self, x: Tensor, ctx: Context) -> Tensor:
        """[B, T, 3], in float32 (float64 for float64)."""
        given, batch, tokens = ctx.side["coordinates"], *x.shape[:2]
        most = tokens
        if ctx.padding is not None:
            most = int(ctx.padding.sum(1).max()) if readable(ctx.padding) else 0
        wrong = not given.dtype.is_floating_point or given.dim() != 3
        if wrong or given.shape[0] != batch or given.shape[2] != 3 or given.shape[1] < most:
            raise InputError(
                f"the side tensor 'coordinates' is {given.dtype} of shape {tuple(given.shape)}",
                where=self.path,
                hint=f"pass numbers [{batch}, tokens, 3] for at least {most} tokens",
            )
        places = by_number(given, ctx.padding, tokens).to(torch.promote_types(x.dtype, torch.float32))
        return places if ctx.padding is None else places.masked_fill(~ctx.padding[..., None], 0.0)


def nearest(places: Tensor, padding: Tensor | None, most: int, radius: float) -> tuple[Tensor, Tensor]:
    """places [B, T, 3] → the nearest tokens of each, itself first, [B, T, min(most, T)], and which of them are
    real and within the radius. Chosen in float32; of equally near ones the first."""
    at = places.detach().float()
    distance = torch.zeros((), device=at.device)
    for axis in at.unbind(-1):
        distance = distance + (axis[:, :, None] - axis[:, None]).square()
    if padding is not None:
        distance = distance.masked_fill(~padding[:, None], torch.inf)
    count = places.shape[1]
    # Distances order as their bits do, and no two keys are equal: the choice depends on nothing else.
    keys = distance.view(torch.int32).long() * count + torch.arange(count, device=at.device)
    near = keys.topk(min(most, count), dim=2, largest=False).indices
    return near, distance.gather(2, near) <= radius * radius


def _softmax(scores: Tensor, seen: Tensor | None, axis: int) -> Tensor:
    if seen is None:
        return torch.softmax(scores, axis)
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), axis)
    return weights.masked_fill(~seen, 0.0)  # where nothing is seen it is 0/0 above


def _some_places(batch: int, length: int) -> dict[str, Tensor]:
    """Points of a cloud, for trials."""
    return {"coordinates": torch.randn(batch, length, 3, generator=torch.Generator().manual_seed(4))}
