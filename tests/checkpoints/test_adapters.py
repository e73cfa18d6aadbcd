"""LoRA folders as `peft` writes them, for every family: what ours computes is what `transformers` computes with
merged weights, W + (alpha / r) · B A (Hu et al. 2021; alpha / √r with use_rslora, Kalajdzievski 2023)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peers import transformers
from safetensors.torch import save_file
from test_parity import PEERS, VOCABULARY

from armillary.base.errors import ArmillaryError, CheckpointError, UnsupportedError
from armillary.checkpoints import load, save, save_open
from armillary.checkpoints.adapters import read_adapter
from armillary.model import Model
from armillary.nn.adapted import LowRankChange, adapted
from armillary.nn.linear import Linear
from armillary.nn.network import ModelSettings, build

RANK, ALPHA = 3, 12
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "somewhere/else",
    "inference_mode": True,
    "r": RANK,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.05,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "target_modules": ["q_proj"],
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_dora": False,
    "use_rslora": False,
    "layers_to_transform": None,
    "loftq_config": {},
    "an_option_of_next_year": None,
}
IDS = torch.arange(40).reshape(2, 20) * 7 % VOCABULARY
# experts and routers are no plain products here, and a tied head is the embedding
LEFT_OUT = ("lm_head", ".experts.", ".gate.", "shared_expert_gate")


def peft_folder(folder: Path, products: dict[str, tuple[int, int]], config: dict | None = None) -> dict:
    """An adapter of these products (outputs, inputs); returns {product: (A, B)}."""
    generator = torch.Generator().manual_seed(3)
    folder.mkdir()
    drawn = {
        name: (torch.randn(RANK, size[1], generator=generator) / 4, torch.randn(size[0], RANK, generator=generator) / 4)
        for name, size in products.items()
    }
    tensors = {
        f"base_model.model.{name}.lora_{'AB'[at]}.weight": pair[at] for name, pair in drawn.items() for at in (0, 1)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | (config or {})))
    return drawn


def targets(peer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    return {
        name: module
        for name, module in peer.named_modules()
        if isinstance(module, kinds) and not any(part in f"{name}." for part in LEFT_OUT)
    }


def size_of(module: torch.nn.Module) -> tuple[int, int]:
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, torch.nn.Linear) else (columns, rows)


@pytest.mark.parametrize("family", sorted(PEERS))
def test_every_family(family, tmp_path) -> None:
    config, model, sizes = PEERS[family]
    torch.manual_seed(1)
    more = {"pad_token_id": 0} if family == "phi3" else {}  # its own is beyond so small a vocabulary
    peer = getattr(transformers, model)(getattr(transformers, config)(**sizes, **more)).eval()
    peer.save_pretrained(tmp_path / "base")
    modules = targets(peer)
    drawn = peft_folder(tmp_path / "adapter", {name: size_of(module) for name, module in modules.items()})
    network = load(tmp_path / "base", device="cpu", dtype="float32").network.eval()
    with torch.no_grad():
        before = network(IDS)
        for name, (a, b) in drawn.items():
            change = ALPHA / RANK * b @ a
            modules[name].weight += change if isinstance(modules[name], torch.nn.Linear) else change.t()
        expected = peer(IDS).logits
        found = adapted(network, read_adapter(tmp_path / "adapter", network))(IDS)
    assert not torch.allclose(before, expected, atol=1e-2), "the adapter does something"
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def ours(**attention) -> Model:
    mixer = {"kind": "attention", "heads": 2, "position": {"kind": "rope"}, **attention}
    settings = ModelSettings(
        width=16, depth=2, vocabulary=VOCABULARY, context=64, block={"mixer": mixer, "channel": "gated"}
    )
    return Model(build(settings, seed=5).eval())


def test_the_rows_of_rotary_pairs_that_are_stored_otherwise(tmp_path) -> None:
    """Ours pairs neighbours; saved as a LLaMA folder, rows are permuted, and so are those of an adapter for it."""
    model = ours(position={"kind": "rope", "pairing": "interleaved"})
    save_open(tmp_path / "base", model.network)
    peer = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    names = [f"model.layers.{layer}.self_attn.{one}_proj" for layer in (0, 1) for one in "qkvo"]
    drawn = peft_folder(tmp_path / "adapter", dict.fromkeys(names, (16, 16)))
    with torch.no_grad():
        for name, (a, b) in drawn.items():
            peer.get_submodule(name).weight += ALPHA / RANK * b @ a
        torch.testing.assert_close(model.adapted(tmp_path / "adapter")(IDS), peer(IDS).logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("root", [False, True])
def test_our_own_names_and_the_scale(root, tmp_path) -> None:
    model = ours()
    path = "blocks.1.channel.inner.down"
    product = model.network.get_submodule(path)
    drawn = peft_folder(tmp_path / "adapter", {path: (product.outputs, product.inputs)}, {"use_rslora": root})
    twin = model.adapted(tmp_path / "adapter")
    a, b = drawn[path]
    with torch.no_grad():
        found = twin(IDS)
        product.weight += (ALPHA / math.sqrt(RANK) if root else ALPHA / RANK) * b @ a
        torch.testing.assert_close(found, model(IDS), atol=1e-4, rtol=1e-4)


def test_names_of_a_bare_body(tmp_path) -> None:
    model = ours()
    for place, name in enumerate(("layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj")):
        peft_folder(tmp_path / str(place), {name: (16, 16)})
    with torch.no_grad():
        one, other = (model.adapted(tmp_path / str(place))(IDS) for place in (0, 1))
    assert torch.equal(one, other)


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "config, kind, message",
    [
        ({"peft_type": "IA3"}, UnsupportedError, "'peft_type' is 'IA3'"),
        ({"use_dora": True}, UnsupportedError, "'use_dora'"),
        ({"bias": "all"}, UnsupportedError, "'bias'"),
        ({"rank_pattern": {"q": 2}}, UnsupportedError, "'rank_pattern'"),
        ({"alpha_pattern": {"q": 2}}, UnsupportedError, "'alpha_pattern'"),
        ({"modules_to_save": ["lm_head"]}, UnsupportedError, "'modules_to_save'"),
        ({"init_lora_weights": "pissa"}, UnsupportedError, "'init_lora_weights'"),
        ({"alora_invocation_tokens": [3]}, UnsupportedError, "'alora_invocation_tokens'"),
        ({"an_option_of_next_year": 2}, UnsupportedError, "'an_option_of_next_year'"),
        ({"r": 4}, CheckpointError, "'r' is 4, but a product has rank 3"),
        ({"lora_alpha": "12"}, CheckpointError, "'lora_alpha' is '12'"),
        ({"r": None}, CheckpointError, "'r' is None"),
        ({"use_rslora": 1}, CheckpointError, "'use_rslora' is 1"),
    ],
)
def test_settings_that_are_not_understood_are_named(config, kind, message, tmp_path) -> None:
    peft_folder(tmp_path / "adapter", {Q: (16, 16)}, config)
    with pytest.raises(kind) as caught:
        ours().adapted(tmp_path / "adapter")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "products, message",
    [
        ({"model.layers.0.self_attn.w_proj": (16, 16)}, "no product 'model.layers.0.self_attn.w_proj'"),
        ({"model.layers.7.self_attn.q_proj": (16, 16)}, "no product 'model.layers.7.self_attn.q_proj'"),
        ({"model.layers.0.input_layernorm": (16, 16)}, "not a plain product here"),
        ({Q: (16, 20)}, f"'base_model.model.{Q}.lora_A.weight' is [3, 20], and 'blocks.0.mixer.inner.q' [16, 16]"),
        ({Q: (20, 16)}, f"'base_model.model.{Q}.lora_B.weight' is [20, 3]"),
        ({}, "no adapter in this file"),
    ],
)
def test_products_that_do_not_fit_are_named_with_both_shapes(products, message, tmp_path) -> None:
    peft_folder(tmp_path / "adapter", products)
    with pytest.raises(ArmillaryError) as caught:
        ours().adapted(tmp_path / "adapter")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({f"{Q}.lora_A.weight": torch.zeros(3, 16)}, f"missing: lora_B of '{Q}'"),
        ({f"{Q}.lora_magnitude_vector": torch.zeros(16)}, "lora_magnitude_vector"),
        ({"model.embed_tokens.lora_embedding_A": torch.zeros(3, 16)}, "lora_embedding_A"),
        (
            {f"{Q}.lora_A.weight": torch.full((3, 16), math.nan), f"{Q}.lora_B.weight": torch.zeros(16, 3)},
            "not finite",
        ),
        (
            {f"{Q}.lora_A.weight": torch.zeros(3, 16, dtype=torch.int64), f"{Q}.lora_B.weight": torch.zeros(16, 3)},
            "holds I64",
        ),
        (
            {
                f"{Q}.lora_A.weight": torch.zeros(3, 16),
                f"{Q}.lora_A.default.weight": torch.zeros(3, 16),
                f"{Q}.lora_B.weight": torch.zeros(16, 3),
            },
            "is there twice",
        ),
    ],
)
def test_tensors_that_are_not_understood_are_named(tensors, message, tmp_path) -> None:
    peft_folder(tmp_path / "adapter", {Q: (16, 16)})
    save_file(
        {f"base_model.model.{name}": one for name, one in tensors.items()},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    with pytest.raises(ArmillaryError) as caught:
        ours().adapted(tmp_path / "adapter")
    assert message in str(caught.value)


def test_folders_that_hold_no_adapter(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        ours().adapted(tmp_path / "nothing")
    peft_folder(tmp_path / "adapter", {Q: (16, 16)})
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        ours().adapted(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        ours().adapted(tmp_path / "adapter")


@pytest.mark.parametrize("layout", ["native", "open"])
def test_a_model_with_an_adapter_is_not_written_without_it(tmp_path: Path, layout: str) -> None:
    made = build(ModelSettings(width=16, depth=1, vocabulary=24, context=32), seed=1)
    path = next(name for name, module in made.named_modules() if type(module) is Linear)
    product = made.get_submodule(path)
    change = LowRankChange(torch.ones(1, product.inputs), torch.ones(product.outputs, 1), 1.0)
    with pytest.raises(UnsupportedError, match="adapter"):
        save(tmp_path / "it", adapted(made, {path: change}), layout=layout)
    assert not (tmp_path / "it").exists()
    with pytest.raises(UnsupportedError, match="already"):
        adapted(adapted(made, {path: change}), {path: change})
