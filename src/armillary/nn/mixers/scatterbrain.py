"""Sparse and low-rank attention at once: exact near by, estimated by random features far away.

Chen et al. 2021, Scatterbrain: Unifying Sparse and Low-rank Attention Approximation. The kernel
estimate of FAVOR+ (Choromanski et al. 2021) is corrected where attention is sparse but large, here
inside a local window (the paper finds such pairs by hashing; the window is what public
re-implementations take, and is causal as it stands). O(T·(window + features)). Causally the state is
the window's keys and values and the sums over older tokens. Random features follow from `seed` and
stay as they are: weights trained with them expect them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from armillary.base.errors import UnsupportedError
from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mechanism import (
    Capabilities,
    Frozen,
    Mixer,
    MixerSettings,
    Place,
    PositionSettings,
    head_width,
    mixers,
)
from armillary.nn.ops.features import log_features, orthogonal_features
from armillary.nn.ops.scatter import EMPTY, Totals, chunk_for, scatter_attend, scatter_extend
from armillary.nn.positions.rope import RopeSettings
from armillary.nn.state import State, WindowState


@mixers.register
class ScatterbrainSettings(MixerSettings):
    """exp(q·k/√K) inside the window, Σ_f φ_f(q) φ_f(k) outside, normalised together."""

    kind: ClassVar[str] = "scatterbrain"
    source: ClassVar[str] = "Chen et al. 2021, Scatterbrain: Unifying Sparse and Low-rank Attention Approximation"
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_scatterbrain.py: D⁻¹(φ(Q)φ(K)ᵀ + S)V with all pairs written out; softmax attention"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(bidirectional=True, state="window", rollback="snapshot")
    heads: int = Field(4, gt=0, description="heads")
    window: int = Field(64, ge=0, description="tokens seen exactly, the query's own included; 0: none (FAVOR+)")
    features: int = Field(64, gt=0, description="random features per head")
    seed: int = Field(0, ge=0, description="of the random features")
    position: PositionSettings | None = Field(None, description="how q and k turn: rope or none")

    @classmethod
    def examples(cls) -> list[Example]:
        both = {"order": "bidirectional"}
        return [
            Example("causal", cls(heads=2, window=4, features=6), compiled=True),
            Example("rotated", cls(heads=2, window=3, features=8, position=RopeSettings(), seed=4)),
            Example("estimates_only", cls(heads=2, window=0, features=6)),
            Example("both_ways", cls(heads=2, window=3, features=6), both),
            Example("estimates_both_ways", cls(heads=2, window=0, features=6), both),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        both = {"order": "bidirectional"}
        return [
            Limit("softmax", Example("wide", cls(heads=1, window=20)), _softmax),
            Limit("softmax_both_ways", Example("wide", cls(heads=1, window=20), both), _softmax),
            Limit("favor", Example("no_window", cls(heads=1, window=0, features=12)), _favor),
        ]

    def head_width(self, width: int) -> int:
        return head_width(width, self.heads, settable=False)

    def build(self, place: Place) -> Scatterbrain:
        return Scatterbrain(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        each, m = self.head_width(place.width), self.features
        flops = 4 * linear_flops(place.width, place.width, length)
        if self.position is not None:
            flops += self.position.cost(place, length, self.heads, self.heads, each).flops
        found = 2.0 * length * (4 * each + 2 + m * (2 * each + 1))
        chunk, causal = chunk_for(self.window), place.order == "causal"

        def absorbed(tokens: int) -> float:
            return tokens * m * (4.0 + 2 * each) + m * (5 + 2 * each) if tokens else 0.0

        for start in range(0, length, chunk):
            stop = min(length, start + chunk)
            low = max(0, start - self.window)
            high = stop if causal else min(length, stop + self.window)
            rows, keys = stop - start, high - low
            found += rows * keys * (4.0 * each + 6)
            left = max(0, min(keys, stop - self.window - low))
            right = keys if causal else max(left, min(keys, start + self.window - low))
            if left or right < keys:
                found += 3.0 * rows * m
            for band in (left, keys - right):
                if band:
                    found += 3.0 * band * m + rows * band * (2.0 * m + 4)
            for far in (low > 0, high < length and not causal):
                if far:
                    found += rows * m * (2.0 * each + 6) + m * (each + 2)
            if low > 0 or (high < length and not causal):
                found += rows * each
            previous = max(0, start - chunk - self.window)
            found += absorbed(low - previous)
            if not causal:
                following = min(length, min(length, stop + chunk) + self.window) if stop < length else length
                found += absorbed(following - high)
        ring = max(1, self.window - 1)
        state = self.heads * (2.0 * ring * each * itemsize + 4 * m * (each + 2))
        return Cost(flops + self.heads * found, state if causal else 0)


class Scatterbrain(Mixer):
    """x [B, T, D] → [B, T, D]; its state is a ring of keys and values and the totals of older tokens."""

    scaled = ("scale",)

    def __init__(self, settings: ScatterbrainSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.heads = self.value_groups = settings.heads
        self.width = settings.head_width(place.width)
        self.window, self.features = settings.window, settings.features
        self.ring = max(1, settings.window - 1)  # what the next token sees exactly, besides itself
        self.scale = self.width**-0.5
        self.q = place.product(place.width, place.width, "q")
        self.k = place.product(place.width, place.width, "k")
        self.v = place.product(place.width, place.width, "v")
        self.o = place.product(place.width, place.width, "o")
        # Not a buffer: it follows from the settings, and casting or building on the meta device leaves it alone.
        self.omega = orthogonal_features(self.features, self.width, settings.seed, self.heads).float()
        sites = settings.position.sites if settings.position is not None else frozenset()
        if sites - {"rotate"}:
            raise UnsupportedError("scatterbrain takes rotations only", where=place.path, hint="position: rope or none")
        self.position = (
            settings.position.build(place.at("position"), self.heads, self.width)
            if settings.position is not None and sites
            else None
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Scatterbrain:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0)).device
        if device.type != "meta":
            self.omega = self.omega.to(device)
        return self

    def values(self, x: Tensor, ctx: Context) -> Tensor:
        return self.v(x).unflatten(-1, (self.heads, self.width))  # type: ignore[no-any-return]

    def _queries_keys(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        q = self.q(x).unflatten(-1, (self.heads, self.width))
        k = self.k(x).unflatten(-1, (self.heads, self.width))
        if self.position is not None:
            q, k = self.position.rotate(q, k, ctx.where(x))
        if ctx.taps is not None:
            q, k = ctx.taps(f"{self.path}.q", q), ctx.taps(f"{self.path}.k", k)
        return q, k

    def _logs(self, x: Tensor) -> Tensor:
        """Log features [B, H, T, m] of queries or keys [B, H, T, K]."""
        return log_features(x * self.scale**0.5, self.omega.to(x.device))

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        q, k = self._queries_keys(x, ctx)
        return Frozen({"q": q, "k": k, "valid": ctx.padding, "documents": ctx.documents})

    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        if frozen.weights is not None:
            return (frozen.weights.to(values.dtype) @ values.transpose(1, 2)).transpose(1, 2)
        parts = frozen.parts
        q, k = parts["q"].transpose(1, 2), parts["k"].transpose(1, 2)
        y = scatter_attend(
            q,
            k,
            values.transpose(1, 2),
            self._logs(q),
            self._logs(k),
            window=self.window,
            scale=self.scale,
            causal=self.order == "causal",
            valid=parts["valid"],
            documents=parts["documents"],
        )
        return y.transpose(1, 2)

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return self.o(mixed.flatten(2))  # type: ignore[no-any-return]

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        if self.order == "bidirectional":
            raise UnsupportedError("a bidirectional mixer cannot be extended", where=self.path)
        wide = torch.promote_types(dtype, torch.float32)
        shape = (batch, self.heads, self.ring, self.width)
        tensors = {name: torch.zeros(shape, dtype=dtype, device=device) for name in ("k", "v")}
        totals = (batch, self.heads, self.features)
        tensors["top"] = torch.full(totals, EMPTY, dtype=wide, device=device)
        tensors["mass"] = torch.zeros(totals, dtype=wide, device=device)
        tensors["sums"] = torch.zeros(*totals, self.width, dtype=wide, device=device)
        return WindowState(tensors)

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        assert isinstance(state, WindowState)
        values = self.values(x, ctx)
        if ctx.taps is not None:
            values = self.tapped_values(values, ctx)
        q, k = (part.transpose(1, 2) for part in self._queries_keys(x, ctx))
        v, chunk, pieces = values.transpose(1, 2), chunk_for(self.window), []
        for start in range(0, x.shape[1], chunk):
            part = slice(start, start + chunk)
            lengths = None if ctx.lengths is None else (ctx.lengths - start).clamp(0, min(chunk, x.shape[1] - start))
            pieces.append(self._extend(q[:, :, part], k[:, :, part], v[:, :, part], state, lengths))
        mixed = torch.cat(pieces, 2).transpose(1, 2)
        if ctx.taps is not None:
            mixed = ctx.taps(f"{self.path}.mixed", mixed)
        return self.finish(mixed, x, ctx)

    def _extend(self, q: Tensor, k: Tensor, v: Tensor, state: WindowState, lengths: Tensor | None) -> Tensor:
        count, before = q.shape[2], state.lengths
        held, columns = state.append({"k": k, "v": v}, lengths)
        keys, values = held["k"].to(q.dtype), held["v"].to(q.dtype)
        steps = torch.arange(count, device=q.device)
        tensors = state.tensors
        far = Totals(tensors["top"], tensors["mass"], tensors["sums"])
        y = scatter_extend(
            q,
            keys,
            values,
            self._logs(q),
            self._logs(keys),
            far,
            lines=before[:, None] + steps,
            columns=columns,
            window=self.window,
            scale=self.scale,
        )
        # Tokens that the ring loses join the totals.
        index = before[:, None] - self.ring + steps
        live = (index >= 0) & (index < state.lengths[:, None] - self.ring)
        slots = torch.where(index < before[:, None], index % self.ring, self.ring + index - before[:, None])
        places = slots.clamp(0, self.ring + count - 1)[:, None, :, None].expand(-1, self.heads, -1, self.width)
        far = far.absorb(self._logs(keys.gather(2, places)), values.gather(2, places), live)
        for name, value in (("top", far.top), ("mass", far.mass), ("sums", far.sums)):
            if torch.is_grad_enabled():
                tensors[name] = value
            else:
                tensors[name].copy_(value)
        return y


def _pairs(mixer: Scatterbrain, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the first head."""
    q, k, v = (x @ product.weight.t() for product in (mixer.q, mixer.k, mixer.v))
    return q, k, v


def _softmax(mixer: Scatterbrain, x: Tensor, ctx: Context) -> Tensor:
    """softmax(q kᵀ / √K) v of one head."""
    q, k, v = _pairs(mixer, x)
    scores = q @ k.transpose(1, 2) / mixer.width**0.5
    if mixer.order == "causal":
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    y: Tensor = torch.softmax(scores, -1) @ v @ mixer.o.weight.t()
    return y


def _favor(mixer: Scatterbrain, x: Tensor, ctx: Context) -> Tensor:
    """φ(q) φ(k)ᵀ, causal and normalised, of one head (Choromanski et al. 2021)."""
    q, k, v = _pairs(mixer, x)
    q, k = (
        (z @ mixer.omega[0].t() - z.square().sum(-1, keepdim=True) / 2).exp()
        for z in (q * mixer.width**-0.25, k * mixer.width**-0.25)
    )
    weights = (q @ k.transpose(1, 2)).tril()
    y: Tensor = weights / weights.sum(-1, keepdim=True) @ v @ mixer.o.weight.t()
    return y
