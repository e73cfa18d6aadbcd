"""From what a person types to a model folder: a run, a model folder, or a name on the hub."""

from __future__ import annotations

import re
from pathlib import Path

from armillary.base.errors import CheckpointError, InputError
from armillary.checkpoints.native import damage
from armillary.checkpoints.open import detect
from armillary.text.older import FILES

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?\Z", re.ASCII)
_STEP = re.compile(r"step-(\d+)\Z")
# Weights, settings and tokenizer; never code, never pickles.
_FETCHED = ("*.safetensors", "*.json", "*.jinja", "recipe.yaml", *FILES)
# What is left out of folders inside: all but 1_Pooling, which says how an encoder of sentences pools, and weights
# there, too.
_FOLDERS = ("[!1]*/*", "1[!_]*/*", "1_[!P]*/*", "?/*", "*/*.safetensors")


def resolve(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The model folder: of a run, its newest checkpoint; of a hub name, its copy in the hub's cache.

    revision: a branch, tag or commit of a hub name. Raises CheckpointError when there is nothing, or
    when a run's newest checkpoint is damaged, naming the file and the newest sound one.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        if revision is not None:
            raise InputError(f"{path} is a folder here and has no revisions", hint="leave revision out")
        return newest(path) if detect(path) == "run" else path
    if isinstance(name_or_path, Path) or not _HUB_NAME.match(name_or_path):
        raise CheckpointError("there is no such folder", where=str(path))
    return _fetched(name_or_path, revision)


def checkpoints(run: str | Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    steps = [(int(match[1]), path) for path in Path(run, "checkpoints").glob("step-*") if (match := _match(path))]
    return [path for _, path in sorted(steps)]


def newest(run: str | Path) -> Path:
    """The newest checkpoint of a run. Raises CheckpointError when there is none or it is damaged."""
    found = checkpoints(run)
    if not found:
        raise CheckpointError("this run has no checkpoint yet", where=str(run))
    fault = damage(found[-1])
    if fault is not None:
        raise CheckpointError(fault, where=str(found[-1]), hint=offer(found[-1]))
    return found[-1]


def offer(checkpoint: Path) -> str:
    """A hint that names the newest sound checkpoint before this one."""
    for other in reversed(checkpoints(checkpoint.parent.parent)):
        if other != checkpoint and damage(other, contents=True) is None:
            return f"the newest sound checkpoint is {other}"
    return "no other checkpoint of this run is sound"


def _match(path: Path) -> re.Match[str] | None:
    return _STEP.match(path.name) if path.is_dir() else None


def _fetched(name: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise CheckpointError(
            f"there is no folder '{name}', and hub names need huggingface_hub",
            hint="check the path, or: pip install 'armillary[hub]'",
        ) from None
    at = f"'{name}'" if revision is None else f"'{name}' at revision '{revision}'"
    try:
        found = snapshot_download(
            name, revision=revision, allow_patterns=list(_FETCHED), ignore_patterns=list(_FOLDERS)
        )
        return Path(found)
    except errors.GatedRepoError:
        what, hint = f"the hub asks for permission to read {at}", f"ask for it on the hub's page of {name}, then log in"
    except errors.RevisionNotFoundError:
        what, hint = f"the hub has no {at}", "give a branch, tag or commit of it"
    except errors.RepositoryNotFoundError:
        what, hint = f"there is no folder '{name}', and no model of that name on the hub", "check the path or the name"
    except errors.HFValidationError:
        what, hint = f"there is no folder '{name}', and it cannot be a hub name", "check the path"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        what = f"there is no folder '{name}', and the hub cannot be reached for {at}"
        hint = f"check the path or the network ({str(error).splitlines()[0]})"
    raise CheckpointError(what, hint=hint)
