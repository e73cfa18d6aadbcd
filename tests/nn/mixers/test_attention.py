"""Attention against the layers of other libraries, from the same weights: outputs and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armillary.base.errors import SettingsError, UnsupportedError
from armillary.nn.context import Context, Memory
from armillary.nn.mask import Mask
from armillary.nn.mechanism import Place
from armillary.nn.mixers.attention import Attention, AttentionSettings
from armillary.nn.norms.rmsnorm import RMSNormSettings
from armillary.nn.positions.rope import RopeSettings
from armillary.nn.positions.t5 import T5PositionSettings
from armillary.nn.taps import Taps

T = 21
PRODUCTS = {"q.weight": "q_proj", "k.weight": "k_proj", "v.weight": "v_proj", "o.weight": "o_proj"}


def causal(length: int = T) -> Tensor:
    """The additive mask that eager layers take, [1, 1, T, T]."""
    return torch.full((length, length), -torch.inf).triu(1)[None, None]


def inputs(width: int, batch: int = 2, length: int = T) -> Tensor:
    return torch.randn(batch, length, width, requires_grad=True)


def compare(ours: Tensor, theirs: Tensor, x: Tensor, pairs: list[tuple[Any, Any]], agree: Any) -> None:
    """Outputs, the gradient of x and of every pair of parameters."""
    weights = torch.randn_like(theirs)
    found = torch.autograd.grad((ours * weights).sum(), [x, *(a for a, _ in pairs)])
    expected = torch.autograd.grad((theirs * weights).sum(), [x, *(b for _, b in pairs)])
    agree(ours, theirs)
    for a, b in zip(found, expected, strict=True):
        agree(a, b.reshape(a.shape) if a.shape != b.shape else b)


def rotary(module: Any, config: Any, length: int = T) -> Any:
    return module(config)(torch.zeros(1, length, config.hidden_size), torch.arange(length)[None])


def test_grouped_attention_is_llamas(agree: Any, load: Any, shake: Any) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama as llama

    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=6, attn_implementation="eager"
    )
    theirs = llama.LlamaAttention(config, 0)
    shake(theirs)
    ours = AttentionSettings(heads=4, kv_heads=2, head_width=6, position=RopeSettings()).build(Place(32))
    load(ours, {name: theirs.get_submodule(other).weight for name, other in PRODUCTS.items()})
    x = inputs(32)
    expected = theirs(x, rotary(llama.LlamaRotaryEmbedding, config), causal())[0]
    pairs = [(ours.get_parameter(n), theirs.get_submodule(o).weight) for n, o in PRODUCTS.items()]
    compare(ours(x, Context()), expected, x, pairs, agree)


def test_query_and_key_norms_are_qwen3s(agree: Any, load: Any, shake: Any) -> None:
    from transformers import Qwen3Config
    from transformers.models.qwen3 import modeling_qwen3 as qwen

    config = Qwen3Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
    )
    theirs = qwen.Qwen3Attention(config, 0)
    shake(theirs)
    ours = AttentionSettings(heads=4, kv_heads=2, position=RopeSettings(), norm=RMSNormSettings()).build(Place(32))
    table = {**PRODUCTS, "q_norm.weight": "q_norm", "k_norm.weight": "k_norm"}
    load(ours, {name: theirs.get_submodule(other).weight for name, other in table.items()})
    x = inputs(32)
    expected = theirs(x, rotary(qwen.Qwen3RotaryEmbedding, config), causal())[0]
    pairs = [(ours.get_parameter(n), theirs.get_submodule(o).weight) for n, o in table.items()]
    compare(ours(x, Context()), expected, x, pairs, agree)


def test_cut_products_are_olmos(agree: Any, load: Any, shake: Any) -> None:
    from transformers import OlmoConfig
    from transformers.models.olmo import modeling_olmo as olmo

    config = OlmoConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, clip_qkv=0.4, attn_implementation="eager"
    )
    theirs = olmo.OlmoAttention(config, 0)
    shake(theirs)
    ours = AttentionSettings(heads=4, kv_heads=2, position=RopeSettings(), clip=0.4).build(Place(32))
    load(ours, {name: theirs.get_submodule(other).weight for name, other in PRODUCTS.items()})
    x = inputs(32)
    expected = theirs(x, rotary(olmo.OlmoRotaryEmbedding, config), causal())[0]
    pairs = [(ours.get_parameter(n), theirs.get_submodule(o).weight) for n, o in PRODUCTS.items()]
    compare(ours(x, Context()), expected, x, pairs, agree)


def test_norms_over_all_heads_are_olmo2s(agree: Any, load: Any, shake: Any) -> None:
    from transformers import Olmo2Config
    from transformers.models.olmo2 import modeling_olmo2 as olmo

    config = Olmo2Config(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager")
    theirs = olmo.Olmo2Attention(config, 0)
    shake(theirs)
    rms = RMSNormSettings()
    ours = AttentionSettings(heads=4, kv_heads=2, position=RopeSettings(), norm=rms, norm_over="all").build(Place(32))
    table = {**PRODUCTS, "q_norm.weight": "q_norm", "k_norm.weight": "k_norm"}
    load(ours, {name: theirs.get_submodule(other).weight for name, other in table.items()})
    x = inputs(32)
    expected = theirs(x, rotary(olmo.Olmo2RotaryEmbedding, config), causal())[0]
    pairs = [(ours.get_parameter(n), theirs.get_submodule(o).weight) for n, o in table.items()]
    compare(ours(x, Context()), expected, x, pairs, agree)


def test_capped_scores_are_gemma2s(agree: Any, load: Any, shake: Any) -> None:
    from transformers import Gemma2Config
    from transformers.models.gemma2 import modeling_gemma2 as gemma

    config = Gemma2Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attn_logit_softcapping=1.5,
        query_pre_attn_scalar=5,
        attn_implementation="eager",
    )
    theirs = gemma.Gemma2Attention(config, 1)  # layer 1 sees everything, layer 0 a window
    shake(theirs)
    settings = AttentionSettings(heads=4, kv_heads=2, position=RopeSettings(), softcap=1.5, scale=5**-0.5)
    ours = settings.build(Place(32))
    load(ours, {name: theirs.get_submodule(other).weight for name, other in PRODUCTS.items()})
    x = inputs(32)
    cos, sin = rotary(gemma.Gemma2RotaryEmbedding, config)
    expected = theirs(x, (cos, sin), causal())[0]
    pairs = [(ours.get_parameter(n), theirs.get_submodule(o).weight) for n, o in PRODUCTS.items()]
    compare(ours(x, Context()), expected, x, pairs, agree)


def test_sinks_are_those_of_gpt_oss(agree: Any) -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    class Layer(nn.Module):
        num_key_value_groups = 2
        sinks = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.1]))

    layer = Layer().train(False)
    ours = AttentionSettings(heads=4, kv_heads=2, sinks=True).build(Place(32))
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        ours.sinks.copy_(layer.sinks)
    x = inputs(32)
    q, k, v = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (ours.q, ours.k, ours.v))
    expected, _ = eager_attention_forward(layer, q, k, v, causal(), ours.scale)
    compare(ours(x, Context()), ours.o(expected.flatten(2)), x, [(ours.sinks, layer.sinks)], agree)


def test_multi_head_attention_is_gpt2s(agree: Any, load: Any, shake: Any) -> None:
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    config = GPT2Config(n_embd=24, n_head=3, attn_pdrop=0.0, resid_pdrop=0.0, attn_implementation="eager")
    theirs = GPT2Attention(config, layer_idx=0)
    shake(theirs)
    ours = AttentionSettings(heads=3, bias=True).build(Place(24))
    q, k, v = theirs.c_attn.weight.split(24, 1)
    biases = dict(zip(["q.bias", "k.bias", "v.bias"], theirs.c_attn.bias.split(24), strict=True))
    table = {"q.weight": q.t(), "k.weight": k.t(), "v.weight": v.t(), "o.weight": theirs.c_proj.weight.t()}
    load(ours, {**table, **biases, "o.bias": theirs.c_proj.bias})
    x = inputs(24)
    weights = torch.randn(2, T, 24)
    found, expected = ours(x, Context()), theirs(x, attention_mask=causal())[0]
    agree(found, expected)
    agree(*(torch.autograd.grad((y * weights).sum(), x, retain_graph=True)[0] for y in (found, expected)))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    ours_grad = torch.cat([ours.q.weight.grad, ours.k.weight.grad, ours.v.weight.grad]).t()
    agree(ours_grad, theirs.c_attn.weight.grad)
    agree(ours.o.bias.grad, theirs.c_proj.bias.grad)


@pytest.mark.parametrize("both_sides", [False, True])
def test_relative_scores_are_t5s(both_sides: bool, agree: Any, load: Any, shake: Any) -> None:
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(
        d_model=24,
        d_kv=6,
        num_heads=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        dropout_rate=0.0,
        is_decoder=not both_sides,
    )
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    shake(theirs)
    position = T5PositionSettings(buckets=8, farthest=20)
    settings = AttentionSettings(heads=3, head_width=6, position=position, scale=1.0)
    ours = settings.build(Place(24, order="bidirectional" if both_sides else "causal"))
    table = {"q.weight": theirs.q, "k.weight": theirs.k, "v.weight": theirs.v, "o.weight": theirs.o}
    table["position.table.weight"] = theirs.relative_attention_bias
    load(ours, {name: module.weight for name, module in table.items()})
    x = inputs(24, length=33)
    mask = torch.zeros(1, 1, 33, 33) if both_sides else causal(33)
    expected = theirs(x, mask=mask)[0]
    pairs = [(ours.get_parameter(name), module.weight) for name, module in table.items()]
    compare(ours(x, Context()), expected, x, pairs, agree)


def test_cross_attention_is_pytorchs(agree: Any, shake: Any) -> None:
    theirs = nn.MultiheadAttention(24, 3, bias=False, batch_first=True)
    shake(theirs)
    ours = AttentionSettings(heads=3).build(Place(24, cross=True))
    with torch.no_grad():
        for product, weight in zip((ours.q, ours.k, ours.v), theirs.in_proj_weight.split(24), strict=True):
            product.weight.copy_(weight)
        ours.o.weight.copy_(theirs.out_proj.weight)
    x, memory = inputs(24), torch.randn(2, 9, 24, requires_grad=True)
    padding = torch.arange(9) < torch.tensor([[9], [5]])
    expected, weights = theirs(x, memory, memory, key_padding_mask=~padding, average_attn_weights=False)
    ctx = Context(memory=Memory(memory, padding))
    compare(ours(x, ctx), expected, x, [(memory, memory)], agree)
    agree(ours.sight(x, ctx), weights)


def test_a_prefix_sees_itself_and_the_rest_sees_back(agree: Any) -> None:
    """Against softmax over the union of the causal triangle and the prefix's columns."""
    ours = AttentionSettings(heads=2).build(Place(8, order="prefix"))
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.5)
    x, prefix = inputs(8, length=6), torch.tensor([4, 0])
    allowed = torch.ones(6, 6).tril().bool() | (torch.arange(6) < prefix[:, None, None])
    q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (ours.q, ours.k, ours.v))
    scores = (q @ k.transpose(2, 3) / math.sqrt(4)).masked_fill(~allowed[:, None], -torch.inf)
    expected = ours.o((torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2))
    agree(ours(x, Context(side={"prefix": prefix})), expected)


def test_weights_can_be_edited_one_step_at_a_time(agree: Any) -> None:
    """Moving all attention to the first token gives that token's value, whatever was asked."""
    ours = AttentionSettings(heads=2).build(Place(8))
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, 5, 8)

    def first(weights: Tensor) -> Tensor:
        moved = torch.zeros_like(weights)
        moved[..., 0] = 1
        return moved

    expected = ours.o(ours.v(x[:, :1]))
    with torch.no_grad():
        state = ours.init_state(1, 5, torch.float32, "cpu")
        for t in range(5):
            taps = Taps(edits=[("*.weights", first)])
            y = ours.extend(x[:, t : t + 1], state, Context(positions=torch.tensor([[t]]), taps=taps))
            agree(y, expected)


def test_an_edit_of_another_shape_is_refused() -> None:
    ours = AttentionSettings(heads=2).build(Place(8))
    taps = Taps(edits=[("*.mixed", lambda value: value[:, 1:])])
    with pytest.raises(Exception, match=r"the edit at '.mixed' returned .*\n.*\(1, 3, 2, 4\)"):
        ours(torch.zeros(1, 3, 8), Context(taps=taps))


class _Even(Mask):
    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        return (k[None] % 2 == 0)[None, None].expand(1, 1, len(q), -1)


def test_the_objectives_mask_is_joined_with_the_mixers_own(agree: Any) -> None:
    ours = AttentionSettings(heads=2).build(Place(8))
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 6, 8)
    weights = ours.sight(x, Context(mask=_Even()))
    allowed = torch.ones(6, 6).tril() * torch.tensor([1.0, 0, 1, 0, 1, 0])
    assert bool(((weights > 0) == (allowed > 0)).all())
    agree(weights.sum(-1), torch.ones(2, 2, 6))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"heads": 4, "kv_heads": 3}, "kv_heads (3) must divide heads (4)"),
        ({"heads": 0}, "greater than 0"),
        ({"position": {"kind": "learned"}}, "put it under model.position"),
    ],
)
def test_contradictions_are_settings_errors(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as error:
        AttentionSettings(**given)
    assert message in str(error.value)


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(UnsupportedError, match="10 does not divide into 4 heads"):
        AttentionSettings().build(Place(10))
    with pytest.raises(UnsupportedError, match="cross attention takes no positions"):
        AttentionSettings(position=RopeSettings()).build(Place(16, cross=True))
    mixer = AttentionSettings().build(Place(16, order="bidirectional"))
    assert isinstance(mixer, Attention)
    with pytest.raises(UnsupportedError, match="cannot be extended"):
        mixer.init_state(1, 4, torch.float32, "cpu")
