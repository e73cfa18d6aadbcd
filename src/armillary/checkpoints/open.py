"""Folders in the common open layout, in and out: config.json, safetensors, tokenizer.

What a folder is read as is decided by its files alone; how, by the family that its config.json
names. What is written loads with `transformers`: its auto class for the kind of model, and `AutoTokenizer`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armillary.base.errors import CheckpointError, SettingsError, UnsupportedError, nearest
from armillary.base.files import new_folder, write_atomic
from armillary.checkpoints import sentence
from armillary.checkpoints.assemble import Loaded, blank, fill, pick_device, pick_dtype, recipe_around, wanted
from armillary.checkpoints.native import MANIFEST, RECIPE, check_vocabulary
from armillary.checkpoints.table import Bound, Family, each, families
from armillary.checkpoints.tensors import (
    INDEX,
    MAX_SHARD,
    WEIGHTS,
    Stored,
    fit,
    inside,
    raise_for,
    read_json,
    read_tensors,
    write_tensors,
)
from armillary.nn.adapted import check_plain
from armillary.nn.network import ModelSettings, Network
from armillary.text import Tokenizer
from armillary.text.older import FILES

CONFIG, GENERATION = "config.json", "generation_config.json"


def detect(folder: str | Path) -> str:
    """What a folder is: "run", "native", or the name of a family of open checkpoints.

    Raises CheckpointError for a folder that is none of these, UnsupportedError for an open one of a
    family that is not known.
    """
    root = Path(folder)
    if root.is_file():
        hint = "give the folder that it lies in"
        if root.suffix == ".gguf":
            hint = "GGUF files are not read; give a folder of safetensors"
        raise CheckpointError("this is a file; a model is a folder", where=str(root), hint=hint)
    if not root.is_dir():
        raise CheckpointError("there is no such folder", where=str(root))
    if (root / MANIFEST).exists():
        return "native"
    if (root / CONFIG).exists():
        return _family(root).kind
    if (root / RECIPE).exists() and (root / "checkpoints").is_dir():
        return "run"
    if (root / WEIGHTS).exists() or (root / INDEX).exists():
        raise CheckpointError(f"there are weights here, but neither {MANIFEST} nor {CONFIG}", where=str(root))
    if (root / RECIPE).exists():
        raise CheckpointError(
            "this run has no checkpoint yet", where=str(root), hint=f"armillary train {root / RECIPE}"
        )
    raise CheckpointError(
        f"no model here: neither {MANIFEST}, nor {CONFIG}, nor a run's {RECIPE} and checkpoints",
        where=str(root),
        hint="give a run folder, a model folder, or a hub name",
    )


def load_open(
    folder: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    *,
    empty: bool = False,
    mapped: bool = False,
) -> Loaded:
    """Read an open folder. The recipe has its model; data and training are at their defaults.

    empty: check all but the contents of the weights, and give the network without storage; mapped: see `load`.

    Raises CheckpointError naming every tensor that is missing, too many, wrongly shaped or not a
    weight, and what in config.json is contradictory; UnsupportedError naming a key that changes the
    computation and is not understood.
    """
    place, kind = pick_device(device), pick_dtype(dtype)
    root = Path(folder)
    family = _family(root)
    settings = family.settings(read_json(inside(root, CONFIG)), str(root / CONFIG))
    found = _whole_names(family, read_tensors(root, mapped=mapped), root)
    settings = sentence.read(root, family.suit(settings, found))
    network = _blank(family, settings, len(found), str(root / CONFIG))
    ours = wanted(network)
    bound = family.bind(settings, ours, found)
    left_out = ours.keys() - {name for one in bound for name in one.ours}
    assert not left_out, f"the table of '{family.kind}' has no entry for {', '.join(sorted(left_out))}"
    repeats = {name: first for name, first in family.repeats.items() if name in found and first in found}
    second = _second(family, network, bound) | repeats
    raise_for(
        fit(
            {name: tensor for name, tensor in found.items() if name not in second},
            {name: like for one in bound for name, like in zip(one.theirs, one.stages[0], strict=True)},
            {name: one.sizes for one in bound for name in one.theirs},
        ),
        root,
        hint=f"{CONFIG} and the weights must be of one model",
    )
    tokenizer = _tokenizer(root, settings)
    check_vocabulary(settings, tokenizer, root)
    recipe = recipe_around(settings, tokenizer, root.resolve().name)
    if empty:
        return Loaded(network, tokenizer, recipe)
    fill(network, _imported(bound, found), place, kind)
    parameters = {one.theirs[0]: network.get_parameter(one.ours[0]) for one in bound if not one.steps}
    for name, first in second.items():
        if name in found and not _equal(found[name], found[first], parameters[first]):
            raise CheckpointError(
                f"tensor '{name}' differs from '{first}', but "
                + ("both are one" if name in repeats else "'tie_word_embeddings' says that they are one"),
                where=str(root),
                hint=None if name in repeats else f"set tie_word_embeddings to false in {CONFIG} if both were trained",
            )
    return Loaded(network, tokenizer, recipe)


def save_open(
    folder: str | Path,
    network: Network,
    tokenizer: Tokenizer | None = None,
    *,
    family: str | None = None,
    max_shard: int = MAX_SHARD,
) -> None:
    """Write the folder in the layout of the family that can express this network.

    family: by default the first that can. Raises UnsupportedError that says which setting has no
    counterpart. The folder appears complete or not at all.
    """
    check_plain(network)
    chosen, config = _expressed(network, family)
    network.check_ties()
    ours = wanted(network)
    bound = chosen.bind(network.settings, ours)
    left_out = ours.keys() - {name for one in bound for name in one.ours}
    assert not left_out, f"the table of '{chosen.kind}' has no entry for {', '.join(sorted(left_out))}"
    ends = list(tokenizer.ends) if tokenizer is not None else []
    tokens = {
        "bos_token_id": getattr(tokenizer, "bos", None),
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": getattr(tokenizer, "pad", None),
    }  # null where there is none: a family's own defaults would point at other tokens
    tokens = {name: config.get(name, token) for name, token in tokens.items()}
    config |= {"torch_dtype": str(network.embed.weight.dtype).removeprefix("torch."), **tokens}
    with new_folder(Path(folder)) as temporary:
        _write_json(temporary / CONFIG, config)
        start = {name: config[name] for name in ("decoder_start_token_id",) if name in config}
        _write_json(temporary / GENERATION, tokens | start)
        sentence.write(temporary, network.settings)
        theirs = {name: tensor for one in bound for name, tensor in one.exported(ours).items()}
        write_tensors(temporary, theirs, max_shard=max_shard)
        if tokenizer is not None:
            tokenizer.save(temporary)
            if tokenizer.chat_template is not None:  # ours goes unsaid in our own folders
                path = temporary / "tokenizer_config.json"
                _write_json(path, {"chat_template": tokenizer.chat_template} | read_json(path))


def _expressed(network: Network, name: str | None) -> tuple[Family, dict[str, Any]]:
    if name is not None and name not in families.names():
        raise UnsupportedError(f"there is no family '{name}'", hint=nearest(name, families.names()))
    reasons: dict[str, list[str]] = {}
    for family in each():
        if name in (None, family.kind):
            try:
                return family, family.config(network.settings)
            except UnsupportedError as error:
                what, _, _ = error.what.partition(" has no counterpart")
                reasons.setdefault(what, []).append(family.kind)
    said = "; ".join(
        f"{what} has no counterpart in the {', '.join(map(repr, kinds))} layout{'s' * (len(kinds) > 1)}"
        for what, kinds in reasons.items()
    )
    raise UnsupportedError(f"no open layout can hold this model: {said}", hint="the native layout holds every model")


def _family(root: Path) -> Family:
    path = inside(root, CONFIG)
    kind = read_json(path).get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError("'model_type' is missing", where=str(path), hint=f"known: {', '.join(families.names())}")
    try:
        return families.get(kind)()  # imports one family, or all to find who answers for another name than its file's
    except SettingsError as error:
        what = f"'model_type' is {kind!r}, a family that is not read yet"
        raise UnsupportedError(what, where=str(path), hint=error.hint) from None


def _blank(family: Family, settings: ModelSettings, count: int, where: str) -> Network:
    """The network without storage, when its sizes go together and can be those of `count` tensors."""
    depths = {"depth": settings.depth, "encoder.depth": settings.encoder.depth if settings.encoder else 0}
    for path, depth in depths.items():
        if depth > count:
            (key, *_) = family.behind(path.split("."))
            raise CheckpointError(f"'{key}' is {depth}, but there are only {count} tensors", where=where)
    try:
        return blank(settings)
    except UnsupportedError as error:
        keys = family.behind((), error.what) or [
            key for path in ("width", "block.mixer.heads", "block.mixer.head_width") for key in family.behind((path,))
        ]
        raise CheckpointError(f"{error.what} (from {', '.join(keys)})", where=where, hint=error.hint) from None
    except RuntimeError as error:  # PyTorch's, on shapes beyond its numbers
        raise CheckpointError(f"these sizes make no tensors ({error})", where=where) from None


def _whole_names(family: Family, found: Mapping[str, Stored], root: Path) -> dict[str, Stored]:
    """Their tensors under the names of a whole model, without those that carry no weights."""
    bare = not any(name.startswith(family.prefix) for name in found)
    names: dict[str, str] = {}
    for name in found:
        whole = name
        for old, new in family.older:
            whole = re.sub(old, new, whole)
        if (bare or f"{family.prefix}{whole}" in found) and not whole.startswith(family.head):
            whole = f"{family.prefix}{whole}"
        if whole in names:
            raise CheckpointError(f"'{names[whole]}' and '{name}' are two names of one tensor", where=str(root))
        names[whole] = name
    unread = family.leftovers
    return {
        whole: found[name]
        for whole, name in names.items()
        if unread is None or not unread.fullmatch(whole.removeprefix(family.prefix))
    }


def _imported(bound: list[Bound], found: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    for one in bound:
        yield from one.imported(found).items()


def _equal(one: Stored, other: Stored, parameter: Tensor) -> bool:
    """Whether two stored tensors are the same; parameter: what the other became, which saves reading it again
    where nothing was lost."""
    tensor = one.read()
    second = parameter.detach().to(tensor.device) if parameter.dtype == other.dtype else other.read()
    common = torch.promote_types(tensor.dtype, second.dtype)
    return torch.equal(tensor.to(common), second.to(common))


def _second(family: Family, network: Network, bound: list[Bound]) -> dict[str, str]:
    """Names on disk that would repeat another tensor → that tensor's name (both are plain renames)."""
    names = {one.ours: one.theirs[0] for one in bound}
    parameters = dict(network.named_parameters(remove_duplicate=False))
    tied = {name: parameters[name] for name in network.tied_names()}
    return {one.theirs[0]: names[(network.tied_names()[one.ours[0]],)] for one in family.bind(network.settings, tied)}


def _tokenizer(root: Path, settings: ModelSettings) -> Tokenizer | None:
    found = [name for name in ("tokenizer.json", "tokenizer_config.json", *FILES) if (root / name).exists()]
    for name in found:
        inside(root, name)
    if not found:
        return None
    tokenizer = Tokenizer.load(root)
    ends = _ends(root)
    if ends is not None:
        tokenizer.end_at(id for id in ends if id < (settings.vocabulary or 0))  # others are never chosen
    return tokenizer


def _ends(root: Path) -> list[int] | None:
    """The ids that end an answer: what generation_config.json says stands before config.json; None: neither does."""
    for name in (GENERATION, CONFIG):
        if (root / name).exists():
            given = read_json(inside(root, name)).get("eos_token_id")
            if given is None:
                continue
            ids = given if isinstance(given, list) else [given]
            if not all(type(id) is int for id in ids):
                where = str(root / name)
                raise CheckpointError(f"'eos_token_id' is {given!r}, expected an id or a list of them", where=where)
            return [id for id in ids if id >= 0]
    return None


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
