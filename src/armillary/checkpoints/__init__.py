"""Models in and out: `load` reads any model folder, `save` writes the native or an open layout."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from armillary.base.errors import CheckpointError, InputError
from armillary.checkpoints.assemble import Loaded
from armillary.checkpoints.native import MANIFEST, load_native, save_native, write_native
from armillary.checkpoints.open import detect, load_open, save_open
from armillary.checkpoints.resolve import checkpoints, newest, offer, resolve
from armillary.checkpoints.tensors import WEIGHTS
from armillary.nn.network import Network
from armillary.recipe import Recipe
from armillary.text import Tokenizer

_MODEL_FILES = re.compile(
    r"""
      armillary\.json
    | recipe\.yaml
    | config\.json
    | generation_config\.json
    | model\.safetensors
    | model-\d{5}-of-\d{5}\.safetensors
    | model\.safetensors\.index\.json
    | tokenizer\.json
    | tokenizer_config\.json
    | special_tokens_map\.json
    | chat_template\.jinja
    | modules\.json  # those of an encoder of sentences
    | sentence_bert_config\.json
    | config_sentence_transformers\.json
    | 1_Pooling
    | 2_Normalize
    """,
    re.VERBOSE,
)


def load(
    path: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    *,
    empty: bool = False,
    mapped: bool = False,
) -> Loaded:
    """The model in a run (its newest checkpoint), a native or open folder, or under a hub name.

    device: auto, cpu, cuda, …; dtype: auto (as stored), float32, bf16, float16; revision: of a hub
    name; empty: check all but the contents of the weights, and give the network without storage; mapped: weights
    that are used as they are stored stay in their files, which must not be written to meanwhile. Raises
    CheckpointError or UnsupportedError naming the file, tensor or key.
    """
    folder = resolve(path, revision)
    if detect(folder) != "native":
        return load_open(folder, device, dtype, empty=empty, mapped=mapped)
    try:
        return load_native(folder, device, dtype, empty=empty, mapped=mapped)
    except CheckpointError as error:
        if folder == Path(path).expanduser():
            raise
        raise CheckpointError(error.what, where=error.where, hint=offer(folder)) from error


def save(
    folder: str | Path,
    network: Network,
    tokenizer: Tokenizer | None = None,
    recipe: Recipe | None = None,
    layout: str = "native",
) -> None:
    """Write a model folder; layout: native, or open (the one that other tools read).

    An earlier model at `folder` is replaced when the new one is complete. Raises InputError when
    other files would be lost, UnsupportedError when no open layout can hold the model.
    """
    place = Path(folder)
    if layout not in ("native", "open"):
        raise InputError(f"there is no layout '{layout}'", hint="native or open")
    _check_replaceable(place)
    if layout == "native":
        save_native(place, network, recipe=recipe, tokenizer=tokenizer)
    else:
        save_open(place, network, tokenizer)


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError("this is a file; a model is a folder", where=str(folder))
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if not _MODEL_FILES.fullmatch(name)]
    if others or (names and not {MANIFEST, WEIGHTS, f"{WEIGHTS}.index.json"} & set(names)):
        raise InputError(
            f"this folder holds more than a model ({(others or names)[0]}), which would be lost",
            where=str(folder),
            hint="save into a new or empty folder",
        )


__all__ = [
    "Loaded",
    "checkpoints",
    "detect",
    "load",
    "load_native",
    "load_open",
    "newest",
    "offer",
    "resolve",
    "save",
    "save_native",
    "save_open",
    "write_native",
]
