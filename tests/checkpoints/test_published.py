"""config.json as published: read, counted in parameters; then shrunk, damaged in many ways, and refused in words."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from armillary.base.errors import ArmillaryError
from armillary.checkpoints import load_open, save_open
from armillary.checkpoints.table import families
from armillary.checkpoints.tensors import INDEX
from armillary.nn.network import ModelSettings, Network, build

# The parts that decide the computation, of: bigscience/bloom-560m, google/gemma-2-2b, google/gemma-3-1b-it,
# openai-community/gpt2, EleutherAI/pythia-70m, huggyllama/llama-7b, meta-llama/Llama-3.2-1B,
# mistralai/Mistral-7B-v0.1, allenai/OLMo-1B-hf, allenai/OLMo-2-0425-1B, microsoft/Phi-3-mini-4k-instruct,
# Qwen/Qwen2-0.5B, Qwen/Qwen3-0.6B, google-bert/bert-base-uncased, FacebookAI/roberta-base,
# sentence-transformers/paraphrase-multilingual-mpnet-base-v2 (a bare body), google-t5/t5-small,
# google/flan-t5-small, google/mt5-small, xlnet/xlnet-base-cased; and how many parameters those models
# have, without BERT's pooler.
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "bloom-560m": (
        559_214_592,
        {
            "model_type": "bloom",
            "apply_residual_connection_post_layernorm": False,
            "attention_softmax_in_fp32": True,
            "bias_dropout_fusion": True,
            "layer_norm_epsilon": 1e-5,
            "masked_softmax_fusion": True,
            "n_embed": 1024,
            "n_inner": None,
            "n_layer": 24,
            "num_attention_heads": 16,
            "offset_alibi": 100,
            "pretraining_tp": 1,
            "skip_bias_add": True,
            "skip_bias_add_qkv": False,
            "unk_token_id": 0,
            "vocab_size": 250880,
        },
    ),
    "gemma-2-2b": (
        2_614_341_888,
        {
            "model_type": "gemma2",
            "architectures": ["Gemma2ForCausalLM"],
            "attention_bias": False,
            "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "max_position_embeddings": 8192,
            "num_attention_heads": 8,
            "num_hidden_layers": 26,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "vocab_size": 256000,
        },
    ),
    "gemma-3-1b": (
        999_885_952,
        {
            "model_type": "gemma3_text",
            "architectures": ["Gemma3ForCausalLM"],
            "attn_logit_softcapping": None,
            "cache_implementation": "hybrid",
            "eos_token_id": [1, 106],
            "final_logit_softcapping": None,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "max_position_embeddings": 32768,
            "num_attention_heads": 4,
            "num_hidden_layers": 26,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-6,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "vocab_size": 262144,
        },
    ),
    "gpt2": (
        124_439_808,
        {
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "architectures": ["GPT2LMHeadModel"],
            "layer_norm_epsilon": 1e-5,
            "n_ctx": 1024,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
            "summary_type": "cls_index",
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
            "vocab_size": 50257,
        },
    ),
    "pythia-70m": (
        70_426_624,
        {
            "model_type": "gpt_neox",
            "architectures": ["GPTNeoXForCausalLM"],
            "hidden_act": "gelu",
            "hidden_size": 512,
            "intermediate_size": 2048,
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "num_attention_heads": 8,
            "num_hidden_layers": 6,
            "rotary_emb_base": 10000,
            "rotary_pct": 0.25,
            "tie_word_embeddings": False,
            "use_parallel_residual": True,
            "vocab_size": 50304,
        },
    ),
    "llama-7b": (
        6_738_415_616,
        {
            "model_type": "llama",
            "architectures": ["LLaMAForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "max_sequence_length": 2048,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "rms_norm_eps": 1e-6,
            "vocab_size": 32000,
        },
    ),
    "Llama-3.2-1B": (
        1_235_814_400,
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "vocab_size": 128256,
        },
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
    ),
    "OLMo-1B": (
        1_176_764_416,
        {
            "model_type": "olmo",
            "architectures": ["OlmoForCausalLM"],
            "attention_bias": False,
            "clip_qkv": None,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 2048,
            "num_attention_heads": 16,
            "num_hidden_layers": 16,
            "num_key_value_heads": 16,
            "pretraining_tp": 1,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "vocab_size": 50304,
        },
    ),
    "OLMo-2-1B": (
        1_484_916_736,
        {
            "model_type": "olmo2",
            "architectures": ["Olmo2ForCausalLM"],
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 16,
            "num_key_value_heads": 16,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 500000,
            "tie_word_embeddings": False,
            "vocab_size": 100352,
        },
    ),
    "Phi-3-mini": (
        3_821_079_552,
        {
            "model_type": "phi3",
            "architectures": ["Phi3ForCausalLM"],
            "attention_bias": False,
            "auto_map": {
                "AutoConfig": "configuration_phi3.Phi3Config",
                "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
            },
            "embd_pdrop": 0.0,
            "hidden_act": "silu",
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "original_max_position_embeddings": 4096,
            "resid_pdrop": 0.0,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "sliding_window": 2047,
            "tie_word_embeddings": False,
            "vocab_size": 32064,
        },
    ),
    "Qwen2-0.5B": (
        494_032_768,
        {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_position_embeddings": 131072,
            "max_window_layers": 24,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    "Qwen3-0.6B": (
        596_049_920,
        {
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    "bert-base": (
        109_514_298,
        {
            "model_type": "bert",
            "architectures": ["BertForMaskedLM"],
            "attention_probs_dropout_prob": 0.1,
            "hidden_act": "gelu",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "layer_norm_eps": 1e-12,
            "max_position_embeddings": 512,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "pad_token_id": 0,
            "position_embedding_type": "absolute",
            "type_vocab_size": 2,
            "vocab_size": 30522,
        },
    ),
    "roberta-base": (
        124_697_433,
        {
            "model_type": "roberta",
            "architectures": ["RobertaForMaskedLM"],
            "hidden_act": "gelu",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 514,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "pad_token_id": 1,
            "type_vocab_size": 1,
            "vocab_size": 50265,
        },
    ),
    "multilingual-mpnet": (
        277_453_056,
        {
            "model_type": "xlm-roberta",
            "architectures": ["XLMRobertaModel"],
            "gradient_checkpointing": False,
            "hidden_act": "gelu",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 514,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "output_past": True,
            "pad_token_id": 1,
            "position_embedding_type": "absolute",
            "type_vocab_size": 1,
            "vocab_size": 250002,
        },
    ),
    "t5-small": (
        60_506_624,
        {
            "model_type": "t5",
            "architectures": ["T5ForConditionalGeneration"],
            "d_ff": 2048,
            "d_kv": 64,
            "d_model": 512,
            "decoder_start_token_id": 0,
            "dropout_rate": 0.1,
            "initializer_factor": 1.0,
            "is_encoder_decoder": True,
            "layer_norm_epsilon": 1e-6,
            "n_positions": 512,
            "num_heads": 8,
            "num_layers": 6,
            "output_past": True,
            "pad_token_id": 0,
            "relative_attention_num_buckets": 32,
            "vocab_size": 32128,
        },
    ),
    "flan-t5-small": (
        76_961_152,
        {
            "model_type": "t5",
            "architectures": ["T5ForConditionalGeneration"],
            "d_ff": 1024,
            "d_kv": 64,
            "d_model": 512,
            "decoder_start_token_id": 0,
            "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": True,
            "layer_norm_epsilon": 1e-6,
            "n_positions": 512,
            "num_decoder_layers": 8,
            "num_heads": 6,
            "num_layers": 8,
            "output_past": True,
            "pad_token_id": 0,
            "relative_attention_max_distance": 128,
            "relative_attention_num_buckets": 32,
            "tie_word_embeddings": False,
            "vocab_size": 32128,
        },
    ),
    "mt5-small": (
        300_176_768,
        {
            "model_type": "mt5",
            "architectures": ["MT5ForConditionalGeneration"],
            "d_ff": 1024,
            "d_kv": 64,
            "d_model": 512,
            "decoder_start_token_id": 0,
            "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": True,
            "layer_norm_epsilon": 1e-6,
            "num_decoder_layers": 8,
            "num_heads": 6,
            "num_layers": 8,
            "pad_token_id": 0,
            "relative_attention_num_buckets": 32,
            "tie_word_embeddings": False,
            "tokenizer_class": "T5Tokenizer",
            "vocab_size": 250112,
        },
    ),
    "xlnet-base": (
        116_750_336,
        {
            "model_type": "xlnet",
            "architectures": ["XLNetLMHeadModel"],
            "attn_type": "bi",
            "bi_data": False,
            "clamp_len": -1,
            "d_head": 64,
            "d_inner": 3072,
            "d_model": 768,
            "dropout": 0.1,
            "end_n_top": 5,
            "ff_activation": "gelu",
            "initializer_range": 0.02,
            "layer_norm_eps": 1e-12,
            "mem_len": None,
            "n_head": 12,
            "n_layer": 12,
            "reuse_len": None,
            "same_length": False,
            "start_n_top": 5,
            "summary_activation": "tanh",
            "summary_type": "last",
            "untie_r": True,
            "vocab_size": 32000,
        },
    ),
}
SMALL = {
    ("vocab_size",): 41,
    ("hidden_size", "n_embd", "n_embed", "d_model"): 24,
    ("intermediate_size", "d_ff", "d_inner"): 40,
    ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"): 2,
    ("num_attention_heads", "n_head", "num_heads"): 4,
    ("num_key_value_heads",): 2,
    ("head_dim", "d_kv"): 8,
    ("d_head",): 6,
    ("rotary_pct",): 0.34,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_have_the_published_size(name: str) -> None:
    count, config = PUBLISHED[name]
    network = build(_settings(config), device="meta")
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def _settings(config: dict[str, Any]) -> ModelSettings:
    """Those of a folder whose tensors agree with config.json about the head."""
    family = families.get(config["model_type"])()
    names = ("lm_head.weight",) if config.get("tie_word_embeddings") is False else ()
    return family.suit(family.settings(config, "config.json"), names)


def test_every_family_has_a_published_config() -> None:
    assert {config["model_type"] for _, config in PUBLISHED.values()} == set(families.names())


def _small(name: str) -> dict[str, Any]:
    sizes = {key: value for keys, value in SMALL.items() for key in keys}
    return {key: sizes.get(key, value) for key, value in PUBLISHED[name][1].items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of every published config, in its own words, in shards."""
    root = tmp_path_factory.mktemp("published")
    for name in PUBLISHED:
        config = _small(name)
        network = build(_settings(config), seed=3)
        save_open(root / name, network, family=config["model_type"], max_shard=12_000)
        (root / name / "config.json").write_text(json.dumps(config))
        (root / name / "modules.json").unlink(missing_ok=True)
        assert isinstance(load_open(root / name, "cpu").network, Network)
    return root


def _copy(source: Path, target: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A folder like `source`; its config, and which file holds which tensor."""
    target.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    index = json.loads((target / INDEX).read_text())
    return json.loads((target / "config.json").read_text()), index["weight_map"]


TENSOR_FAULTS = ("missing", "extra", "transposed", "wrong type", "truncated", "outside")


@settings(max_examples=60)
@given(name=st.sampled_from(sorted(PUBLISHED)), fault=st.sampled_from(TENSOR_FAULTS), choice=st.integers(0, 999))
def test_a_damaged_folder_names_the_tensor(
    folders: Path, tmp_path_factory: pytest.TempPathFactory, name: str, fault: str, choice: int
) -> None:
    folder = tmp_path_factory.mktemp("damaged") / name
    _, homes = _copy(folders / name, folder)
    shapes = {key: tensor.shape for file in set(homes.values()) for key, tensor in load_file(folder / file).items()}
    able = sorted(key for key, shape in shapes.items() if fault != "transposed" or len(set(shape)) == 2)
    key = able[choice % len(able)]
    file, named = folder / homes[key], key
    held = load_file(file)
    if fault == "missing":
        del held[key], homes[key]
        named = f"missing: '{key}'"
    elif fault == "extra":
        held[f"{key}.ghost"] = torch.ones(3)
        homes[f"{key}.ghost"] = file.name
        named = f"not part of the model: '{key}.ghost'"
    elif fault == "transposed":
        held[key] = held[key].t().contiguous()
        named = f"'{key}' is {list(held[key].shape)}"
    elif fault == "wrong type":
        held[key] = held[key].to((torch.int64, torch.int8, torch.bool)[choice % 3])
        named = f"wrong type: '{key}'"
    elif fault == "outside":
        named = homes[key] = ("../" * (1 + choice % 3) + "elsewhere.safetensors", "/etc/passwd")[choice % 2]
    save_file(held, file) if held else file.unlink()
    if fault == "truncated":
        whole = file.read_bytes()
        file.write_bytes(whole[: choice * len(whole) // 1000])
        named = file.name
    (folder / INDEX).write_text(json.dumps({"weight_map": homes}))
    with pytest.raises(ArmillaryError) as caught:
        load_open(folder, "cpu")
    assert named in str(caught.value) and str(folder) in str(caught.value)


# 4 heads may become 3 without a contradiction, since 24 features divide into both; 5 may not.
SIZE_KEYS = tuple(key for keys in SMALL for key in keys if key != "rotary_pct")


@settings(max_examples=40)
@given(name=st.sampled_from(sorted(PUBLISHED)), key=st.sampled_from(SIZE_KEYS), by=st.sampled_from([1, 5, 10**5]))
def test_a_contradictory_number_is_named(
    folders: Path, tmp_path_factory: pytest.TempPathFactory, name: str, key: str, by: int
) -> None:
    folder = tmp_path_factory.mktemp("contradictory") / name
    config, _ = _copy(folders / name, folder)
    if key in config:
        config[key] += by
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ArmillaryError) as caught:
            load_open(folder, "cpu")
        blocks = ("missing: '", "not part of the model: '") if "layer" in key else ()
        assert any(part in str(caught.value) for part in (key, *blocks))


JUNK = (None, True, False, 0, -1, 1, 7, 10**9, 10**40, 0.0, -2.5, 0.5, 1e308, float("nan"), float("inf"))
JUNK += ("", "x", "gelu", [], ["x"], [None], [[1]], {}, {"x": 1}, {"rope_type": "yarn"}, {"rope_type": ["linear"]})
JUNK += ({"rope_type": "linear", "factor": 0}, {"rope_type": "llama3", "factor": True}, {"full_attention": 3})


@settings(max_examples=150)
@given(name=st.sampled_from(sorted(PUBLISHED)), choice=st.integers(0, 999), junk=st.sampled_from(range(len(JUNK))))
def test_junk_is_read_or_refused_in_words(folders: Path, name: str, choice: int, junk: int) -> None:
    config = _small(name)
    family = families.get(config["model_type"])()
    keys = sorted({"rope_parameters", "layer_types", *config, *(key for field in family.fields for key in field.keys)})
    config[keys[choice % len(keys)]] = JUNK[junk]
    with suppress(ArmillaryError):
        build(family.settings(config, "here/config.json"), device="meta")
