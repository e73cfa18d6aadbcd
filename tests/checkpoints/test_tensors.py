"""Folders of safetensors: exact round trips, and every fault named."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file

from armillary.base.errors import ArmillaryError, CheckpointError
from armillary.base.files import new_folder
from armillary.checkpoints import save, tensors
from armillary.checkpoints.tensors import INDEX, WEIGHTS, fit, read_json, read_tensors, stored, write_tensors
from armillary.nn.network import ModelSettings, build

KINDS = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]


def _some(count: int = 5) -> dict[str, torch.Tensor]:
    return {f"layer.{i}.weight": torch.randn(3 + i, 7) for i in range(count)}


def _write(folder: Path, given: dict[str, torch.Tensor], **options: int) -> list[str]:
    return write_tensors(folder, {name: stored(tensor) for name, tensor in given.items()}, **options)


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8), limit=st.integers(1, 400))
def test_any_sharding_gives_back_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    given = {f"t{i}": torch.randn(size).to(KINDS[i % len(KINDS)]) for i, size in enumerate(sizes)}
    given["scalar"] = torch.tensor(3.5)
    files = _write(folder, given, max_shard=limit)
    assert sorted(files) == sorted(path.name for path in folder.iterdir())
    found = read_tensors(folder)
    assert set(found) == set(given)
    for name, tensor in given.items():
        again = found[name].read()
        assert again.dtype == tensor.dtype and torch.equal(again, tensor)
    for file in files:
        if file != INDEX:  # the safetensors library is the oracle for what a file holds
            held = load_file(folder / file)
            assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= limit


def test_parts_of_one_storage_are_written_apart(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    _write(tmp_path, {"a": whole[:3], "b": whole[3:].t()})
    found = read_tensors(tmp_path)
    assert torch.equal(found["a"].read(), whole[:3]) and torch.equal(found["b"].read(), whole[3:].t())


def test_read_tensors_own_their_memory(tmp_path: Path) -> None:
    """So that a file changed or cut off later cannot change or end the process."""
    _write(tmp_path, {"a": torch.ones(4)})
    tensor = read_tensors(tmp_path)["a"].read()
    (tmp_path / WEIGHTS).write_bytes(b"")
    assert torch.equal(tensor, torch.ones(4))


def _index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def _first(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


def _twice(folder: Path) -> None:
    held = load_file(_first(folder))
    last = sorted(folder.glob("model-*.safetensors"))[-1]
    tensors.save_file({**load_file(last), **held}, last)


def _repeat_in_header(folder: Path) -> None:
    entry = b'"layer.0.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    header = b"{" + entry + b"," + entry + b"}"
    _first(folder).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: _first(f).write_bytes(_first(f).read_bytes()[:-3]), "model-00001-of-00005.safetensors"),
    "longer": (lambda f: _first(f).write_bytes(_first(f).read_bytes() + b"x"), "model-00001-of-00005.safetensors"),
    "cut header": (lambda f: _first(f).write_bytes(_first(f).read_bytes()[:20]), "model-00001-of-00005.safetensors"),
    "empty file": (lambda f: _first(f).write_bytes(b""), "model-00001-of-00005.safetensors"),
    "noise": (lambda f: _first(f).write_bytes(b"\xff" * 99), "model-00001-of-00005.safetensors"),
    "missing shard": (lambda f: _first(f).unlink(), "'model-00001-of-00005.safetensors' is missing"),
    "absent tensor": (lambda f: _index(f, lambda m: m.update(ghost=_first(f).name)), "'ghost' is not in"),
    "wrong shard": (
        lambda f: _index(f, lambda m: m.update({"layer.0.weight": "model-00002-of-00005.safetensors"})),
        "'layer.0.weight' is not in model-00002-of-00005.safetensors",
    ),
    "exchanged": (
        lambda f: _index(
            f, lambda m: m.update({"layer.0.weight": m["layer.1.weight"], "layer.1.weight": _first(f).name})
        ),
        "'layer.0.weight' is not in model-00002-of-00005.safetensors",
    ),
    "subfolder": (
        lambda f: _index(f, lambda m: m.update(x="sub/x.safetensors")),
        "'sub/x.safetensors' is not the name",
    ),
    "tensor twice": (_twice, "'layer.0.weight' is both in"),
    "tensor twice in a header": (_repeat_in_header, "'layer.0.weight' is there twice"),
    "outside above": (lambda f: _index(f, lambda m: m.update(x="../outside.safetensors")), "'../outside.safetensors'"),
    "outside root": (lambda f: _index(f, lambda m: m.update(x="/etc/passwd")), "'/etc/passwd'"),
    "parent": (lambda f: _index(f, lambda m: m.update(x="..")), "'..'"),
    "not a name": (lambda f: _index(f, lambda m: m.update(x=3)), "3 is not the name of a file"),  # type: ignore[call-overload]
    "no map": (lambda f: (f / INDEX).write_text("{}"), "weight_map"),
    "no object": (lambda f: (f / INDEX).write_text("[1]"), INDEX),
    "no JSON": (lambda f: (f / INDEX).write_text('{"weight_map": {'), INDEX),
    "deep JSON": (lambda f: (f / INDEX).write_text("[" * 100_000), INDEX),
    "key twice": (lambda f: (f / INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}'), "'a' is there twice"),
    "no index": (lambda f: (f / INDEX).unlink(), "no model.safetensors.index.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_named(tmp_path: Path, fault: str) -> None:
    _write(tmp_path, _some(), max_shard=1)
    (tmp_path.parent / "outside.safetensors").write_bytes(_first(tmp_path).read_bytes())
    assert len(read_tensors(tmp_path)) == 5
    break_it, named = FAULTS[fault]
    break_it(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        read_tensors(tmp_path)
    assert named in str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "weights.pkl"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="refused") as caught:
        read_tensors(tmp_path)
    assert name in str(caught.value) and "safetensors" in str(caught.value)


def test_a_file_that_changes_after_it_was_listed(tmp_path: Path) -> None:
    _write(tmp_path, _some())
    found = read_tensors(tmp_path)
    held = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(held[:-4])
    with pytest.raises(CheckpointError, match=r"'layer\.4\.weight' cannot be read: the file ends early"):
        found["layer.4.weight"].read()
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"'layer\.0\.weight' cannot be read"):
        found["layer.0.weight"].read()


def test_links_may_not_lead_out(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    _write(tmp_path, _some())
    (inner / WEIGHTS).symlink_to(tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="leads out"):
        read_tensors(inner)


def test_the_hub_caches_links_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "rev"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    _write(blobs, {"a": torch.ones(2)})
    (snapshot / WEIGHTS).symlink_to(Path("../../blobs") / WEIGHTS)
    assert list(read_tensors(snapshot)) == ["a"]
    (snapshot / WEIGHTS).unlink()
    (tmp_path / WEIGHTS).write_bytes((blobs / WEIGHTS).read_bytes())
    (snapshot / WEIGHTS).symlink_to(tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="leads out"):
        read_tensors(snapshot)


def test_fit_names_every_tensor() -> None:
    held = {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.int64), "c": torch.ones(5)}
    wanted = {"a": torch.ones(3, 2), "b": torch.ones(4), "d": torch.ones(6)}
    found = fit({name: stored(tensor) for name, tensor in held.items()}, wanted, {"a": "n_embd"})
    assert [line.partition(":")[0] for line in found] == [
        "wrong shape",
        "wrong type",
        "missing",
        "not part of the model",
    ]
    assert "'a' is [2, 3], but the settings ask for [3, 2] (n_embd)" in found[0]
    assert "'b'" in found[1] and "'d' [6]" in found[2] and "'c' [5]" in found[3]


@pytest.mark.parametrize("kind", ["F8_E4M3", "U8"])
def test_quantised_tensors_are_known_but_no_weights(tmp_path: Path, kind: str) -> None:
    header = json.dumps({"a": {"dtype": kind, "shape": [8], "data_offsets": [0, 8]}}).encode()
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    (line,) = fit(read_tensors(tmp_path), {"a": torch.ones(8)})
    assert "wrong type: 'a'" in line


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own message for a full disk, as seen on one, becomes ours."""
    place = tmp_path / "model"
    place.mkdir()
    (place / "old").write_text("kept")

    def full(*arguments: object, **options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(ArmillaryError, match="the disk is full"), new_folder(place) as folder:
        _write(folder, _some())
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and (place / "old").read_text() == "kept"
    assert errno.ENOSPC == 28


def test_json_too_large_to_be_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_LONGEST_JSON", 10)
    (tmp_path / "config.json").write_text('{"a": 1234567890}')
    with pytest.raises(CheckpointError, match="too large"):
        read_json(tmp_path / "config.json")


CHILD = """
import sys, torch
from armillary.checkpoints import load
def resident(word):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(word))
load(sys.argv[1], "cpu", sys.argv[2])  # what is imported on the way counts before
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before = resident("VmRSS")
network = load(sys.argv[3], "cpu", sys.argv[2]).network
print(resident("VmHWM") - before, sum(tensor.nbytes for tensor in network.parameters()))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory cannot be set back")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["open", "native"])
def test_loading_holds_the_weights_once(tmp_path: Path, layout: str, dtype: str) -> None:
    """50 MB of weights in float32: no second copy of them is held, nor all of them in another type. Beside them
    are the tensor being read and what the allocator keeps of earlier ones: a few of 3 MB."""
    for name, width in (("tiny", 16), ("model", 512)):
        settings = ModelSettings(width=width, depth=4, vocabulary=512, context=64)
        save(tmp_path / name, build(settings), layout=layout)
    words = [sys.executable, "-c", CHILD, tmp_path / "tiny", dtype, tmp_path / "model"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    peak, weights = map(int, done.stdout.split())
    assert weights > 20e6
    assert weights < peak < weights + 20e6
