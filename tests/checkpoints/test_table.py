"""The invertible tables: steps undo exactly, settings survive both directions, the rest is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armillary.base.errors import CheckpointError, UnsupportedError
from armillary.base.settings import parse
from armillary.checkpoints.facts import facts
from armillary.checkpoints.families.gpt2 import GPT2
from armillary.checkpoints.families.llama import Llama
from armillary.checkpoints.table import (
    Family,
    PermuteHalfInterleaved,
    Split,
    SplitByHead,
    Squeeze,
    Stack,
    Step,
    Transpose,
    families,
)
from armillary.nn.network import ModelSettings, build

ATTENTION = {"kind": "attention", "heads": 4, "kv_heads": 2, "position": {"kind": "rope"}}
LLAMA: dict[str, Any] = {
    "width": 24,
    "depth": 2,
    "vocabulary": 41,
    "context": 64,
    "block": {"mixer": ATTENTION, "channel": {"kind": "gated", "hidden": 40}},
}
NORM = {"kind": "layernorm"}
GPT: dict[str, Any] = {
    "width": 24,
    "depth": 2,
    "vocabulary": 41,
    "context": 64,
    "position": {"kind": "learned"},
    "norm": NORM,
    "block": {
        "mixer": {"kind": "attention", "heads": 4, "bias": True},
        "channel": {"kind": "ffn", "activation": "gelu_tanh", "bias": True},
        "norm": NORM,
    },
}


def _with(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    key, _, rest = path.partition(".")
    return {**data, key: _with(data.get(key) or {}, rest, value) if rest else value}


def _settings(data: dict[str, Any]) -> ModelSettings:
    return parse(ModelSettings, data)


@given(
    rows=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    columns=st.integers(1, 5),
    heads=st.integers(1, 4),
    half=st.integers(1, 4),
)
def test_every_step_undoes_itself(rows: list[int], columns: int, heads: int, half: int) -> None:
    parts = [torch.randn(count, columns) for count in rows]
    cases: list[tuple[Step, list[torch.Tensor]]] = [
        (Transpose(), parts),
        (Split(), parts),
        (Split(1), [part.t() for part in parts]),
        (SplitByHead(heads), list(torch.randn(3, heads * half, columns))),
        (Stack(), [torch.randn(heads, half, columns)]),
        (Squeeze(1), parts),
        (PermuteHalfInterleaved(heads), [torch.randn(heads * 2 * half, columns), torch.randn(heads * 2 * half)]),
    ]
    for step, ours in cases:
        theirs = step.undo(ours)
        again = step.apply(theirs, ours)
        assert all(torch.equal(a, b) for a, b in zip(again, ours, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(step.undo(again), theirs, strict=True))


def test_permutation_moves_pairs_where_they_belong() -> None:
    """By the definitions of the two pairings: (2i, 2i+1) against (i, i + K/2)."""
    ours = torch.arange(12)  # two heads of six features
    (theirs,) = PermuteHalfInterleaved(2).undo([ours])
    assert theirs.tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_fused_rows_lie_head_after_head() -> None:
    """By the definition of the published layout: for each head its queries, keys and values."""
    (theirs,) = SplitByHead(2).undo([torch.arange(4), torch.arange(10, 14), torch.arange(20, 24)])
    assert theirs.tolist() == [0, 1, 10, 11, 20, 21, 2, 3, 12, 13, 22, 23]


@pytest.mark.parametrize("family, data", [(Llama(), LLAMA), (GPT2(), GPT)])
def test_the_table_covers_every_parameter_once(family: Family, data: dict[str, Any]) -> None:
    network = build(_settings(_with(data, "head", {"kind": "language_model", "tied": False})), device="meta")
    names = [name for one in family.bind(network.settings, network.state_dict()) for name in one.ours]
    assert sorted(names) == sorted(network.state_dict())


# Spellings: the same network said in several ways has the same facts.


@pytest.mark.parametrize(
    "change",
    [
        {"blocks": {"one": LLAMA["block"]}, "block": None},
        {"blocks": {"a": LLAMA["block"], "b": LLAMA["block"]}, "pattern": ["a", "b"], "block": None},
        {"overrides": {1: LLAMA["block"]}},
        {"linear": {"all": "dense"}},
        _with({}, "block", {**LLAMA["block"], "dropout": 0.1}),
        _with(
            {},
            "block",
            {**LLAMA["block"], "mixer": {**ATTENTION, "head_width": 6, "scale": 6**-0.5, "out_bias": False}},
        ),
        _with(
            {},
            "block",
            {
                "branches": [
                    {"name": "mixer", "mixer": ATTENTION},
                    {"name": "channel", "channel": LLAMA["block"]["channel"]},
                ]
            },
        ),
        {"position": "none"},
    ],
)
def test_spellings_have_equal_facts(change: dict[str, Any]) -> None:
    assert facts(_settings(LLAMA | change)) == facts(_settings(LLAMA))


def test_what_only_trains_a_router_is_no_fact() -> None:
    trained = {"balance": "concentration", "balance_weight": 1.0, "z_weight": 0.5, "capacity": 1.5, "jitter": 0.1}
    changed = _settings(_with(MOE, "block.channel", MOE["block"]["channel"] | trained))
    assert facts(changed) == facts(_settings(MOE)) and changed != _settings(MOE)


# Every setting is either expressed exactly or named.

EXPRESSED: list[tuple[Family, dict[str, Any], str, Any]] = [
    (Llama(), LLAMA, "block.mixer.kv_heads", 4),
    (Llama(), LLAMA, "block.mixer.head_width", 10),
    (Llama(), LLAMA, "block.mixer.bias", True),
    (Llama(), LLAMA, "block.mixer.position.base", 5e5),
    (Llama(), LLAMA, "block.mixer.position.scaling", {"kind": "linear", "factor": 2.5}),
    (Llama(), LLAMA, "block.mixer.position.scaling", {"kind": "llama3", "factor": 8.0, "trained_length": 32}),
    (Llama(), LLAMA, "block.mixer.position.scaling", {"kind": "yarn", "factor": 4.0, "trained_length": 32}),
    (Llama(), LLAMA, "block.channel.activation", "gelu_tanh"),
    (Llama(), LLAMA, "block.channel.bias", True),
    (Llama(), LLAMA, "head.tied", False),
    (GPT2(), GPT, "block.channel.hidden", 31),
    (GPT2(), GPT, "block.channel.activation", "relu"),
    (GPT2(), GPT, "head.tied", False),
    (GPT2(), GPT, "context", 17),
]


@pytest.mark.parametrize("family, data, path, value", EXPRESSED)
def test_settings_survive_both_directions(family: Family, data: dict[str, Any], path: str, value: Any) -> None:
    settings = _settings(_with(data, path, value))
    assert facts(settings) != facts(_settings(data))
    config = family.config(settings)
    assert facts(family.settings(config, "config.json")) == facts(settings)
    again = {key: item for key, item in config.items() if key not in family.constants}
    rewritten = family.config(family.settings(config, "config.json"))
    assert {key: item for key, item in rewritten.items() if key not in family.constants} == again


MOE = _with(LLAMA, "block.channel", {"kind": "moe", "experts": 4, "hidden": 20})
SSM = _with(LLAMA, "block", {"mixer": {"kind": "mamba"}})
WINDOWED = _with(LLAMA, "block.mixer", {**ATTENTION, "kind": "window", "window": 7})
NOT_EXPRESSED: list[tuple[Family, dict[str, Any], dict[str, Any], str]] = [
    (Llama(), LLAMA, {"block": {"mixer": "retention", "channel": "gated"}}, "model.blocks.0.mixer.kind: 'retention'"),
    (
        Llama(),
        LLAMA,
        {"overrides": {1: {"mixer": "retention", "channel": "gated"}}},
        "model.blocks.1.mixer.kind: 'retention'",
    ),
    (Llama(), LLAMA, _with(LLAMA, "block.norm", NORM), "model.blocks.0.norm.kind: 'layernorm'"),
    (Llama(), LLAMA, _with(LLAMA, "block.norm_at", "post"), "model.blocks.0.norm_at: 'post'"),
    (Llama(), LLAMA, _with(LLAMA, "block.parallel", True), "model.blocks.0.parallel: True"),
    (Llama(), LLAMA, _with(LLAMA, "block.mixer.softcap", 5.0), "model.blocks.0.mixer.softcap: 5.0"),
    (Llama(), LLAMA, _with(LLAMA, "block.mixer.sinks", True), "model.blocks.0.mixer.sinks: True"),
    (Llama(), LLAMA, _with(LLAMA, "block.mixer.norm", "rmsnorm"), "model.blocks.0.mixer.norm.kind: 'rmsnorm'"),
    (Llama(), LLAMA, _with(LLAMA, "block.mixer.scale", 0.3), "model.blocks.0.mixer.scale: 0.3"),
    (Llama(), LLAMA, _with(LLAMA, "block.mixer.out_bias", True), "model.blocks.0.mixer.out_bias: True"),
    (Llama(), LLAMA, _with(LLAMA, "block.mixer.position", "alibi"), "model.blocks.0.mixer.position.kind: 'alibi'"),
    (Llama(), LLAMA, _with(LLAMA, "block.mixer.position", None), "model.blocks.0.mixer.position: None"),
    (
        Llama(),
        LLAMA,
        _with(_with(LLAMA, "block.mixer.head_width", 8), "block.mixer.position.fraction", 0.5),
        "model.blocks.0.mixer.position.fraction: 0.5",
    ),
    (Llama(), LLAMA, {"norm": None}, "model.norm: None"),
    (Llama(), LLAMA, {"norm": {"kind": "rmsnorm", "epsilon": 1e-3}}, "model.blocks.0.norm.epsilon: 1e-05"),
    (Llama(), LLAMA, {"embed_scale": 2.0}, "model.embed_scale: 2.0"),
    (Llama(), LLAMA, {"embed_norm": "rmsnorm"}, "model.embed_norm"),
    (Llama(), LLAMA, {"segments": 2}, "model.segments: 2"),
    (Llama(), LLAMA, {"position": "learned"}, "model.position"),
    (Llama(), LLAMA, {"head": {"kind": "language_model", "softcap": 30.0}}, "model.head.softcap: 30.0"),
    (Llama(), LLAMA, {"head": {"kind": "classification"}}, "model.head.kind: 'classification'"),
    (Llama(), LLAMA, {"share": {"all": ["blocks.*.channel"]}}, "model.share"),
    (Llama(), LLAMA, {"form": "prefix"}, "model.form: 'prefix'"),
    (Llama(), LLAMA, {"width": 26, "block": _with(LLAMA["block"], "mixer.head_width", 6)}, "model.width: 26"),
    (
        Llama(),
        LLAMA,
        {"block": {"branches": [{"name": "look", "mixer": ATTENTION}, {"name": "channel", "channel": "gated"}]}},
        "model.blocks.0.branches: 'look, channel'",
    ),
    (Llama(), LLAMA, WINDOWED, "model.blocks.0.mixer.window: 7"),
    (families.get("mistral")(), LLAMA, {"overrides": {1: WINDOWED["block"]}}, "model.blocks.1.mixer.window: 7"),
    (families.get("mistral")(), LLAMA, _with(WINDOWED, "block.mixer.dilation", 2), "model.blocks.0.mixer.dilation: 2"),
    (families.get("mistral")(), LLAMA, _with(WINDOWED, "block.mixer.window", [7, 7, 8, 7]), "mixer.window.0: 7"),
    (families.get("phi3")(), LLAMA, _with(LLAMA, "block.mixer.position.pairing", "interleaved"), "pairing"),
    (families.get("qwen3")(), LLAMA, {}, "model.blocks.0.mixer.norm: None"),
    (families.get("qwen2")(), LLAMA, {}, "model.blocks.0.mixer.bias: False"),
    (families.get("bloom")(), LLAMA, {}, "model.embed_norm: None"),
    (families.get("mixtral")(), LLAMA, {}, "model.blocks.0.channel.kind: 'gated'"),
    (families.get("mixtral")(), MOE, _with(MOE, "block.channel.normalise", False), "channel.normalise: False"),
    (families.get("mixtral")(), MOE, _with(MOE, "block.channel.scores", "sigmoid"), "channel.scores: 'sigmoid'"),
    (families.get("mixtral")(), MOE, _with(MOE, "block.channel.bias_rate", 0.1), "channel.bias_rate: 0.1"),
    (families.get("mixtral")(), MOE, _with(MOE, "block.channel.shared", 8), "channel.shared: 8"),
    (families.get("mixtral")(), MOE, _with(MOE, "block.channel.gated", False), "channel.gated: False"),
    (families.get("qwen2_moe")(), LLAMA, {}, "model.blocks: channel.kind is never 'moe'"),
    (families.get("qwen2_moe")(), MOE, {}, "model.blocks.0.channel.shared_gate: False"),
    (families.get("bamba")(), LLAMA, {}, "model.blocks: mixer.kind is never 'mamba2'"),
    (families.get("mamba")(), SSM, _with(SSM, "block.channel", "gated"), "model.blocks.0.channel.kind: 'gated'"),
    (families.get("mamba")(), SSM, _with(SSM, "block.mixer.expand", 1.5), "model.blocks.0.mixer.expand: 1.5"),
    (families.get("mamba2")(), SSM, {}, "model.blocks.0.mixer.kind: 'mamba'"),
    (GPT2(), GPT, _with(GPT, "block.mixer.kv_heads", 2), "model.blocks.0.mixer.kv_heads: 2"),
    (GPT2(), GPT, _with(GPT, "block.mixer.bias", False), "model.blocks.0.mixer.bias: False"),
    (GPT2(), GPT, _with(GPT, "norm.bias", False), "model.norm.bias: False"),
    (GPT2(), GPT, {"position": "sinusoidal"}, "model.position.kind: 'sinusoidal'"),
]


@pytest.mark.parametrize("family, data, change, named", NOT_EXPRESSED, ids=[case[3] for case in NOT_EXPRESSED])
def test_a_setting_without_counterpart_is_named(
    family: Family, data: dict[str, Any], change: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        family.config(_settings(data | change))
    assert named in str(caught.value)


# config.json as it comes.


def _llama(**changes: Any) -> dict[str, Any]:
    base = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 41,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return {key: value for key, value in (base | changes).items() if value != "gone"}


def _gpt(**changes: Any) -> dict[str, Any]:
    return {"model_type": "gpt2", "vocab_size": 41, "n_embd": 24, "n_layer": 2, "n_head": 4} | changes


def test_absent_keys_mean_what_the_family_says() -> None:
    """The oracle is the published defaults of LLaMA 1 and of GPT-2."""
    llama = facts(Llama().settings(_llama(), "config.json"))
    assert llama["blocks.0.mixer.kv_heads"] == 4 and llama["context"] == 2048 and llama["norm.epsilon"] == 1e-6
    assert llama["blocks.0.channel.activation"] == "silu" and llama["head.tied"] is False
    assert llama["blocks.0.mixer.position.base"] == 10000.0
    gpt = facts(GPT2().settings(_gpt(), "config.json"))
    assert gpt["context"] == 1024 and gpt["blocks.0.channel.hidden"] == 96 and gpt["head.tied"] is True
    assert gpt["blocks.0.channel.activation"] == "gelu_tanh" and gpt["norm.epsilon"] == 1e-5


def _scaled(**scaling: Any) -> dict[str, Any]:
    return _llama(rope_scaling=scaling)


WRONG: list[tuple[dict[str, Any], str]] = [
    (_llama(hidden_size="gone"), "'hidden_size' is missing"),
    (_llama(hidden_size=24.5), "'hidden_size' is 24.5"),
    (_llama(hidden_size="24"), "'hidden_size' is '24'"),
    (_llama(hidden_size=True), "'hidden_size' is True"),
    (_llama(num_hidden_layers=0), "num_hidden_layers"),
    (_llama(vocab_size=-3), "vocab_size"),
    (_llama(num_key_value_heads=3), "num_key_value_heads"),
    (_llama(attention_bias="yes"), "'attention_bias'"),
    (_llama(rms_norm_eps="small"), "'rms_norm_eps'"),
    (_llama(hidden_act="quick_gelu"), "'hidden_act' is 'quick_gelu'"),
    (_llama(hidden_act=["silu"]), "'hidden_act'"),
    (_llama(sliding_window=64), "'sliding_window' is 64"),
    (_llama(quantization_config={"bits": 4}), "'quantization_config'"),
    (_llama(auto_map={"AutoModel": "code.Model"}), "'auto_map'"),
    (_llama(is_encoder_decoder=True), "'is_encoder_decoder'"),
    (_llama(pruned_heads={"0": [1]}), "'pruned_heads'"),
    (_llama(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
    (_llama(num_atention_heads=4), "'num_atention_heads'"),
    (_llama(logit_scale=2.0), "'logit_scale'"),
    (_llama(partial_rotary_factor=0.5), "'partial_rotary_factor' is 0.5"),
    (_llama(rope_theta="big"), "'rope_theta'"),
    (_llama(rope_scaling=[1]), "'rope_scaling'"),
    (_llama(rope_theta=10.0, rope_parameters={"rope_theta": 20.0}), "'rope_parameters.rope_theta': 20.0"),
    (_llama(rope_scaling={"rope_type": "linear"}, rope_parameters={"rope_type": "default"}), "contradict"),
    (_llama(rope_parameters={"full_attention": {}}), "'rope_parameters.full_attention'"),
    (_scaled(type="dynamic", factor=2.0), "'rope_scaling.rope_type' is 'dynamic'"),
    (_scaled(rope_type="longrope", factor=2.0), "'longrope'"),
    (_scaled(rope_type="linear"), "'rope_scaling.factor' is missing"),
    (_scaled(rope_type="linear", factor="2"), "'rope_scaling.factor' is '2'"),
    (_scaled(rope_type="linear", type="yarn", factor=2.0), "'rope_scaling.type'"),
    (_scaled(rope_type="linear", factor=2.0, short_factor=[1]), "'rope_scaling.short_factor'"),
    (_scaled(rope_type="llama3", factor=8.0, high_freq_factor=4.0), "'rope_scaling.low_freq_factor' is missing"),
    (_scaled(rope_type="yarn", factor=8.0, truncate=False), "'rope_scaling.truncate'"),
    (_gpt(n_ctx=512), "'n_ctx': 512 and 'n_positions': None contradict"),
    (_gpt(n_ctx=512, n_positions=256), "'n_ctx': 512 and 'n_positions': 256 contradict"),
    (_gpt(scale_attn_weights=False), "'scale_attn_weights'"),
    (_gpt(scale_attn_by_inverse_layer_idx=True), "'scale_attn_by_inverse_layer_idx'"),
    (_gpt(add_cross_attention=True), "'add_cross_attention'"),
    (_gpt(n_head=5), "5 heads"),
]


def _of(kind: str, **changes: Any) -> dict[str, Any]:
    return {
        key: value
        for key, value in (_llama(model_type=kind, architectures="gone") | changes).items()
        if value != "gone"
    }


def _mamba(kind: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": kind, "vocab_size": 41, "hidden_size": 24, "num_hidden_layers": 2} | changes


NEAR, FAR = "sliding_attention", "full_attention"
WRONG += [
    (_of("mistral", attention_bias=True), "'attention_bias' is True"),
    (_of("mistral", layer_types=[FAR, FAR]), "'layer_types'"),
    (_of("mistral", num_key_value_heads=2, sliding_window=0), "sliding_window"),
    (_of("mistral", sliding_window=True), "'sliding_window' is True"),
    (_of("qwen2", layer_types=[FAR]), "'layer_types' lists 1 blocks, but 'num_hidden_layers' is 2"),
    (_of("qwen2", layer_types=[NEAR, "chunked_attention"]), "'layer_types' is"),
    (_of("qwen2", layer_types=[NEAR, FAR]), "'sliding_window' that is not in use"),
    (_of("qwen2", use_sliding_window=1), "'use_sliding_window' is 1"),
    (_of("qwen2", use_mrope=True), "'use_mrope' is True"),
    (_of("qwen3", num_key_value_heads="gone"), "kv_heads (32)"),
    (_of("olmo", clip_qkv=-1.0), "clip_qkv"),
    (_of("olmo2", sliding_window=4), "'sliding_window'"),
    (_of("gemma2", num_key_value_heads=2, sliding_window=None), "'sliding_window'"),
    (_of("gemma2", num_key_value_heads=2, hidden_act="gelu"), "'hidden_act': 'gelu' and 'hidden_activation': None"),
    (_of("gemma2", num_key_value_heads=2, use_bidirectional_attention=True), "'use_bidirectional_attention' is True"),
    (_of("gemma2", num_key_value_heads=2, query_pre_attn_scalar=0), "'query_pre_attn_scalar'"),
    (_of("gemma3_text", rope_parameters={"rope_theta": 1e4}), "'rope_parameters.rope_theta'"),
    (_of("gemma3_text", attn_logit_softcapping=50.0), "'attn_logit_softcapping' is 50.0"),
    (_of("gemma3_text", sliding_window_pattern=0, _sliding_window_pattern=3), "contradict"),
    (_of("phi3", rope_scaling={"type": "longrope", "short_factor": [1.0]}), "length of each input"),
    (_of("phi3", rope_scaling={"type": "su", "short_factor": [1.0]}), "length of each input"),
    (_of("phi3", rope_scaling={"type": "yarn", "factor": 2.0}), "'rope_scaling.rope_type' is 'yarn'"),
    (_of("phi3", auto_map={"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"}), "'auto_map'"),
    (_of("gpt_neox", rotary_pct=0.0), "rotary_pct"),
    (_of("gpt_neox", rotary_pct=0.5, rope_parameters={"partial_rotary_factor": 0.25}), "contradict"),
    (_of("gpt_neox", rope_theta=1e4), "'rope_theta'"),
    (_of("bloom", intermediate_size="gone", n_embed=48, hidden_act="gone"), "'hidden_size': 24 and 'n_embed': 48"),
    (_of("mixtral", num_key_value_heads=2, num_experts_per_tok=9), "num_experts_per_tok"),
    (_of("mixtral", num_key_value_heads=2, num_local_experts=10**6), "'num_local_experts' is 1000000"),
    (_of("mixtral", num_local_experts=4, num_experts=5), "contradict"),
    (_of("qwen2_moe", num_key_value_heads=2, norm_topk_prob="no"), "'norm_topk_prob' is 'no'"),
    (_of("qwen2_moe", num_key_value_heads=2, mlp_only_layers=[2]), "'mlp_only_layers' names block 2"),
    (_of("qwen2_moe", num_key_value_heads=2, mlp_only_layers="none"), "'mlp_only_layers' is 'none'"),
    (_of("qwen2_moe", num_key_value_heads=2, decoder_sparse_step=0), "'decoder_sparse_step' is 0"),
    (_of("qwen2_moe", num_key_value_heads=2, use_sliding_window=True), "no 'layer_types' says in which blocks"),
    (_of("qwen2_moe", num_key_value_heads=2, n_group=2), "'n_group'"),
    (
        _of("qwen3_moe", num_key_value_heads=2, use_sliding_window=True, max_window_layers=1),
        "'max_window_layers' is 1 beside a window",
    ),
    (_of("qwen3_moe", num_key_value_heads=2, shared_expert_intermediate_size=8), "'shared_expert_intermediate_size'"),
    (_of("qwen3_moe", num_key_value_heads=2, num_experts_per_tok=200), "num_experts_per_tok"),
    (_of("bamba", num_key_value_heads=2, mamba_n_heads=6, attn_rotary_emb=2), "'attn_rotary_emb' is 2"),
    (_of("bamba", num_key_value_heads=2, mamba_n_heads=6, partial_rotary_factor=1.0), "'partial_rotary_factor' is 1.0"),
    (_of("bamba", num_key_value_heads=2, mamba_n_heads=6, mamba_proj_bias=True), "'mamba_proj_bias' is True"),
    (_of("bamba", num_key_value_heads=2, mamba_n_heads=5), "'mamba_n_heads': 5"),
    (
        _of("bamba", num_key_value_heads=2, mamba_n_heads=6, mamba_d_head=4),
        "'mamba_n_heads': 6 times 'mamba_d_head': 4",
    ),
    (_of("bamba", num_key_value_heads=2, mamba_n_heads=6, attn_layer_indices=[True]), "'attn_layer_indices'"),
    (_of("bamba", num_key_value_heads=2, mamba_n_heads=6, hidden_act="gelu"), "'hidden_act' is 'gelu'"),
    (_mamba("mamba", intermediate_size=40), "'intermediate_size': 40 and 'expand': 2 times 'hidden_size': 24"),
    (_mamba("mamba", d_model=25), "'d_model': 25"),
    (_mamba("mamba", ssm_cfg={"layer": "Mamba2"}), "'ssm_cfg'"),
    (_mamba("mamba", rms_norm=False), "'rms_norm' is False"),
    (_mamba("mamba", time_step_rank="most"), "'time_step_rank' is 'most'"),
    (_mamba("mamba", hidden_act="gelu"), "'hidden_act' is 'gelu'"),
    (_mamba("mamba2", num_heads=6, head_dim=8, n_groups=4), "6 heads do not divide into 4"),
    (_mamba("mamba2", num_heads=6, head_dim=8, n_groups=2, time_step_limit=[0.1]), "'time_step_limit' is [0.1]"),
    (_mamba("mamba2", num_heads=6, head_dim=8, n_groups=2, time_step_limit=[0.2, 0.1]), "time_step_limit"),
    (_mamba("mamba2", num_heads=6, head_dim=8, n_groups=2, use_conv_bias=False), "'use_conv_bias' is False"),
    (_mamba("mamba2", num_heads=6, head_dim=8, n_groups=2, d_ssm=24), "'d_ssm'"),
    (_of("bloom", intermediate_size="gone", apply_residual_connection_post_layernorm=True), "apply_residual"),
]


@pytest.mark.parametrize("config, named", WRONG, ids=[case[1] for case in WRONG])
def test_a_wrong_key_is_named(config: dict[str, Any], named: str) -> None:
    family = families.get(config["model_type"])()
    with pytest.raises((CheckpointError, UnsupportedError)) as caught:
        build(family.settings(config, "here/config.json"), device="meta")
    assert named in str(caught.value)


def test_null_and_absence_differ_where_the_family_says_so() -> None:
    """Mistral's and Gemma 2's readers take a missing key for a number and null for none."""
    read = families.get("mistral")().settings
    for changes, window in (({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 9}, 9)):
        assert facts(read(_of("mistral", num_key_value_heads=2, **changes), "")).get("blocks.1.mixer.window") == window
    read = families.get("gemma2")().settings
    for changes, cap in (({}, 50.0), ({"attn_logit_softcapping": None}, None), ({"attn_logit_softcapping": 9.0}, 9.0)):
        assert facts(read(_of("gemma2", num_key_value_heads=2, **changes), ""))["blocks.0.mixer.softcap"] == cap


@pytest.mark.parametrize(
    "config, far",
    [
        (_of("gemma2", num_hidden_layers=5, num_key_value_heads=2), [1, 3]),
        (_of("gemma3_text", num_hidden_layers=13), [5, 11]),
        (_of("gemma3_text", num_hidden_layers=5, sliding_window_pattern=2), [1, 3]),
        (_of("gemma3_text", num_hidden_layers=3, layer_types=[FAR, NEAR, FAR]), [0, 2]),
        (_of("qwen2", num_key_value_heads=2, num_hidden_layers=4, max_window_layers=1), [0, 1, 2, 3]),
        (
            _of("qwen2", num_key_value_heads=2, num_hidden_layers=4, max_window_layers=1, use_sliding_window=True),
            [0],
        ),
    ],
)
def test_which_blocks_look_at_everything(config: dict[str, Any], far: list[int]) -> None:
    """By the rules of the families' readers; a rule that repeats is a pattern."""
    settings = families.get(config["model_type"])().settings(config, "")
    known = facts(settings)
    blocks = range(settings.depth)
    assert [index for index in blocks if known[f"blocks.{index}.mixer.kind"] == "attention"] == far
    bases = {known[f"blocks.{index}.mixer.position.base"] for index in blocks}
    assert bases == ({1e4, 1e6} if config["model_type"] == "gemma3_text" else {1e4})


def test_blocks_are_permuted_each_as_it_is_paired() -> None:
    """One block with interleaved pairs among others with half ones: only its rows move."""
    other = _with(LLAMA["block"], "mixer.position.pairing", "interleaved")
    network = build(_settings(LLAMA | {"overrides": {1: other}}), seed=1)
    bound = {one.theirs[0]: one for one in Llama().bind(network.settings, network.state_dict())}
    moved = []
    for index in range(2):
        one = bound[f"model.layers.{index}.self_attn.q_proj.weight"]
        (stored,) = one.exported(network.state_dict()).values()
        moved.append(not torch.equal(stored.read(), network.state_dict()[one.ours[0]]))
    assert moved == [False, True]


def test_bookkeeping_keys_are_left_alone() -> None:
    extra = {"_name_or_path": "x", "torch_dtype": "bfloat16", "pretraining_tp": 1, "attention_dropout": 0.1}
    extra |= {"bos_token_id": 1, "eos_token_id": [2, 3], "do_sample": True, "use_cache": False, "unknown": None}
    assert Llama().settings(_llama(**extra), "") == Llama().settings(_llama(), "")


def test_older_and_newer_rope_keys_mean_the_same() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 32}
    older = Llama().settings(_llama(rope_theta=5e5, rope_scaling=scaling), "")
    newer = Llama().settings(_llama(rope_parameters={"rope_theta": 5e5, **scaling}), "")
    assert older == newer


def test_yarn_without_a_factor_stretches_to_the_whole_length() -> None:
    """By the definition that published folders rely on: the new length over the old."""
    scaling = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32}
    found = facts(Llama().settings(_llama(max_position_embeddings=96, rope_scaling=scaling), ""))
    assert found["blocks.0.mixer.position.scaling.factor"] == 3.0
