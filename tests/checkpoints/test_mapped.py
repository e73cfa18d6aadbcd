"""Weights that stay in their files: the same numbers, no memory of their own, and nothing lost that was changed."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch

from armillary.checkpoints import load, mapped, save
from armillary.checkpoints.mapped import Mapped, forget
from armillary.engine import replay
from armillary.engine.slots import Slots
from armillary.nn.network import ModelSettings, Network, build


def network() -> Network:
    settings = ModelSettings(
        width=256,
        depth=1,
        vocabulary=500,
        context=64,
        block={"mixer": {"kind": "attention", "heads": 2}, "channel": {"kind": "gated", "hidden": 1024}},
    )
    return build(settings, seed=1)


def resident(tensor: torch.Tensor) -> int:
    """Bytes of it that are in this process's memory, whole pages, as the system tells."""
    begin, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    found, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and ":" not in head:
            low, high = (int(end, 16) for end in head.split("-"))
            here = low < stop and begin < high
        elif here and head == "Rss:":
            found += 1024 * int(line.split()[1])
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "model", network())
    return tmp_path / "model"


def test_the_same_numbers(folder: Path) -> None:
    own, lying = (load(folder, device="cpu", mapped=how).network for how in (False, True))
    for name, weight in own.state_dict().items():
        assert torch.equal(weight, lying.state_dict()[name]), name
    cast = load(folder, device="cpu", dtype="bf16", mapped=True).network
    assert all(torch.equal(weight.bfloat16(), cast.state_dict()[name]) for name, weight in own.state_dict().items())


@torch.no_grad()
def test_what_is_written_stays_in_memory(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    made = load(folder, device="cpu", mapped=True).network
    weight = made.get_parameter("blocks.0.channel.inner.up.weight")
    weight.add_(1)
    expected = weight.clone()
    for parameter in made.parameters():
        forget(parameter)
    assert torch.equal(weight, expected)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.skipif(sys.platform != "linux", reason="the system's account of memory is read")
@torch.no_grad()
def test_an_engine_leaves_them_in_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "tiles", lambda: True)
    made = load(folder, device="cpu", mapped=True).network
    up = made.get_parameter("blocks.0.channel.inner.up.weight")
    whole = sum(parameter.nbytes for parameter in made.parameters())
    assert torch.isfinite(up).all() and resident(up) >= up.nbytes
    taped = Slots(made, 1, 64)
    if taped.replay is None:
        pytest.skip("there is no C compiler here")
    assert resident(up) < whole / 4
    own = Slots(load(folder, device="cpu").network, 1, 64)
    assert torch.equal(taped.extend([0], [[1, 2, 3]]), own.extend([0], [[1, 2, 3]]))
    plain = Slots(made, 1, 64, weights="plain")  # finds them where they were
    assert torch.equal(plain.extend([0], [[1, 2, 3]]), plain_scores(folder))


def plain_scores(folder: Path) -> torch.Tensor:
    return Slots(load(folder, device="cpu").network, 1, 64, weights="plain").extend([0], [[1, 2, 3]])


def test_a_file_is_held_as_long_as_a_tensor_is(tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    path.write_bytes(torch.arange(10, dtype=torch.float32).numpy().tobytes())
    tensor = Mapped(path).tensor(4, (3, 2), torch.float32)
    gc.collect()
    assert tensor is not None and tensor.flatten().tolist() == [1, 2, 3, 4, 5, 6]
    assert Mapped(path).tensor(3, (1,), torch.float32) is None  # does not lie as numbers of this size must
    count = len(mapped._maps)
    del tensor
    gc.collect()
    assert len(mapped._maps) < count
