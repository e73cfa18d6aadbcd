"""The native layout: everything that a model is, in one folder.

    armillary.json      format, settings of the network, dtype, version of the taps, sha256 of the files
    recipe.yaml         the whole recipe
    model.safetensors   parameters under their own names (or shards and an index); tied ones once
    tokenizer.json, tokenizer_config.json

Any mechanism can be stored so; other tools read the open layouts.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import armillary
from armillary.base.errors import CheckpointError, InputError, SettingsError
from armillary.base.files import new_folder, write_atomic
from armillary.base.settings import parse
from armillary.checkpoints.assemble import Loaded, blank, fill, pick_device, pick_dtype, recipe_around, wanted
from armillary.checkpoints.tensors import (
    MAX_SHARD,
    fit,
    inside,
    raise_for,
    read_json,
    read_tensors,
    stored,
    write_tensors,
)
from armillary.nn import taps
from armillary.nn.adapted import check_plain
from armillary.nn.network import ModelSettings, Network
from armillary.recipe import Recipe
from armillary.recipe.migrate import SCHEMA_VERSION, migrate
from armillary.text import Tokenizer

FORMAT = 1
MANIFEST = "armillary.json"
RECIPE = "recipe.yaml"


def save_native(
    folder: str | Path,
    network: Network,
    *,
    recipe: Recipe | None = None,
    tokenizer: Tokenizer | None = None,
    max_shard: int = MAX_SHARD,
) -> None:
    """Write the folder; it appears complete or not at all.

    Raises InputError when the recipe describes another network.
    """
    with new_folder(Path(folder)) as temporary:
        write_native(
            temporary, network, recipe=recipe, tokenizer=tokenizer, max_shard=max_shard, name=Path(folder).name
        )


def write_native(
    folder: Path,
    network: Network,
    *,
    recipe: Recipe | None = None,
    tokenizer: Tokenizer | None = None,
    max_shard: int = MAX_SHARD,
    name: str = "model",
) -> None:
    """Write the files into a folder that is there, for callers who add their own before it is renamed.

    name: of the recipe that is made when there is none.
    """
    check_plain(network)
    settings = network.settings
    if recipe is None:
        recipe = recipe_around(settings, tokenizer, name)
    elif recipe.model.derive(vocabulary=settings.vocabulary) != settings:
        raise InputError("this recipe describes another network", hint="give the recipe that the network was built by")
    network.check_ties()
    tensors = {key: stored(tensor) for key, tensor in wanted(network).items()}
    write_tensors(folder, tensors, max_shard=max_shard)
    if recipe is not None:
        recipe.save(folder / RECIPE)
    if tokenizer is not None:
        tokenizer.save(folder)
    sizes: Counter[torch.dtype] = Counter()
    for parameter in network.parameters():
        sizes[parameter.dtype] += parameter.numel()
    manifest = {
        "format": FORMAT,
        "armillary": armillary.__version__,
        "taps": taps.VERSION,
        "dtype": str(sizes.most_common(1)[0][0]).removeprefix("torch."),
        "parameters": sizes.total(),
        "schema_version": SCHEMA_VERSION,
        "model": settings.to_data(),
        "files": {path.name: _signed(path) for path in sorted(folder.iterdir())},
    }
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def load_native(
    folder: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    *,
    verify: bool = True,
    empty: bool = False,
    mapped: bool = False,
) -> Loaded:
    """Read the folder. dtype auto: as stored.

    verify: compare every file with its recorded sha256; empty: check all but the contents of the weights, and
    give the network without storage; mapped: see `load`. Raises CheckpointError that names every file or tensor
    that is damaged, missing, too many or wrongly shaped.
    """
    place, kind = pick_device(device), pick_dtype(dtype)
    root = Path(folder)
    manifest = _manifest(root)
    fault = damage(root, manifest, contents=verify and not empty)
    if fault is not None:
        raise CheckpointError(fault, where=str(root), hint="copy it again, or use an earlier checkpoint")
    settings = _settings(root, manifest)
    network = blank(settings)
    needed, found = wanted(network), read_tensors(root, mapped=mapped)
    raise_for(fit(found, needed), root)
    tokenizer = Tokenizer.load(root) if (root / "tokenizer.json").exists() else None
    check_vocabulary(settings, tokenizer, root)
    recipe = Recipe.load(root / RECIPE) if (root / RECIPE).exists() else None
    if not empty:
        fill(network, ((name, found[name].read()) for name in needed), place, kind)
    return Loaded(network, tokenizer, recipe)


def damage(folder: Path, manifest: dict[str, Any] | None = None, *, contents: bool = False) -> str | None:
    """What is wrong with the files of a native folder, or None: missing, of another size or, when
    `contents` are compared, changed."""
    try:
        manifest = manifest or _manifest(folder)
        for name, signed in manifest["files"].items():
            path = inside(folder, name)
            if not path.is_file():
                return f"'{name}' is missing"
            size = path.stat().st_size
            if size != signed["bytes"]:
                return f"'{name}' is damaged: it has {size} bytes, {signed['bytes']} were written"
            if contents and _signed(path) != signed:
                return f"'{name}' was changed or damaged since it was written (another sha256)"
    except CheckpointError as error:
        return error.what
    return None


def check_vocabulary(settings: ModelSettings, tokenizer: Tokenizer | None, folder: Path) -> None:
    """Every id of the tokenizer must have its row of the embedding."""
    if tokenizer is None or settings.vocabulary is None:
        return
    if max(tokenizer.ends, default=0) >= settings.vocabulary:
        raise CheckpointError(
            f"answers should end at {max(tokenizer.ends)}, but the model's vocabulary is {settings.vocabulary}",
            where=str(folder),
        )
    if tokenizer.size > settings.vocabulary:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.size} entries, but the model's vocabulary is {settings.vocabulary}",
            where=str(folder),
            hint="put the tokenizer that the model was trained with beside it",
        )


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    manifest = read_json(path)
    version = manifest.get("format")
    if type(version) is not int or version < 1:
        raise CheckpointError(
            f"the format of this folder is {version!r}, not a whole number from 1 up", where=str(path)
        )
    if version > FORMAT:
        raise CheckpointError(
            f"this folder has format {version}; this Armillary reads up to {FORMAT}",
            where=str(path),
            hint="use the version of Armillary that wrote it, or a newer one",
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(item, dict) and {"sha256", "bytes"} <= item.keys() for item in files.values()
    ):
        raise CheckpointError("'files' should list the size and sha256 of every file", where=str(path))
    return manifest


def _settings(folder: Path, manifest: dict[str, Any]) -> ModelSettings:
    where = str(folder / MANIFEST)
    data = {key: manifest.get(key) for key in ("schema_version", "model")}
    if not isinstance(data["model"], dict):
        raise CheckpointError("'model' should hold the settings of the network", where=where)
    try:
        settings = parse(ModelSettings, migrate(data)["model"], ("model",))
    except SettingsError as error:
        raise SettingsError(error.what, path=error.path, where=where, hint=error.hint) from None
    if settings.vocabulary is None:
        raise CheckpointError("model.vocabulary is not there", where=where)
    return settings


def _signed(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
