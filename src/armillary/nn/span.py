"""What mixers share that weigh the values of a growing span: every token's queries against its keys.

A mixer of this family says how queries and keys are made and how they meet the values (`attend`);
masks, the state and its chunks, taps and sight are here. Dense attention, which also looks at
memories and prefixes, is in `mixers/attention.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from armillary.base.errors import UnsupportedError
from armillary.nn.context import Context, Memory
from armillary.nn.mask import Causal, Documents, Keys, Mask, both
from armillary.nn.mechanism import Frozen, Mixer, MixerSettings, Place, PositionSettings
from armillary.nn.state import SpanState, State, zeros
from armillary.nn.tape import Buffer, NoStep, Tape, record


def visible(order: str, ctx: Context) -> Mask | None:
    """The mask of a whole call, causal or bidirectional."""
    mask = both(Causal() if order == "causal" else None, ctx.mask)
    if ctx.documents is not None:
        mask = both(mask, Documents(ctx.documents, ctx.documents))
    return mask if ctx.padding is None else both(mask, Keys(ctx.padding))


class SpanMixer(Mixer):
    """x [B, T, D] → [B, T, D]; causal, its state are the keys and values so far.

    heads: of queries; groups: of keys and values; width: features of each; position: turns queries
    and keys; tracks: whether the positions of earlier tokens are kept, for `attend` to use.
    """

    scaled = ("scale",)

    def __init__(
        self,
        settings: MixerSettings,
        place: Place,
        *,
        heads: int,
        groups: int,
        width: int,
        position: PositionSettings | None = None,
        tracks: bool = False,
    ) -> None:
        super().__init__(settings, place)
        self.heads, self.groups, self.width, self.tracks = heads, groups, width, tracks
        self.scale = width**-0.5
        self.value_groups = groups
        self.k = place.product(place.width, groups * width, "k")
        self.v = place.product(place.width, groups * width, "v")
        sites = position.sites if position is not None else frozenset()
        if sites - {"rotate"}:
            raise UnsupportedError(
                f"'{self.kind}' takes rotations only", where=place.path, hint="position: rope or none"
            )
        self.position = position.build(place.at("position"), heads, width) if position is not None and sites else None

    def queries(self, x: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """[B, T, H, K], and whatever else `close` needs."""
        raise NotImplementedError

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, places: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """q [B, H, T, K], k and v [B, G, S, K] → [B, H, T, K]; places: the positions [B or 1, T] and
        [B or 1, S] of both, where tracked."""
        raise NotImplementedError

    def close(self, mixed: Tensor, frozen: Frozen, x: Tensor, ctx: Context) -> Tensor:
        """`finish` with what `queries` gave at hand."""
        return self.finish(mixed, x, ctx)

    def values(self, x: Tensor, ctx: Context) -> Tensor:
        return self.v(x).unflatten(-1, (self.groups, self.width))  # type: ignore[no-any-return]

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        where = ctx.where(x)
        parts = {**self._scored(x, ctx), "mask": visible(self.order, ctx), "places": (where, where)}
        return Frozen(parts)

    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        if frozen.weights is not None:
            each = values.repeat_interleave(self.heads // self.groups, 2).transpose(1, 2)
            return (frozen.weights.to(each.dtype) @ each).transpose(1, 2)
        q, k, mask, places = (frozen.parts[name] for name in ("q", "k", "mask", "places"))
        y = self.attend(q.transpose(1, 2), k.transpose(1, 2), values.transpose(1, 2), mask, places)
        return y.transpose(1, 2)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        self.accept(ctx)
        values = self.values(x, ctx)
        if ctx.taps is not None:
            values = ctx.taps(f"{self.path}.v", values)
        return self._closed(self.freeze(x, ctx), values, x, ctx)

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        if self.order == "bidirectional":
            raise UnsupportedError("a bidirectional mixer cannot be extended", where=self.path)
        shape = (batch, self.groups, capacity, self.width)
        # Zeros, not empty: a slot that a ragged row has not reached meets a weight of 0, and 0·NaN is NaN.
        tensors = {name: zeros(shape, dtype, device) for name in ("k", "v")}
        if self.tracks:
            tensors["positions"] = zeros((batch, 1, capacity), torch.int64, device)
        return SpanState(tensors)

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        assert isinstance(state, SpanState)
        valid = ctx.present(x)
        if valid is not None:  # what stands in other places must not decide how the products of valid ones are grouped
            x = x.masked_fill(~valid[..., None], 0.0)
        values = self.values(x, ctx)
        if ctx.taps is not None:
            values = ctx.taps(f"{self.path}.v", values)
        made = self._scored(x, ctx)
        added = {"k": made["k"].transpose(1, 2), "v": values.transpose(1, 2)}
        where = ctx.where(x)
        if self.tracks:
            added["positions"] = where.expand(x.shape[0], -1)[:, None]
        start, uniform = state.lengths, state.uniform
        held = state.append(added, ctx.lengths)
        mask = Causal(start if uniform is None or state.uniform is None else uniform)
        places = (where, held["positions"][:, 0]) if self.tracks else None
        frozen = Frozen({**made, "k": held["k"].transpose(1, 2), "mask": mask, "places": places})
        return self._closed(frozen, held["v"].transpose(1, 2), x, ctx)

    def appended(self, tape: Tape, x: Buffer, state: State) -> tuple[Tensor, Tensor]:
        """The native step of keys and values: added to those so far, [slots, G, room, K] of both."""
        if type(state) is not SpanState or self.tracks:
            raise NoStep("keys and values that a driver or a cache of another kind keeps, or positions beside them")
        k, v = tape.hold(state, "k", "v")
        key, value = (record(product, tape, x, unit=self.width) for product in (self.k, self.v))
        if self.position is not None:
            record(self.position, tape, key, self.groups)
        tape.append(k, key)
        tape.append(v, value)
        return k, v

    def _scored(self, x: Tensor, ctx: Context) -> dict[str, Tensor]:
        q, rest = self.queries(x, ctx)
        k = self.k(x).unflatten(-1, (self.groups, self.width))
        if self.position is not None:
            q, k = self.position.rotate(q, k, ctx.where(x))
        if ctx.taps is not None:
            q, k = ctx.taps(f"{self.path}.q", q), ctx.taps(f"{self.path}.k", k)
        return {"q": q, "k": k, **rest}

    def _closed(self, frozen: Frozen, values: Tensor, x: Tensor, ctx: Context) -> Tensor:
        if ctx.taps is None:
            return self.close(self.mix(frozen, values), frozen, x, ctx)
        mixed = self.mix(self._weights(frozen, values, ctx), values)
        return self.close(ctx.taps(f"{self.path}.mixed", mixed), frozen, x, ctx)
