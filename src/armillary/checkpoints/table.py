"""Families of open checkpoints: one invertible table each, from which both directions are derived.

A family pairs the keys of config.json with settings (`fields`) and the tensors on disk with our
parameters (`Entry`: their names, our names, a chain of steps between them, each of which inverts
exactly). A new family is one file in `families/`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from armillary.base.errors import CheckpointError, SettingsError, UnsupportedError, nearest
from armillary.base.registry import Registry
from armillary.base.settings import parse
from armillary.checkpoints.facts import Facts, facts, flat
from armillary.checkpoints.fields import COMMON, IGNORED, Config, Data, Field, first
from armillary.checkpoints.tensors import Stored, owned
from armillary.nn.network import ModelSettings

families: Registry[Family] = Registry("family", "armillary.checkpoints.families")


class Step:
    """A reversible change: `undo(apply(x)) == x`, bit for bit."""

    def apply(self, parts: list[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """Theirs towards ours; like: tensors of the shapes to be had."""
        raise NotImplementedError

    def undo(self, parts: list[Tensor]) -> list[Tensor]:
        """Ours towards theirs."""
        raise NotImplementedError


class Transpose(Step):
    """Matrices stored as [inputs, outputs]."""

    def apply(self, parts: list[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        return [part.t() for part in parts]

    def undo(self, parts: list[Tensor]) -> list[Tensor]:
        return [part.t() for part in parts]


class Split(Step):
    """One tensor stored for several of ours, joined along `axis`; undone by joining."""

    def __init__(self, axis: int = 0) -> None:
        self.axis = axis

    def apply(self, parts: list[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        (whole,) = parts
        return list(whole.split([part.shape[self.axis] for part in like], self.axis))

    def undo(self, parts: list[Tensor]) -> list[Tensor]:
        return [torch.cat(parts, self.axis)]


class Stack(Step):
    """Several tensors of one shape stored for one of ours, which has them along its first axis; undone by parting."""

    def apply(self, parts: list[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        return [torch.stack(parts)]

    def undo(self, parts: list[Tensor]) -> list[Tensor]:
        (whole,) = parts
        return list(whole.unbind(0))


class Squeeze(Step):
    """An axis of size 1 that is stored and that ours do not have."""

    def __init__(self, axis: int) -> None:
        self.axis = axis

    def apply(self, parts: list[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        return [part.squeeze(self.axis) for part in parts]

    def undo(self, parts: list[Tensor]) -> list[Tensor]:
        return [part.unsqueeze(self.axis) for part in parts]


class SplitByHead(Step):
    """Rows of queries, keys and values stored as one tensor head after head, [H, 3, K]."""

    def __init__(self, heads: int) -> None:
        self.heads = heads

    def apply(self, parts: list[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        (whole,) = parts
        return [part.flatten(0, 1) for part in whole.unflatten(0, (self.heads, len(like), -1)).unbind(1)]

    def undo(self, parts: list[Tensor]) -> list[Tensor]:
        return [torch.stack([part.unflatten(0, (self.heads, -1)) for part in parts], 1).flatten(0, 2)]


class PermuteHalfInterleaved(Step):
    """Rows of queries or keys whose rotary pairs are (i, i + K/2) on their side and (2i, 2i + 1) on ours."""

    def __init__(self, heads: int) -> None:
        self.heads = heads

    def apply(self, parts: list[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        return [self._swapped(part, 2, part.shape[0] // self.heads // 2) for part in parts]

    def undo(self, parts: list[Tensor]) -> list[Tensor]:
        return [self._swapped(part, part.shape[0] // self.heads // 2, 2) for part in parts]

    def _swapped(self, part: Tensor, outer: int, inner: int) -> Tensor:
        swapped: Tensor = part.unflatten(0, (self.heads, outer, inner)).transpose(1, 2).flatten(0, 2)
        return swapped


@dataclass(frozen=True)
class Entry:
    """Tensors on disk, our parameters, and the steps from theirs to ours.

    `{i}` in a name stands for every block. An entry holds where a network has its parameters (so a
    bias that settings leave out needs no condition). sizes: the keys of config.json that decide the
    shape, for messages; other: the same parameters under the names of some folders, read where a folder
    has them and never written.
    """

    theirs: str | tuple[str, ...]
    ours: str | tuple[str, ...]
    steps: tuple[Step, ...] = ()
    sizes: str = ""
    other: bool = False

    def names(self, index: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Their names and ours for a block."""
        pair = ((part,) if isinstance(part, str) else part for part in (self.theirs, self.ours))
        theirs, ours = (tuple(name.replace("{i}", str(index)) for name in names) for names in pair)
        return theirs, ours

    @property
    def repeated(self) -> bool:
        """Whether it is one of every block."""
        return "{i}" in (self.theirs if isinstance(self.theirs, str) else self.theirs[0])


@dataclass(frozen=True)
class Bound:
    """An entry for one block of one network. stages: tensors without storage, theirs first, ours last."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    steps: tuple[Step, ...]
    sizes: str
    stages: tuple[tuple[Tensor, ...], ...]

    def imported(self, tensors: Mapping[str, Stored]) -> dict[str, Tensor]:
        """Their tensors → our parameters by name, each alone in its storage."""
        parts = [tensors[name].read() for name in self.theirs]
        for step, like in zip(self.steps, self.stages[1:], strict=True):
            parts = step.apply(parts, like)
        return {name: owned(part) for name, part in zip(self.ours, parts, strict=True)}

    def exported(self, tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
        """Our parameters → their tensors by name, each formed when it is read."""

        def read(place: int) -> Tensor:
            parts = [tensors[name].detach() for name in self.ours]
            for step in reversed(self.steps):
                parts = step.undo(parts)
            return owned(parts[place].cpu())

        dtype = tensors[self.ours[0]].dtype
        return {
            name: Stored(tuple(like.shape), dtype, partial(read, place))
            for place, (name, like) in enumerate(zip(self.theirs, self.stages[0], strict=True))
        }


class Family:
    """One kind of open checkpoint, known by the `model_type` of its config.json.

    source: who published it; architectures: values of that key that can be read, the first one is
    written; prefix: what the names of a whole model's tensors begin with, left out by folders of the
    bare body; head: what the others begin with; template: the settings that all members have; kinds:
    blocks of several kinds, by name the fact that tells one and its value, so that `NAME.mixer.heads`
    can be a path of fields beside `block.mixer.heads`; optional: those that a model may lack; fields and
    entries: the two halves of the table; ignored: keys that leave the computation alone; leftovers: tensors
    that do; older: other names of tensors (a pattern and what replaces it); repeats: names of tensors that
    may be there beside those that they repeat; constants: keys written besides.
    """

    kind: ClassVar[str] = ""
    source: ClassVar[str] = ""
    architectures: ClassVar[tuple[str, ...]] = ()
    prefix: ClassVar[str] = ""
    head: ClassVar[str] = "lm_head."
    template: ClassVar[Mapping[str, Any]] = {}
    kinds: ClassVar[Mapping[str, tuple[str, Any]]] = {}
    optional: ClassVar[frozenset[str]] = frozenset()
    fields: ClassVar[tuple[Field, ...]] = ()
    entries: ClassVar[tuple[Entry, ...]] = ()
    ignored: ClassVar[frozenset[str]] = frozenset()
    leftovers: ClassVar[re.Pattern[str] | None] = None
    older: ClassVar[tuple[tuple[str, str], ...]] = ()
    repeats: ClassVar[Mapping[str, str]] = {}
    constants: ClassVar[Mapping[str, Any]] = {}

    def settings(self, data: Mapping[str, Any], where: str) -> ModelSettings:
        """config.json → settings. where: the file, for messages.

        Raises UnsupportedError for what changes the computation and cannot be represented, and
        CheckpointError for what is missing or contradictory, each naming the key.
        """
        config = Config(data, where)
        self._check_architecture(config)
        ready: Data = copy.deepcopy(dict(self.template))
        own = {key for field in self.fields for key in field.keys}
        for field in (*(one for one in COMMON if not own & set(one.keys)), *self.fields):
            field.read(config, ready)
        if ready.get("depth", 1) < 1:  # our own may have none; theirs say what they compute by their blocks
            raise config.wrong(self.behind(("depth",))[0], ready["depth"], "at least 1")
        strange = sorted(config.unread - IGNORED - self.ignored)
        if strange:
            known = [key for field in self.fields for key in field.keys]
            close = nearest(strange[0], known)
            hint = "If it does not change what the model computes, remove it from the file."
            raise UnsupportedError(
                f"not understood: {', '.join(f'{key!r}' for key in strange)}",
                where=where,
                hint=f"{close} {hint}" if close.startswith("did") else hint,
            )
        try:
            return parse(ModelSettings, ready)
        except SettingsError as error:
            raise CheckpointError(
                f"{error.what} (from {', '.join(self.behind(error.path, error.what))})", where=where, hint=error.hint
            ) from None

    def suit(self, settings: ModelSettings, names: Collection[str]) -> ModelSettings:
        """The settings for a folder with tensors of these names, where config.json does not say it all."""
        return settings

    def config(self, settings: ModelSettings) -> Data:
        """Settings → config.json. Raises UnsupportedError naming the setting that has no counterpart."""
        wanted = self.equivalent(facts(settings))
        template = {first(path): value for path, value in flat(self.template).items()}
        missing = [name for name in self.kinds if self._block(name, wanted) is None]
        for path, value in (self.kinds[name] for name in missing if name not in self.optional):
            raise UnsupportedError(
                f"model.blocks: {path} is never {value!r}, which has no counterpart in the '{self.kind}' layout"
            )
        for path, value in template.items():
            if path.partition(".")[0] not in missing and wanted.get(path) != value:
                raise self._without(path, wanted, value)
        config: Data = {"architectures": [self.architectures[0]], "model_type": self.kind}
        for field in self.fields:
            field.write(wanted, config)
        again = self.equivalent(facts(self.settings(config, "config.json")))
        for path in (*wanted, *again):  # their kinds of blocks, which repeat what the blocks say, stand last
            if path not in wanted or path not in again or wanted[path] != again[path]:
                raise self._without(path, wanted, again.get(path))
        self.check(wanted)
        return config | dict(self.constants)

    def equivalent(self, wanted: Facts) -> Facts:
        """Facts of a network that computes the same once `table` has changed the parameters: here, a
        window is attention that looks less far. Those of the first block of every kind are added under the
        kind's name."""
        wanted = dict(wanted)
        for name in [name for name, value in wanted.items() if value == "window" and name.endswith(".kind")]:
            wanted[name] = "attention"
            dilation = f"{name.removesuffix('.kind')}.dilation"
            if wanted.get(dilation) == 1:
                del wanted[dilation]
        for kind in self.kinds:
            block = self._block(kind, wanted)
            if block is not None:
                wanted |= {
                    f"{kind}.{name.removeprefix(block)}": held
                    for name, held in wanted.items()
                    if name.startswith(block)
                }
        return wanted

    def _block(self, kind: str, wanted: Facts) -> str | None:
        """What the facts of the first block of a kind begin with."""
        path, value = self.kinds[kind]
        like = (f"blocks.{index}." for index in range(wanted["depth"]))
        return next((one for one in like if wanted.get(f"{one}{path}") == value), None)

    def check(self, wanted: Facts) -> None:
        """Raise UnsupportedError for what the readers of such folders refuse."""

    def table(self, settings: ModelSettings) -> Sequence[Entry]:
        """The tensors' half of the table for a network with these settings."""
        return self.entries

    def bind(self, settings: ModelSettings, ours: Mapping[str, Tensor], found: Container[str] = ()) -> list[Bound]:
        """Every entry that holds for a network with parameters `ours`, of which only shapes matter.

        found: the names in a folder, which decide between two that hold.
        """
        bound = []
        taken: set[str] = set()
        deepest = max(settings.depth, settings.encoder.depth if settings.encoder else 0)
        for entry in sorted(self.table(settings), key=lambda entry: not entry.other):
            for index in range(deepest if entry.repeated else 1):
                theirs, names = entry.names(index)
                if any(name not in ours or name in taken for name in names):
                    continue
                if entry.other and any(name not in found for name in theirs):
                    continue
                taken.update(names)
                bound.append(Bound(theirs, names, entry.steps, entry.sizes, _stages(entry, names, ours)))
        return bound

    def _check_architecture(self, config: Config) -> None:
        given = config.take("architectures", [])
        names = given if isinstance(given, list) else [given]
        if names and not any(name in self.architectures for name in names):
            raise UnsupportedError(
                f"'architectures' is {', '.join(map(str, names))}",
                where=config.where,
                hint=f"of this family only {', '.join(self.architectures)} can be read",
            )

    def behind(self, where: Sequence[str], what: str = "") -> list[str]:
        """The keys of config.json behind a mistake in the settings made from them, at `where` or said in `what`."""
        path = re.sub(r"^(encoder\.)?blocks\.\w+", r"\1block", ".".join(where))
        kinds = re.compile(rf"^({'|'.join(self.kinds)})\.")
        near = [
            (key, name)
            for field in self.fields
            for key in field.keys
            for name in ((kinds.sub("block.", name) for name in field.paths) if self.kinds else field.paths)
            if name.startswith(path) or path.startswith(f"{name}.")
        ]
        said = set(re.findall(r"\w+", what))
        meant = [key for key, name in near if name == path or name.rpartition(".")[2] in said]
        return list(dict.fromkeys(meant or [key for key, _ in near if where]))

    def _without(self, path: str, wanted: Facts, theirs: Any) -> UnsupportedError:
        """Name the setting: the deepest part of `path` that the network's settings do have."""
        meant = "" if theirs is None or path not in wanted else f" (it means {theirs!r})"
        kind, _, rest = path.partition(".")
        if kind in self.kinds:
            path = f"{self._block(kind, wanted)}{rest}"
        while path not in wanted and "." in path:
            path = path.rpartition(".")[0]
            path = next((full for name in ("kind", "branches") if (full := f"{path}.{name}") in wanted), path)
        ours = wanted.get(path)
        return UnsupportedError(f"model.{path}: {ours!r} has no counterpart in the '{self.kind}' layout{meant}")


def _stages(entry: Entry, names: tuple[str, ...], ours: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], ...]:
    parts = [torch.empty(ours[name].shape, dtype=ours[name].dtype, device="meta") for name in names]
    stages = [tuple(parts)]
    for step in reversed(entry.steps):
        parts = step.undo(parts)
        stages.append(tuple(parts))
    return tuple(reversed(stages))


def each() -> Iterator[Family]:
    """One object of every registered family."""
    return (family() for _, family in families)
