"""Checkpoints of a run: written whole or not at all, checked before they are trusted, thinned out.

`checkpoints/step-000500/` is a model folder like any other, with `optimizer.safetensors` and
`trainer.json` beside the weights. The latter names every file with its size and sha256.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from armillary.base.errors import ArmillaryError, CheckpointError
from armillary.base.files import explained, new_folder
from armillary.checkpoints.native import write_native
from armillary.nn.network import Network
from armillary.recipe import Recipe
from armillary.text.tokenizer import Tokenizer
from armillary.train import distributed
from armillary.train.distributed import World
from armillary.train.trainer import Trainer

OPTIMISER, TRAINER = "optimizer.safetensors", "trainer.json"
FULL = (errno.ENOSPC, errno.EDQUOT)
_NAME = re.compile(r"step-(\d{6,})\Z")


class Checkpoints:
    """The `checkpoints` folder of a run."""

    def __init__(self, folder: Path, world: World | None = None) -> None:
        self.folder, self.world = folder, world or World()

    def all(self) -> list[Path]:
        """The checkpoints by step, the latest last."""
        found = [path for path in self.folder.iterdir() if step_of(path)] if self.folder.is_dir() else []
        return sorted(found, key=lambda path: step_of(path) or 0)

    def save(self, trainer: Trainer, tokenizer: Tokenizer, recipe: Recipe, more: Mapping[str, Any]) -> Path:
        """Write the present state; `more` (plain data) is stored beside it. Every process calls it.

        Raises ArmillaryError when the disk is full or refuses; what was there before is untouched.
        """
        path = self.folder / f"step-{trainer.steps_done:06d}"
        if self.world.size == 1:
            tensors, info = trainer.state(weights=False)
            self._write(path, trainer.network, tokenizer, recipe, tensors, {**info, **more})
        else:
            self._write_together(path, trainer, tokenizer, recipe, more)
        return path

    def newest_good(self, notice: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        """The latest checkpoint that is whole, with its data; damaged ones are named and set aside.

        None when there is none at all. Raises CheckpointError when there are some and none is whole.
        """
        self._tidy()
        bad: list[CheckpointError] = []
        for path in reversed(self.all()):
            try:
                info = check(path)
            except CheckpointError as error:
                bad.append(error)
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
                notice(f"{error.where}: {error.what}; this checkpoint is set aside as {aside.name}")
                continue
            return path, info
        if bad:
            raise CheckpointError(
                f"no checkpoint is whole; the latest: {bad[0].what}",
                where=bad[0].where,
                hint="the run can only be trained again, into another folder",
            )
        return None

    def thin(self, keep: int | None, best: int | None) -> None:
        """Remove all but the latest `keep` and that of step `best`."""
        if keep is None:
            return
        for path in self.all()[:-keep]:
            if step_of(path) != best:
                gone = path.with_name(f".{path.name}.gone")
                os.replace(path, gone)
                shutil.rmtree(gone, ignore_errors=True)

    def _tidy(self) -> None:
        """Remove what a killed process left half written or half removed."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.startswith((".step-", ".gathered-")):
                    shutil.rmtree(path, ignore_errors=True)

    def _write(
        self,
        path: Path,
        network: Network,
        tokenizer: Tokenizer,
        recipe: Recipe,
        optimiser: Mapping[str, Tensor] | Path,
        info: Mapping[str, Any],
    ) -> None:
        with new_folder(path) as temporary, _os_errors():
            write_native(temporary, network, recipe=recipe, tokenizer=tokenizer)
            if isinstance(optimiser, Path):
                os.replace(optimiser, temporary / OPTIMISER)
            else:
                save_file({name: t.detach().cpu().contiguous() for name, t in optimiser.items()}, temporary / OPTIMISER)
            seal(temporary, info)

    def _write_together(
        self, path: Path, trainer: Trainer, tokenizer: Tokenizer, recipe: Recipe, more: Mapping[str, Any]
    ) -> None:
        """All processes write their parts aside; the first one then makes the folder from them."""

        def begin() -> str:
            with explained("writing", path):
                self.folder.mkdir(parents=True, exist_ok=True)
                return tempfile.mkdtemp(dir=self.folder, prefix=".gathered-")

        tensors, info = trainer.state()
        weights = {n.removeprefix("weights."): t for n, t in tensors.items() if n.startswith("weights.")}
        moments = {n: t for n, t in tensors.items() if not n.startswith("weights.")}
        files = {"weights.safetensors": weights, OPTIMISER: moments} if moments else {"weights.safetensors": weights}
        gathered = Path(self.world.lead(begin))
        try:
            with explained("writing", path):
                distributed.write_shards(gathered, files)

            def finish() -> None:
                with torch.device("meta"):
                    twin = Network(trainer.network.settings)
                twin.load_state_dict(load_file(gathered / "weights.safetensors"), strict=False, assign=True)
                twin.tie()
                lacking = [name for name, tensor in twin.state_dict().items() if tensor.is_meta]
                assert not lacking, f"never written: {lacking}"
                held: Mapping[str, Tensor] | Path = gathered / OPTIMISER if moments else {}
                self._write(path, twin, tokenizer, recipe, held, {**info, **more})

            self.world.lead(finish)
        finally:
            if self.world.first:
                shutil.rmtree(gathered, ignore_errors=True)


def step_of(path: Path) -> int | None:
    """The step of a checkpoint folder by its name; None for any other name."""
    match = _NAME.match(path.name)
    return int(match[1]) if match else None


def seal(folder: Path, info: Mapping[str, Any]) -> None:
    """Write trainer.json: `info`, and the size and sha256 of every file in the folder."""
    files = {
        str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != TRAINER
    }
    data = {**info, "files": files}
    (folder / TRAINER).write_text(json.dumps({**data, "sha256": _digest(data)}, indent=1) + "\n", encoding="utf-8")


def check(folder: Path) -> dict[str, Any]:
    """The data of a checkpoint whose every file is as it was written; CheckpointError names what is not."""
    path = folder / TRAINER
    try:
        data = json.loads(path.read_bytes())
        stored = data.pop("sha256")
        files = dict(data["files"])
    except FileNotFoundError:
        raise CheckpointError("trainer.json is missing", where=str(folder)) from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError("trainer.json is damaged", where=str(path)) from None
    if stored != _digest(data):
        raise CheckpointError("trainer.json is damaged: its checksum differs", where=str(path))
    for name, facts in files.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{name} is missing", where=str(folder))
        size = file.stat().st_size
        if size != facts["size"]:
            how = "truncated" if size < facts["size"] else "too long"
            raise CheckpointError(f"{name} is {how}: {size} bytes, not {facts['size']}", where=str(folder))
        if _sha256(file) != facts["sha256"]:
            raise CheckpointError(f"{name} is damaged: its checksum differs", where=str(folder))
    return data  # type: ignore[no-any-return]


def restore(trainer: Trainer, folder: Path, info: Mapping[str, Any]) -> None:
    """Put AdamW's moments and the counters back; the weights are in the network already."""
    if trainer.world.size == 1:
        tensors = load_file(folder / OPTIMISER)
    else:
        wanted = {
            f"{moment}.{name}": trainer.names[name]
            for name in info["updates"]
            if name in trainer.names
            for moment in ("exp_avg", "exp_avg_sq")
        }
        tensors = distributed.read_shards(folder, wanted) if wanted else {}
    trainer.load_state(tensors, info)


def disk_full(error: ArmillaryError) -> bool:
    """Whether there was no room, rather than something else wrong with the disk."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in FULL


@contextmanager
def _os_errors() -> Iterator[None]:
    """safetensors reports the system's refusals in words; make them what they are."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), str(error)) from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
