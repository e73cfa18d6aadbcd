"""The native layout: any network comes back bit for bit, and every fault of a folder is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from armillary.base.errors import ArmillaryError, CheckpointError, InputError
from armillary.base.settings import parse
from armillary.checkpoints import load, load_native, save, save_native, write_native
from armillary.checkpoints.assemble import pick_device, pick_dtype
from armillary.checkpoints.native import MANIFEST, damage
from armillary.checkpoints.tensors import WEIGHTS
from armillary.nn.network import ModelSettings, Network, build
from armillary.recipe import Recipe
from armillary.text import TokenizerSettings, train_tokenizer

SMALL: dict[str, Any] = {"width": 24, "depth": 3, "vocabulary": 41, "context": 32}
ATTENTION = {"kind": "attention", "heads": 4, "kv_heads": 2, "position": "rope"}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"block": {"mixer": ATTENTION, "channel": "gated"}},
    "untied": {"block": {"mixer": ATTENTION, "channel": "ffn"}, "head": {"kind": "language_model", "tied": False}},
    "hybrid": {
        "blocks": {
            "state": {"mixer": "retention", "channel": "gated"},
            "look": {"mixer": {**ATTENTION, "sinks": True, "norm": "rmsnorm"}, "channel": "gated", "norm": "layernorm"},
        },
        "pattern": ["state", "look"],
    },
    "shared": {"block": {"mixer": ATTENTION, "channel": "gated"}, "share": {"all": ["blocks.*.channel"]}},
    "encoder": {
        "form": "encoder",
        "position": "learned",
        "block": {"mixer": "attention", "channel": "ffn"},
        "head": {"kind": "classification", "classes": 3},
    },
    "encoder_decoder": {
        "form": "encoder_decoder",
        "encoder": {"depth": 2, "block": {"mixer": {"kind": "attention", "position": "t5"}, "channel": "ffn"}},
        "block": {"mixer": {"kind": "attention", "position": "alibi"}, "cross": "attention", "channel": "ffn"},
    },
}


def _network(name: str = "tied", **changes: Any) -> Network:
    return build(parse(ModelSettings, SMALL | MODELS[name] | changes), seed=3)


def _run(network: Network) -> torch.Tensor:
    ids = torch.arange(20).reshape(2, 10)
    source = ids[:, :4] if network.settings.form == "encoder_decoder" else None
    with torch.no_grad():
        out: torch.Tensor = network(ids, source=source)
    return out


@pytest.mark.parametrize("name", MODELS)
def test_every_form_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    network = _network(name)
    save_native(tmp_path / "model", network)
    loaded = load_native(tmp_path / "model", "cpu")
    assert loaded.network.settings == network.settings
    again = loaded.network.state_dict()
    assert list(again) == list(network.state_dict())
    assert all(torch.equal(again[key], tensor) for key, tensor in network.state_dict().items())
    assert torch.equal(_run(loaded.network), _run(network))
    loaded.network.check_ties()
    assert not set(network.tied_names()) & set(load_file(tmp_path / "model" / WEIGHTS))
    if name != "encoder_decoder":
        assert loaded.recipe is not None and loaded.recipe.model == network.settings


@pytest.mark.parametrize("dtype", ["bf16", torch.float64])
def test_a_dtype_that_is_asked_for(tmp_path: Path, dtype: Any) -> None:
    network = _network()
    save_native(tmp_path / "model", network)
    loaded = load_native(tmp_path / "model", "cpu", dtype).network
    kind = pick_dtype(dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {kind} and loaded.dtype == kind
    assert torch.equal(loaded.embed.weight, network.embed.weight.to(kind))


def test_unknown_devices_and_dtypes() -> None:
    for name in ("gpu", "cuda:99", "meta"):
        with pytest.raises(InputError, match=name):
            pick_device(name)
    with pytest.raises(InputError, match="int3"):
        pick_dtype("int3")
    with pytest.raises(InputError, match="int64"):
        pick_dtype(torch.int64)


def test_recipe_and_tokenizer_come_back(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TokenizerSettings(kind="byte"), [])
    recipe = Recipe.load({"name": "mine", "tokenizer": {"kind": "byte"}, "model": {"width": 16, "depth": 1}})
    network = build(recipe.model.derive(vocabulary=tokenizer.size))
    save(tmp_path / "model", network, tokenizer, recipe)
    loaded = load(tmp_path / "model")
    assert loaded.recipe == recipe and loaded.recipe.model.vocabulary is None
    assert loaded.network.settings.vocabulary == tokenizer.size
    assert loaded.tokenizer is not None and loaded.tokenizer.fingerprint == tokenizer.fingerprint
    manifest = json.loads((tmp_path / "model" / MANIFEST).read_text())
    assert manifest["format"] == 1 and manifest["taps"] == 1 and manifest["dtype"] == "float32"
    assert set(manifest["files"]) == {path.name for path in (tmp_path / "model").iterdir()} - {MANIFEST}


def test_a_recipe_of_another_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="another network"):
        save_native(tmp_path / "model", _network(), recipe=Recipe())
    assert not any(tmp_path.iterdir())


def test_files_written_beforehand_are_signed_too(tmp_path: Path) -> None:
    (tmp_path / "trainer.json").write_text("{}")
    write_native(tmp_path, _network())
    assert damage(tmp_path, contents=True) is None
    (tmp_path / "trainer.json").write_text("[]")
    assert "trainer.json" in str(damage(tmp_path, contents=True))


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the weights and sign them anew, as a tool that edits folders would."""
    held = load_file(folder / WEIGHTS)
    change(held)
    save_file(held, folder / WEIGHTS)
    _manifest(folder, lambda data: data["files"].pop(WEIGHTS))


def _manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


Q, GATE = "blocks.0.mixer.inner.q.weight", "blocks.1.channel.inner.gate.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing": (lambda f: _rewrite(f, lambda t: t.pop(Q)), [f"missing: '{Q}' [24, 24]"]),
    "extra": (lambda f: _rewrite(f, lambda t: t.update(ghost=torch.ones(2))), ["not part of the model: 'ghost' [2]"]),
    "transposed": (
        lambda f: _rewrite(f, lambda t: t.update({GATE: t[GATE].t().contiguous()})),
        [f"'{GATE}' is [24, 64], but the settings ask for [64, 24]"],
    ),
    "integers": (lambda f: _rewrite(f, lambda t: t.update({Q: t[Q].long()})), [f"wrong type: '{Q}' holds I64"]),
    "several": (
        lambda f: _rewrite(f, lambda t: (t.pop(Q), t.pop(GATE), t.update(ghost=torch.ones(2)))),
        [Q, GATE, "ghost", "3 tensors"],
    ),
    "one bit": (lambda f: _flip(f / WEIGHTS), [WEIGHTS, "sha256"]),
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), [WEIGHTS, "bytes"]),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), [f"'{WEIGHTS}' is missing"]),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), [MANIFEST]),
    "half a manifest": (lambda f: (f / MANIFEST).write_text('{"format": 1, "mo'), [MANIFEST]),
    "newer format": (lambda f: _manifest(f, lambda d: d.update(format=99)), ["format 99", "newer"]),
    "no format": (lambda f: _manifest(f, lambda d: d.pop("format")), ["format", "None"]),
    "newer schema": (lambda f: _manifest(f, lambda d: d.update(schema_version=99)), ["schema version 99", MANIFEST]),
    "file outside": (lambda f: _manifest(f, lambda d: d["files"].update({"../x": d["files"][WEIGHTS]})), ["'../x'"]),
    "no sha256": (lambda f: _manifest(f, lambda d: d["files"].update({WEIGHTS: {}})), ["sha256"]),
    "unknown key": (lambda f: _manifest(f, lambda d: d["model"].update(widht=3)), ["widht", "width", MANIFEST]),
    "no model": (lambda f: _manifest(f, lambda d: d.pop("model")), ["'model'"]),
    "no vocabulary": (lambda f: _manifest(f, lambda d: d["model"].pop("vocabulary")), ["vocabulary"]),
    "another width": (lambda f: _manifest(f, lambda d: d["model"].update(width=32)), [Q, GATE, "embed.weight"]),
    "recipe changed": (lambda f: (f / "recipe.yaml").write_text("seed: 1\n"), ["recipe.yaml"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_message(tmp_path: Path, fault: str) -> None:
    save_native(tmp_path / "model", _network())
    break_it, named = FAULTS[fault]
    break_it(tmp_path / "model")
    with pytest.raises(ArmillaryError) as caught:
        load_native(tmp_path / "model", "cpu")
    assert [part for part in named if part not in str(caught.value)] == []


def test_a_tokenizer_too_large_for_the_model(tmp_path: Path) -> None:
    save_native(tmp_path / "model", _network(), tokenizer=train_tokenizer(TokenizerSettings(kind="byte"), []))
    with pytest.raises(CheckpointError, match=r"tokenizer has 262 entries.*vocabulary is 41"):
        load_native(tmp_path / "model", "cpu")


def test_a_save_that_fails_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = _network(), _network(depth=1)
    save(tmp_path / "model", first)

    def fail(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Recipe, "save", fail)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path / "model", second)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert load(tmp_path / "model", "cpu").network.settings == first.settings
    save(tmp_path / "model", second)
    assert load(tmp_path / "model", "cpu").network.settings == second.settings


@pytest.mark.parametrize("layout", ["native", "open"])
def test_saving_never_removes_what_is_not_a_model(tmp_path: Path, layout: str) -> None:
    for name in ("notes.txt", "config.json", "trainer.json"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text("{}")
        with pytest.raises(InputError, match=name):
            save(folder, _network(), layout=layout)
        assert (folder / name).read_text() == "{}"
    with pytest.raises(InputError, match="this is a file"):
        save(tmp_path / "notes-txt" / "notes.txt", _network(), layout=layout)
    with pytest.raises(InputError, match="'gguf'"):
        save(tmp_path / "new", _network(), layout="gguf")


@pytest.mark.parametrize("layout", ["native", "open"])
def test_an_empty_one_is_checked_but_for_the_contents_of_its_weights(tmp_path: Path, layout: str) -> None:
    tokenizer = train_tokenizer(TokenizerSettings(kind="byte"), [])
    network = _network(vocabulary=tokenizer.size)
    folder = tmp_path / "model"
    save(folder, network, tokenizer, layout=layout)
    weights = folder / WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-64] + bytes(64))  # not read
    found = load(folder, empty=True)
    assert found.tokenizer is not None and found.tokenizer.fingerprint == tokenizer.fingerprint
    assert all(one.is_meta for one in found.network.parameters())
    assert {name: tuple(one.shape) for name, one in found.network.named_parameters()} == {
        name: tuple(one.shape) for name, one in network.named_parameters()
    }
    weights.write_bytes(whole[:-64])
    with pytest.raises(CheckpointError, match="safetensors"):
        load(folder, empty=True)
