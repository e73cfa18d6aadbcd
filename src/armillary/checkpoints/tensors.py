"""Folders of safetensors: read lazily and checked, written whole; one file or shards with an index.

Only safetensors are ever read: the other formats in use are pickles, which can run code. Every
fault of a folder is one CheckpointError that names the file or tensor.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from armillary.base.errors import CheckpointError, InputError
from armillary.base.files import confined, write_atomic
from armillary.checkpoints.mapped import Mapped

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD = 5 * 10**9  # bytes
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors\Z")

_AGAIN = "copy or download it again, or use an earlier checkpoint"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_LONGEST_JSON = 256 * 2**20  # bytes; the largest indices and tokenizers take tens of megabytes
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Stored:
    """A tensor that is known but not yet in memory.

    dtype: None when it is one that no weight can have (kind names it); read: gives the tensor, in
    memory of its own.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    read: Callable[[], Tensor]
    kind: str = ""

    @property
    def nbytes(self) -> int:
        assert self.dtype is not None
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def stored(tensor: Tensor) -> Stored:
    """A tensor in memory, as one to be written."""
    return Stored(tuple(tensor.shape), tensor.dtype, lambda: owned(tensor.detach().cpu()))


def owned(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and alone in its storage."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises CheckpointError when the file is missing, damaged, or says a key twice."""
    try:
        if path.stat().st_size > _LONGEST_JSON:
            raise CheckpointError("this file is too large to be what its name says", where=str(path))
        data = json.loads(path.read_bytes(), object_pairs_hook=_once)
    except FileNotFoundError:
        raise CheckpointError("this file is missing", where=str(path)) from None
    except (ValueError, RecursionError) as error:  # ValueError: JSON, encoding and _once
        raise CheckpointError(f"this file is not sound JSON: {error}", where=str(path)) from None
    if not isinstance(data, dict):
        raise CheckpointError("this file should hold a JSON object", where=str(path))
    return data


def inside(folder: Path, name: Any) -> Path:
    """The file `name` of the folder, refused when it would lie elsewhere.

    The hub's cache keeps a snapshot's files as links into its `blobs` folder; those are followed.
    """
    where = str(folder)
    if not isinstance(name, str) or not name or Path(name).name != name or "\\" in name:
        raise CheckpointError(f"{name!r} is not the name of a file in this folder", where=where)
    path = folder / name
    if path.is_symlink() and folder.parent.name == "snapshots":
        root, relative = folder.parent.parent, f"snapshots/{folder.name}/{name}"
    else:
        root, relative = folder, name
    try:
        confined(root, relative)
    except InputError:
        raise CheckpointError(f"'{name}' is a link that leads out of this folder", where=where) from None
    return path


def read_tensors(folder: Path, *, mapped: bool = False) -> dict[str, Stored]:
    """Every tensor of a folder by name, none of them in memory yet; mapped: as in `read_file`.

    Raises CheckpointError for a folder without safetensors (naming pickles that are refused), a
    truncated or damaged file, an index that names a missing or outside file, a tensor that its
    shard lacks, and a tensor that is there twice.
    """
    if (folder / WEIGHTS).exists():
        return read_file(inside(folder, WEIGHTS), mapped=mapped)
    if not (folder / INDEX).exists():
        raise CheckpointError(*_absent(folder), where=str(folder), hint=_hint(folder))
    index = read_json(inside(folder, INDEX)).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError("the index has no weight_map", where=str(folder / INDEX))
    shards: dict[str, dict[str, Stored]] = {}
    for name, file in index.items():
        if not isinstance(file, str) or file not in shards:
            path = inside(folder, file)
            if not path.exists():
                raise CheckpointError(
                    f"'{file}' is missing, where the index puts '{name}'",
                    where=str(folder),
                    hint="copy or download the missing file",
                )
            shards[file] = read_file(path, mapped=mapped)
    found: dict[str, Stored] = {}
    homes: dict[str, str] = {}
    for file, tensors in shards.items():
        for name, tensor in tensors.items():
            if name in homes:
                raise CheckpointError(f"tensor '{name}' is both in {homes[name]} and in {file}", where=str(folder))
            homes[name] = file
            found[name] = tensor
    for name, file in index.items():
        if homes.get(name) != file:
            raise CheckpointError(f"tensor '{name}' is not in {file}, where the index puts it", where=str(folder))
    return found


def write_tensors(folder: Path, tensors: Mapping[str, Stored], *, max_shard: int = MAX_SHARD) -> list[str]:
    """Write tensors into a folder as safetensors and return the names of the files.

    max_shard: bytes of tensors in one file; above it shards and an index are written. At most one
    shard's worth of tensors is formed at a time.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    files = [WEIGHTS]
    if len(shards) > 1:
        files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        try:
            save_file({name: tensors[name].read() for name in names}, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise _unwritten(error, folder / file) from error
        (folder / file).chmod(0o644)
    if len(shards) == 1:
        return files
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
    }
    write_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return [*files, INDEX]


def fit(found: Mapping[str, Stored], wanted: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> list[str]:
    """What is wrong with the tensors of a folder, a line for each: missing, extra, wrong shape or kind.

    wanted: shapes and kinds by name; notes: what decides a tensor's shape, for the message.
    """
    problems = []
    for name, like in wanted.items():
        note = f" ({notes[name]})" if notes and notes.get(name) else ""
        tensor = found.get(name)
        if tensor is None:
            problems.append(f"missing: '{name}' {list(like.shape)}{note}")
        elif tensor.shape != tuple(like.shape):
            problems.append(
                f"wrong shape: '{name}' is {list(tensor.shape)}, but the settings ask for {list(like.shape)}{note}"
            )
        elif tensor.dtype not in FLOATS if like.is_floating_point() else tensor.dtype != like.dtype:
            kinds = "F32, BF16, F16 or F64" if like.is_floating_point() else str(like.dtype).removeprefix("torch.")
            problems.append(f"wrong type: '{name}' holds {tensor.kind}, where {kinds} is needed")
    problems += [f"not part of the model: '{name}' {list(found[name].shape)}" for name in found if name not in wanted]
    return problems


def raise_for(problems: Iterable[str], folder: Path, hint: str | None = None) -> None:
    """One CheckpointError with every problem, or nothing."""
    lines = list(problems)
    if len(lines) == 1:
        raise CheckpointError(f"a tensor does not fit the model. {lines[0]}", where=str(folder), hint=hint)
    if lines:
        listed = "".join(f"\n  {line}" for line in lines)
        raise CheckpointError(f"{len(lines)} tensors do not fit the model:{listed}", where=str(folder), hint=hint)


def read_file(path: Path, *, mapped: bool = False) -> dict[str, Stored]:
    """Every tensor of one safetensors file by name, none of them in memory yet.

    The library checks the file; tensors are then read as bytes, each into the memory where it stays,
    for what is read from a mapped file counts as this process's memory besides. mapped: they stay the file's bytes
    instead, in memory where they are looked at (`checkpoints.mapped`).
    """
    try:
        with safe_open(str(path), framework="pt"):
            start, header = _header(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"this file is truncated or damaged ({error})", where=str(path), hint=_AGAIN) from None
    found = {}
    file = Mapped(path) if mapped and header else None
    for name, part in header.items():
        if name != "__metadata__":
            shape, kind, (begin, _) = tuple(part["shape"]), part["dtype"], part["data_offsets"]
            dtype = _DTYPES.get(kind)
            found[name] = Stored(
                shape, dtype, partial(_read, path, name, start + begin, shape, dtype, kind, file), kind
            )
    return found


def _read(
    path: Path,
    name: str,
    begin: int,
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
    kind: str,
    mapped: Mapped | None = None,
) -> Tensor:
    """A tensor from its place in a file, in memory of its own unless it can stay in the mapped file."""
    if dtype is None:
        raise CheckpointError(f"tensor '{name}' holds {kind}, which no weight can", where=str(path))
    if mapped is not None and (found := mapped.tensor(begin, shape, dtype)) is not None:
        return found
    tensor = torch.empty(shape, dtype=dtype)
    room: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(begin)
            while room and (count := file.readinto(room)):  # one call gives 2 GiB at the most
                room = room[count:]
    except OSError as error:
        raise CheckpointError(f"tensor '{name}' cannot be read ({error})", where=str(path), hint=_AGAIN) from None
    if room:
        raise CheckpointError(f"tensor '{name}' cannot be read: the file ends early", where=str(path), hint=_AGAIN)
    return tensor


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors begin, and what the header says of each. The library takes the last of two with one
    name; here that is a fault."""
    with path.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        text = handle.read(length)
    try:
        header: dict[str, Any] = json.loads(text, object_pairs_hook=_once)
    except ValueError as error:
        raise CheckpointError(f"the header of this file is not sound: {error}", where=str(path)) from None
    return 8 + length, header


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, value in pairs:
        if key in data:
            raise ValueError(f"'{key}' is there twice")
        data[key] = value
    return data


def _absent(folder: Path) -> tuple[str]:
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    if shards:
        return (f"there are shards ({shards[0]}, …) but no {INDEX} that says what they hold",)
    pickles = _pickled(folder)
    if pickles:
        return (f"the weights here are pickles ({', '.join(pickles)}), which can run code when read: refused",)
    return (f"there are no weights here: neither {WEIGHTS} nor {INDEX}",)


def _hint(folder: Path) -> str | None:
    if _pickled(folder):
        return "get the safetensors version, or convert it where it is trusted: model.save_pretrained(folder)"
    return None


def _pickled(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES) if folder.is_dir() else []


def _unwritten(error: SafetensorError, path: Path) -> Exception:
    """The library reports a full disk as text; raise what the operating system said."""
    code = re.search(r"os error (\d+)", str(error))
    if code:
        return OSError(int(code[1]), str(error), str(path))
    return CheckpointError(f"the weights cannot be written ({error})", where=str(path))
