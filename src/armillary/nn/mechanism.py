"""The contract of every mechanism: settings that build and cost it, and what its module must offer.

A mixer moves information between positions; a channel mixer works within one; a position says
where a token stands; a norm rescales. Each lives in one file under its role's package and is known
by its `kind` because that file registers it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from armillary.base.errors import UnsupportedError
from armillary.base.registry import Registry
from armillary.base.settings import Choice
from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost
from armillary.nn.example import Example, Limit
from armillary.nn.linear import DenseSettings, LinearSettings
from armillary.nn.state import State

mixers: Registry[MixerSettings] = Registry("mixer", "armillary.nn.mixers", default="attention")
channels: Registry[ChannelSettings] = Registry("channel", "armillary.nn.channels", default="gated")
positions: Registry[PositionSettings] = Registry("position", "armillary.nn.positions", default="rope")
norms: Registry[NormSettings] = Registry("norm", "armillary.nn.norms", default="rmsnorm")

Scores = Callable[[Tensor, Tensor], Tensor]
Order = Literal["causal", "bidirectional", "prefix"]


@dataclass(frozen=True)
class Place:
    """Where a mechanism is built: everything about its surroundings that it may depend on.

    order: which tokens a mixer may see; length: the longest sequence (for tables of positions);
    linear: settings of products by role; path: the name of the module, used by taps and messages.
    """

    width: int
    layer: int = 0
    depth: int = 1
    order: Order = "causal"
    length: int = 1024
    cross: bool = False
    path: str = ""
    linear: Mapping[str, LinearSettings] = field(default_factory=dict)

    def at(self, name: str) -> Place:
        return dataclasses.replace(self, path=f"{self.path}.{name}" if self.path else name)

    def product(self, inputs: int, outputs: int, role: str, bias: bool = False) -> Any:
        """A trainable product for `role`, of the kind that the recipe asks for."""
        return self._kind(role).build(inputs, outputs, role=role, bias=bias, depth=self.depth)

    def experts(self, experts: int, inputs: int, outputs: int, role: str, bias: bool = False) -> Any:
        """As many trainable products of one shape, of which every row chooses some."""
        return self._kind(role).build_experts(experts, inputs, outputs, role=role, bias=bias, depth=self.depth)

    def _kind(self, role: str) -> LinearSettings:
        """What the recipe names for the role, or for all roles but those that its kind leaves dense."""
        every = self.linear.get("all")
        if every is None or role in every.leaves:
            every = DenseSettings()
        return self.linear.get(role) or every


@dataclass(frozen=True)
class Capabilities:
    """What a mixer can honour; declared abilities are tested, undeclared ones must raise.

    packed: documents side by side in one row; padding: rows with padded tokens; mask: a predicate
    from the objective; rollback: how its state goes back; chunking: whether any chunking gives the
    same numbers; sight: whether it has an exact token-to-token matrix; side: the named tensors that
    it needs; takes: those that it uses where they are given; noise: whether it draws noise in training
    updates (and only there); driven: whether it looks at what a driver's state holds for it (`SlideState`),
    so that a driver decides what it sees.
    """

    causal: bool = True
    bidirectional: bool = False
    prefix: bool = False
    cross: bool = False
    packed: bool = True
    padding: bool = True
    mask: bool = False
    state: Literal["span", "window", "fixed", "scored"] = "span"
    rollback: Literal["truncate", "snapshot"] = "snapshot"
    chunking: bool = True
    sight: Literal["exact", "jacobian"] = "exact"
    side: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    noise: bool = False
    driven: bool = False


class MechanismSettings(Choice):
    """Settings of any mechanism; the conformance suite tries it as these two methods say."""

    @classmethod
    def examples(cls) -> list[Example]:
        """The variants to hold to the laws; by default the one without settings."""
        return [Example("default", cls())]

    @classmethod
    def limits(cls) -> list[Limit]:
        """Settings at which the mechanism becomes something known."""
        return []


class MixerSettings(MechanismSettings):
    """Settings of a mixer: `build` makes the module, `cost` says what it takes."""

    choices: ClassVar[Registry[MixerSettings]] = mixers
    capabilities: ClassVar[Capabilities]

    def build(self, place: Place) -> Mixer:
        raise NotImplementedError

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        """Forward FLOPs of one row of `length` tokens on the plain path, and its state's bytes after
        them when activations take `itemsize` bytes."""
        raise NotImplementedError

    def rows(self, place: Place, length: int) -> Mapping[str, float]:
        """How many rows products see, by their name in the module or that of their list; of those that are not
        named, each sees every token once. By it products of other kinds than dense ones are accounted for."""
        return {}

    def active(self, parameters: int) -> int:
        """Of `parameters`, how many take part for one token (fewer than all for experts)."""
        return parameters


# What a channel mixer can do that works within each position; no mask can be in its way.
WITHIN = Capabilities(bidirectional=True, prefix=True, mask=True, state="fixed")


class ChannelSettings(MechanismSettings):
    """Settings of a channel mixer; `mixes`: whether what a token gets depends on others."""

    choices: ClassVar[Registry[ChannelSettings]] = channels
    mixes: ClassVar[bool] = False

    def can(self) -> Capabilities:
        """What a channel mixer with these settings honours."""
        return WITHIN

    def build(self, place: Place) -> ChannelMixer:
        raise NotImplementedError

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        raise NotImplementedError

    def active(self, parameters: int, width: int) -> int:
        """Of `parameters` at a `width`, how many take part for one token (fewer than all for experts)."""
        return parameters


class PositionSettings(MechanismSettings):
    """Settings of a position; `sites` names where it acts: embed, rotate, bias, relate, decay."""

    choices: ClassVar[Registry[PositionSettings]] = positions
    sites: ClassVar[frozenset[str]] = frozenset()

    def build(self, place: Place, heads: int = 1, head_width: int = 0) -> Position:
        raise NotImplementedError

    def cost(self, place: Place, length: int, heads: int, kv_heads: int, head_width: int) -> Cost:
        """FLOPs of its sites for one row, in a mixer with these heads (0 heads: the embedding site)."""
        return Cost()


class NormSettings(MechanismSettings):
    """Settings of a norm over the last axis."""

    choices: ClassVar[Registry[NormSettings]] = norms

    def build(self, width: int) -> nn.Module:
        raise NotImplementedError

    def flops(self, width: int, tokens: float) -> float:
        raise NotImplementedError


class Position(nn.Module):
    """A way to say where a token stands; each site that a class names in its settings is a method."""

    sites: frozenset[str] = frozenset()

    def embed(self, positions: Tensor) -> Tensor:
        """positions [B or 1, T] → what is added to the embedding, [B or 1, T, D]."""
        raise UnsupportedError(f"{type(self).__name__} does not act on the embedding")

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """q [B, T, H, K], k [B, T, G, K] at positions [B or 1, T] → both, rotated."""
        raise UnsupportedError(f"{type(self).__name__} does not rotate queries and keys")

    def bias(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """positions [B or 1, T] and [B or 1, S] → scores to add, [B or 1, H, T, S]."""
        raise UnsupportedError(f"{type(self).__name__} adds no score")

    def relate(self, q: Tensor, q_pos: Tensor, k_pos: Tensor) -> tuple[Tensor, Scores]:
        """q [B, T, H, K] at positions [B or 1, T], keys at [B or 1, S] → the queries that meet the keys'
        content, and scores to add that depend on the query: (rows, columns) → [B, H, rows, columns],
        before the scale."""
        raise UnsupportedError(f"{type(self).__name__} relates no query to a distance")

    def decay(self, positions: Tensor) -> Tensor:
        """positions [B or 1, T] → log decay per head, [B or 1, T, H]."""
        raise UnsupportedError(f"{type(self).__name__} gives no decay")


@dataclass(frozen=True)
class Frozen:
    """What an exactly linear mixer fixed from its input: the mix is linear in the values given it.

    parts: tensors and settings as the mixer likes; weights: set only when an edit replaced them,
    [B, H, T, S].
    """

    parts: Mapping[str, Any]
    weights: Tensor | None = None


class Mechanism(nn.Module):
    """What mixers and channel mixers refuse alike."""

    kind: str
    path: str
    capabilities: Capabilities

    def accept(self, ctx: Context) -> None:
        """Refuse what cannot be honoured."""
        can = self.capabilities
        if ctx.documents is not None and not can.packed:
            raise UnsupportedError(f"'{self.kind}' cannot keep packed documents apart", where=self.path)
        if ctx.padding is not None and not can.padding:
            raise UnsupportedError(f"'{self.kind}' cannot leave padded tokens out", where=self.path)
        if ctx.mask is not None and not can.mask:
            raise UnsupportedError(f"'{self.kind}' cannot take a mask from the objective", where=self.path)
        for name in can.side:
            if name not in ctx.side:
                raise UnsupportedError(f"'{self.kind}' needs the side tensor '{name}'", where=self.path)


class Mixer(Mechanism):
    """Anything that moves information between positions; x and the result are [B, T, D].

    A mixer with exact sight splits into `freeze` (everything the mix depends on except the values),
    `values`, `mix` (linear in the values) and `finish` (gates and output product); `forward` is
    their composition, so the matrix that `sight` returns is the one that acted. Other mixers write
    their own `forward`.
    """

    value_groups: int = 1
    # Its attributes that multiply scores, sums over the features of a head: 1/√K, or what a rule of scaling makes of
    # them. (): no score of it grows with the width; None: it does not say, and such a rule refuses it.
    scaled: ClassVar[tuple[str, ...] | None] = None

    def __init__(self, settings: MixerSettings, place: Place) -> None:
        super().__init__()
        can = type(settings).capabilities
        self.kind = settings.kind
        self.capabilities = can
        self.path = place.path
        self.order = place.order
        self.cross = place.cross
        if place.cross and not can.cross:
            raise UnsupportedError(f"'{self.kind}' cannot look at a memory (cross)", where=place.path)
        if not place.cross and not getattr(can, place.order):
            able = [name for name in ("causal", "bidirectional", "prefix") if getattr(can, name)]
            raise UnsupportedError(
                f"'{self.kind}' cannot be {place.order}", where=place.path, hint=f"it can be {', '.join(able)}"
            )

    def accept(self, ctx: Context, *, extending: bool = False) -> None:
        """Refuse what this mixer cannot honour; called first by `forward` and `extend`."""
        super().accept(ctx)
        if self.cross and (ctx.documents is not None or ctx.mask is not None):
            raise UnsupportedError("a memory has no documents and takes no mask from the objective", where=self.path)
        if not self.cross and ctx.memory is not None:
            raise UnsupportedError(f"'{self.kind}' was not built to look at a memory", where=self.path)
        if extending:
            for name in ("documents", "padding", "mask"):
                if getattr(ctx, name) is not None:
                    raise UnsupportedError(
                        f"extend takes no {name}", where=self.path, hint="rows of one batch are ragged by `lengths`"
                    )
        elif ctx.lengths is not None:
            raise UnsupportedError("forward takes no lengths", where=self.path, hint="use `padding`")

    def blank(self, name: str, batch: int, length: int, device: torch.device | str) -> Tensor:
        """The side tensor `name` with nothing in it, for calls whose numbers do not matter."""
        return torch.zeros(batch, dtype=torch.int64, device=device)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        self.accept(ctx)
        values = self.values(x, ctx)
        if ctx.taps is not None:
            values = ctx.taps(f"{self.path}.v", values)
        frozen = self.freeze(x, ctx)
        if ctx.taps is not None:
            frozen = self._weights(frozen, values, ctx)
        mixed = self.mix(frozen, values)
        if ctx.taps is not None:
            mixed = ctx.taps(f"{self.path}.mixed", mixed)
        return self.finish(mixed, x, ctx)

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State:
        raise UnsupportedError(f"'{self.kind}' has no state: it cannot be extended", where=self.path)

    def extend(self, x: Tensor, state: Any, ctx: Context) -> Tensor:
        """The next chunk [B, T ≥ 1, D] of every row; the state moves on in place."""
        raise UnsupportedError(f"'{self.kind}' cannot be extended", where=self.path)

    def values(self, x: Tensor, ctx: Context) -> Tensor:
        """The tensor in which the mix is linear, [B, S, G, K]."""
        raise UnsupportedError(
            f"'{self.kind}' is not linear in a value tensor", where=self.path, hint="its sight is `jacobian`"
        )

    def freeze(self, x: Tensor, ctx: Context) -> Frozen:
        raise UnsupportedError(f"'{self.kind}' is not linear in a value tensor", where=self.path)

    def mix(self, frozen: Frozen, values: Tensor) -> Tensor:
        """[B, S, G, K] → [B, T, H, K]."""
        raise UnsupportedError(f"'{self.kind}' is not linear in a value tensor", where=self.path)

    def finish(self, mixed: Tensor, x: Tensor, ctx: Context) -> Tensor:
        raise UnsupportedError(f"'{self.kind}' is not linear in a value tensor", where=self.path)

    def sight(self, x: Tensor, ctx: Context) -> Tensor:
        """The token-to-token matrix [B, groups, T, S] that acted on the values."""
        self.accept(ctx)
        values = self.values(x, ctx)
        return self.matrix(self.freeze(x, ctx), values.shape[0], values.shape[1], x)

    def jacobian(self, x: Tensor, ctx: Context) -> Tensor:
        """The exact derivative [B, T, D, S, D] of every output by every token mixed in (those of the
        memory for a cross mixer); the sight of mixers that are linear in no value tensor."""
        with torch.enable_grad():
            source = (ctx.memory.hidden if self.cross and ctx.memory is not None else x).detach().requires_grad_()
            if self.cross and ctx.memory is not None:
                y = self(x, ctx.replace(memory=dataclasses.replace(ctx.memory, hidden=source)))
            else:
                y = self(source, ctx)
            outputs: Tensor = y.sum(0)  # rows of a batch do not meet, so one pass serves them all
            slopes = [
                torch.autograd.grad(each, source, retain_graph=True, materialize_grads=True)[0]
                for each in outputs.flatten()
            ]
        return torch.stack(slopes, 1).view(x.shape[0], *outputs.shape, *source.shape[1:])

    def matrix(self, frozen: Frozen, batch: int, source: int, like: Tensor) -> Tensor:
        """`mix` on one-hot positions, some columns at a time, so that the production op is what is read."""
        columns = []
        for start in range(0, source, 256):
            stop = min(source, start + 256)
            hot = torch.zeros(source, stop - start, dtype=like.dtype, device=like.device)
            hot[torch.arange(start, stop), torch.arange(stop - start)] = 1
            values = hot[None, :, None].expand(batch, source, self.value_groups, stop - start)
            columns.append(self.mix(frozen, values))
        return torch.cat(columns, -1).transpose(1, 2)

    def _weights(self, frozen: Frozen, values: Tensor, ctx: Context) -> Frozen:
        assert ctx.taps is not None
        name = f"{self.path}.weights"
        batch, source = values.shape[:2]
        if ctx.taps.edited(name):
            weights = ctx.taps(name, self.matrix(frozen, batch, source, values))
            return dataclasses.replace(frozen, weights=weights)
        ctx.taps.lazy(name, lambda: self.matrix(frozen, batch, source, values))
        return frozen

    def tapped_values(self, values: Tensor, ctx: Context) -> Tensor:
        """The taps on a chunk's values in the `extend` of a mixer whose state holds no tokens: its weights
        over earlier ones do not exist, so they can be neither shown nor edited."""
        assert ctx.taps is not None
        name = f"{self.path}.weights"
        if ctx.taps.edited(name):
            raise UnsupportedError(
                "weights over tokens that only live in the state cannot be edited",
                where=self.path,
                hint="edit them in a whole forward call",
            )
        ctx.taps.lazy(name, self._no_weights)
        return ctx.taps(f"{self.path}.v", values)

    def _no_weights(self) -> Tensor:
        raise UnsupportedError(
            "weights over tokens that only live in the state do not exist",
            where=self.path,
            hint="watch a whole forward call instead",
        )


class ChannelMixer(Mechanism):
    """Works within each position; x and the result are [B, T, D]. Most carry no state. Those that can do less
    than `WITHIN` call `accept` first."""

    capabilities: Capabilities = WITHIN

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        raise NotImplementedError

    def init_state(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str, memory: Memory | None = None
    ) -> State | None:
        return None

    def extend(self, x: Tensor, state: Any, ctx: Context) -> Tensor:
        return self(x, ctx)  # type: ignore[no-any-return]


def head_width(width: int, heads: int, given: int | None = None, *, settable: bool = True) -> int:
    """Features per head: those given, or an even share of the width; settable: whether a recipe may give them."""
    if given is None and width % heads:
        raise UnsupportedError(
            f"a width of {width} does not divide into {heads} heads",
            hint="change width or heads" + (", or set head_width" if settable else ""),
        )
    return given or width // heads


def initialise(module: nn.Module, seed: int) -> None:
    """Draw every parameter from one generator, in module order, so that a seed means a network."""
    device = next(module.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            reset = getattr(part, "reset", None)
            if callable(reset):
                reset(generator)
