"""A window for every token, and a few global tokens that see all and are seen by all.

Beltagy, Peters & Cohan 2020, Longformer: The Long-Document Transformer. The first `globals` tokens of each
document are global: they have products of their own (q_global, k_global, v_global, which start as copies of
the local ones) over everything, while the other tokens look at their window and at the global tokens in one
softmax. Which tokens are global is the task's choice in the paper; the first ones serve classification (a
token that sums up) and questions put in front. In a causal model a global token sees no later token
either, so that the global products act among the first tokens only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mask import Documents, Keys, Marked, Mask, Window, both
from armillary.nn.mechanism import Capabilities, Frozen, Place, mixers
from armillary.nn.mixers.attention import Look, Scoring
from armillary.nn.mixers.window import WindowAttention, WindowSettings
from armillary.nn.ops.attend import marked_places
from armillary.nn.positions.rope import RopeSettings
from armillary.nn.state import State, WindowState


@mixers.register
class LongformerSettings(WindowSettings):
    """softmax over the window and the global tokens; global tokens over everything, by products of their own."""

    kind: ClassVar[str] = "longformer"
    source: ClassVar[str] = "Beltagy, Peters & Cohan 2020, Longformer: The Long-Document Transformer"
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_longformer.py: transformers' Longformer layer with global tokens, outputs and "
        "gradients; the causal form as loops over tokens"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(
        causal=True, bidirectional=True, state="window", rollback="snapshot"
    )
    globals: int = Field(1, gt=0, description="how many tokens at the start of each document are global")

    @model_validator(mode="after")
    def _sites(self) -> LongformerSettings:
        if self.position is not None and "bias" in self.position.sites:
            raise ValueError(f"'{self.position.kind}' adds scores: longformer takes rotations only (rope)")
        if not self.diagonal:
            raise ValueError("in longformer every token sees itself: diagonal must be true")
        return self

    @classmethod
    def examples(cls) -> list[Example]:
        rope, both_ways = RopeSettings(), {"order": "bidirectional"}
        return [
            Example("causal", cls(window=3, globals=2, kv_heads=2, position=rope)),
            Example("per_head", cls(window=(2, 4, 3, 3), dilation=(1, 1, 2, 1), globals=3, bias=True)),
            Example("sinks", cls(window=3, globals=2, sinks=True)),
            Example("both_ways", cls(window=2, globals=2, kv_heads=2, position=rope), both_ways, compiled=True),
            Example("both_ways_biased", cls(window=3, bias=True), both_ways),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [Limit("wide", Example("wide", cls(heads=1, window=64, globals=2)), _dense)]

    def build(self, place: Place) -> Longformer:
        return Longformer(self, place)

    def rows(self, place: Place, length: int) -> Mapping[str, float]:
        marked = min(self.globals, length)
        seen = length if place.order == "bidirectional" else marked
        return {"q_global": marked, "k_global": seen, "v_global": seen}

    def active(self, parameters: int) -> int:
        """A token that is not global passes the local products and the output's."""
        local, own = 2 * self.heads + 2 * self.groups, self.heads + 2 * self.groups
        return parameters * local // (local + own)

    def pairs(self, place: Place, length: int) -> float:
        if self.sinks:
            return float(self.heads * length * length)
        marked, total = min(self.globals, length), 0.0
        for back, gap in self.spans:
            spans = Window(back, back if place.order == "bidirectional" else 0, gap).spans(length)
            total += length * min(length, 1 + sum(spans) + marked)
        return total

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        each, marked = self.features(place.width), min(self.globals, length)
        seen = length if place.order == "bidirectional" else marked
        flops = linear_flops(place.width, self.heads * each, marked, self.bias)
        flops += 2 * linear_flops(place.width, self.groups * each, seen, self.bias)
        flops += self.heads * marked * (seen * (4 * each + 6 + (3 if self.softcap else 0)) + (5 if self.sinks else 0))
        flops += length * self.heads * each  # the local and the global part of a token, of which one is 0
        flops += self.headed_flops(self.heads, each, marked, True)
        flops += self.headed_flops(self.groups, each, seen, True) + self.headed_flops(self.groups, each, seen, False)
        if self.position is not None:
            flops += self.position.cost(place, marked, self.heads, 0, each).flops
            flops += self.position.cost(place, seen, 0, self.groups, each).flops
        state = self.globals * (4 * self.groups * each * itemsize + 8) if place.order == "causal" else 0
        return super().cost(place, length, itemsize) + Cost(flops, state)


@dataclass(frozen=True)
class Globals:
    """The global tokens of a call: rows [B or 1, m] where they stand, −1 for none; their queries [B, m, H, K],
    the keys that they see [B, S, G, K], at places [B or 1, S] among the values (None: all of them); scoring."""

    rows: Tensor
    q: Tensor
    k: Tensor
    places: Tensor | None
    scoring: Scoring


class Longformer(WindowAttention):
    """x [B, T, D] → [B, T, D]. Values are [B, S, 2·G, K], the local and the global ones, and the mix is
    [B, T, 2·H, K], each row of which is 0 in one half. A causal state is a ring, and the first tokens."""

    def __init__(self, settings: LongformerSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.globals = settings.globals
        self.value_groups = 2 * self.groups
        query, key = self.heads * self.width, self.groups * self.width
        self.q_global = place.product(place.width, query, "q", settings.bias)
        self.k_global = place.product(place.width, key, "k", settings.bias)
        self.v_global = place.product(place.width, key, "v", settings.bias)
        for name in ("q", "k", "v"):
            # Parts are initialised in the order of their making, so the local product has its weights by then.
            for copied, local in zip(
                getattr(self, f"{name}_global").modules(), getattr(self, name).modules(), strict=True
            ):
                if hasattr(copied, "reset"):
                    copied.reset = partial(_copy, copied, local)

    def values(self, x: Tensor, ctx: Context) -> Tensor:
        local = self._headed(self.v(x), self.groups)
        if self.order == "bidirectional":
            return torch.cat([local, self._headed(self.v_global(x), self.groups)], 2)
        rows = self._rows(x, ctx)
        own = self._headed(self.v_global(_at(x, rows)), self.groups)
        return torch.cat([local, _spread(own, rows, x.shape[1])], 2)

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        frozen = super().freeze(x, ctx)
        rows = self._rows(x, ctx)
        taken = _at(x, rows)
        causal = self.order == "causal"
        q, k = self._global(taken, taken if causal else x, ctx.where(x), rows)
        if ctx.taps is not None:
            q, k = ctx.taps(f"{self.path}.q_global", q), ctx.taps(f"{self.path}.k_global", k)
        mask: Mask | None = Window(None, 0, queries=rows, keys=rows) if causal else None
        if ctx.documents is not None:
            own = _at(ctx.documents[..., None], rows)[..., 0]
            mask = both(mask, Documents(own, own if causal else ctx.documents))
        if ctx.padding is not None and not causal:
            mask = both(mask, Keys(ctx.padding))
        found = Globals(rows, q, k, rows if causal else None, Scoring(mask))
        return Frozen({**frozen.parts, "globals": found})

    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        if frozen.weights is not None:
            return super().mix(frozen, values)
        local, own = values.split(self.groups, 2)
        y = super().mix(frozen, local)
        found: Globals = frozen.parts["globals"]
        if found.rows.shape[1] == 0:
            return torch.cat([y, torch.zeros_like(y)], 2)
        if found.places is not None:
            own = _at(own, found.places)
        q, k, v = (each.transpose(1, 2) for each in (found.q, found.k, own))
        z = _spread(self._attend(q, k, v, found.scoring), found.rows, y.shape[1])
        there = torch.ones_like(found.rows, dtype=torch.bool)[..., None]
        y = y.masked_fill(_spread(there, found.rows, y.shape[1])[..., None], 0)
        return torch.cat([y, z], 2)

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        local, own = mixed.split(self.heads, 2)
        return self.o((local + own).flatten(2))  # type: ignore[no-any-return]

    def narrow(self, mask: Mask | None, look: Look) -> Mask | None:
        assert look.keys is not None
        seen = look.keys < self.globals
        if look.ctx.padding is not None:
            seen = seen & look.ctx.padding
        marked = Marked(seen, self._most(seen.shape[1], look.ctx))
        return self._windows(look, lambda window: window | marked if mask is None else mask & (window | marked))

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        state = super().init_state(batch, capacity, dtype, device, memory)
        shape = (batch, self.groups, self.globals, self.width)
        for name in ("first_k", "first_v", "first_k_global", "first_v_global"):
            state.tensors[name] = torch.zeros(shape, dtype=dtype, device=device)
        state.tensors["first"] = torch.full((batch, self.globals), -1, dtype=torch.int64, device=device)
        return state

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        assert isinstance(state, WindowState)
        q, k = self._turned(x, ctx)
        values, rows = self.values(x, ctx), self._rows(x, ctx)
        taken = _at(x, rows)
        own_q, own_k = self._global(taken, taken, ctx.where(x), rows)
        if ctx.taps is not None:
            q, k = ctx.taps(f"{self.path}.q", q), ctx.taps(f"{self.path}.k", k)
            values = ctx.taps(f"{self.path}.v", values)
            own_q, own_k = ctx.taps(f"{self.path}.q_global", own_q), ctx.taps(f"{self.path}.k_global", own_k)
        local, own = (each.transpose(1, 2) for each in values.split(self.groups, 2))
        start, uniform = state.lengths, state.uniform
        parts = {"k": k.transpose(1, 2), "v": local}
        spread = _spread(own_k, rows, x.shape[1]).transpose(1, 2)
        self._keep(state, {**parts, "k_global": spread, "v_global": own}, start, x, ctx)
        held, index = state.append(parts, ctx.lengths)
        before: int | Tensor = start if uniform is None or state.uniform is None else uniform

        # The first tokens stand before the ring; there those of them that the ring holds too are left out.
        first = state.tensors["first"]
        keys = torch.cat([first, index.expand(len(first), -1)], 1)
        known = torch.zeros_like(keys, dtype=torch.bool)
        known[:, : self.globals] = True
        fresh = ~known & ~(keys[:, :, None] == first[:, None]).any(-1)
        look = Look(before, ctx.where(x), None, keys, ctx)
        causal = Window(offset=before, keys=keys)
        mask = self._windows(look, lambda window: causal & (Keys(known) | (window & Keys(fresh))))

        held_k = torch.cat([state.tensors["first_k"].to(k.dtype), held["k"].to(k.dtype)], 2)
        begun = torch.as_tensor(before, device=rows.device).expand(len(rows))[:, None]
        places = torch.arange(self.globals, device=x.device)[None]
        order = Window(None, 0, queries=begun + rows, keys=first)
        found = Globals(rows, own_q, state.tensors["first_k_global"].transpose(1, 2), places, Scoring(order))
        frozen = Frozen({"q": q, "k": held_k.transpose(1, 2), "scoring": self._scoring(mask, look), "globals": found})

        values = torch.cat([state.tensors["first_v"], held["v"]], 2)
        others = state.tensors["first_v_global"]
        others = torch.cat([others, others.new_zeros(*others.shape[:2], values.shape[2] - self.globals, self.width)], 2)
        values = torch.cat([values, others], 1).transpose(1, 2)
        if ctx.taps is not None:
            frozen = self._weights(frozen, values, ctx)
        mixed = self.mix(frozen, values)
        if ctx.taps is not None:
            mixed = ctx.taps(f"{self.path}.mixed", mixed)
        return self.finish(mixed, x, ctx)

    def _keep(self, state: State, parts: Mapping[str, Tensor], start: Tensor, x: Tensor, ctx: Context) -> None:
        """Put the chunk's global tokens into their slots: position p into slot p."""
        slots = torch.arange(self.globals, device=x.device)
        steps = torch.arange(x.shape[1], device=x.device)
        match = ctx.where(x).expand(len(x), -1)[:, None] == slots[:, None]
        if ctx.lengths is not None:
            match = match & (steps < ctx.lengths[:, None])[:, None]
        came, where = match.any(2), match.to(torch.int8).argmax(2)
        for name, part in parts.items():
            old = state.tensors[f"first_{name}"]
            new = part.take_along_dim(where[:, None, :, None], 2).to(old.dtype)
            state.put(f"first_{name}", torch.where(came[:, None, :, None], new, old))
        state.put("first", torch.where(came, start[:, None] + where, state.tensors["first"]))

    def _rows(self, x: Tensor, ctx: Context) -> Tensor:
        """Where the global tokens of x stand, [B, m], −1 for none."""
        marks = (ctx.where(x) < self.globals).expand(x.shape[0], -1)
        real = ctx.present(x)
        return marked_places(marks if real is None else marks & real, self._most(x.shape[1], ctx))

    def _most(self, length: int, ctx: Context) -> int:
        # each of the packed documents, of which there may be as many as tokens, has its own
        return length if ctx.documents is not None else min(length, self.globals)

    def _global(self, taken: Tensor, seen: Tensor, positions: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, m, H, K] of the global tokens, and keys [B, S, G, K] of the tokens that they see."""
        q = self._headed(self.q_global(taken), self.heads, self.q_norm)
        k = self._headed(self.k_global(seen), self.groups, self.k_norm)
        if self.position is not None:
            own = _at(positions[..., None], rows)[..., 0]
            q, _ = self.position.rotate(q, q[:, :, :0], own)
            _, k = self.position.rotate(k[:, :, :0], k, own if self.order == "causal" else positions)
        return q, k


def _at(x: Tensor, places: Tensor) -> Tensor:
    """x [B or 1, S, …] at places [B or 1, m] (−1 gives some row) → [B, m, …]."""
    index = places.clamp(min=0).reshape(*places.shape, *[1] * (x.dim() - 2))
    return x.take_along_dim(index, 1)


def _spread(x: Tensor, places: Tensor, length: int) -> Tensor:
    """The inverse of `_at`: x [B, m, …] at its places of zeros [B, length, …]."""
    index = torch.where(places < 0, length, places).reshape(*places.shape, *[1] * (x.dim() - 2)).expand_as(x)
    return x.new_zeros(x.shape[0], length + 1, *x.shape[2:]).scatter(1, index, x)[:, :length]


def _copy(module: nn.Module, local: nn.Module, generator: torch.Generator | None) -> None:
    module.load_state_dict(local.state_dict())


def _dense(mixer: Longformer, x: Tensor, ctx: Context) -> Tensor:
    """Causal attention of one head that sees everything; of the first tokens by the global products."""
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    parts = []
    for q, k, v in ((mixer.q, mixer.k, mixer.v), (mixer.q_global, mixer.k_global, mixer.v_global)):
        scores = (x @ q.weight.t()) @ (x @ k.weight.t()).transpose(1, 2) * mixer.scale
        parts.append(torch.softmax(scores.masked_fill(later, -torch.inf), -1) @ (x @ v.weight.t()))
    y = torch.cat([parts[1][:, : mixer.globals], parts[0][:, mixer.globals :]], 1)
    return y @ mixer.o.weight.t()  # type: ignore[no-any-return]
