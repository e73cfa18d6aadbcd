"""Other ways to keep the keys and values of attention than all of them as they are.

Policies bound how many tokens a layer keeps, and are lossy (kind "scored"): `Sinks` the first and the nearest
(Xiao et al. 2024, Efficient Streaming Language Models with Attention Sinks), `HeavyHitters` the nearest and
those that got most attention so far (Zhang et al. 2023, H2O: Heavy-Hitter Oracle for Efficient Generative
Inference of Large Language Models), `Salient` the nearest and those that got most of it lately (Zhao et al.
2024, ALISA: Accelerating Large Language Model Inference via Sparsity-Aware KV Caching). `Int8` keeps all
tokens, in 8 bits.

    state = model.init_state(1, cache=HeavyHitters(budget=256))

Choices where a policy had one: tokens keep the positions that they had (the keys are stored turned), where
the paper on sinks numbers what is kept anew; what is dropped is gone, where ALISA has it in the host's memory
and may fetch it again; attention "lately" is a sum that fades, with one number a token. A chunk's tokens see
one another whole, and tokens are dropped after it: with other chunks, other tokens may stay (`Sinks` excepted,
whose every token sees what it would have seen alone).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from armillary.base.errors import InputError, UnsupportedError, nearest
from armillary.nn.mask import Mask
from armillary.nn.state import CountedState, SpanState, State, zeros

if TYPE_CHECKING:
    from armillary.nn.block import Block, BlockState

Mass = Callable[[Tensor | None, int], Tensor]  # valid queries [B, T] or all, first of them → [B, H, S]


class Cache:
    """How a network's keys and values are kept; `lossy`: answers may differ from those with all of them."""

    lossy: ClassVar[bool] = True

    def state(self, state: State, mixer: object, path: str) -> State | None:
        """What takes the place of an empty state; None: it stays. Raises UnsupportedError where it must not."""
        raise NotImplementedError


@dataclass(frozen=True)
class Policy(Cache):
    """budget: tokens of every row that a layer keeps."""

    budget: int

    def __post_init__(self) -> None:
        if self.budget < 2:
            raise InputError(f"a budget of {self.budget} tokens", hint="give at least 2")

    def state(self, state: State, mixer: object, path: str) -> State | None:
        if state.kind != "span":
            return None
        if not getattr(mixer, "evicts", False) or type(state) is not SpanState:
            raise UnsupportedError(
                "this mixer's past grows with its tokens, and they cannot be dropped one by one",
                where=path,
                hint="keep all of it: give no cache",
            )
        return KeptState(state, self)

    def per_head(self) -> bool:
        """Whether heads keep different tokens."""
        return False

    def watched(self, count: int) -> int:
        """Of so many queries, how many of the last say what got attention."""
        return 0

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        """Which of the keys that are there queries look at, by their indices in the row; None: all before."""
        return None

    def faded(self, mass: Tensor, tokens: Tensor) -> Tensor:
        """What earlier attention counts after so many more tokens [B, 1, 1]."""
        return mass

    def worth(self, index: Tensor, mass: Tensor, seen: Tensor) -> Tensor:
        """How much each entry is worth keeping, [B, groups, S] float32; index: of its token in the row; mass:
        the attention that it got; seen: tokens of the row so far [B, 1, 1]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Sinks(Policy):
    """The first `sinks` tokens and the nearest."""

    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sinks < self.budget:
            raise InputError(f"{self.sinks} sinks in a budget of {self.budget} tokens")

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        return (keys < self.sinks) | (queries - keys < self.budget - self.sinks)

    def worth(self, index: Tensor, mass: Tensor, seen: Tensor) -> Tensor:
        return torch.where(index < self.sinks, torch.inf, index.float())


@dataclass(frozen=True)
class HeavyHitters(Policy):
    """The nearest `recent` (by default half) and, head by head, those with most attention since they came."""

    recent: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.near <= self.budget:
            raise InputError(f"{self.near} recent tokens in a budget of {self.budget}")

    @property
    def near(self) -> int:
        return self.budget // 2 if self.recent is None else self.recent

    def per_head(self) -> bool:
        return True

    def watched(self, count: int) -> int:
        return count

    def worth(self, index: Tensor, mass: Tensor, seen: Tensor) -> Tensor:
        return torch.where(index >= seen - self.near, torch.inf, mass)


@dataclass(frozen=True)
class Salient(HeavyHitters):
    """The nearest and those with most attention from the last `window` tokens or so, over all heads."""

    window: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise InputError(f"a window of {self.window} tokens", hint="give at least 1")

    def per_head(self) -> bool:
        return False

    def watched(self, count: int) -> int:
        return min(count, self.window)

    def faded(self, mass: Tensor, tokens: Tensor) -> Tensor:
        return mass * (1 - 1 / self.window) ** tokens


POLICIES: dict[str, type[Policy]] = {"sinks": Sinks, "heavy_hitters": HeavyHitters, "salient": Salient}


def read_policy(text: str) -> Policy:
    """`KIND:BUDGET`, perhaps with settings behind it (`sinks:512,sinks=8`) → that policy. Raises InputError."""
    kind, _, rest = text.partition(":")
    if kind not in POLICIES:
        raise InputError(f"there is no cache policy '{kind}'", hint=nearest(kind, POLICIES))
    made, (budget, *more) = POLICIES[kind], rest.split(",")
    known = [one.name for one in fields(made) if one.name != "budget"]
    given: dict[str, int] = {}
    for name, value in (("budget", budget), *((one.partition("=")[::2]) for one in more)):
        if (name != "budget" and name not in known) or name in given:
            raise InputError(
                f"'{name}' in '{text}' is no setting of '{kind}', or a second one", hint=nearest(name, known)
            )
        if not (value.isascii() and value.isdecimal() and len(value) < 10):
            raise InputError(
                f"'{value}' in '{text}' is no number of tokens",
                hint=f"for example {kind}:512, or {kind}:512,{known[0]}=8",
            )
        given[name] = int(value)
    return made(**given)


class KeptState(CountedState):
    """The entries that a policy keeps, in slots along axis 2 in no order: [B, G, budget + 1, …] (one slot is
    for the token that is read); "index" [B, 1 or G, slots] counts the tokens of a row from 0, −1 for an
    empty slot; "mass" is the attention that each got.
    """

    kind: ClassVar[str] = "scored"

    def __init__(self, state: SpanState, policy: Policy) -> None:
        slots = policy.budget + 1
        tensors = {n: zeros((*t.shape[:2], slots, *t.shape[3:]), t.dtype, t.device) for n, t in state.tensors.items()}
        # scores that depend on positions are made for all heads alike, so these keep the same tokens
        apart = policy.per_head() and "positions" not in tensors
        shape = (state.batch, tensors["k"].shape[1] if apart else 1, slots)
        self.policy, self.names = policy, tuple(tensors)
        device = tensors["k"].device
        tensors["index"] = torch.full(shape, -1, dtype=torch.int64, device=device)
        tensors["mass"] = torch.zeros(shape, device=device)
        super().__init__(tensors)
        self._open: tuple[dict[str, Tensor], Tensor, Tensor] | None = None

    def append(
        self, parts: Mapping[str, Tensor], lengths: Tensor | None = None, apart: bool = False
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What a chunk's tokens can look at, themselves included; `settle` has to follow.

        parts: [B, G, T, …]; lengths: [B] valid tokens of each row's chunk, None means all T; apart: give
        copies, which later calls do not touch. Returns tensors [B, G, S, …] and the index of each entry
        [B, 1 or G, S], negative for none.
        """
        count = parts["k"].shape[2]
        added = torch.full_like(self.lengths, count) if lengths is None else lengths.to(self.lengths)
        index, steps = self.tensors["index"], torch.arange(count, device=self.lengths.device)
        fresh = torch.where(steps < added[:, None], self.lengths[:, None] + steps, -1)
        fresh = fresh[:, None].expand(-1, index.shape[1], -1)
        if count > 1 or torch.is_grad_enabled():
            held = {
                name: torch.cat([self.tensors[name], parts[name].to(self.tensors[name].dtype)], 2) for name in parts
            }
            index = torch.cat([index, fresh], 2)
        else:
            slot = (index < 0).to(torch.int8).argmax(2, keepdim=True)  # the first that is empty
            for name, part in parts.items():
                target = self.tensors[name]
                where = slot.view(*slot.shape, *[1] * (part.dim() - 3)).expand(-1, part.shape[1], 1, *part.shape[3:])
                valid = (added > 0).view(-1, *[1] * (part.dim() - 1))
                target.scatter_(2, where, torch.where(valid, part.to(target.dtype), target.gather(2, where)))
            index = index.scatter(2, slot, torch.where(fresh >= 0, fresh, index.gather(2, slot)))
            held = {name: self.tensors[name].clone() if apart else self.tensors[name] for name in parts}
        self._open = (held, index, added)
        if lengths is not None:
            self.uniform = None
        self.lengths = self.lengths + added
        self.uniform = None if self.uniform is None else self.uniform + count
        return held, index

    def settle(self, mass: Mass, count: int, ragged: bool) -> None:
        """Drop what is beyond the budget. mass(valid, first): the attention [B, H, S] that each entry gets from
        the chunk's queries from `first` on, as far as they are valid [B, T]."""
        assert self._open is not None
        held, index, added = self._open
        self._open = None
        got = self._got(mass, count, added, index, ragged)
        worth = self.policy.worth(index, got, self.lengths[:, None, None]).masked_fill(index < 0, -torch.inf)
        changed = (added > 0)[:, None, None]
        if index.shape[2] == self.policy.budget + 1:  # a token was written in its place: one may go
            full = (index >= 0).all(2, keepdim=True) & changed
            worst = worth.argmin(2, keepdim=True)
            index = index.scatter(2, worst, torch.where(full, -1, index.gather(2, worst)))
            self._write("index", index)
            self._write("mass", got)
            return
        kept = worth.topk(self.policy.budget, 2).indices.sort(2).values
        kept = torch.nn.functional.pad(kept, (0, 1))
        chosen = index.gather(2, kept)
        chosen[:, :, -1] = -1
        self._write("index", torch.where(changed, chosen, self.tensors["index"]))
        self._write("mass", torch.where(changed, got.gather(2, kept), self.tensors["mass"]))
        for name, tensor in held.items():
            shape = (*kept.shape, *[1] * (tensor.dim() - 3))
            where = kept.view(shape).expand(-1, tensor.shape[1], -1, *tensor.shape[3:])
            valid = changed.view(-1, *[1] * (tensor.dim() - 1))
            self._write(name, torch.where(valid, tensor.gather(2, where), self.tensors[name]))

    def _got(self, mass: Mass, count: int, added: Tensor, index: Tensor, ragged: bool) -> Tensor:
        """The attention that the entries have got so far."""
        missing = index.shape[2] - self.tensors["mass"].shape[2]
        before = self.tensors["mass"].masked_fill(self.tensors["index"] < 0, 0.0)
        got = torch.nn.functional.pad(self.policy.faded(before, added[:, None, None]), (0, missing))
        watched = self.policy.watched(count)
        if watched:
            valid, first = None, count - watched
            if ragged:
                steps = torch.arange(count, device=added.device)
                valid, first = (steps < added[:, None]) & (steps >= added[:, None] - watched), 0
            new = mass(valid, first).detach().float()
            got = got + new.unflatten(1, (index.shape[1], -1)).mean(2)
        return got.masked_fill(index < 0, 0.0)

    def _write(self, name: str, value: Tensor) -> None:
        self.put(name, value.to(self.tensors[name].dtype))


@dataclass(frozen=True, eq=False)
class Kept(Mask):
    """Which of the kept entries queries see. index [B, 1 or G, S] says which tokens they are; before: tokens
    before the chunk; heads: of the queries."""

    index: Tensor
    before: int | Tensor
    heads: int
    policy: Policy

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        keys = self.index[:, :, None, k]
        lines = (q[None] + (self.before[:, None] if isinstance(self.before, Tensor) else self.before))[:, None, :, None]
        seen = (keys >= 0) & (keys <= lines)
        near = self.policy.sees(lines, keys)
        seen = seen if near is None else seen & near
        return seen if seen.shape[1] == 1 else seen.repeat_interleave(self.heads // seen.shape[1], 1)


@dataclass(frozen=True, eq=False)
class Later(Mask):
    """The mask of the queries from `first` on, and of them of those that are valid [B, T]."""

    whole: Mask
    first: int
    valid: Tensor | None

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        seen = self.whole.rows(q + self.first, k)
        return seen if self.valid is None else seen & self.valid[:, None, q + self.first, None]


@dataclass(frozen=True)
class Int8(Cache):
    """Keys and values in 8 bits with one scale for each token and head, symmetric: no element is off by more
    than 1/254 of the largest of its token and head, nor by the rounding of the scale."""

    lossy: ClassVar[bool] = False  # every token keeps its entry, whatever came before and after

    def state(self, state: State, mixer: object, path: str) -> State | None:
        return Int8State(state) if type(state) is SpanState else None


class Int8State(SpanState):
    """As a span, its tensors [B, G, capacity, K] of int8, with "NAME.scale" [B, G, capacity, 1] in bf16."""

    def __init__(self, state: SpanState) -> None:
        self.kinds = {name: t.dtype for name, t in state.tensors.items() if t.is_floating_point() and t.dim() == 4}
        tensors = {}
        for name, t in state.tensors.items():
            if name in self.kinds:
                tensors[name] = zeros(t.shape, torch.int8, t.device)
                tensors[f"{name}.scale"] = zeros((*t.shape[:3], 1), torch.bfloat16, t.device)
            else:
                tensors[name] = t
        super().__init__(tensors)

    def append(self, parts: Mapping[str, Tensor], lengths: Tensor | None = None) -> dict[str, Tensor]:
        """As of a span; what is given back has been through the 8 bits, the chunk's own entries, too, so that
        chunks make no difference."""
        if torch.is_grad_enabled():
            raise UnsupportedError("a state in 8 bits passes no gradient on", hint="use torch.no_grad()")
        coded = {}
        for name, part in parts.items():
            if name in self.kinds:
                coded[name], coded[f"{name}.scale"] = encode(part)
            else:
                coded[name] = part
        held = super().append(coded, lengths)
        return {
            name: decode(held[name], held[f"{name}.scale"], self.kinds[name]) if name in self.kinds else held[name]
            for name in parts
        }


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] → int8 and its scales [..., 1] bf16."""
    scale = (x.abs().amax(-1, keepdim=True).float() / 127).to(torch.bfloat16)
    coded = (x.float() / scale.float().clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(-127, 127)
    return coded.to(torch.int8), scale


def decode(coded: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return coded.to(dtype) * scale.to(dtype)


def cached(cache: Cache, blocks: Iterable[Block], states: Sequence[BlockState]) -> None:
    """Put a cache's states in the place of empty ones. Raises UnsupportedError where none takes its kind."""
    found = False
    for block, held in zip(blocks, states, strict=True):
        for branch in block.branches():
            if branch.name in held:
                state = cache.state(held[branch.name], branch.inner, branch.path)
                if state is not None:
                    held[branch.name], found = state, True
    if not found:
        raise UnsupportedError(
            "no mixer here keeps keys and values of all its tokens, so no cache is needed", hint="give none"
        )
