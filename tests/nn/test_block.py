"""Blocks against whole layers of other libraries, from the same weights: outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary.base.errors import SettingsError
from armillary.base.settings import parse
from armillary.nn.block import Block, BlockSettings
from armillary.nn.context import Context, Memory
from armillary.nn.mechanism import Place

T = 18


def build(data: dict[str, Any], width: int, **place: Any) -> Block:
    return parse(BlockSettings, data).build(Place(width, path="blocks.0", **place))


def compare(
    ours: Block, theirs: nn.Module, expected: Tensor, x: Tensor, pairs: dict[str, Tensor], agree: Any, ctx: Any = None
) -> None:
    found = ours(x, ctx or Context())
    agree(found, expected)
    weights = torch.randn_like(expected)
    a = torch.autograd.grad((found * weights).sum(), [x, *(ours.get_parameter(name) for name in pairs)])
    b = torch.autograd.grad((expected * weights).sum(), [x, *pairs.values()])
    for one, two in zip(a, b, strict=True):
        agree(one, two)


def test_pre_norm_block_is_llamas(agree: Any, load: Any, shake: Any) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama as llama

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
    )
    theirs = llama.LlamaDecoderLayer(config, 0)
    shake(theirs)
    mixer = {"kind": "attention", "heads": 4, "kv_heads": 2, "position": "rope"}
    ours = build({"mixer": mixer, "channel": {"kind": "gated", "hidden": 40}}, 32)
    table = {f"mixer.inner.{n}.weight": theirs.self_attn.get_submodule(f"{n}_proj").weight for n in "qkvo"}
    table |= {f"channel.inner.{n}.weight": theirs.mlp.get_submodule(f"{n}_proj").weight for n in ("gate", "up", "down")}
    table["mixer.norm.weight"] = theirs.input_layernorm.weight
    table["channel.norm.weight"] = theirs.post_attention_layernorm.weight
    load(ours, table)
    x = torch.randn(2, T, 32, requires_grad=True)
    where = llama.LlamaRotaryEmbedding(config)(x, torch.arange(T)[None])
    mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
    expected = theirs(x, attention_mask=mask, position_embeddings=where)
    expected = expected[0] if isinstance(expected, tuple) else expected
    compare(ours, theirs, expected, x, table, agree)


def test_sandwich_norm_is_gemma2s(agree: Any, load: Any, shake: Any) -> None:
    """Gemma's gains are stored as an offset from 1."""
    from transformers import Gemma2Config
    from transformers.models.gemma2 import modeling_gemma2 as gemma

    config = Gemma2Config(
        hidden_size=32,
        intermediate_size=40,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=20.0,
        rms_norm_eps=1e-5,
        layer_types=["full_attention"],
        num_hidden_layers=1,
        attn_implementation="eager",
    )
    theirs = gemma.Gemma2DecoderLayer(config, 0)
    shake(theirs)
    mixer = {"kind": "attention", "heads": 4, "kv_heads": 2, "position": "rope", "softcap": 20.0}
    channel = {"kind": "gated", "hidden": 40, "activation": "gelu_tanh"}
    ours = build({"mixer": mixer, "channel": channel, "norm_at": "sandwich"}, 32)
    table = {f"mixer.inner.{n}.weight": theirs.self_attn.get_submodule(f"{n}_proj").weight for n in "qkvo"}
    table |= {f"channel.inner.{n}.weight": theirs.mlp.get_submodule(f"{n}_proj").weight for n in ("gate", "up", "down")}
    norms = {
        "mixer.norm.weight": theirs.input_layernorm.weight,
        "mixer.norm_after.weight": theirs.post_attention_layernorm.weight,
        "channel.norm.weight": theirs.pre_feedforward_layernorm.weight,
        "channel.norm_after.weight": theirs.post_feedforward_layernorm.weight,
    }
    load(ours, table | {name: weight + 1 for name, weight in norms.items()})
    x = torch.randn(2, T, 32, requires_grad=True)
    where = gemma.Gemma2RotaryEmbedding(config)(x, torch.arange(T)[None])
    mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
    expected = theirs(x, attention_mask=mask, position_embeddings=where)
    expected = expected[0] if isinstance(expected, tuple) else expected
    compare(ours, theirs, expected, x, table | norms, agree)


def test_norm_after_is_olmo2s(agree: Any, load: Any, shake: Any) -> None:
    from transformers import Olmo2Config
    from transformers.models.olmo2 import modeling_olmo2 as olmo

    config = Olmo2Config(
        hidden_size=32, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager"
    )
    theirs = olmo.Olmo2DecoderLayer(config, 0)
    shake(theirs)
    mixer = {"kind": "attention", "heads": 4, "kv_heads": 2, "position": "rope", "norm": "rmsnorm", "norm_over": "all"}
    ours = build({"mixer": mixer, "channel": {"kind": "gated", "hidden": 40}, "norm_at": "after"}, 32)
    table = {f"mixer.inner.{n}.weight": theirs.self_attn.get_submodule(f"{n}_proj").weight for n in "qkvo"}
    table |= {f"mixer.inner.{n}_norm.weight": theirs.self_attn.get_submodule(f"{n}_norm").weight for n in "qk"}
    table |= {f"channel.inner.{n}.weight": theirs.mlp.get_submodule(f"{n}_proj").weight for n in ("gate", "up", "down")}
    table["mixer.norm.weight"] = theirs.post_attention_layernorm.weight
    table["channel.norm.weight"] = theirs.post_feedforward_layernorm.weight
    load(ours, table)
    x = torch.randn(2, T, 32, requires_grad=True)
    where = olmo.Olmo2RotaryEmbedding(config)(x, torch.arange(T)[None])
    mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
    expected = theirs(x, attention_mask=mask, position_embeddings=where)
    expected = expected[0] if isinstance(expected, tuple) else expected
    compare(ours, theirs, expected, x, table, agree)


@pytest.mark.parametrize("parallel", [True, False])
def test_parallel_residual_is_gpt_neoxs(parallel: bool, agree: Any, load: Any, shake: Any) -> None:
    from transformers import GPTNeoXConfig
    from transformers.models.gpt_neox import modeling_gpt_neox as neox

    config = GPTNeoXConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        use_parallel_residual=parallel,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attn_implementation="eager",
    )
    theirs = neox.GPTNeoXLayer(config, 0)
    shake(theirs)
    mixer = {"kind": "attention", "heads": 4, "bias": True, "position": {"kind": "rope", "fraction": 0.25}}
    channel = {"kind": "ffn", "hidden": 48, "bias": True}
    ours = build({"mixer": mixer, "channel": channel, "norm": "layernorm", "parallel": parallel}, 32)
    joined = theirs.attention.query_key_value
    parts = zip(joined.weight.view(4, 3, 8, 32).unbind(1), joined.bias.view(4, 3, 8).unbind(1), strict=True)
    table: dict[str, Tensor] = {}
    for name, (weight, bias) in zip("qkv", parts, strict=True):
        table |= {f"mixer.inner.{name}.weight": weight.reshape(32, 32), f"mixer.inner.{name}.bias": bias.reshape(32)}
    shared: dict[str, Tensor] = {}
    for name, module in {
        "mixer.inner.o": theirs.attention.dense,
        "channel.inner.up": theirs.mlp.dense_h_to_4h,
        "channel.inner.down": theirs.mlp.dense_4h_to_h,
        "mixer.norm": theirs.input_layernorm,
        "channel.norm": theirs.post_attention_layernorm,
    }.items():
        shared |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    load(ours, table | shared)
    x = torch.randn(2, T, 32, requires_grad=True)
    where = neox.GPTNeoXRotaryEmbedding(config)(x, torch.arange(T)[None])
    mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
    expected = theirs(x, attention_mask=mask, position_embeddings=where)
    expected = expected[0] if isinstance(expected, tuple) else expected
    compare(ours, theirs, expected, x, shared, agree)


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_block_is_pytorchs(norm_first: bool, agree: Any, load: Any, shake: Any) -> None:
    """Post-norm as published in 2017, and pre-norm, with padding."""
    theirs = nn.TransformerEncoderLayer(24, 3, 40, dropout=0.0, batch_first=True, norm_first=norm_first).train()
    shake(theirs)
    mixer = {"kind": "attention", "heads": 3, "bias": True}
    channel = {"kind": "ffn", "hidden": 40, "activation": "relu", "bias": True}
    block = {"mixer": mixer, "channel": channel, "norm": "layernorm", "norm_at": "pre" if norm_first else "post"}
    ours = build(block, 24, order="bidirectional")
    table: dict[str, Tensor] = {}
    parts = zip(theirs.self_attn.in_proj_weight.split(24), theirs.self_attn.in_proj_bias.split(24), strict=True)
    for name, (weight, bias) in zip("qkv", parts, strict=True):
        table |= {f"mixer.inner.{name}.weight": weight, f"mixer.inner.{name}.bias": bias}
    shared: dict[str, Tensor] = {}
    for name, module in {
        "mixer.inner.o": theirs.self_attn.out_proj,
        "channel.inner.up": theirs.linear1,
        "channel.inner.down": theirs.linear2,
        "mixer.norm": theirs.norm1,
        "channel.norm": theirs.norm2,
    }.items():
        shared |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    load(ours, table | shared)
    x = torch.randn(2, T, 24, requires_grad=True)
    padding = torch.arange(T) < torch.tensor([[T], [11]])
    keep = padding[..., None].float()  # what a padded token's own output is does not matter
    expected = theirs(x, src_key_padding_mask=~padding) * keep
    found = ours(x, Context(padding=padding)) * keep
    agree(found, expected)
    weights = torch.randn_like(expected)
    a = torch.autograd.grad((found * weights).sum(), [x, *(ours.get_parameter(name) for name in shared)])
    b = torch.autograd.grad((expected * weights).sum(), [x, *shared.values()])
    for one, two in zip(a, b, strict=True):
        agree(one, two)


def test_decoder_block_with_cross_attention_is_pytorchs(agree: Any, load: Any, shake: Any) -> None:
    theirs = nn.TransformerDecoderLayer(24, 3, 40, dropout=0.0, batch_first=True, norm_first=True).train()
    shake(theirs)
    attention = {"kind": "attention", "heads": 3, "bias": True}
    channel = {"kind": "ffn", "hidden": 40, "activation": "relu", "bias": True}
    ours = build({"mixer": attention, "cross": attention, "channel": channel, "norm": "layernorm"}, 24)
    table: dict[str, Tensor] = {}
    for branch, attn in (("mixer", theirs.self_attn), ("cross", theirs.multihead_attn)):
        parts = zip(attn.in_proj_weight.split(24), attn.in_proj_bias.split(24), strict=True)
        for name, (weight, bias) in zip("qkv", parts, strict=True):
            table |= {f"{branch}.inner.{name}.weight": weight, f"{branch}.inner.{name}.bias": bias}
    shared: dict[str, Tensor] = {}
    for name, module in {
        "mixer.inner.o": theirs.self_attn.out_proj,
        "cross.inner.o": theirs.multihead_attn.out_proj,
        "channel.inner.up": theirs.linear1,
        "channel.inner.down": theirs.linear2,
        "mixer.norm": theirs.norm1,
        "cross.norm": theirs.norm2,
        "channel.norm": theirs.norm3,
    }.items():
        shared |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    load(ours, table | shared)
    x, memory = torch.randn(2, T, 24, requires_grad=True), torch.randn(2, 7, 24)
    expected = theirs(x, memory, tgt_mask=torch.full((T, T), -torch.inf).triu(1), tgt_is_causal=True)
    compare(ours, theirs, expected, x, shared, agree, Context(memory=Memory(memory)))


def test_scale_and_dropout_act_on_the_branch_alone(agree: Any) -> None:
    branch = {"name": "only", "channel": {"kind": "ffn", "hidden": 20}, "scale": 0.25}
    plain = build({"branches": [{**branch, "scale": 1.0}]}, 16)
    scaled, dropped = build({"branches": [branch]}, 16), build({"branches": [{**branch, "dropout": 0.5}]}, 16)
    for block in (plain, scaled, dropped):
        for parameter in block.parameters():
            nn.init.constant_(parameter, 0.1)
    x = torch.randn(2, 200, 16)
    agree(scaled(x, Context()) - x, 0.25 * (plain(x, Context()) - x))
    agree(dropped.eval()(x, Context()), scaled(x, Context()))
    rest = (dropped.train()(x, Context()) - x) / (scaled(x, Context()) - x)
    assert set(rest.round(decimals=1).abs().unique().tolist()) == {0.0, 2.0}
    assert float((rest > 1).float().mean()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    "data, message",
    [
        ({}, "needs a mixer, a channel or branches"),
        ({"mixer": "attention", "branches": []}, "not both"),
        ({"branches": [{"name": "a"}]}, "either a mixer or a channel"),
        ({"branches": [{"name": "a b", "channel": "ffn"}]}, "cannot name a branch"),
        ({"branches": [{"name": "forward", "channel": "ffn"}]}, "cannot name a branch"),
        ({"branches": [{"name": "path", "channel": "ffn"}]}, "cannot name a branch"),
        ({"branches": [{"name": "a", "channel": "ffn", "look": "memory"}]}, "only a mixer"),
        ({"branches": [{"name": "a", "channel": "ffn"}] * 2}, "branch names repeat: a, a"),
        ({"mixer": "attention", "channel": "ffn", "parallel": True, "norm_at": "post"}, "cannot have norm_at: post"),
    ],
)
def test_contradictions_are_settings_errors(data: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as error:
        parse(BlockSettings, data)
    assert message in str(error.value)


def test_a_branch_beside_reads_what_the_one_before_it_read() -> None:
    """x + a(n(x)) + b(n(x)), then the channel on the sum: heads of two mixers as if they were one's."""
    settings = parse(
        BlockSettings,
        {
            "branches": [
                {"name": "near", "mixer": {"kind": "window", "heads": 2, "window": 3}},
                {"name": "far", "mixer": {"kind": "attention", "heads": 2}, "beside": True},
                {"name": "channel", "channel": "gated"},
            ]
        },
    )
    block = settings.build(Place(16))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x = torch.randn(2, 7, 16)
    near, far, channel = block.branches()
    middle = x + near.inner(near.norm(x), Context()) + far.inner(far.norm(x), Context())
    expected = middle + channel.inner(channel.norm(middle), Context())
    torch.testing.assert_close(block(x, Context()), expected)


@pytest.mark.parametrize(
    "branches, message",
    [
        ([{"name": "a", "mixer": "attention", "beside": True}], "none before it"),
        (
            [
                {"name": "a", "mixer": "attention", "norm_at": "post"},
                {"name": "b", "mixer": "attention", "beside": True},
            ],
            "norm_at: post",
        ),
    ],
)
def test_a_branch_that_cannot_stand_beside_is_refused(branches: list[dict], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse(BlockSettings, {"branches": branches})
