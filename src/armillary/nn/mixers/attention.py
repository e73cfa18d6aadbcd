"""Dense softmax attention: multi-head, grouped- and multi-query, cross; causal, bidirectional, prefix.

Vaswani et al. 2017, Attention Is All You Need; grouped queries: Ainslie et al. 2023, GQA; query and
key norms: Henry et al. 2020, Query-Key Normalization for Transformers; soft-capped scores: Gemma
Team 2024, Gemma 2; learned sinks: a logit per head that takes part in the softmax without a value
(Xiao et al. 2023, Efficient Streaming Language Models with Attention Sinks); tokens that do not see
themselves: Shi et al. 2021, SparseBERT: Rethinking the Importance Analysis in Self-attention; products cut to a
range: MosaicML 2023, MPT; norms over all heads together: OLMo Team 2025, 2 OLMo 2 Furious.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from armillary.base.errors import UnsupportedError
from armillary.nn.cache import Int8State, Kept, KeptState, Later
from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mask import Causal, Documents, Keys, Mask, Others, Prefix, Window, both
from armillary.nn.mechanism import (
    Capabilities,
    Frozen,
    Mixer,
    MixerSettings,
    NormSettings,
    Place,
    PositionSettings,
    head_width,
    mixers,
)
from armillary.nn.norms.rmsnorm import RMSNormSettings
from armillary.nn.ops.attend import Bias, Modify, attend
from armillary.nn.positions.alibi import Alibi
from armillary.nn.positions.rope import RopeSettings
from armillary.nn.positions.transformer_xl import TransformerXLPosition
from armillary.nn.state import FixedState, SlideState, SpanState, State, WindowState, zeros
from armillary.nn.steps.span import attend_int8
from armillary.nn.tape import Buffer, NoStep, Tape, record

_SITES = frozenset({"rotate", "bias", "relate"})


@mixers.register
class AttentionSettings(MixerSettings):
    """softmax(q kᵀ / √K + position) v over the tokens that the mask allows."""

    kind: ClassVar[str] = "attention"
    source: ClassVar[str] = "Vaswani et al. 2017, Attention Is All You Need"
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_attention.py: transformers' Llama, Qwen3, Gemma 2, gpt-oss, GPT-2, OLMo, "
        "OLMo 2 and T5 layers, PyTorch's cross attention; outputs and gradients"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(
        causal=True,
        bidirectional=True,
        prefix=True,
        cross=True,
        mask=True,
        state="span",
        rollback="truncate",
        driven=True,
    )
    tracked: ClassVar[bool] = False  # whether the mask needs the positions of earlier tokens
    heads: int = Field(4, gt=0, description="query heads")
    kv_heads: int | None = Field(None, gt=0, description="key/value heads (divides heads); by default as many")
    head_width: int | None = Field(None, gt=0, description="features per head; by default width / heads")
    position: PositionSettings | None = Field(
        None, description="where tokens stand: rope, alibi, t5, transformer_xl, none"
    )
    norm: NormSettings | None = Field(None, description="norm of queries and keys")
    norm_over: Literal["head", "all"] = Field(
        "head", description="what that norm goes over: the features of each head, or of all heads together"
    )
    clip: float | None = Field(None, gt=0, description="queries, keys and values are cut to ±clip, before any norm")
    softcap: float | None = Field(None, gt=0, description="scores become c·tanh(score/c)")
    sinks: bool = Field(False, description="a learned logit per head that takes attention and gives nothing")
    scale: float | None = Field(None, gt=0, description="factor on the scores; by default 1/√head_width")
    bias: bool = Field(False, description="biases on q, k and v")
    out_bias: bool | None = Field(None, description="bias on the output product; by default as `bias`")
    diagonal: bool = Field(
        True, description="whether a token sees itself; without, a causal row's first token still does"
    )

    @model_validator(mode="after")
    def _coherent(self) -> AttentionSettings:
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads ({self.kv_heads}) must divide heads ({self.heads})")
        if self.position is not None and self.position.kind != "none" and not self.position.sites & _SITES:
            raise ValueError(f"'{self.position.kind}' acts on the embedding: put it under model.position")
        return self

    @classmethod
    def examples(cls) -> list[Example]:
        rope, rms = RopeSettings(), RMSNormSettings()
        return [
            Example("multi_head", cls(position=rope)),
            Example("grouped", cls(kv_heads=2, position=rope), compiled=True),
            Example("multi_query", cls(kv_heads=1, position=rope)),
            Example("softcap", cls(softcap=2.0), compiled=True),
            Example("sinks", cls(kv_heads=2, sinks=True)),
            Example("qk_norm", cls(position=rope, norm=rms)),
            Example("wide_biased", cls(head_width=6, bias=True, scale=0.3, clip=0.7, norm=rms, norm_over="all")),
            Example("no_diagonal", cls(position=rope, diagonal=False)),
            Example("bidirectional", cls(position=rope), {"order": "bidirectional"}),
            Example("no_diagonal_both_ways", cls(diagonal=False), {"order": "bidirectional"}),
            Example("prefix", cls(position=rope), {"order": "prefix"}),
            Example("cross", cls(kv_heads=2), {"cross": True}),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [
            Limit("textbook", Example("one_head", cls(heads=1)), _textbook),
            Limit("softcap", Example("high_cap", cls(softcap=1e4)), Example("no_cap", cls())),
        ]

    @property
    def groups(self) -> int:
        return self.kv_heads or self.heads

    def features(self, width: int) -> int:
        """Features per head."""
        return head_width(width, self.heads, self.head_width)

    def build(self, place: Place) -> Attention:
        return Attention(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        width, each = place.width, self.features(place.width)
        query, key = self.heads * each, self.groups * each
        out_bias = self.bias if self.out_bias is None else self.out_bias
        flops = linear_flops(width, query, length, self.bias) + 2 * linear_flops(width, key, length, self.bias)
        flops += linear_flops(query, width, length, out_bias)
        pairs = self.pairs(place, length)
        flops += pairs * (4 * each + 6)  # two products, scale, softmax
        if self.softcap is not None:
            flops += 3 * pairs
        if self.sinks:
            flops += 5.0 * self.heads * length
        for heads, normed in ((self.heads, True), (self.groups, True), (self.groups, False)):
            flops += self.headed_flops(heads, each, length, normed)
        if self.position is not None:
            flops += self.position.cost(place, length, self.heads, self.groups, each).flops
        tracked = self.tracked or (self.position is not None and bool(self.position.sites & {"bias", "relate"}))
        kept = 0 if place.order == "bidirectional" and not place.cross else self.kept(length)
        return Cost(flops, kept * (2 * key * itemsize + (8 if tracked else 0)))

    def headed_flops(self, heads: int, each: int, length: int, normed: bool) -> float:
        """FLOPs of cutting and norming one product's results."""
        flops = 0.0 if self.clip is None else float(heads * each * length)
        if self.norm is not None and normed:
            over = self.norm_over == "all"
            flops += self.norm.flops(heads * each, length) if over else self.norm.flops(each, heads * length)
        return flops

    def pairs(self, place: Place, length: int) -> float:
        """How many scores a row of `length` tokens takes, over all heads."""
        return float(self.heads * length * length)

    def kept(self, length: int) -> int:
        """How many tokens the state has room for after `length` of them."""
        return length


@dataclass(frozen=True)
class Scoring:
    """How the scores of one call are made beyond q kᵀ: which of them count, what is added, what changes them."""

    mask: Mask | None = None
    bias: Bias | None = None
    modify: Modify | None = None


@dataclass(frozen=True)
class Look:
    """Who looks at whom in one call: `before` keys lie before its queries (one number, or [B] of them),
    in the order of the row unless `index` [B or 1, S] says which token each key is (a ring); positions
    of the queries [B or 1, T] and, for a mixer that tracks them, of the keys [B or 1, S]; and the call itself."""

    before: int | Tensor
    queries: Tensor
    keys: Tensor | None
    index: Tensor | None = None
    ctx: Context = field(default_factory=Context)


class Attention(Mixer):
    """x [B, T, D] → [B, T, D]; with cross, keys and values come from ctx.memory [B, S, D].

    Kinds of attention that differ in what is seen or how it is scored derive from it: `narrow` is the
    mask of their own, `modify` changes scores, and `window` bounds the state.
    """

    scaled = ("scale",)
    window: int | None = None  # how many tokens back anything can look; the state holds no more

    def __init__(self, settings: AttentionSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.heads, self.groups = settings.heads, settings.groups
        self.width = settings.features(place.width)
        self.value_groups = self.groups
        self.scale = settings.scale or self.width**-0.5
        self.softcap = settings.softcap
        self.diagonal = settings.diagonal or place.cross
        out_bias = settings.bias if settings.out_bias is None else settings.out_bias
        self.q = place.product(place.width, self.heads * self.width, "q", settings.bias)
        self.k = place.product(place.width, self.groups * self.width, "k", settings.bias)
        self.v = place.product(place.width, self.groups * self.width, "v", settings.bias)
        self.o = place.product(self.heads * self.width, place.width, "o", out_bias)
        sites = settings.position.sites if settings.position is not None else frozenset()
        if place.cross and sites:
            raise UnsupportedError("cross attention takes no positions", where=place.path, hint="set position: null")
        self.position = (
            settings.position.build(place.at("position"), self.heads, self.width)
            if settings.position is not None and sites
            else None
        )
        self.rotates, self.biases, self.relates = "rotate" in sites, "bias" in sites, "relate" in sites
        self.compares = isinstance(self.position, TransformerXLPosition) and self.position.segment is not None
        self.tracks = self.biases or self.relates or settings.tracked
        self.clip, self.norm_all = settings.clip, settings.norm_over == "all"
        self.q_norm = self.k_norm = None
        if settings.norm is not None:
            self.q_norm = settings.norm.build(self.width * (self.heads if self.norm_all else 1))
            self.k_norm = settings.norm.build(self.width * (self.groups if self.norm_all else 1))
        self.sinks = nn.Parameter(torch.empty(self.heads)) if settings.sinks else None

    def reset(self, generator: torch.Generator | None) -> None:
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def values(self, x: Tensor, ctx: Context) -> Tensor:
        source = self._memory(ctx).hidden.to(x.dtype) if self.cross else x
        return self._headed(self.v(source), self.groups)

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        if self.cross:
            memory = self._memory(ctx)
            q, k = self._queries(x, ctx), self._keys(memory.hidden.to(x.dtype), ctx)
            mask: Mask | None = None if memory.padding is None else Keys(memory.padding)
            if ctx.taps is not None:
                q, k = ctx.taps(f"{self.path}.q", q), ctx.taps(f"{self.path}.k", k)
            return Frozen({"q": q, "k": k, "scoring": Scoring(mask)})
        q, k = self._turned(x, ctx)
        if ctx.taps is not None:
            q, k = ctx.taps(f"{self.path}.q", q), ctx.taps(f"{self.path}.k", k)
        look = Look(0, ctx.where(x), ctx.where(x), ctx=ctx)
        q, scoring = self._related(q, self._scoring(self._mask(ctx, look), look), look)
        return Frozen({"q": q, "k": k, "scoring": scoring})

    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        if frozen.weights is not None:
            each = values.repeat_interleave(self.heads // self.groups, 2).transpose(1, 2)
            return (frozen.weights.to(each.dtype) @ each).transpose(1, 2)
        return self._attend(
            frozen.parts["q"].transpose(1, 2),
            frozen.parts["k"].transpose(1, 2),
            values.transpose(1, 2),
            frozen.parts["scoring"],
        )

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return self.o(mixed.flatten(2))  # type: ignore[no-any-return]

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        if self.cross:
            if memory is None:
                raise UnsupportedError("cross attention needs a memory", where=self.path, hint="pass source=…")
            hidden = memory.hidden
            parts = {
                "k": self._keys(hidden, Context()).transpose(1, 2),
                "v": self._headed(self.v(hidden), self.groups).transpose(1, 2),
            }
            if memory.padding is not None:
                parts["padding"] = memory.padding
            return FixedState(parts)
        if self.order == "bidirectional":
            raise UnsupportedError("a bidirectional mixer cannot be extended", where=self.path)
        shape = (batch, self.groups, capacity if self.window is None else self.window, self.width)
        # Zeros, not empty: a slot that a ragged row has not reached meets a weight of 0, and 0·NaN is NaN.
        tensors = {name: zeros(shape, dtype, device) for name in ("k", "v")}
        if self.tracks:
            tensors["positions"] = zeros((batch, 1, shape[2]), torch.int64, device)
        return SpanState(tensors) if self.window is None else WindowState(tensors)

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        if isinstance(state, FixedState):
            q = self._queries(x, ctx)
            padding = state.tensors.get("padding")
            seen = None if padding is None else Keys(padding)
            k, v = state.tensors["k"], state.tensors["v"]
            if ctx.taps is not None:
                q, k = ctx.taps(f"{self.path}.q", q), ctx.taps(f"{self.path}.k", k.transpose(1, 2)).transpose(1, 2)
                v = ctx.taps(f"{self.path}.v", v.transpose(1, 2)).transpose(1, 2)
            return self._mixed(q, k, v, Scoring(seen), x, ctx)
        q, k = self._turned(x, ctx)
        v = self._headed(self.v(x), self.groups)
        if ctx.taps is not None:
            q, k = ctx.taps(f"{self.path}.q", q), ctx.taps(f"{self.path}.k", k)
            v = ctx.taps(f"{self.path}.v", v)
        parts = {"k": k.transpose(1, 2), "v": v.transpose(1, 2)}
        positions = ctx.where(x).expand(x.shape[0], -1)
        if self.tracks:
            parts["positions"] = positions[:, None]
        index: Tensor | None = None
        mask: Mask | None
        if isinstance(state, SlideState):
            if not self.diagonal:
                raise UnsupportedError("a driver's segments show every token to itself", where=self.path)
            held, mask = state.see(parts, self._kept(x, parts, ctx) if state.detached else None, ctx.lengths)
            look = Look(0, positions, held["positions"][:, 0] if self.tracks else None, ctx=ctx)
        else:
            assert isinstance(state, (SpanState, WindowState, KeptState))
            start, uniform = state.lengths, state.uniform
            if isinstance(state, KeptState):
                held, kept = state.append(parts, ctx.lengths, ctx.taps is not None)
            elif isinstance(state, WindowState):
                held, index = state.append(parts, ctx.lengths)
            else:
                held = state.append(parts, ctx.lengths)
            before: int | Tensor = start if uniform is None or state.uniform is None else uniform
            look = Look(before, positions, held["positions"][:, 0] if self.tracks else None, index, ctx)
            if isinstance(state, KeptState):
                mask = Kept(kept, before, self.heads, state.policy)
            else:
                mask = self.narrow(self._extend_mask(look, ctx, x), look)
        q, scoring = self._related(q, self._scoring(mask, look), look)
        y = self._mixed(q, held["k"], held["v"], scoring, x, ctx)
        if isinstance(state, KeptState):
            state.settle(partial(self._mass, q, held["k"], held["v"], scoring), x.shape[1], ctx.lengths is not None)
        return y

    @property
    def evicts(self) -> bool:
        """Whether single tokens can be dropped from its state: their scores depend on no other token."""
        own = ("extend", "init_state", "narrow", "modify", "_attend", "_mixed", "_scoring", "_related", "_extend_mask")
        plain = all(getattr(type(self), name) is getattr(Attention, name) for name in own)
        return plain and self.diagonal and self.window is None and not self.cross and self.order == "causal"

    def _mass(self, q: Tensor, k: Tensor, v: Tensor, how: Scoring, valid: Tensor | None, first: int) -> Tensor:
        """The attention that every key gets from valid queries [B, T] from `first` on, [B, H, S]."""
        assert how.mask is not None
        bias = None if how.bias is None else partial(_later_rows, how.bias, first)
        _, mass = attend(
            q.transpose(1, 2)[:, :, first:],
            k,
            v[..., :1],
            mask=Later(how.mask, first, valid),
            bias=bias,
            scale=self.scale,
            softcap=self.softcap,
            sinks=self.sinks,
            want_mass=True,
        )
        assert mass is not None
        return mass

    def record(self, tape: Tape, x: Buffer, state: State) -> Buffer:
        if type(self) is not Attention:
            raise NoStep(f"'{self.kind}' has no native step")
        return self.recorded(tape, x, state)

    def recorded(self, tape: Tape, x: Buffer, state: State, back: int | None = None) -> Buffer:
        """The step of attention that looks at most `back` tokens back."""
        if (
            self.order != "causal"
            or self.cross
            or not self.diagonal
            or type(state) not in (SpanState, Int8State, WindowState)
        ):
            raise NoStep("attention that is not causal, or with a memory, a driver or a cache of another kind")
        biased = isinstance(self.position, Alibi)
        if self.tracks and not biased:
            raise NoStep("scores that depend on positions otherwise than by slopes")
        queries = self._headed_step(tape, x, self.q, self.heads, self.q_norm)
        keys = self._headed_step(tape, x, self.k, self.groups, self.k_norm)
        values = self._headed_step(tape, x, self.v, self.groups, None)
        if self.rotates:
            record(self.position, tape, queries, self.heads)
            record(self.position, tape, keys, self.groups)
        if self.tracks:
            tape.append(tape.hold(state, "positions")[0], None)
        how: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap, "sinks": self.sinks}
        how["slopes"] = self.position.slopes if isinstance(self.position, Alibi) else None
        if isinstance(state, Int8State):
            assert back is None
            mixed = attend_int8(tape, state, queries, keys, values, self.heads, **how)
        else:
            k, v = tape.hold(state, "k", "v")
            tape.append(k, keys)
            tape.append(v, values)
            mixed = tape.attend(queries, k, v, self.heads, back=back, **how)
        return record(self.o, tape, mixed)  # type: ignore[no-any-return]

    def _headed_step(self, tape: Tape, x: Buffer, product: nn.Module, heads: int, norm: nn.Module | None) -> Buffer:
        y: Buffer = record(product, tape, x, unit=self.width)
        if self.clip is not None:
            tape.clip(y, self.clip, self.width)
        if norm is None:
            return y
        return record(norm, tape, y, **({"place": True} if self.norm_all else {"over": (heads, self.width)}))  # type: ignore[no-any-return]

    def narrow(self, mask: Mask | None, look: Look) -> Mask | None:
        """The order's mask, narrowed to what this kind of attention looks at."""
        if self.diagonal:
            return mask
        return both(mask, Others(look.before, look.index, look.queries == 0 if self.order == "causal" else None))

    def modify(self, look: Look) -> Modify | None:
        """How this kind of attention changes its scores."""
        return None

    def _scoring(self, mask: Mask | None, look: Look) -> Scoring:
        bias: Bias | None = None
        if self.biases:
            assert self.position is not None and look.keys is not None
            bias = partial(_bias_rows, self.position, look.queries, look.keys)
        return Scoring(mask, bias, self.modify(look))

    def _related(self, q: Tensor, how: Scoring, look: Look) -> tuple[Tensor, Scoring]:
        """The queries that meet the keys' content, and what a position that knows them adds to the scores."""
        if not self.relates:
            return q, how
        assert self.position is not None and look.keys is not None
        turned, scores = self.position.relate(q, look.queries, look.keys)
        if self.compares and "segments" in look.ctx.side:
            assert isinstance(self.position, TransformerXLPosition)
            scores = partial(_sum_rows, scores, self.position.compare(q, look.ctx.side["segments"]))
        return turned, replace(how, bias=partial(_scaled_rows, scores, self.scale))

    def entries(self, x: Tensor, ctx: Context) -> dict[str, Tensor]:
        """What tokens x [B, T, D] at ctx.positions are looked at by: keys and values [B, G, T, K], and
        their positions [B, 1, T] where scores depend on them."""
        k = self._keys(x, ctx)
        if self.position is not None and self.rotates:
            _, k = self.position.rotate(k, k, ctx.where(x))
        v = self._headed(self.v(x), self.groups)
        parts = {"k": k.transpose(1, 2), "v": v.transpose(1, 2)}
        if self.tracks:
            parts["positions"] = ctx.where(x).expand(x.shape[0], -1)[:, None]
        return parts

    def _kept(self, x: Tensor, parts: dict[str, Tensor], ctx: Context) -> dict[str, Tensor] | None:
        """The chunk's entries for later segments: the same numbers, whose gradient reaches the weights of
        the products and ends at x."""
        if not torch.is_grad_enabled():
            return None
        entries = self.entries(x.detach(), ctx)
        if ctx.taps is None:
            return {name: entries[name] for name in ("k", "v")}
        # an edit of k or v acts on what later segments see, too
        return {name: parts[name].detach() + (entries[name] - entries[name].detach()) for name in ("k", "v")}

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, how: Scoring, x: Tensor, ctx: Context) -> Tensor:
        if ctx.taps is None:
            return self.finish(self._attend(q.transpose(1, 2), k, v, how), x, ctx)
        frozen = Frozen({"q": q, "k": k.transpose(1, 2), "scoring": how})
        values = v.transpose(1, 2)
        mixed = self.mix(self._weights(frozen, values, ctx), values)
        return self.finish(ctx.taps(f"{self.path}.mixed", mixed), x, ctx)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, how: Scoring) -> Tensor:
        y, _ = attend(
            q,
            k,
            v,
            mask=how.mask,
            bias=how.bias,
            scale=self.scale,
            softcap=self.softcap,
            sinks=self.sinks,
            modify=how.modify,
        )
        return y.transpose(1, 2)

    def _turned(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Queries [B, T, H, K] and keys [B, T, G, K] of the same tokens, turned by their positions."""
        q, k = self._queries(x, ctx), self._keys(x, ctx)
        return self.position.rotate(q, k, ctx.where(x)) if self.position is not None and self.rotates else (q, k)

    def _queries(self, x: Tensor, ctx: Context) -> Tensor:
        return self._headed(self.q(x), self.heads, self.q_norm)

    def _keys(self, x: Tensor, ctx: Context) -> Tensor:
        return self._headed(self.k(x), self.groups, self.k_norm)

    def _headed(self, y: Tensor, heads: int, norm: nn.Module | None = None) -> Tensor:
        """What a product gives, [B, T, H·K], cut and normed as the settings say → [B, T, H, K]."""
        if self.clip is not None:
            y = y.clamp(-self.clip, self.clip)
        if norm is not None and self.norm_all:
            return norm(y).unflatten(-1, (heads, self.width))  # type: ignore[no-any-return]
        y = y.unflatten(-1, (heads, self.width))
        return y if norm is None else norm(y)

    def _memory(self, ctx: Context) -> Memory:
        if ctx.memory is None:
            raise UnsupportedError("cross attention needs a memory", where=self.path, hint="pass source=…")
        return ctx.memory

    def _mask(self, ctx: Context, look: Look) -> Mask | None:
        mask: Mask | None = None
        if self.order == "causal":
            mask = Causal()
        elif self.order == "prefix":
            prefix = self._prefix(ctx)
            # Padding on the left moves the prefix: its tokens are counted, not its places.
            early = None if ctx.padding is None else ctx.padding.long().cumsum(1) <= prefix[:, None]
            mask = Causal() | (Prefix(prefix) if early is None else Keys(early))
        mask = both(self.narrow(mask, look), ctx.mask)
        if ctx.documents is not None:
            mask = both(mask, Documents(ctx.documents, ctx.documents))
        if ctx.padding is not None:
            mask = both(mask, Keys(ctx.padding))
        return mask

    def _extend_mask(self, look: Look, ctx: Context, x: Tensor) -> Mask:
        before = look.before
        if look.index is not None:
            return Window(offset=before, keys=look.index)
        causal = Causal(before)
        if self.order != "prefix":
            return causal
        prefix = self._prefix(ctx)
        begun = torch.as_tensor(before, device=prefix.device)
        count = torch.full_like(prefix, x.shape[1]) if ctx.lengths is None else ctx.lengths
        split = (begun < prefix) & ((begun + count < prefix) | (begun > 0)) & (count > 0)
        if bool(split.any()):
            raise UnsupportedError(
                "a prefix must come whole in one chunk, since its tokens see one another", where=self.path
            )
        # Slots beyond a row's tokens must stay unseen even when the prefix is the longest row's.
        return causal | Prefix(torch.minimum(prefix, begun + count))

    def _prefix(self, ctx: Context) -> Tensor:
        if "prefix" not in ctx.side:
            raise UnsupportedError(
                "a prefix model needs the length of each row's prefix",
                where=self.path,
                hint='pass side={"prefix": lengths} with lengths [B]',
            )
        return ctx.side["prefix"]


def _bias_rows(position: nn.Module, q_pos: Tensor, k_pos: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    bias: Tensor = position.bias(q_pos[:, rows], k_pos[:, columns])  # type: ignore[operator]
    return bias


def _sum_rows(first: Bias, second: Bias, rows: Tensor, columns: Tensor) -> Tensor:
    return first(rows, columns) + second(rows, columns)


def _later_rows(bias: Bias, first: int, rows: Tensor, columns: Tensor) -> Tensor:
    return bias(rows + first, columns)


def _scaled_rows(scores: Bias, scale: float, rows: Tensor, columns: Tensor) -> Tensor:
    return scores(rows, columns) * scale


def _textbook(mixer: Attention, x: Tensor, ctx: Context) -> Tensor:
    """softmax(q kᵀ / √K) v Wᵒ of one causal head, as equation (1) of the paper writes it."""
    q, k, v = (x @ product.weight.t() for product in (mixer.q, mixer.k, mixer.v))
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(1, 2) / mixer.width**0.5).masked_fill(later, -torch.inf)
    y: Tensor = torch.softmax(scores, -1) @ v @ mixer.o.weight.t()
    return y
