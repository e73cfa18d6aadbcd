"""The network: embedding, stack, final norm and head; decoder, encoder, encoder–decoder or prefix model.

`hidden` and `head` are apart, so that losses are computed in chunks and full float32 logits never
exist. Parameters keep their own dtype; activations flow in `dtype`, set by `compute`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from armillary.base.errors import InputError, SettingsError, UnsupportedError
from armillary.nn.block import Block
from armillary.nn.cache import Cache, cached
from armillary.nn.context import Context, Memory
from armillary.nn.cost import Cost
from armillary.nn.driver import DriverSettings
from armillary.nn.heads.base import HeadSettings
from armillary.nn.heads.language_model import LanguageModelHead, LanguageModelHeadSettings
from armillary.nn.linear import Embedding, LinearSettings
from armillary.nn.mask import Mask
from armillary.nn.mechanism import ChannelMixer, Mixer, NormSettings, Order, Place, PositionSettings, initialise
from armillary.nn.network_state import NetworkState
from armillary.nn.norms.rmsnorm import RMSNormSettings
from armillary.nn.ops import readable
from armillary.nn.ops.cross_entropy import linear_cross_entropy, token_nll
from armillary.nn.positions.learned import LearnedPosition
from armillary.nn.scaling import ScalingSettings, scale
from armillary.nn.side import SideSettings
from armillary.nn.stack import Stack, StackSettings, share
from armillary.nn.tape import NoStep, Tape, record
from armillary.nn.taps import Taps
from armillary.nn.training import Training

Form = Literal["decoder", "encoder", "encoder_decoder", "prefix"]
_ORDER: dict[str, Order] = {
    "decoder": "causal",
    "encoder": "bidirectional",
    "encoder_decoder": "causal",
    "prefix": "prefix",
}


class ModelSettings(StackSettings):
    """A whole network."""

    form: Form = Field("decoder", description="decoder, encoder, encoder_decoder or prefix")
    width: int = Field(256, gt=0, description="features of the residual stream")
    vocabulary: int | None = Field(None, gt=0, description="entries of the embedding; by default the tokenizer's")
    context: int = Field(1024, gt=0, description="longest sequence that tables of positions serve")
    position: PositionSettings | None = Field(None, description="positions added to the embedding: learned, sinusoidal")
    segments: int = Field(0, ge=0, description="how many segment embeddings (0: none)")
    start: int | None = Field(
        None, ge=0, description="token that an encoder_decoder's answers start from; by default the source's last"
    )
    queries: bool = Field(
        False, description="a trained embedding of tokens that are asked for: the second stream (see nn/two_stream.py)"
    )
    embed_scale: float = Field(1.0, gt=0, description="factor on the embedding")
    embed_norm: NormSettings | None = Field(None, description="norm after the embedding")
    norm: NormSettings | None = Field(RMSNormSettings(), description="norm after the last block")
    head: HeadSettings = Field(LanguageModelHeadSettings(), description="what is read off the last hidden states")
    encoder: StackSettings | None = Field(None, description="the encoder of an encoder_decoder")
    linear: dict[str, LinearSettings] = Field({}, description="kind of product by role (q, k, v, o, up, …, or all)")
    side: dict[str, SideSettings] = Field(
        {}, description="what makes side tensors (edges, coordinates, channels) from the ids, by name"
    )
    scaling: ScalingSettings | None = Field(
        None, description="base sizes from which starting values and learning rates scale"
    )
    driver: DriverSettings | None = Field(
        None, description="recurrence over segments: transformer_xl, memory_tokens, feedback"
    )

    @model_validator(mode="after")
    def _whole(self) -> ModelSettings:
        if (self.form == "encoder_decoder") != (self.encoder is not None):
            raise ValueError("form: encoder_decoder and encoder: {…} go together")
        if self.position is not None and self.position.kind != "none" and "embed" not in self.position.sites:
            raise ValueError(f"'{self.position.kind}' does not act on the embedding: put it under the mixer's position")
        if self.driver is not None and self.topology == "reversible":
            raise ValueError("a driver steps through single blocks, which a reversible stack does not have")
        if self.driver is not None and self.encoder is not None:
            raise ValueError("a driver drives a decoder or an encoder, not an encoder_decoder")
        crosses = any(branch.look == "memory" for block in self.layers() for branch in block.all())
        if self.form == "encoder_decoder" and not crosses:
            raise ValueError("no block of the decoder looks at the encoder: add cross: {kind: attention} to a block")
        if self.form != "encoder_decoder" and crosses:
            raise ValueError("a block looks at an encoder's memory, but there is none: use form: encoder_decoder")
        return self

    def place(self) -> Place:
        return Place(
            width=self.width, depth=self.depth, order=_ORDER[self.form], length=self.context, linear=self.linear
        )

    def source_place(self) -> Place:
        """Where the encoder of an encoder–decoder is built."""
        return Place(width=self.width, order="bidirectional", length=self.context, linear=self.linear, path="encoder")

    def cost(self, place: Place, length: int, itemsize: int = 2) -> Cost:
        """Forward FLOPs of one row of `length` tokens (for an encoder–decoder, on both sides) and the
        bytes of its state."""
        if self.driver is None:
            total = super().cost(place, length, itemsize)
        else:
            total = self.driver.cost(self, place, length, itemsize)
        around = 0.0
        if self.embed_scale != 1.0:
            around += length * self.width
        for norm in (self.embed_norm, self.norm):
            around += norm.flops(self.width, length) if norm is not None else 0.0
        if self.position is not None:
            around += self.position.cost(place, length, 0, 0, 0).flops
        around += self.head.flops(self.width, self.vocabulary or 0, length)
        if self.encoder is not None:
            around += self.encoder.cost(self.source_place(), length, itemsize).flops
        return total + Cost(around)


class Network(nn.Module):
    """ids [B, T] int64 → what the head gives (logits [B, T, V] for a language model)."""

    TAPS_OUTSIDE: ClassVar[tuple[str, ...]] = ("embed", "norm", "logits")

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        if settings.vocabulary is None:
            raise SettingsError(
                "the vocabulary is not known", path=("model", "vocabulary"), hint="give it, or train a tokenizer first"
            )
        self.settings = settings
        self.dtype = torch.float32
        place = settings.place()
        # A tied table must also score, so it starts small; on its own it starts at the scale that blocks add.
        tied = isinstance(settings.head, LanguageModelHeadSettings) and settings.head.tied
        self.embed = Embedding(settings.vocabulary, settings.width, deviation=None if tied else 1.0)
        sites = settings.position.sites if settings.position is not None else frozenset()
        self.position = settings.position.build(place.at("position")) if settings.position and sites else None
        self.segment = Embedding(settings.segments, settings.width, role="segment") if settings.segments else None
        self.query = Embedding(1, settings.width, role="query") if settings.queries else None
        self.embed_norm = settings.embed_norm.build(settings.width) if settings.embed_norm else None
        if settings.encoder is not None:
            self.encoder = Stack(settings.encoder, settings.source_place())
            self.encoder_norm = settings.norm.build(settings.width) if settings.norm else None
            _no_side(self.encoder)
            self.blocks = Stack(settings, place.at("decoder"))
        else:
            self.blocks = Stack(settings, place)
        self.driver = None if settings.driver is None else settings.driver.build(place, settings)
        self.norm = settings.norm.build(settings.width) if settings.norm else None
        self.head = settings.head.build(place.at("head"), settings.vocabulary, self.embed)
        self._shared = share(self, settings.share)
        self.tie()
        self._side = self._needed_side()
        self.takes = frozenset(name for part in self._parts() for name in part.capabilities.takes)
        self._compares = any(getattr(mixer, "compares", False) for mixer in self.mixers())
        for name in settings.side:
            if name not in self._side:
                raise SettingsError(f"no mechanism here needs the side tensor '{name}'", path=("model", "side", name))
        self.rates = scale(self)  # factors on the learning rate, by the parameter's name

    # -- parameters

    def tie(self) -> None:
        """Make shared parameters one object again (after a load or a move that copied them)."""
        if isinstance(self.head, LanguageModelHead) and self.head.tied:
            self.head.product.weight = self.embed.weight
        for name, first in self._shared:
            owner, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(owner), leaf, self.get_parameter(first))

    def check_ties(self) -> None:
        """Raise when parameters that the recipe ties have come apart."""
        if isinstance(self.head, LanguageModelHead) and self.head.tied:
            assert self.head.product.weight is self.embed.weight, "the head's weight is no longer the embedding's"
        for name, first in self._shared:
            assert self.get_parameter(name) is self.get_parameter(first), f"{name} is no longer {first}"

    def tied_names(self) -> dict[str, str]:
        """Names that are a second name of another parameter → that parameter's name."""
        names = dict(self._shared)
        if isinstance(self.head, LanguageModelHead) and self.head.tied:
            names["head.product.weight"] = "embed.weight"
        return names

    def initialise(self, seed: int) -> None:
        initialise(self, seed)

    def compute(self, dtype: torch.dtype) -> Network:
        """Let activations flow in `dtype`; parameters keep theirs."""
        self.dtype = dtype
        return self

    def stacks(self) -> list[Stack]:
        stacks = [self.encoder, self.blocks] if self.settings.encoder is not None else [self.blocks]
        return stacks if self.driver is None else [*stacks, *self.driver.stacks()]

    def compile_blocks(self, **options: Any) -> None:
        for stack in self.stacks():
            stack.compile_blocks(**options)

    def recompute_blocks(self, on: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass and compute the rest again."""
        for stack in self.stacks():
            stack.recompute = on

    def mixers(self) -> list[Mixer]:
        return [module for module in self.modules() if isinstance(module, Mixer)]

    @property
    def side_names(self) -> frozenset[str]:
        """The side tensors that have to be given: all but those that the model makes by itself (`takes`: those
        that may be given)."""
        return self._side - set(self.settings.side)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def taps(self) -> list[str]:
        """The names of all taps of this network, from a pass over tensors without storage."""
        with torch.device("meta"):
            twin = Network(self.settings)
        names = _Names()
        ids = torch.zeros(1, 2, dtype=torch.int64, device="meta")
        source = ids if self.settings.form == "encoder_decoder" else None
        twin(ids, source=source, side=twin.blank_side(1, 2), taps=names)
        return names.found

    # -- whole sequences

    def forward(self, ids: Tensor, **inputs: Any) -> Tensor:
        """See `hidden` for the inputs; returns what the head gives."""
        h = self.hidden(ids, **inputs)
        out: Tensor = self.head(h, inputs.get("padding"))
        taps = inputs.get("taps")
        return out if taps is None else taps("logits", out)

    def hidden(
        self,
        ids: Tensor,
        *,
        source: Tensor | None = None,
        source_padding: Tensor | None = None,
        padding: Tensor | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        queries: Tensor | None = None,
        side: Mapping[str, Tensor] | None = None,
        mask: Mask | None = None,
        training: Training | None = None,
        taps: Taps | None = None,
    ) -> Tensor:
        """The last hidden states [B, T, D], after the final norm.

        ids: [B, T] int64; source, source_padding: [B, S], the encoder's input; padding: [B, T] bool,
        True for real tokens; documents: [B, T] ids of packed documents; positions: [B, T], by
        default counted from 0 in each document; segments: [B, T]; queries: [B, T] bool, tokens that are only asked
        for, embedded as such and not as their ids; side: named tensors that the
        mechanisms ask for and `model.side` does not make; mask: a predicate from the objective;
        training: the update that this call belongs to, which brings noise and auxiliary losses.
        Raises InputError or UnsupportedError for what the network cannot honour.
        """
        self._check_ids(ids, "ids")
        side = self._completed(side, ids, padding)
        if segments is not None and self._compares:
            side["segments"] = segments
        if positions is None and (documents is not None or padding is not None):
            positions = _counted(ids, documents, padding)
        if documents is not None and self.settings.encoder is not None:
            raise UnsupportedError("an encoder–decoder has one source per row, so its rows hold one document each")
        memory = self._memory(source, source_padding, taps, ids.shape[0], training)
        ctx = Context(
            positions=positions,
            documents=documents,
            padding=padding,
            mask=mask,
            memory=memory,
            ids=ids,
            side=side,
            training=training,
            taps=taps,
        )
        x = self._embedded(ids, segments, ctx, taps, queries)
        x = self.blocks(x, ctx) if self.driver is None else self.driver(self.blocks, x, ctx)
        return self._closed(x, taps)

    def cross_entropy(self, hidden: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Weighted sum of the targets' negative log-likelihoods in nats, a float32 scalar.

        hidden: [B, T, D]; targets: [B, T] int64; weights: [B, T] or None = ones.
        """
        head = self._scores()
        return linear_cross_entropy(
            head.scaled(hidden).reshape(-1, hidden.shape[-1]),
            head.product.weight,
            targets.reshape(-1),
            weights=None if weights is None else weights.reshape(-1),
            bias=head.product.bias,
            softcap=head.softcap,
        )

    def token_nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood of each target in nats, [B, T] float32, without gradients."""
        head = self._scores()
        flat = token_nll(
            head.scaled(hidden).reshape(-1, hidden.shape[-1]),
            head.product.weight,
            targets.reshape(-1),
            bias=head.product.bias,
            softcap=head.softcap,
        )
        return flat.view(targets.shape)

    # -- chunks

    def init_state(
        self,
        batch: int,
        capacity: int | None = None,
        *,
        source: Tensor | None = None,
        source_padding: Tensor | None = None,
        cache: Cache | None = None,
    ) -> NetworkState:
        """An empty state for `batch` rows with room for `capacity` tokens (it grows beyond that).

        An encoder–decoder encodes its source here, once. cache: how keys and values are kept (see
        `nn.cache`), by default all of them as they are.
        """
        if self.settings.form == "encoder":
            raise UnsupportedError("an encoder sees whole sequences: it has no state", hint="call the model instead")
        memory = self._memory(source, source_padding, None, batch)
        room = capacity if capacity is not None else 64
        if self.driver is None:
            blocks = self.blocks.init_state(batch, room, self.dtype, self.device, memory)
            if cache is not None:
                cached(cache, self.blocks, blocks)
        else:
            if cache is not None:
                raise UnsupportedError("a driver keeps states of its own", hint="cache=None")
            blocks = self.driver.init_state(self.blocks, batch, room, self.dtype, self.device)
        return NetworkState(blocks, torch.zeros(batch, dtype=torch.int64, device=self.device), memory)

    def extend(
        self,
        ids: Tensor,
        state: NetworkState,
        *,
        lengths: Tensor | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        side: Mapping[str, Tensor] | None = None,
        last: bool = False,
        taps: Taps | None = None,
    ) -> Tensor:
        """Logits of the next chunk; the state moves on in place.

        ids: [B, T ≥ 1]; lengths: [B] valid tokens of each row (0 allowed), None = all; last=True
        gives only each row's last valid token, [B, 1, V].
        """
        self._check_ids(ids, "ids")
        if ids.shape[0] != state.batch:
            raise InputError(f"the chunk has {ids.shape[0]} rows, the state {state.batch}")
        side = dict(side or {})
        self._check_side(side)
        count = ids.shape[1]
        steps = torch.arange(count, device=ids.device)
        if lengths is not None:
            lengths = self._check_lengths(lengths, ids)
            # A token that is not there may not ask for a position that is not there either.
            steps = torch.minimum(steps, lengths[:, None] - 1)
        if positions is None:
            positions = (state.positions[:, None] + steps).clamp(min=0)
        ctx = Context(positions=positions, lengths=lengths, memory=state.memory, ids=ids, side=side, taps=taps)
        x = self._embedded(ids, segments, ctx, taps)
        if self.driver is None:
            x = self.blocks.extend(x, state.blocks, ctx)
        else:
            x = self.driver.extend(self.blocks, x, state.blocks, ctx)
        added = torch.full_like(state.lengths, count) if lengths is None else lengths
        state.lengths = state.lengths + added
        state.positions = state.positions + added
        if last:
            if lengths is None:
                x = x[:, -1:]
            else:
                x = x[torch.arange(len(x), device=x.device), (added - 1).clamp(min=0)][:, None]
        out: Tensor = self.head(self._closed(x, taps))
        return out if taps is None else taps("logits", out)

    def record(self, tape: Tape, state: NetworkState) -> None:
        """Write down `extend` of such a state, for a decoder on a CPU; raises NoStep for other networks."""
        if self.settings.form != "decoder" or self.driver is not None or self.segment is not None:
            raise NoStep("only decoders without a driver and segments have one")
        if self.dtype == torch.float64 or self.device.type not in ("cpu", "meta"):
            raise NoStep("float64 and other devices have none")
        x = tape.embed(self.embed.weight, self.settings.embed_scale)
        if self.position is not None:
            room = min(tape.room, self.position.length) if isinstance(self.position, LearnedPosition) else tape.room
            table = self.position.embed(torch.arange(room, device=self.device)[None])[0]
            tape.embed(table.float(), onto=x, places=True)
        if self.embed_norm is not None:
            record(self.embed_norm, tape, x, place=True)
        tape.complete = lambda side, ids: self._completed(side, ids, None)
        self.blocks.record(tape, x, state.blocks)
        h = tape.pick(x)
        if self.norm is not None:
            h = record(self.norm, tape, h)
        tape.close(record(self.head, tape, h))

    # -- parts

    def _embedded(
        self, ids: Tensor, segments: Tensor | None, ctx: Context, taps: Taps | None, queries: Tensor | None = None
    ) -> Tensor:
        x = self.embed(ids).to(self.dtype)
        if queries is not None:
            if self.query is None:
                raise InputError("this network has no embedding of queries", hint="set model.queries")
            x = torch.where(queries[..., None], self.query.weight[0].to(self.dtype), x)
        if self.settings.embed_scale != 1.0:
            x = x * torch.tensor(self.settings.embed_scale, dtype=self.dtype, device=x.device)
        if self.position is not None:
            x = x + self.position.embed(ctx.where(ids)).to(self.dtype)
        if segments is not None and self.segment is None and not self._compares:
            raise InputError("this network has no segments", hint="set model.segments")
        if self.segment is not None:
            given = torch.zeros_like(ids) if segments is None else segments
            x = x + self.segment(given).to(self.dtype)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        return x if taps is None else taps("embed", x)

    def _closed(self, x: Tensor, taps: Taps | None) -> Tensor:
        x = x if self.norm is None else self.norm(x)
        return x if taps is None else taps("norm", x)

    def _memory(
        self,
        source: Tensor | None,
        padding: Tensor | None,
        taps: Taps | None,
        batch: int,
        training: Training | None = None,
    ) -> Memory | None:
        if self.settings.encoder is None:
            if source is not None or padding is not None:
                raise InputError("this network has no encoder, so it takes no source")
            return None
        if source is None:
            raise InputError("an encoder–decoder needs a source", hint="pass source=ids [B, S]")
        self._check_ids(source, "source")
        if source.shape[0] != batch:
            raise InputError(f"the source has {source.shape[0]} rows, the ids {batch}")
        positions = None if padding is None else _counted(source, None, padding)
        ctx = Context(positions=positions, padding=padding, ids=source, training=training, taps=taps)
        x = self.encoder(self._embedded(source, None, ctx, None), ctx)
        return Memory(x if self.encoder_norm is None else self.encoder_norm(x), padding)

    def _scores(self) -> LanguageModelHead:
        if not isinstance(self.head, LanguageModelHead):
            raise UnsupportedError("this network has no language-model head", hint="set model.head: language_model")
        return self.head

    def _check_ids(self, ids: Tensor, name: str) -> None:
        if ids.dim() != 2 or ids.dtype != torch.int64:
            raise InputError(
                f"{name} has shape {tuple(ids.shape)} and type {ids.dtype}",
                hint="pass int64 ids of shape [batch, time]",
            )
        if readable(ids):
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.embed.entries:
                raise InputError(
                    f"{name} holds {low if low < 0 else high}, but the vocabulary has {self.embed.entries} entries",
                    hint="encode the text with the tokenizer that belongs to this model",
                )

    def _check_lengths(self, lengths: Tensor, ids: Tensor) -> Tensor:
        rows, count = ids.shape
        if lengths.shape != (rows,) or bool(((lengths < 0) | (lengths > count)).any()):
            raise InputError(
                f"lengths are {lengths.tolist()} for a chunk of {rows} rows of {count} tokens",
                hint=f"pass one number from 0 to {count} for each row",
            )
        return lengths.to(ids.device, torch.int64)

    def blank_side(self, batch: int, length: int) -> dict[str, Tensor]:
        """The side tensors of a call whose numbers do not matter, with nothing in them."""
        found = {"prefix": torch.zeros(batch, dtype=torch.int64, device=self.device)} if "prefix" in self._side else {}
        for mixer in self.mixers():
            for name in mixer.capabilities.side:
                found[name] = mixer.blank(name, batch, length, self.device)
        return found

    def _completed(self, side: Mapping[str, Tensor] | None, ids: Tensor, padding: Tensor | None) -> dict[str, Tensor]:
        """What the call gives, and the rest from `model.side`."""
        given = dict(side or {})
        for name, made in self.settings.side.items():
            if name not in given:
                given[name] = made.make(ids, padding)
        self._check_side(given)
        return given

    def _parts(self) -> list[Mixer | ChannelMixer]:
        return [module for module in self.modules() if isinstance(module, (Mixer, ChannelMixer))]

    def _needed_side(self) -> frozenset[str]:
        needed = {name for part in self._parts() for name in part.capabilities.side}
        return frozenset(needed | ({"prefix"} if self.settings.form == "prefix" else set()))

    def _check_side(self, side: Mapping[str, Tensor]) -> None:
        for name in side:
            if name not in self._side and name not in self.takes:
                raise InputError(f"no mechanism here needs the side tensor '{name}'")
        for name in self._side:
            if name not in side:
                hint = f'pass side={{"{name}": …}}' + (f", or set model.side.{name}" if name != "prefix" else "")
                raise InputError(f"a mechanism here needs the side tensor '{name}'", hint=hint)


class _Names(Taps):
    """Collects the names of the places that a call passes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __call__(self, name: str, value: Tensor) -> Tensor:
        self.found.append(name)
        return value

    def lazy(self, name: str, make: Callable[[], Tensor]) -> None:
        self.found.append(name)


def _no_side(encoder: Stack) -> None:
    """Refuse mechanisms that would look at side tensors, which a source does not bring."""
    for part in encoder.modules():
        if not isinstance(part, (Mixer, ChannelMixer)):
            continue
        asked = [*part.capabilities.side, *part.capabilities.takes]
        if getattr(part, "compares", False):
            asked.append("segments")
        if asked:
            raise UnsupportedError(
                f"'{part.kind}' looks at side tensors ({', '.join(asked)}), which a source does not bring",
                where=f"model.{part.path}",
                hint="use it in form: encoder, or in the decoder",
            )


def _counted(ids: Tensor, documents: Tensor | None, padding: Tensor | None) -> Tensor:
    """Positions [B, T] that start at 0 in every document and pass over padding."""
    steps = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if padding is not None:
        steps = (padding.long().cumsum(1) - 1).clamp(min=0)
    if documents is None:
        return steps
    new = torch.ones_like(documents, dtype=torch.bool)
    new[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return steps - torch.where(new, steps, 0).cummax(1).values


def build(settings: ModelSettings, *, device: str = "cpu", seed: int = 0) -> Network:
    """A network with fresh weights drawn from `seed`; on device "meta" it has shapes only."""
    with torch.device(device):
        network = Network(settings)
    if device != "meta":
        network.initialise(seed)
    network.check_ties()
    return network


__all__ = ["Block", "Form", "ModelSettings", "Network", "NetworkState", "build"]
