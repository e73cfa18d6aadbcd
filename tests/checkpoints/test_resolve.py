"""From a name to a folder: runs, model folders, the hub's cache; offline throughout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from armillary.base.errors import CheckpointError, InputError
from armillary.base.settings import parse
from armillary.checkpoints import checkpoints, load, resolve, save_native, save_open
from armillary.checkpoints.tensors import WEIGHTS
from armillary.nn.network import ModelSettings, Network, build

MODEL = {"width": 16, "depth": 1, "vocabulary": 23, "block": {"mixer": {"kind": "attention", "position": "rope"}}}


def _network(seed: int = 0) -> Network:
    block = {"mixer": {"kind": "attention", "position": "rope"}, "channel": "gated"}
    return build(parse(ModelSettings, MODEL | {"block": block}), seed=seed)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints whose numbers do not sort as text, and what a kill may leave behind."""
    run = tmp_path / "run"
    for step in (90, 999_999, 1_000_000):
        save_native(run / "checkpoints" / f"step-{step:06}", _network(step))
    (run / "recipe.yaml").write_text("seed: 0\n")
    (run / "checkpoints" / ".step-2000000.x1").mkdir()
    (run / "checkpoints" / "step-3000000").write_text("no folder")
    return run


def test_a_run_is_its_newest_checkpoint(run: Path) -> None:
    assert [path.name for path in checkpoints(run)] == ["step-000090", "step-999999", "step-1000000"]
    assert resolve(run) == run / "checkpoints" / "step-1000000" == resolve(str(run))
    loaded = load(run, "cpu").network
    assert torch.equal(loaded.embed.weight, _network(1_000_000).embed.weight)


@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_last_sound_one_offered(run: Path, damage: str) -> None:
    def break_it(step: str, how: str) -> None:
        file = run / "checkpoints" / step / WEIGHTS
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        if how == "missing":
            file.unlink()
        else:
            file.write_bytes(data[:-1] if how == "truncated" else data)

    break_it("step-1000000", damage)
    break_it("step-999999", "one bit")
    with pytest.raises(CheckpointError) as caught:
        load(run, "cpu")
    message = str(caught.value)
    assert "step-1000000" in message and WEIGHTS in message
    assert f"the newest sound checkpoint is {run / 'checkpoints' / 'step-000090'}" in message
    load(run / "checkpoints" / "step-000090", "cpu")
    break_it("step-000090", "truncated")
    with pytest.raises(CheckpointError, match="no other checkpoint of this run is sound"):
        load(run, "cpu")


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        load(tmp_path)


def test_folders_are_themselves_and_have_no_revisions(tmp_path: Path) -> None:
    save_open(tmp_path / "open", _network())
    assert resolve(tmp_path / "open") == tmp_path / "open"
    with pytest.raises(InputError, match="no revisions"):
        resolve(tmp_path / "open", "main")


@pytest.mark.parametrize("name", ["/no/such/folder", "a/b/c", "./models/x", Path("someone/model"), "spaced name"])
def test_a_path_that_is_not_there_never_asks_the_hub(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(name)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"armillary\[hub\]"):
        resolve("someone/model")


def test_the_hubs_cache_serves_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache layout that huggingface_hub documents: refs, snapshots, blobs."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    home, commit = tmp_path / "models--someone--model", "0" * 40
    save_open(home / "blobs", _network(4))
    (home / "snapshots" / commit).mkdir(parents=True)
    for file in (home / "blobs").iterdir():
        (home / "snapshots" / commit / file.name).symlink_to(Path("../../blobs") / file.name)
    (home / "refs").mkdir()
    for revision in ("main", "v1"):
        (home / "refs" / revision).write_text(commit)
    for revision in (None, "v1", commit):
        loaded = load("someone/model", "cpu", revision=revision).network
        assert torch.equal(loaded.embed.weight, _network(4).embed.weight)
    for name, revision in [("someone/model", "v2"), ("someone/else", None), ("nosuchrun", None)]:
        with pytest.raises(CheckpointError) as caught:
            resolve(name, revision)
        assert f"'{name}'" in str(caught.value) and "check the path" in str(caught.value)


def test_only_data_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own filter decides what the patterns let through."""
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve("someone/model", "v3") == tmp_path
    assert asked["name"] == "someone/model" and asked["revision"] == "v3"
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    wanted += ["tokenizer_config.json", "chat_template.jinja", "armillary.json", "recipe.yaml"]
    wanted += ["vocab.txt", "merges.txt", "spiece.model", "modules.json", "1_Pooling/config.json"]
    others = ["pytorch_model.bin", "modeling.py", "consolidated.pth", "onnx/model.safetensors", "README.md", "a.gguf"]
    others += [
        "onnx/config.json",
        "2_Dense/config.json",
        "1_Dense/model.safetensors",
        "1_Pooling/other.bin",
        "1/a.json",
    ]
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(wanted + others, **patterns)) == wanted


@pytest.mark.parametrize("error", ["RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError"])
def test_the_hubs_answers_are_explained(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    kind = getattr(hub.errors, error)

    def download(name: str, **options: Any) -> str:
        raise kind.__new__(kind, "from the hub")

    monkeypatch.setattr(hub, "snapshot_download", download)
    words = {
        "RepositoryNotFoundError": "no model of that name",
        "RevisionNotFoundError": "'v9'",
        "GatedRepoError": "permission",
    }
    with pytest.raises(CheckpointError) as caught:
        resolve("someone/model", "v9")
    assert words[error] in str(caught.value)
