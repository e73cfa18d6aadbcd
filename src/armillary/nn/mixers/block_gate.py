"""Block gates: a query opens or closes whole blocks of earlier keys, by learned gates.

Dynamic sparse attention as a family has no one paper; this form takes blocks and their mean keys from
Lu et al. 2025 (MoBA: Mixture of Block Attention for Long-Context LLMs) and the gate from Louizos,
Welling & Kingma 2018 (Learning Sparse Neural Networks through L0 Regularization): a hard-concrete
variable, which is exactly 0 with a probability that can be penalised.

For query t and block n of b finished keys with mean k̄_n, per head: log α = gain · q_t·k̄_n / √K +
bias, s = σ(log α) (in updates σ((log u − log(1 − u) + log α)/τ) with uniform u, drawn once for
neighbouring queries), g = clip(1.2·s − 0.1, 0, 1). A gate multiplies the block's softmax weights before
they are normalised: at 1 it is attention, at 0 the block is not computed and gets no gradient. The
block that the query stands in is always open, so only finished blocks are gated and the mixer is
causal. Blocks are counted from the start of each document. λ times the expected share of open blocks,
as far as that is above a target, is added to the loss. Gains and biases are kept divided by 10: a logit
has several units to go while training moves a parameter by a fraction of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from armillary.base.errors import UnsupportedError
from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.example import Example, Limit
from armillary.nn.mask import Causal, Documents, Keys, both
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
from armillary.nn.ops.attend import attend
from armillary.nn.ops.block_sparse import attend_block_sparse
from armillary.nn.positions.none import NoPositionSettings
from armillary.nn.positions.rope import RopeSettings
from armillary.nn.state import SpanState, State, zeros
from armillary.nn.training import attach, uniform

LOW, HIGH = -0.1, 1.1  # to where the gate is stretched before it is clipped to [0, 1]
TEMPERATURE = 0.33
PACE = 10.0  # how much faster gains and biases move than they would as parameters of their own
TILE = 16  # queries that the op takes together; the blocks that any of them opens are computed


@mixers.register
class BlockGateSettings(MixerSettings):
    """Softmax attention over the blocks whose gate is open, and the query's own."""

    kind: ClassVar[str] = "block_gate"
    source: ClassVar[str] = (
        "Louizos, Welling & Kingma 2018, Learning Sparse Neural Networks through L0 Regularization; "
        "Lu et al. 2025, MoBA: Mixture of Block Attention for Long-Context LLMs"
    )
    oracle: ClassVar[str] = (
        "tests/nn/mixers/test_block_gate.py: gates and softmax as loops over tokens; PyTorch's attention with "
        "open gates; the penalty as a frequency"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(state="span", rollback="truncate", noise=True)
    heads: int = Field(4, gt=0, description="query heads")
    kv_heads: int | None = Field(None, gt=0, description="key/value heads (divides heads); by default as many")
    head_width: int | None = Field(None, gt=0, description="features per head; by default width / heads")
    position: PositionSettings | None = Field(RopeSettings(), description="how q and k turn: rope or none")
    block: int = Field(32, gt=0, description="keys in a block")
    penalty: float = Field(0.0, ge=0, description="loss added per expected share of open blocks, in nats")
    target: float = Field(0.0, ge=0, lt=1, description="expected share of open blocks that costs nothing")
    start: float = Field(1.0, description="bias of the gates before training: above 0 they begin open")

    @model_validator(mode="after")
    def _coherent(self) -> BlockGateSettings:
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads ({self.kv_heads}) must divide heads ({self.heads})")
        return self

    @classmethod
    def examples(cls) -> list[Example]:
        return [
            Example("gated", cls(heads=2, block=4, start=-1.5, penalty=0.1), compiled=True),
            Example("grouped", cls(kv_heads=2, block=3, start=-2.0, position=NoPositionSettings())),
            Example("wide", cls(heads=2, head_width=6, block=2, start=-2.0)),
        ]

    @classmethod
    def limits(cls) -> list[Limit]:
        return [
            Limit("open", Example("open", cls(heads=1, block=4, start=50.0, position=None)), _attention),
            Limit("shut", Example("shut", cls(heads=1, block=4, start=-50.0, position=None)), _local),
        ]

    @property
    def groups(self) -> int:
        return self.kv_heads or self.heads

    def features(self, width: int) -> int:
        """Features per head."""
        return head_width(width, self.heads, self.head_width)

    def build(self, place: Place) -> BlockGate:
        return BlockGate(self, place)

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        width, each = place.width, self.features(place.width)
        query, key = self.heads * each, self.groups * each
        flops = 2 * linear_flops(width, query, length) + 2 * linear_flops(width, key, length)
        flops += float(self.heads * length * length) * (4 * each + 7)  # products, scale, gate, softmax
        finished = (length - 1) // self.block
        # Mean keys, gains, then product, bias, σ, stretch (2), clip, logarithm for each gate.
        flops += finished * self.block * key + length * query + self.heads * length * finished * (2 * each + 6.0)
        if self.position is not None:
            flops += self.position.cost(place, length, self.heads, self.groups, each).flops
        wide = max(4, itemsize)
        return Cost(flops, length * 2 * key * itemsize + length // self.block * key * wide)


class BlockGate(Mixer):
    """x [B, T, D] → [B, T, D]; its state is keys, values and one mean key per finished block."""

    scaled = ("scale",)

    def __init__(self, settings: BlockGateSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.heads, self.groups = settings.heads, settings.groups
        self.width = settings.features(place.width)
        self.value_groups = self.groups
        self.block, self.start = settings.block, settings.start
        self.penalty, self.target = settings.penalty, settings.target
        self.tile = math.gcd(TILE, settings.block)
        self.scale = self.width**-0.5
        self.q = place.product(place.width, self.heads * self.width, "q")
        self.k = place.product(place.width, self.groups * self.width, "k")
        self.v = place.product(place.width, self.groups * self.width, "v")
        self.o = place.product(self.heads * self.width, place.width, "o")
        self.gain = nn.Parameter(torch.empty(self.heads))
        self.bias = nn.Parameter(torch.empty(self.heads))
        sites = settings.position.sites if settings.position is not None else frozenset()
        if sites - {"rotate"}:
            raise UnsupportedError("block gates take rotations only", where=place.path, hint="position: rope or none")
        self.position = (
            settings.position.build(place.at("position"), self.heads, self.width)
            if settings.position is not None and sites
            else None
        )

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.constant_(self.gain, 1 / PACE)
        nn.init.constant_(self.bias, self.start / PACE)

    def values(self, x: Tensor, ctx: Context) -> Tensor:
        return self.v(x).unflatten(-1, (self.groups, self.width))  # type: ignore[no-any-return]

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        q, k = self._queries_and_keys(x, ctx)
        length = x.shape[1]
        if ctx.documents is None and ctx.padding is None:
            own = torch.arange(length, device=x.device)[None] // self.block
            means = _means(k, (length - 1) // self.block, self.block)
            gate = self._gates(q, means, own, None, ctx)
            return Frozen({"q": q, "k": k, "gate": gate})
        own, of, finished = _membership(x, ctx, self.block)
        means = _scattered_means(k, own, ctx.padding, finished.shape[1], self.block)
        gate = self._gates(q, means, own, (of[:, :, None] == finished[:, None]), ctx)
        mask = Causal() if ctx.documents is None else both(Causal(), Documents(ctx.documents, ctx.documents))
        mask = mask if ctx.padding is None else both(mask, Keys(ctx.padding))
        return Frozen({"q": q, "k": k, "gate": gate, "own": own, "mask": mask})

    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        if frozen.weights is not None:
            each = values.repeat_interleave(self.heads // self.groups, 2).transpose(1, 2)
            return (frozen.weights.to(each.dtype) @ each).transpose(1, 2)
        parts = frozen.parts
        q, k, v, gate = parts["q"].transpose(1, 2), parts["k"].transpose(1, 2), values.transpose(1, 2), parts["gate"]
        if "mask" in parts:  # documents begin anywhere: pairs are masked one by one
            own = parts["own"]

            def bias(rows: Tensor, columns: Tensor) -> Tensor:
                index = own[:, None, None, columns].expand(-1, self.heads, len(rows), -1)
                return gate[:, :, rows].gather(3, index)  # type: ignore[no-any-return]

            return attend(q, k, v, mask=parts["mask"], bias=bias, scale=self.scale)[0].transpose(1, 2)
        y = self._sparse(q, k, v, gate, parts.get("front", 0), parts.get("offset"), parts.get("tile", self.tile))
        return y.transpose(1, 2)

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return self.o(mixed.flatten(2))  # type: ignore[no-any-return]

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        # Zeros, not empty: a slot that a ragged row has not reached meets a weight of 0, and 0·NaN is NaN.
        shape = (batch, self.groups, capacity, self.width)
        wide = torch.promote_types(dtype, torch.float32)
        tensors = {name: zeros(shape, dtype, device) for name in ("k", "v")}
        means = torch.zeros(batch, self.groups, capacity // self.block, self.width, dtype=wide, device=device)
        return BlockSpanState(tensors, means, self.block)

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        assert isinstance(state, BlockSpanState)
        q, k = self._queries_and_keys(x, ctx)
        v = self.values(x, ctx)
        if ctx.taps is not None:
            v = ctx.taps(f"{self.path}.v", v)
        start, uniform, count = state.lengths, state.uniform, x.shape[1]
        held = state.append({"k": k.transpose(1, 2), "v": v.transpose(1, 2)}, ctx.lengths)
        state.close_blocks(start, None if state.uniform is None else uniform)
        steps = torch.arange(count, device=x.device)
        own = (start[:, None] + steps) // self.block
        gate = self._gates(q, state.tensors["means"][:, :, : (state.longest - 1) // self.block], own, None, ctx)
        parts = {"q": q, "gate": gate, "offset": start, "tile": 1}
        if count > 1 and uniform is not None and state.uniform is not None:
            # Tiles are whole from the start of a block on, so the first one begins with rows that are not there.
            front = uniform % self.tile
            parts |= {"front": front, "offset": start - front, "tile": self.tile}
        if ctx.taps is None:
            # All room that there is, and not the part in use: taking a part would copy it.
            room = state.tensors
            mixed = self.mix(Frozen(parts | {"k": room["k"].transpose(1, 2)}), room["v"].transpose(1, 2))
            return self.finish(mixed, x, ctx)
        values = held["v"].transpose(1, 2)
        frozen = self._weights(Frozen(parts | {"k": held["k"].transpose(1, 2)}), values, ctx)
        return self.finish(ctx.taps(f"{self.path}.mixed", self.mix(frozen, values)), x, ctx)

    # -- parts

    def _queries_and_keys(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        q = self.q(x).unflatten(-1, (self.heads, self.width))
        k = self.k(x).unflatten(-1, (self.groups, self.width))
        if self.position is not None:
            q, k = self.position.rotate(q, k, ctx.where(x))
        if ctx.taps is not None:
            q, k = ctx.taps(f"{self.path}.q", q), ctx.taps(f"{self.path}.k", k)
        return q, k

    def _gates(self, q: Tensor, means: Tensor, own: Tensor, same: Tensor | None, ctx: Context) -> Tensor:
        """The logarithms of the gates [B, H, T, N + 1]: 0 for the query's own block, -inf for those to come.

        q: [B, T, H, K]; means: [B, G, N, K]; own: [B or 1, T] the block of each query; same: [B, T, N]
        blocks of the query's document, None = all.
        """
        batch, length = q.shape[:2]
        blocks = means.shape[2]
        wide = means.dtype
        asked = (q.to(wide) * (self.gain * (PACE * self.scale)).to(wide)[:, None]).transpose(1, 2)
        asked = asked.reshape(batch, self.groups, -1, self.width)
        logits = (asked @ means.transpose(2, 3)).view(batch, self.heads, length, blocks)
        logits = logits + (self.bias * PACE).to(wide)[:, None, None]
        index = torch.arange(blocks + 1, device=q.device)
        earlier = (index[:-1] < own[..., None])[:, None]
        if same is not None:
            earlier = earlier & same[:, None]
        # One draw for the queries that the op takes together, or one of them would open nearly every block.
        tiles = -(-length // self.tile)
        drawn = uniform(ctx, self.path, "gate", (batch, self.heads, tiles, blocks), q.detach())
        if drawn is None:
            soft = torch.sigmoid(logits)
        else:
            drawn = drawn.to(wide).repeat_interleave(self.tile, 2)[:, :, :length]
            soft = torch.sigmoid((drawn.log() - (1 - drawn).log() + logits) / TEMPERATURE)
        gate = (soft * (HIGH - LOW) + LOW).clamp(0, 1)
        if ctx.taps is not None:
            gate = ctx.taps(f"{self.path}.gate", gate)
        opened = earlier & (gate > 0)
        # Where it is shut the gate is replaced before the logarithm: there the slope would be infinite.
        logs = torch.where(opened, torch.where(opened, gate, 1.0).log(), -torch.inf)
        logs = F.pad(logs, (0, 1), value=-torch.inf)
        logs = torch.where((index == own[..., None])[:, None], 0.0, logs)
        if self.penalty and ctx.training is not None:
            chance = torch.sigmoid(logits - TEMPERATURE * math.log(-LOW / HIGH))
            pairs = earlier.expand_as(chance).sum().clamp(min=1)
            share = chance.masked_fill(~earlier, 0.0).sum() / pairs
            logs = attach(logs, self.penalty * (share - self.target).clamp(min=0), ctx)
        return logs

    def _sparse(
        self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, front: int, offset: Tensor | None, tile: int
    ) -> Tensor:
        """Through the op: q [B, H, T, K] behind `offset` keys, the first `front` rows of a tile not there."""
        blocks = -(-k.shape[2] // self.block)
        gate = F.pad(gate, (0, blocks - gate.shape[3], front, 0), value=-torch.inf)
        q = F.pad(q, (0, 0, front, 0)) if front else q
        layout = gate > -torch.inf
        if tile > 1:
            short = -layout.shape[2] % tile
            layout = F.pad(layout, (0, 0, 0, short)).unflatten(2, (-1, tile)).any(3)
        y = attend_block_sparse(
            q, k, v, layout, rows=tile, columns=self.block, scale=self.scale, gate=gate, offset=offset
        )
        return y[:, :, front:] if front else y


class BlockSpanState(SpanState):
    """Keys and values of every token, and the mean key of every finished block: `means` [B, G, capacity /
    block, K], float32 at the least."""

    def __init__(self, tensors: dict[str, Tensor], means: Tensor, block: int) -> None:
        super().__init__(tensors)
        self.tensors["means"] = means
        self.block = block

    def append(self, parts: dict[str, Tensor], lengths: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        held = super().append(parts, lengths)
        return {name: held[name] for name in parts}

    def close_blocks(self, start: Tensor, uniform: int | None) -> None:
        """The means of the blocks that were finished since rows held `start` tokens (`uniform`: all rows
        as many); those of other blocks and rows stay bit for bit."""
        known = uniform if uniform is not None else int(start.min())
        first, last = known // self.block, self.longest // self.block
        means = self.tensors["means"]
        if torch.is_grad_enabled():
            means = F.pad(means, (0, 0, 0, max(0, last - means.shape[2])))
        if last > first:
            keys = self.tensors["k"][:, :, first * self.block : last * self.block]
            fresh = _means(keys.transpose(1, 2), last - first, self.block)
            if uniform is None:
                ends = torch.arange(first + 1, last + 1, device=start.device) * self.block
                closed = (ends > start[:, None]) & (ends <= self.lengths[:, None])
                fresh = torch.where(closed[:, None, :, None], fresh, means[:, :, first:last])
            if torch.is_grad_enabled():
                means = torch.cat([means[:, :, :first], fresh, means[:, :, last:]], 2)
            else:
                means[:, :, first:last] = fresh
        self.tensors["means"] = means

    def cut(self, row: int, start: int, stop: int) -> dict[str, Tensor]:
        found = super().cut(row, start, stop)
        del found["means"]  # they follow from the keys
        return found

    def paste(self, row: int, start: int, entries: Mapping[str, Tensor]) -> None:
        super().paste(row, start, entries)
        stop = int(self.lengths[row])
        first, last = start // self.block, stop // self.block
        keys = self.tensors["k"][row : row + 1, :, first * self.block : last * self.block].transpose(1, 2)
        self.tensors["means"][row, :, first:last] = _means(keys, last - first, self.block)[0]

    def _reserve(self, capacity: int) -> None:
        means = self.tensors.pop("means")
        super()._reserve(capacity)
        short = self.capacity // self.block - means.shape[2]
        self.tensors["means"] = F.pad(means, (0, 0, 0, short)) if short > 0 else means

    @classmethod
    def join(cls, states: list[Self]) -> Self:  # type: ignore[override]
        capacity = max(state.capacity for state in states)
        for state in states:
            state._reserve(capacity)
        most = max(state.tensors["means"].shape[2] for state in states)
        for state in states:
            means = state.tensors["means"]
            state.tensors["means"] = F.pad(means, (0, 0, 0, most - means.shape[2]))
        return super().join(states)


def _means(k: Tensor, blocks: int, block: int) -> Tensor:
    """k [B, T, G, K] → the mean key of the first blocks, [B, G, blocks, K]."""
    wide = torch.promote_types(k.dtype, torch.float32)
    each: Tensor = k[:, : blocks * block].to(wide).unflatten(1, (blocks, block))
    return each.mean(2).transpose(1, 2)


def _scattered_means(k: Tensor, own: Tensor, padding: Tensor | None, blocks: int, block: int) -> Tensor:
    """The same where block own[b, t] of a token is anywhere; a block that is not full gets a mean that nobody uses."""
    wide = torch.promote_types(k.dtype, torch.float32)
    each = k.to(wide) if padding is None else k.to(wide).masked_fill(~padding[..., None, None], 0.0)
    total = torch.zeros(k.shape[0], blocks, *k.shape[2:], dtype=wide, device=k.device)
    total = total.scatter_add(1, own[..., None, None].expand_as(each), each)
    return (total / block).transpose(1, 2)


def _membership(x: Tensor, ctx: Context, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which block each token is in [B, T], which document [B, T], and the document of each block [B, T - 1].

    Blocks hold `block` real tokens of one document, counted from its first; there are at most T.
    """
    batch, length = x.shape[:2]
    real = torch.ones(batch, length, dtype=torch.bool, device=x.device) if ctx.padding is None else ctx.padding
    documents = torch.zeros_like(real, dtype=torch.int64) if ctx.documents is None else ctx.documents
    changed = torch.ones_like(real)
    changed[:, 1:] = documents[:, 1:] != documents[:, :-1]
    of = changed.long().cumsum(1)
    count = real.long().cumsum(1)  # real tokens up to and with this one
    before = torch.where(changed, count - real.long(), 0).cummax(1).values
    begins = real & ((count - before - 1) % block == 0)
    own = (begins.long().cumsum(1) - 1).clamp(min=0)
    # A block's document is that of its first token; blocks that do not exist belong to none.
    where = torch.where(begins, own, length)
    belongs = torch.zeros(batch, length + 1, dtype=of.dtype, device=x.device).scatter(1, where, of)
    return own, of, belongs[:, : length - 1]


def _softmax(mixer: BlockGate, x: Tensor, block: int) -> Tensor:
    """One head, equation (1) of Vaswani et al. 2017, over keys of the query's block of this size."""
    q, k, v = (x @ product.weight.t() for product in (mixer.q, mixer.k, mixer.v))
    steps = torch.arange(x.shape[1])
    hidden = (steps > steps[:, None]) | (steps // block != steps[:, None] // block)
    scores = (q @ k.transpose(1, 2) / mixer.width**0.5).masked_fill(hidden, -torch.inf)
    y: Tensor = torch.softmax(scores, -1) @ v @ mixer.o.weight.t()
    return y


def _attention(mixer: BlockGate, x: Tensor, ctx: Context) -> Tensor:
    return _softmax(mixer, x, x.shape[1])


def _local(mixer: BlockGate, x: Tensor, ctx: Context) -> Tensor:
    return _softmax(mixer, x, mixer.block)
