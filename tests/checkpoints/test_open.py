"""Damaged and contradictory open folders: one message that names the tensor, key or file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from armillary.base.errors import ArmillaryError, CheckpointError, UnsupportedError
from armillary.base.settings import parse
from armillary.checkpoints import detect, load_open, save, save_native, save_open
from armillary.checkpoints.tensors import INDEX, WEIGHTS
from armillary.nn.network import ModelSettings, Network, build

LLAMA: dict[str, Any] = {
    "width": 24,
    "depth": 2,
    "vocabulary": 41,
    "context": 64,
    "block": {
        "mixer": {"kind": "attention", "heads": 4, "kv_heads": 2, "position": {"kind": "rope"}},
        "channel": {"kind": "gated", "hidden": 40},
    },
}
NORM = {"kind": "layernorm"}
GPT: dict[str, Any] = LLAMA | {
    "position": {"kind": "learned"},
    "norm": NORM,
    "block": {
        "mixer": {"kind": "attention", "heads": 4, "bias": True},
        "channel": {"kind": "ffn", "activation": "gelu_tanh", "bias": True},
        "norm": NORM,
    },
}


def _network(data: dict[str, Any] = LLAMA, **changes: Any) -> Network:
    return build(parse(ModelSettings, data | changes), seed=2)


def _change(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    held = load_file(folder / WEIGHTS)
    change(held)
    save_file(held, folder / WEIGHTS)


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


K, UP = "model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing": (
        lambda f: _change(f, lambda t: t.pop(K)),
        [f"missing: '{K}' [12, 24]", "num_key_value_heads × head_dim, hidden_size"],
    ),
    "extra": (
        lambda f: _change(f, lambda t: t.update({"model.layers.0.mlp.ghost": torch.ones(2)})),
        ["not part of the model: 'model.layers.0.mlp.ghost' [2]"],
    ),
    "unasked bias": (
        lambda f: _change(f, lambda t: t.update({K.replace("weight", "bias"): torch.ones(12)})),
        [K.replace("weight", "bias")],
    ),
    "transposed": (
        lambda f: _change(f, lambda t: t.update({UP: t[UP].t().contiguous()})),
        [f"'{UP}' is [24, 40], but the settings ask for [40, 24]", "intermediate_size, hidden_size"],
    ),
    "wrong type": (lambda f: _change(f, lambda t: t.update({K: t[K].int()})), [f"wrong type: '{K}' holds I32"]),
    "several": (
        lambda f: _change(f, lambda t: (t.pop(K), t.update({UP: torch.ones(3), "ghost": torch.ones(2)}))),
        ["3 tensors", K, UP, "ghost"],
    ),
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]), [WEIGHTS, "truncated"]),
    "index outside": (
        lambda f: (
            (f / WEIGHTS).rename(f.parent / "outside"),
            (f / INDEX).write_text('{"weight_map": {"a": "../outside"}}'),
        ),
        ["'../outside'"],
    ),
    "pickle only": (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), ["pytorch_model.bin", "refused"]),
    "width": (
        lambda f: _config(f, hidden_size=48),
        ["'model.embed_tokens.weight' is [41, 24]", "[41, 48]", "hidden_size"],
    ),
    "vocabulary": (lambda f: _config(f, vocab_size=42), ["'model.embed_tokens.weight'", "(vocab_size, hidden_size)"]),
    "too few layers": (lambda f: _config(f, num_hidden_layers=1), ["not part of the model", K]),
    "too many layers": (lambda f: _config(f, num_hidden_layers=3), ["missing", "model.layers.2.mlp.up_proj.weight"]),
    "kv heads": (lambda f: _config(f, num_key_value_heads=1), [f"'{K}' is [12, 24]", "[6, 24]", "num_key_value_heads"]),
    "head width": (lambda f: _config(f, head_dim=8), [K, "head_dim"]),
    "feed-forward": (lambda f: _config(f, intermediate_size=41), [UP, "intermediate_size"]),
    "biases": (lambda f: _config(f, attention_bias=True), ["missing", K.replace("weight", "bias")]),
    "untied": (lambda f: _config(f, tie_word_embeddings=False), ["missing: 'lm_head.weight' [41, 24]"]),
    "heads": (lambda f: _config(f, num_attention_heads=3), ["num_key_value_heads", "config.json"]),
    "unknown key": (lambda f: _config(f, hidden_sise=3), ["'hidden_sise'", "did you mean 'hidden_size'"]),
    "unknown family": (lambda f: _config(f, model_type="lama"), ["'lama'", "did you mean 'llama'"]),
    "no family": (lambda f: _config(f, model_type=None), ["'model_type' is missing"]),
    "no JSON": (lambda f: (f / "config.json").write_text("{'a'}"), ["config.json", "not sound JSON"]),
    "another tokenizer": (lambda f: (f / "tokenizer.model").write_bytes(b"x"), ["tokenizer.model"]),
    "with and without prefix": (
        lambda f: _change(f, lambda t: t.update({K.removeprefix("model."): t[K].clone()})),
        [f"'{K.removeprefix('model.')}'", f"'{K}'", "two names of one tensor"],
    ),
    "tied apart": (
        lambda f: _change(f, lambda t: t.update({"lm_head.weight": torch.ones(41, 24)})),
        ["'lm_head.weight' differs from 'model.embed_tokens.weight'", "tie_word_embeddings"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_message(tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "model"
    save_open(folder, _network())
    load_open(folder, "cpu")
    break_it, named = FAULTS[fault]
    break_it(folder)
    with pytest.raises(ArmillaryError) as caught:
        load_open(folder, "cpu")
    message = str(caught.value)
    assert [part for part in named if part not in message] == []
    assert str(folder) in message


@pytest.mark.parametrize("data", [LLAMA, GPT])
def test_loaded_parameters_own_their_memory(tmp_path: Path, data: dict[str, Any]) -> None:
    """Tensors stored as one must not keep one another alive, nor lie scattered in memory."""
    save_open(tmp_path / "model", _network(data))
    for parameter in load_open(tmp_path / "model", "cpu").network.parameters():
        assert parameter.is_contiguous() and parameter.untyped_storage().nbytes() == parameter.nbytes


def test_a_second_name_that_agrees_is_read(tmp_path: Path) -> None:
    network = _network()
    save_open(tmp_path / "model", network)
    _change(tmp_path / "model", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    loaded = load_open(tmp_path / "model", "cpu").network
    loaded.check_ties()
    assert torch.equal(loaded.embed.weight, network.embed.weight)


@pytest.mark.parametrize("kind", ["auto", "bfloat16"])
def test_a_second_name_that_differs_by_rounding_differs(tmp_path: Path, kind: str) -> None:
    """Whatever type the weights are wanted in."""
    save_open(tmp_path / "model", _network())
    _change(tmp_path / "model", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].bfloat16()}))
    with pytest.raises(ArmillaryError, match="differs from"):
        load_open(tmp_path / "model", "cpu", kind)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_published_gpt2_leftovers_are_ignored(tmp_path: Path, prefix: str) -> None:
    """The published folders hold causal masks as tensors, with and without the prefix."""
    network = _network(GPT)
    save_open(tmp_path / "model", network)

    def older(held: dict[str, torch.Tensor]) -> None:
        named = {prefix + name.removeprefix("transformer."): tensor for name, tensor in held.items()}
        held.clear()
        held.update(named)
        held[f"{prefix}h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
        held[f"{prefix}h.1.attn.masked_bias"] = torch.tensor(-1e4)

    _change(tmp_path / "model", older)
    loaded = load_open(tmp_path / "model", "cpu").network
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids), network(ids))
    _change(tmp_path / "model", lambda t: t.update({f"{prefix}h.0.crossattention.bias": torch.ones(1)}))
    with pytest.raises(CheckpointError, match="crossattention"):
        load_open(tmp_path / "model", "cpu")


def test_published_llama_leftovers_are_ignored(tmp_path: Path) -> None:
    save_open(tmp_path / "model", _network())
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _change(tmp_path / "model", lambda t: t.update({name: torch.ones(3)}))
    load_open(tmp_path / "model", "cpu")


def test_a_model_that_no_open_layout_holds(tmp_path: Path) -> None:
    network = _network(block={"mixer": "retention", "channel": "gated"})
    with pytest.raises(UnsupportedError) as caught:
        save(tmp_path / "model", network, layout="open")
    assert "model.blocks.0.mixer.kind: 'retention'" in str(caught.value) and "native" in str(caught.value)
    assert not any(tmp_path.iterdir())
    save(tmp_path / "model", network, layout="native")


def test_a_family_that_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="'llama' layout"):
        save_open(tmp_path / "model", _network(GPT), family="llama")
    with pytest.raises(UnsupportedError, match="no family 'gpt'"):
        save_open(tmp_path / "model", _network(GPT), family="gpt")
    save_open(tmp_path / "model", _network(GPT), family="gpt2")
    assert detect(tmp_path / "model") == "gpt2"


def test_detection(tmp_path: Path) -> None:
    save_open(tmp_path / "open", _network())
    save_native(tmp_path / "native", _network())
    assert detect(tmp_path / "open") == "llama" and detect(tmp_path / "native") == "native"
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.yaml").write_text("seed: 0\n")
    assert detect(run) == "run"
    (run / "checkpoints").rmdir()
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    for path, named in [
        (run, "no checkpoint yet"),
        (tmp_path / "nothing", "no such folder"),
        (tmp_path, "no model here"),
        (tmp_path / "weights.gguf", "GGUF"),
        (tmp_path / "open" / WEIGHTS, "a model is a folder"),
    ]:
        with pytest.raises(CheckpointError) as caught:
            detect(path)
        assert named in str(caught.value)
