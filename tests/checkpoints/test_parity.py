"""Every family of decoders against `transformers`, both ways, on tiny random models with asymmetric shapes.

Run with ARMILLARY_MEASURE=1, in one process, it writes what it measured to parity.json, from which
`python tools/models.py` makes docs/models.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import (
    CONTEXT,
    GPT2,
    SIZES,
    TOKENS,
    VOCABULARY,
    Measured,
    Seen,
    greedy,
    in_and_out,
    measuring,
    share,
    stirred,
    tokens,
    transformers,
)

from armillary.nn.network import Network

MEASURED, CLOSE = Path(__file__).with_name("parity.json"), 1e-3

NEOX = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"} | {"num_attention_heads": 3}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 40, "n_layer": 3, "n_head": 5}
GEMMA = SIZES | {"head_dim": 10, "query_pre_attn_scalar": 20, "sliding_window": 7}
MOE = SIZES | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
MAMBA: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 40, "num_hidden_layers": 3, "state_size": 6}
MAMBA2 = MAMBA | {"num_heads": 10, "head_dim": 8, "n_groups": 1, "state_size": 12, "chunk_size": 16}
BAMBA = SIZES | {"mamba_n_heads": 12, "mamba_d_state": 10, "mamba_chunk_size": 16, "attn_layer_indices": [1]}
PEERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bamba": ("BambaConfig", "BambaForCausalLM", BAMBA),
    "bloom": ("BloomConfig", "BloomForCausalLM", BLOOM),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", GEMMA),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", GEMMA | {"sliding_window_pattern": 3}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", NEOX),
    "llama": ("LlamaConfig", "LlamaForCausalLM", SIZES),
    "mamba": ("MambaConfig", "MambaForCausalLM", MAMBA),
    "mamba2": ("Mamba2Config", "Mamba2ForCausalLM", MAMBA2),
    "mistral": ("MistralConfig", "MistralForCausalLM", SIZES),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", SIZES | {"num_local_experts": 5}),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", SIZES),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", SIZES),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", SIZES),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", SIZES),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", MOE | {"shared_expert_intermediate_size": 28}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", SIZES),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", MOE | {"head_dim": 10}),
}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


def _rope(kind: str, base: float = 1e4, **rest: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": base, **rest}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 48}
YARN = {"factor": 3.0, "original_max_position_embeddings": 32}
NEAR_FAR = {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}
BOTH_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e3},
}

# By family and variant: what is different in it. A variant "… in bf16" is stored in that type.
CASES: dict[tuple[str, str], dict[str, Any]] = {
    ("bamba", "attention in one block"): {},
    ("bamba", "groups, few taps, limited steps, biases, tied, in bf16"): TIED
    | {"mamba_n_groups": 2, "mamba_d_conv": 2, "time_step_limit": [0.4, 1.5], "attn_layer_indices": [0, 2]}
    | {"attention_bias": True, "mlp_bias": True},
    ("bloom", "tied"): {},
    ("bloom", "untied in bf16"): UNTIED | {"layer_norm_epsilon": 1e-3},
    ("gemma2", "tied, soft caps, alternating windows"): {
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 6.0,
    },
    ("gemma2", "untied, no caps, other layers, in bf16"): UNTIED
    | NEAR_FAR
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
    ("gemma3_text", "tied, two rotary bases"): {},
    ("gemma3_text", "untied, scaled rotary base, in bf16"): UNTIED | NEAR_FAR | {"rope_parameters": BOTH_ROPES},
    ("gpt2", "tied"): {},
    ("gpt2", "untied in bf16"): UNTIED | {"n_inner": None, "activation_function": "relu"},
    ("gpt_neox", "parallel, a quarter of each head turned"): {},
    ("gpt_neox", "in sequence, tied, in bf16"): TIED
    | {"use_parallel_residual": False, "attention_bias": False}
    | _rope("linear", 5e3, factor=2.0, partial_rotary_factor=0.5),
    ("llama", "plain"): {},
    ("llama", "tied in bf16"): TIED,
    ("llama", "wide heads, biases, llama3"): {"head_dim": 10, "attention_bias": True, "mlp_bias": True}
    | _rope("llama3", 5e5, **LLAMA3),
    ("llama", "one key head, linear"): {
        "num_key_value_heads": 1,
        "hidden_act": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-3,
        **_rope("linear", 5e5, factor=2.5),
    },
    ("llama", "yarn"): {"head_dim": 16} | _rope("yarn", **YARN, beta_fast=8.0),
    ("llama", "yarn with mscale"): {"head_dim": 16} | _rope("yarn", **YARN, mscale=0.7, mscale_all_dim=0.3),
    ("mamba", "tied"): {},
    ("mamba", "untied, wide, biases, many ranks, few taps, in bf16"): UNTIED
    | {"expand": 3, "use_bias": True, "use_conv_bias": False, "time_step_rank": 7, "conv_kernel": 2},
    ("mamba2", "one group"): {},
    ("mamba2", "groups, few taps, limited steps, tied, in bf16"): TIED
    | {"n_groups": 5, "conv_kernel": 3, "time_step_limit": [0.4, 1.5], "layer_norm_epsilon": 1e-3},
    ("mistral", "window, wide heads"): {"sliding_window": 7, "head_dim": 10},
    ("mistral", "no window, tied, in bf16"): TIED | {"sliding_window": None},
    ("mixtral", "plain"): {},
    ("mixtral", "window, wide heads, three of the experts, tied, in bf16"): TIED
    | {"sliding_window": 7, "head_dim": 12, "num_experts_per_tok": 3},
    ("olmo", "cut queries, keys and values"): {"clip_qkv": 0.5},
    ("olmo", "tied, biases, in bf16"): TIED | {"attention_bias": True},
    ("olmo2", "plain"): {},
    ("olmo2", "tied, biases, in bf16"): TIED | {"attention_bias": True, "rms_norm_eps": 1e-3},
    ("phi3", "plain"): {},
    ("phi3", "window, half of each head turned, tied, in bf16"): TIED
    | {"sliding_window": 7}
    | _rope("default", partial_rotary_factor=0.5),
    ("qwen2", "plain"): {},
    ("qwen2", "windows in later blocks, tied, yarn, in bf16"): TIED
    | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    | _rope("yarn", **YARN),
    ("qwen2_moe", "a block without experts"): {"mlp_only_layers": [0]},
    ("qwen2_moe", "experts in one block, gates that sum to 1, a window in two, no biases, tied, in bf16"): TIED
    | {"decoder_sparse_step": 2, "norm_topk_prob": True, "qkv_bias": False}
    | {
        "use_sliding_window": True,
        "sliding_window": 7,
        "layer_types": NEAR_FAR["layer_types"][1:] + NEAR_FAR["layer_types"][1:2],
    },
    ("qwen3", "wide heads"): {"head_dim": 10},
    ("qwen3", "a window in one block, tied, biases, in bf16"): TIED
    | NEAR_FAR
    | {"head_dim": 10, "use_sliding_window": True, "sliding_window": 7, "attention_bias": True},
    ("qwen3_moe", "experts in all blocks"): {},
    ("qwen3_moe", "a block without experts, gates that sum to 1, windows, tied, biases, in bf16"): TIED
    | {"mlp_only_layers": [2], "norm_topk_prob": True, "attention_bias": True}
    | {"use_sliding_window": True, "sliding_window": 7},
}


@pytest.fixture(scope="module")
def measured() -> Iterator[Measured]:
    yield from measuring(MEASURED, CASES)


@pytest.mark.parametrize(("family", "variant"), CASES, ids=[f"{family}-{variant}" for family, variant in CASES])
def test_in_and_out_against_transformers(tmp_path: Path, family: str, variant: str, measured: Measured) -> None:
    made, read = _peer(family, CASES[family, variant]), transformers.AutoModelForCausalLM.from_pretrained
    network, peer, result = in_and_out(tmp_path, family, made, variant.endswith("in bf16"), read, _differences)
    result["greedy"], result["close"] = _greedy(network, peer)
    _chunks(network)
    measured.setdefault(family, {})[variant] = result


def test_every_decoder_was_measured() -> None:
    """parity.json is of these cases; the other families are in test_encoders.py."""
    held = json.loads(MEASURED.read_text(encoding="utf-8"))
    assert held["families"].keys() == set(PEERS)
    assert [(family, variant) for family, variants in held["families"].items() for variant in variants] == list(CASES)


def _peer(family: str, changes: dict[str, Any]) -> Any:
    config, model, base = PEERS[family]
    none = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # so that nothing stops early
    made = getattr(transformers, config)(**(base | none | changes), attn_implementation="eager")
    peer = getattr(transformers, model)(made)
    return stirred(peer, gain=0 if family.startswith("gemma") else 1)  # theirs add 1 to it


@torch.no_grad()
def _differences(network: Network, peer: Any) -> tuple[float, float]:
    """The largest of logits, and of hidden states as a share of the largest of their layer."""
    ids, seen = tokens(), Seen()
    logits, theirs = network(ids, taps=seen), peer(ids, output_hidden_states=True)
    hidden = theirs.hidden_states
    if peer.config.model_type in ("mamba", "mamba2"):  # theirs are of after every block, before the last norm too
        hidden = (peer.get_input_embeddings()(ids), *hidden[:-2], hidden[-1])
    assert len(seen.found) == len(hidden) == network.settings.depth + 1
    return float((logits - theirs.logits).abs().max()), share(zip(seen.found, hidden, strict=True))


@torch.no_grad()
def _greedy(network: Network, peer: Any) -> tuple[int, int]:
    start = tokens(1, 11)
    # limits on steps are left out where they go on from a cache, though not without one
    cached = tuple(getattr(peer.config, "time_step_limit", ())) in ((), (0.0, math.inf))
    theirs = peer.generate(start, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0, use_cache=cached)
    assert theirs.shape == (1, 11 + TOKENS)
    return greedy(network, network.init_state(1, CONTEXT), start, theirs[0, 11:].tolist(), CLOSE)


@torch.no_grad()
def _chunks(network: Network) -> None:
    """The same logits in chunks through a state as without one."""
    ids = tokens()
    state = network.init_state(len(ids), 8)
    parts = [network.extend(part, state) for part in ids.split(13, 1)]
    assert (torch.cat(parts, 1) - network(ids)).abs().max() < 1e-4
