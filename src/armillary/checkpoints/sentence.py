"""Folders of sentence encoders: what becomes of the last hidden states, as `modules.json` lists it.

The layout is that of the sentence-transformers library (Reimers & Gurevych 2019, Sentence-BERT): the
model, a folder that says how its hidden states are pooled, and often a module that scales to unit length.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from armillary.base.errors import CheckpointError, UnsupportedError
from armillary.base.files import confined, write_atomic
from armillary.checkpoints.tensors import read_json
from armillary.nn.heads.embedding import EmbeddingHeadSettings
from armillary.nn.network import ModelSettings

MODULES, LENGTH, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
# What these files say of the head, and config.json does not.
SAID = {"head.pool": "mean", "head.normalise": False, "head.longest": None, "head.prompt": ""}
_PACKAGE = "sentence_transformers.models"
_POOLS = {"cls_token": "first", "mean_tokens": "mean", "lasttoken": "last"}
_NAMES = {"cls": "first", "mean": "mean", "lasttoken": "last"}


def read(root: Path, settings: ModelSettings) -> ModelSettings:
    """The settings with the embedding head that the folder describes; as they are without `modules.json`.

    Raises UnsupportedError naming a module or a kind of pooling that is not known, CheckpointError for
    files that say nothing.
    """
    if not (root / MODULES).exists():
        return settings
    kinds = [(kind, path) for kind, path in _modules(root / MODULES)]
    if [kind for kind, _ in kinds] not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UnsupportedError(
            f"the modules are {', '.join(kind for kind, _ in kinds) or 'none'}",
            where=str(root / MODULES),
            hint="Transformer, Pooling and then perhaps Normalize can be read",
        )
    if kinds[0][1] not in ("", "."):
        raise UnsupportedError(
            f"the model is in '{kinds[0][1]}'", where=str(root / MODULES), hint="it should be beside this file"
        )
    if not isinstance(settings.head, EmbeddingHeadSettings) and settings.form != "encoder":
        raise UnsupportedError("sentences are embedded by encoders only", where=str(root / MODULES))
    prompt = _prompt(root)
    pool = _pool(root, kinds[1][1], prompt != "")
    head = EmbeddingHeadSettings.model_validate(
        {"pool": pool, "normalise": len(kinds) == 3, "longest": _longest(root), "prompt": prompt}
    )
    return settings.derive(head=head)


def write(folder: Path, settings: ModelSettings) -> None:
    """The files that say how a model with an embedding head pools."""
    head = settings.head
    if not isinstance(head, EmbeddingHeadSettings):
        return
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")][: 2 + head.normalise]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"{_PACKAGE}.{kind}"}
        for index, (path, kind) in enumerate(kinds)
    ]
    modes = {f"pooling_mode_{name}": pool == head.pool for name, pool in _POOLS.items()}
    _write(folder / MODULES, modules)
    for path, _ in kinds[1:]:
        (folder / path).mkdir()
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": settings.width, **modes})
    if head.prompt:
        _write(folder / PROMPTS, {"prompts": {"default": head.prompt}, "default_prompt_name": "default"})
    if head.longest is not None:
        _write(folder / LENGTH, {"max_seq_length": head.longest, "do_lower_case": False})


def _prompt(root: Path) -> str:
    """What the folder puts before every text by itself; prompts that are asked for by name are not ours."""
    path = root / PROMPTS
    if not path.exists():
        return ""
    data = read_json(path)
    name, prompts = data.get("default_prompt_name"), data.get("prompts")
    if name is None:
        return ""
    prompt = prompts.get(name) if isinstance(prompts, dict) and isinstance(name, str) else None
    if not isinstance(prompt, str):
        raise CheckpointError(f"'default_prompt_name' is {name!r}, but 'prompts' has no such text", where=str(path))
    return prompt


def _modules(path: Path) -> list[tuple[str, str]]:
    """Kind and folder of every module, in order."""
    try:
        found = json.loads(path.read_text("utf-8"))
        modules = sorted(found, key=lambda module: module["idx"])
        kinds = [(module["type"], module["path"]) for module in modules]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError("this file should list modules with idx, path and type", where=str(path)) from None
    if not all(isinstance(part, str) for pair in kinds for part in pair):
        raise CheckpointError("the path and type of a module should be text", where=str(path))
    if strange := [kind for kind, _ in kinds if not kind.startswith("sentence_transformers.")]:
        raise UnsupportedError(f"a module is {strange[0]!r}", where=str(path), hint="no code of a folder is ever run")
    return [(kind.rpartition(".")[2], place) for kind, place in kinds]


def _pool(root: Path, place: str, prompted: bool) -> str:
    path = confined(root, f"{place}/config.json")
    data = read_json(path)
    if prompted and data.get("include_prompt", True) is not True:
        raise UnsupportedError("'include_prompt' leaves the default prompt out of the pooling", where=str(path))
    named = data.get("pooling_mode")
    modes = [named] if named is not None else [key for key, on in data.items() if key.startswith(_MODE) and on is True]
    pools = [_NAMES.get(str(mode)) or _POOLS.get(str(mode).removeprefix(_MODE)) for mode in modes]
    if len(pools) != 1 or pools[0] is None:
        raise UnsupportedError(
            f"the pooling is {', '.join(map(str, modes)) or 'none'}",
            where=str(path),
            hint=f"one of {', '.join(_MODE + name for name in _POOLS)} can be represented",
        )
    return pools[0]


def _longest(root: Path) -> int | None:
    if not (root / LENGTH).exists():
        return None
    data = read_json(root / LENGTH)
    if data.get("do_lower_case") is True:
        raise UnsupportedError("'do_lower_case' asks for lower case beside the tokenizer", where=str(root / LENGTH))
    length: Any = data.get("max_seq_length")
    if length is not None and (type(length) is not int or length < 1):
        raise CheckpointError(f"'max_seq_length' is {length!r}, expected a whole number", where=str(root / LENGTH))
    return length


def _write(path: Path, data: Any) -> None:
    write_atomic(path, json.dumps(data, indent=2) + "\n")


_MODE = "pooling_mode_"
