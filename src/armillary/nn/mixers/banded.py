"""What `lsh`, `lsh_local` and `routing` share: tokens sorted into groups, each seeing the last ones of its own.

Queries and keys are one product (a key is its query at length 1, so that scores are ‖q‖ times a
cosine), and a mechanism says only which group a token belongs to in each order. A token sees itself
where its bands hold nobody else, as Reformer has it: the score of a query with its own key would
drown all others. Groups are chosen from float32 queries, whatever type activations have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from armillary.base.errors import UnsupportedError
from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost, linear_flops
from armillary.nn.mechanism import Capabilities, Frozen, Mixer, MixerSettings, Place, head_width
from armillary.nn.ops.band import band_attend, chunk_attend, ranks, sort_groups
from armillary.nn.state import State

NORM_EPSILON = 1e-6
GROUP = 2**40  # codes of neighbouring groups lie this far apart
EMPTY = -(2**62)  # the code of a slot without a token


class BandedSettings(MixerSettings):
    """The settings that they share."""

    capabilities: ClassVar[Capabilities] = Capabilities(state="window", rollback="snapshot")
    heads: int = Field(4, gt=0, description="heads, each with its own groups")
    head_width: int | None = Field(None, gt=0, description="features per head; by default width / heads")
    window: int = Field(64, gt=0, description="tokens of its group that a token sees, the last ones before it")

    def orders(self) -> list[tuple[int, int]]:
        """Of every order the number of groups and the tokens seen in one."""
        raise NotImplementedError

    def features(self, width: int) -> int:
        """Features per head."""
        return head_width(width, self.heads, self.head_width)

    def grouping(self, width: int) -> float:
        """FLOPs of finding the groups of one token in one head, and of making its key."""
        raise NotImplementedError

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        each, orders = self.features(place.width), self.orders()
        inner = self.heads * each
        flops = 3 * linear_flops(place.width, inner, length) + linear_flops(inner, place.width, length)
        flops += self.heads * length * (self.grouping(each) + length * (4.0 * each + 6))
        slots = sum(groups * width for groups, width in orders)
        state = self.heads * (slots * (2 * each * itemsize + 8 * len(orders)) + 8.0 * sum(n for n, _ in orders))
        return Cost(flops - linear_flops(place.width, inner, length), state)


class BandState(State):
    """Of every group of every order its last tokens, in a ring.

    k, v: [B, H, slots, K]; codes: [B, H, slots, R], where the token stands in all orders (`GROUP` ·
    group + its number in the group); counts: [B, H, groups], how many tokens each group has had.
    """

    kind: ClassVar[str] = "window"


class BandMixer(Mixer):
    """x [B, T, D] → [B, T, D]."""

    def __init__(self, settings: BandedSettings, place: Place) -> None:
        super().__init__(settings, place)
        self.heads = self.value_groups = settings.heads
        self.width = settings.features(place.width)
        self.orders = settings.orders()
        self.widths = [width for _, width in self.orders]
        self.scale = 1.0
        inner = self.heads * self.width
        self.q = place.product(place.width, inner, "q")
        self.v = place.product(place.width, inner, "v")
        self.o = place.product(inner, place.width, "o")

    def groups(self, q: Tensor, ctx: Context, real: Tensor | None) -> Tensor:
        """q [B, T, H, K] in float32 (or float64), real [B, T] or None = all → the groups of each order,
        [B, H, R, T] int64 from 0."""
        raise NotImplementedError

    def shaped(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys from the product [B, T, H, K]."""
        return q, q * torch.rsqrt(q.square().sum(-1, keepdim=True) + self.width * NORM_EPSILON)

    def values(self, x: Tensor, ctx: Context) -> Tensor:
        return self.v(x).unflatten(-1, (self.heads, self.width))  # type: ignore[no-any-return]

    def _asked(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys [B, T, H, K] in x's type, and groups."""
        wide = torch.promote_types(x.dtype, torch.float32)
        q = self.q(x.to(wide)).unflatten(-1, (self.heads, self.width))
        if ctx.taps is not None:
            q = ctx.taps(f"{self.path}.q", q)
        q, k = self.shaped(q)
        if ctx.taps is not None:
            k = ctx.taps(f"{self.path}.k", k)
        real = ctx.present(x)
        with torch.no_grad():
            groups = self.groups(q.detach(), ctx, real)
        return q.to(x.dtype), k.to(x.dtype), groups

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        q, k, groups = self._asked(x, ctx)
        length = x.shape[1]
        if length * (min(length, max(self.widths)) + 1) >= 2**31:
            raise UnsupportedError(
                f"a window of {max(self.widths)} over {length} tokens is too large to sort",
                where=self.path,
                hint="lower window, or attend densely",
            )
        if ctx.documents is not None:
            groups = groups + ctx.documents[:, None, None] * max(n for n, _ in self.orders)
        if ctx.padding is not None:
            groups = groups.masked_fill(~ctx.padding[:, None, None], 2**62)
        pairs = [sort_groups(groups[:, :, number], width) for number, width in enumerate(self.widths)]
        return Frozen(
            {"q": q, "k": k, "orders": [o for o, _ in pairs], "places": torch.stack([p for _, p in pairs], 2)}
        )

    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        if frozen.weights is not None:
            return (frozen.weights.to(values.dtype) @ values.transpose(1, 2)).transpose(1, 2)
        q, k, v = (x.transpose(1, 2) for x in (frozen.parts["q"], frozen.parts["k"], values))
        y = band_attend(q, k, v, frozen.parts["orders"], frozen.parts["places"], self.widths, self.scale)
        return y.transpose(1, 2)

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        return self.o(mixed.flatten(2))  # type: ignore[no-any-return]

    # -- chunks

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        slots = sum(groups * width for groups, width in self.orders)
        entries = torch.zeros(batch, self.heads, slots, self.width, dtype=dtype, device=device)
        codes = torch.full((batch, self.heads, slots, len(self.orders)), EMPTY, dtype=torch.int64, device=device)
        counts = torch.zeros(batch, self.heads, sum(n for n, _ in self.orders), dtype=torch.int64, device=device)
        return BandState({"k": entries, "v": entries.clone(), "codes": codes, "counts": counts})

    def extend(self, x: Tensor, state: State, ctx: Context) -> Tensor:
        self.accept(ctx, extending=True)
        assert isinstance(state, BandState)
        values = self.values(x, ctx)
        if ctx.taps is not None:
            values = self.tapped_values(values, ctx)
        q, k, groups = self._asked(x, ctx)
        q, k, v = (part.transpose(1, 2) for part in (q, k, values))
        valid = ctx.present(x)
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else valid
        real = valid[:, None, None].expand_as(groups)
        first = torch.tensor(_starts([n for n, _ in self.orders]), device=x.device)[:, None]
        counts = state.tensors["counts"]
        seats = (groups + first).flatten(2)
        begun = counts.gather(2, seats).view_as(groups)
        # Tokens that are not there form a group of their own, which no real one sees.
        sizes = torch.tensor([n for n, _ in self.orders], device=x.device)[:, None]
        own = torch.where(real, groups, sizes)
        numbers = begun + ranks(own)
        codes = torch.where(real, groups, sizes) * GROUP + numbers
        mixed = chunk_attend(
            q, k, v, groups, codes.transpose(2, 3), state.tensors, self.orders, scale=self.scale, spacing=GROUP
        )
        added = torch.zeros_like(counts).scatter_add(2, seats, real.flatten(2).long())
        self._advance(state, {"k": k, "v": v, "codes": codes.transpose(2, 3)}, groups, numbers, real, counts + added)
        mixed = mixed.transpose(1, 2)
        if ctx.taps is not None:
            mixed = ctx.taps(f"{self.path}.mixed", mixed)
        return self.finish(mixed, x, ctx)

    def _advance(
        self, state: BandState, parts: dict[str, Tensor], groups: Tensor, numbers: Tensor, real: Tensor, counts: Tensor
    ) -> None:
        """Put the chunk's tokens into their rings; where a group had more than its ring holds, the last."""
        device, length = groups.device, groups.shape[3]
        sizes = [(groups * width) for groups, width in self.orders]
        starts = torch.tensor(_starts(sizes), device=device)[:, None]
        widths = torch.tensor(self.widths, device=device)[:, None]
        slots = (starts + groups * widths + numbers % widths).flatten(2)  # [B, H, R·T]
        kept = real.flatten(2)
        keep_storage = not torch.is_grad_enabled()
        if length == 1 and keep_storage:  # one slot of every order: written alone
            for name, part in parts.items():
                at = slots[..., None].expand(-1, -1, -1, part.shape[3])
                held = state.tensors[name]
                new = part.expand(-1, -1, at.shape[2], -1).to(held.dtype)
                held.scatter_(2, at, torch.where(kept[..., None], new, held.gather(2, at)))
        else:
            steps = torch.arange(length, device=device).expand_as(groups).flatten(2)
            winner = torch.full(state.tensors["k"].shape[:3], -1, dtype=torch.int64, device=device)
            winner = winner.scatter_reduce(2, slots, steps.masked_fill(~kept, -1), "amax")[..., None]
            for name, part in parts.items():
                held = state.tensors[name]
                at = winner.clamp(min=0).expand(-1, -1, -1, part.shape[3])
                new = torch.where(winner >= 0, part.to(held.dtype).gather(2, at), held)
                state.tensors[name] = held.copy_(new) if keep_storage else new
        state.tensors["counts"] = state.tensors["counts"].copy_(counts) if keep_storage else counts


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:number]) for number in range(len(sizes))]


def full_shared(mixer: Any, x: Tensor, ctx: Context) -> Tensor:
    """Causal attention with shared queries and keys, itself only where there is no other: the limit at
    which one group and a window without end arrive."""
    heads = []
    for h in range(mixer.heads):
        part = slice(h * mixer.width, (h + 1) * mixer.width)
        q, k = mixer.shaped((x @ mixer.q.weight[part].t())[:, :, None])
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu()
        later[0, 0] = False
        scores = (q[:, :, 0] @ k[:, :, 0].transpose(1, 2) * mixer.scale).masked_fill(later, -torch.inf)
        heads.append(torch.softmax(scores, -1) @ (x @ mixer.v.weight[part].t()))
    y: Tensor = torch.cat(heads, -1) @ mixer.o.weight.t()
    return y
